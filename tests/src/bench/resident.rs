//! Resident memory of a VMM, guest RAM apart.

use crate::Failure;

use super::MEMORY;

/// Resident memory in KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) struct Resident {
    /// In the mapping of guest RAM.
    pub(super) ram: u64,
    /// In all others: program, libraries, heap, stacks.
    pub(super) beside: u64,
}

/// Reads it from /proc.
pub(super) fn of(pid: u32) -> Result<Resident, Failure> {
    parse(&std::fs::read_to_string(format!("/proc/{pid}/smaps"))?)
        .ok_or_else(|| Failure::new(format!("no mapping of process {pid} looks like guest RAM")))
}

/// Guest RAM is what is at least half as large as the guest's memory: nothing else is.
fn parse(smaps: &str) -> Option<Resident> {
    let mut resident = Resident::default();
    let mut size = 0;
    let mut found = false;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (Some(name), Some(Ok(kib))) = (words.next(), words.next().map(str::parse::<u64>))
        else {
            continue;
        };
        match name {
            "Size:" => size = kib,
            "Rss:" if size >= MEMORY * 1024 / 2 && kib > 0 => {
                resident.ram += kib;
                found = true;
            }
            "Rss:" => resident.beside += kib,
            _ => {}
        }
    }
    found.then_some(resident)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_large_mapping_is_ram() {
        let smaps = "\
7f00-7f01 rw-p 00000000 00:00 0
Size:             262144 kB
Rss:               70000 kB
Pss:               70000 kB
7f02-7f03 r-xp 00000000 00:00 1 /lib/libc.so.6
Size:               1400 kB
Rss:                 900 kB
7f04-7f05 ---p 00000000 00:00 0
Size:             262144 kB
Rss:                   0 kB
7f06-7f07 rw-p 00000000 00:00 0 [stack]
Size:                132 kB
Rss:                  20 kB
";
        let wanted = Resident {
            ram: 70000,
            beside: 920,
        };
        assert_eq!(parse(smaps), Some(wanted));
        assert_eq!(parse("Size: 100 kB\nRss: 100 kB\n"), None);
    }
}
