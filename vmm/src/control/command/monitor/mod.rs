//! `human-monitor-command`: the few commands of QEMU's human monitor that tools send.
//!
//! What they print has QEMU's form to the letter, because tools read it (drgn reads `info mtree
//! -f`, `gpa2hva` and `xp`). As in QEMU, a mistake in the command line is text in the answer and
//! not an error, and lines end with CR LF.

mod help;
mod memory;
mod registers;

use super::{Context, Registry};
use crate::control::protocol::{QmpError, Version};
use crate::machine::RunState;

#[derive(serde::Deserialize, Debug)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Line {
    command_line: String,
    cpu_index: Option<u32>,
}

pub(super) fn register(registry: &mut Registry) {
    registry.slow("human-monitor-command", |context, line: Line| {
        let text = run(context, &line);
        Ok::<String, QmpError>(text.replace('\n', "\r\n"))
    });
}

fn run(context: &Context, line: &Line) -> String {
    let words: Vec<&str> = line.command_line.split_whitespace().collect();
    let host = context.services.host();
    let outcome = |result: Result<(), QmpError>| match result {
        Ok(()) => String::new(),
        Err(error) => format!("Error: {error}\n"),
    };
    match words.as_slice() {
        [] => String::new(),
        ["help" | "?"] => help::commands(),
        ["info"] | ["help", "info"] => help::infos(),
        ["help", name] => help::one(name),
        ["info", rest @ ..] => info(context, rest, line.cpu_index),
        ["gpa2hva", address] => memory::gpa2hva(host, address),
        ["xp", rest @ ..] => memory::xp(host, rest),
        ["stop" | "s"] => outcome(super::machine::monitor_stop(context)),
        ["cont" | "c"] => outcome(super::machine::monitor_cont(context)),
        ["system_powerdown"] => {
            host.power_button();
            String::new()
        }
        ["system_reset"] => {
            host.reset();
            String::new()
        }
        ["quit" | "q"] => {
            host.quit();
            String::new()
        }
        [name, ..] if help::is_command(name) => {
            format!("{name}: wrong arguments\nTry \"help {name}\" for more information\n")
        }
        [name, ..] => unknown(name),
    }
}

fn unknown(what: &str) -> String {
    let shown: String = what.chars().take(64).collect();
    format!("unknown command: '{shown}'\n")
}

fn info(context: &Context, words: &[&str], cpu_index: Option<u32>) -> String {
    let host = context.services.host();
    match words {
        ["status"] => match host.run_state() {
            RunState::Running => "VM status: running\n".to_owned(),
            RunState::Paused => "VM status: paused\n".to_owned(),
            other => {
                let name = serde_json::to_value(other).unwrap_or_default();
                format!(
                    "VM status: paused ({})\n",
                    name.as_str().unwrap_or_default()
                )
            }
        },
        ["version"] => {
            let version = Version.to_value();
            let number = |part: &str| version["qemu"][part].as_u64().unwrap_or(0);
            format!(
                "{}.{}.{} {}\n",
                number("major"),
                number("minor"),
                number("micro"),
                version["package"].as_str().unwrap_or_default()
            )
        }
        ["name"] => String::new(),
        ["kvm"] => "kvm support: enabled\n".to_owned(),
        ["cpus"] => host
            .cpus()
            .iter()
            .map(|cpu| {
                let current = if cpu.index == cpu_index.unwrap_or(0) {
                    '*'
                } else {
                    ' '
                };
                format!(
                    "{current} CPU #{}: thread_id={}\n",
                    cpu.index, cpu.thread_id
                )
            })
            .collect(),
        ["mtree", "-f"] => memory::flat_view(host),
        ["mtree", ..] => "only the flat view is available: info mtree -f\n".to_owned(),
        ["registers", "-a"] => registers::show(context, None),
        ["registers"] => registers::show(context, Some(cpu_index.unwrap_or(0))),
        ["registers", index] => match index.parse() {
            Ok(index) => registers::show(context, Some(index)),
            Err(_) => "CPU#: expected a number\n".to_owned(),
        },
        ["dump"] => {
            let progress = context.services.dump().progress();
            let name = serde_json::to_value(progress.status).unwrap_or_default();
            format!(
                "Status: {}\nFinished: {} of {} bytes\n",
                name.as_str().unwrap_or_default(),
                progress.completed,
                progress.total
            )
        }
        _ => unknown(&format!("info {}", words.join(" "))),
    }
}
