//! The guest and the host add and remove callbacks of the same tracepoint, in any order.
//!
//! The guest's are those of its own tracing, the main one and instances of it. Nothing runs in the
//! guest but what is asked for, so what each callback must have seen is known to the last program.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stillpoint_tests::{Failure, Guest, Qmp, Random, TestResult, all_freed, replacement, seed};

use crate::{attach, detach, silent};

const NAME: &str = "sched_process_exec";
const TRACING: &str = "/sys/kernel/tracing";
/// What tells how many events an instance has, without starting a program.
const COUNT: &str = "/tmp/count";
/// Where the guest shows what callbacks have added up.
const SUM: &str = "/proc/sys/kernel/panic";
/// The guest's users of the tracepoint: its tracing itself, and instances.
const GUESTS: u64 = 4;
/// Callbacks of ours at a time.
const MOST: usize = 6;
/// What the guest's own have is among them.
const PRIORITIES: [i32; 8] = [-20, -1, 0, 5, 10, 10, 11, 100];

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Count,
    Add,
    Record,
}

/// One of ours.
struct Ours {
    id: u64,
    kind: Kind,
    data: u64,
    /// How many programs had been started when it came.
    since: u64,
}

struct Round<'a> {
    guest: &'a Guest,
    qmp: &'a mut Qmp,
    random: Random,
    /// How many programs were started.
    started: u64,
    ours: Vec<Ours>,
    /// How many programs had been started when each of the guest's users came.
    guests: Vec<Option<u64>>,
    /// What those of ours have added up that are gone.
    sum: u64,
    seen: u64,
    longest: Duration,
    waited: Duration,
}

fn directory(user: usize) -> String {
    match user {
        0 => TRACING.to_owned(),
        user => format!("{TRACING}/instances/user{user}"),
    }
}

impl Round<'_> {
    /// Runs a command that starts no program, between programs: so many were started before it, and
    /// so many behind it.
    fn sh(&mut self, command: &str) -> Result<(String, u64, u64), Failure> {
        let (before, behind) = (self.random.below(3), self.random.below(3));
        let programs = |n| "/bin/true; ".repeat(usize::try_from(n).unwrap_or(0));
        let command = format!("{}{command}; {}:", programs(before), programs(behind));
        let said = self.guest.sh(&command)?;
        // The shell is one.
        let earlier = self.started + 1 + before;
        self.started = earlier + behind;
        Ok((said, earlier, behind))
    }

    fn of_guest(&mut self) -> TestResult {
        let user = usize::try_from(self.random.below(GUESTS)).unwrap_or(0);
        self.change_guest(user)
    }

    fn change_guest(&mut self, user: usize) -> TestResult {
        let go = format!("cd {}", directory(user));
        let enable = format!("events/sched/{NAME}/enable");
        let since = self.guests.get(user).copied().flatten();
        let now = if let Some(since) = since {
            let (said, until, _) = self.sh(&format!("{go}; echo 0 >{enable}; . {COUNT}"))?;
            assert_eq!(said.trim(), (until - since).to_string(), "user {user}");
            self.seen += until - since;
            None
        } else {
            let (_, since, _) = self.sh(&format!("{go}; echo >trace; echo 1 >{enable}"))?;
            Some(since)
        };
        if let Some(user) = self.guests.get_mut(user) {
            *user = now;
        }
        Ok(())
    }

    fn of_host(&mut self) -> TestResult {
        let adds = match self.ours.len() {
            0 => true,
            MOST => false,
            _ => self.random.below(2) == 0,
        };
        let begun = Instant::now();
        if adds {
            self.add()?;
        } else {
            let index = self.random.below(self.ours.len() as u64);
            let ours = self.ours.remove(usize::try_from(index).unwrap_or(0));
            self.remove(&ours)?;
        }
        self.waited += begun.elapsed();
        self.longest = self.longest.max(begun.elapsed());
        Ok(())
    }

    fn add(&mut self) -> TestResult {
        let data = 1 + self.random.below(9999);
        let priority = self.random.below(PRIORITIES.len() as u64);
        let priority = PRIORITIES.get(usize::try_from(priority).unwrap_or(0));
        let mut arguments = json!({
            "name": NAME, "data": data, "priority": priority, "deadline": "30s",
        });
        let kind = match self.random.below(3) {
            0 => Kind::Count,
            1 => {
                arguments["object"] = json!(replacement("add").display().to_string());
                Kind::Add
            }
            _ => {
                arguments["callback"] = json!("record");
                arguments["registers"] = json!(["di"]);
                Kind::Record
            }
        };
        let id = attach(self.qmp, arguments)?;
        self.ours.push(Ours {
            id,
            kind,
            data,
            since: self.started,
        });
        Ok(())
    }

    /// It has seen every program, and nobody else's data.
    fn remove(&mut self, ours: &Ours) -> TestResult {
        let expected = self.started - ours.since;
        if ours.kind == Kind::Record {
            let told = self.qmp.execute("query-records", json!({"id": ours.id}))?;
            let records: Vec<_> = told["records"].as_array().into_iter().flatten().collect();
            assert_eq!(
                records.len() as u64 + told["lost"].as_u64().unwrap_or(0),
                expected,
                "{told}"
            );
            let own: Value = json!(format!("{:#x}", ours.data));
            assert!(
                records.iter().all(|record| record["values"][0] == own),
                "{own}: {told}"
            );
        }
        assert_eq!(detach(self.qmp, ours.id)?, expected, "{}", ours.id);
        self.seen += expected;
        if ours.kind == Kind::Add {
            self.sum += ours.data * expected;
        }
        Ok(())
    }

    /// What all of ours have added up is what each was given, as often as it was called.
    fn check_sum(&mut self) -> TestResult {
        // Named by its path it is a program of its own, as the shell is that runs it.
        let said = self.guest.sh(&format!("/bin/cat {SUM}"))?;
        self.started += 2;
        let until = self.started;
        let adding = self.ours.iter().filter(|ours| ours.kind == Kind::Add);
        let there: u64 = adding.map(|ours| ours.data * (until - ours.since)).sum();
        let sum: i64 = said.trim().parse()?;
        assert_eq!(sum, i64::try_from(self.sum + there)?, "each its own data");
        Ok(())
    }

    fn all(&mut self, rounds: usize) -> Result<usize, Failure> {
        let mut turns: Vec<_> = (0..rounds).map(|turn| turn % 2 == 0).collect();
        self.random.shuffle(&mut turns);
        let mut most = 0;
        for (turn, of_guest) in turns.into_iter().enumerate() {
            match of_guest {
                true => self.of_guest()?,
                false => self.of_host()?,
            }
            let guests = self.guests.iter().flatten().count();
            most = most.max(self.ours.len() + guests);
            if turn % 25 == 24 {
                self.check_sum()?;
            }
        }
        while let Some(ours) = self.ours.pop() {
            self.remove(&ours)?;
        }
        for user in 0..self.guests.len() {
            if self.guests.get(user).copied().flatten().is_some() {
                self.change_guest(user)?;
            }
        }
        self.check_sum()?;
        Ok(most)
    }
}

/// `rounds` additions and removals, half of them the guest's.
pub(crate) fn alternate(guest: &Guest, qmp: &mut Qmp, rounds: usize) -> TestResult {
    let seed = seed()?;
    let random = Random::new(seed);
    println!("alternating: seed {seed}");
    let users = 1..GUESTS;
    let instances = users.map(|user| directory(usize::try_from(user).unwrap_or(0)));
    let instances = instances.collect::<Vec<_>>().join(" ");
    guest.sh(&format!("mkdir {instances}; echo 0 >{SUM}"))?;
    guest.sh(&format!(
        "echo 'n=0; for f in per_cpu/cpu*/stats; do while read k v; do \
         [ $k = entries: ] && n=$((n+v)); done <$f; done; echo $n' >{COUNT}"
    ))?;
    let begun = Instant::now();
    let mut round = Round {
        guest,
        qmp,
        random,
        started: 0,
        ours: Vec::new(),
        guests: vec![None; usize::try_from(GUESTS)?],
        sum: 0,
        seen: 0,
        longest: Duration::ZERO,
        waited: Duration::ZERO,
    };
    let most = round.all(rounds)?;
    let Round {
        started,
        seen,
        longest,
        waited,
        ..
    } = round;
    guest.sh(&format!("rmdir {instances}; echo 0 >{SUM}"))?;
    all_freed(qmp)?;
    silent(guest)?;
    println!(
        "alternating: {rounds} additions and removals, 0 to {most} callbacks at a time, {seen} calls \
         for {started} programs, all as expected; ours took {:?} each, {longest:?} at most; {:?} in all",
        waited / u32::try_from(rounds / 2)?.max(1),
        begun.elapsed()
    );
    Ok(())
}
