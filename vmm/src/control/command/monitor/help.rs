//! What `help` prints: a line for each command, its first word the name, as `qmp-shell -H` wants it
//! for completion.

const COMMANDS: &[(&str, &str, &str)] = &[
    ("cont|c", "", "resume emulation"),
    (
        "gpa2hva",
        "addr",
        "print the host virtual address corresponding to a guest physical address",
    ),
    ("help|?", "[cmd]", "show the help"),
    (
        "info",
        "[subcommand]",
        "show various information about the system state",
    ),
    ("quit|q", "", "quit the emulator"),
    ("stop|s", "", "stop emulation"),
    ("system_powerdown", "", "send system power down event"),
    ("system_reset", "", "reset the system"),
    ("xp", "/fmt addr", "physical memory dump starting at 'addr'"),
];

const INFOS: &[(&str, &str, &str)] = &[
    ("cpus", "", "show infos for each CPU"),
    ("dump", "", "Display the latest dump status"),
    ("kvm", "", "show KVM information"),
    (
        "mtree",
        "-f",
        "show memory tree (-f: dump flat view for address spaces)",
    ),
    ("name", "", "show the current VM name"),
    (
        "registers",
        "[-a|vcpu]",
        "show the cpu registers (-a: show register info for all cpus)",
    ),
    ("status", "", "show the current VM status (running|paused)"),
    ("version", "", "show the version of QEMU"),
];

fn line(prefix: &str, (name, arguments, what): &(&str, &str, &str)) -> String {
    format!("{prefix}{name} {arguments} -- {what}\n")
}

pub(super) fn commands() -> String {
    COMMANDS.iter().map(|entry| line("", entry)).collect()
}

pub(super) fn infos() -> String {
    INFOS.iter().map(|entry| line("info ", entry)).collect()
}

fn find(name: &str) -> Option<&'static (&'static str, &'static str, &'static str)> {
    COMMANDS
        .iter()
        .find(|(names, ..)| names.split('|').any(|one| one == name))
}

pub(super) fn is_command(name: &str) -> bool {
    find(name).is_some()
}

pub(super) fn one(name: &str) -> String {
    find(name).map_or_else(String::new, |entry| line("", entry))
}
