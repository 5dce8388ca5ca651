//! CPU time and memory of a process with everything that it started: what `/proc` says.
//!
//! A process belongs to the tree of another if it descends from it, or is in its process group: one whose parent ended keeps its
//! group. A process that came and ended between two readings is not seen.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;

use crate::overhead::cpu::{self, Reading, Used};

/// Ticks of `/proc/PID/stat` are 10 ms long on Linux (`USER_HZ` is 100 on every architecture that Rust's standard library runs on
/// with `/proc`).
const TICK_NANOS: u64 = 10_000_000;
/// What two readings in ticks may seem to have used too much: user and system time are each rounded.
const ROUNDED: u64 = 2;

/// What every process of a tree used so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Tree(BTreeMap<u32, One>);

#[derive(Clone, Debug)]
struct One {
    threads: Reading,
    ticks: u64,
    began: u64,
}

/// A line of `/proc/PID/stat`, as far as it is needed.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stat {
    name: String,
    parent: u32,
    group: u32,
    ticks: u64,
    /// When it started, in ticks since the machine did: tells processes of one id apart.
    began: u64,
}

impl Tree {
    /// Reads the trees of all `roots` below `proc` (`/proc`).
    ///
    /// # Errors
    /// If none of them lives, or the kernel does not say.
    pub(super) fn read(proc: &Path, roots: &[u32]) -> io::Result<Tree> {
        let all = processes(proc)?;
        let mut tree = BTreeMap::new();
        for pid in members(&all, roots) {
            // One that ends between the listing and the reading has used nothing that can be read.
            if let (Ok(threads), Some(stat)) = (cpu::read(proc, pid, 0), all.get(&pid)) {
                tree.insert(pid, One { threads, ticks: stat.ticks, began: stat.began });
            }
        }
        if tree.is_empty() {
            return Err(io::Error::other(format!("none of the processes {roots:?} lives")));
        }
        Ok(Tree(tree))
    }

    /// What the tree used since `before`.
    pub(super) fn since(&self, before: &Tree) -> Used {
        let none = One { threads: Reading::default(), ticks: 0, began: 0 };
        let mut sum = Used::default();
        for (pid, after) in &self.0 {
            let before = before.0.get(pid).filter(|one| one.began == after.began).unwrap_or(&none);
            let mut used = cpu::between(&before.threads, &after.threads);
            // Threads that ended are in the process's ticks only.
            let ticks = after.ticks.saturating_sub(before.ticks).saturating_sub(ROUNDED) * TICK_NANOS;
            used.request += ticks.saturating_sub(used.request + used.exporter);
            sum.request += used.request;
            sum.exporter += used.exporter;
        }
        sum
    }

    /// The largest resident memory of each process so far, together, in KiB.
    pub(super) fn peak_kib(&self, proc: &Path) -> u64 {
        self.0.keys().filter_map(|pid| cpu::peak_rss_kib(proc, *pid).ok()).sum()
    }

    /// When a process of the tree started.
    pub(super) fn began(&self, pid: u32) -> Option<u64> {
        self.0.get(&pid).map(|one| one.began)
    }

    /// When the process that has this id now started.
    pub(super) fn began_now(proc: &Path, pid: u32) -> Option<u64> {
        let text = std::fs::read_to_string(proc.join(pid.to_string()).join("stat")).ok()?;
        Stat::parse(&text).map(|stat| stat.began)
    }

    /// The processes.
    pub(super) fn pids(&self) -> impl Iterator<Item = u32> {
        self.0.keys().copied()
    }
}

/// The processes of this name.
///
/// # Errors
/// If `/proc` cannot be read.
pub(super) fn named(proc: &Path, name: &str) -> io::Result<Vec<u32>> {
    Ok(processes(proc)?.into_iter().filter(|(_, stat)| stat.name == name).map(|(pid, _)| pid).collect())
}

/// Every process.
fn processes(proc: &Path) -> io::Result<BTreeMap<u32, Stat>> {
    let mut all = BTreeMap::new();
    for entry in std::fs::read_dir(proc)? {
        let path = entry?.path();
        let Some(pid) = path.file_name().and_then(|n| n.to_str()?.parse().ok()) else { continue };
        let stat = std::fs::read_to_string(path.join("stat")).ok().and_then(|text| Stat::parse(&text));
        all.extend(stat.map(|stat| (pid, stat)));
    }
    Ok(all)
}

/// The roots, everything in their groups, and everything that descends from those.
fn members(all: &BTreeMap<u32, Stat>, roots: &[u32]) -> BTreeSet<u32> {
    let own = |pid: &u32, stat: &Stat| roots.contains(pid) || roots.contains(&stat.group);
    let mut found: BTreeSet<u32> = all.iter().filter(|(pid, stat)| own(pid, stat)).map(|(pid, _)| *pid).collect();
    loop {
        let more = |pid: &u32, stat: &Stat| !found.contains(pid) && found.contains(&stat.parent);
        let next: Vec<u32> = all.iter().filter(|(pid, stat)| more(pid, stat)).map(|(pid, _)| *pid).collect();
        if next.is_empty() {
            return found;
        }
        found.extend(next);
    }
}

impl Stat {
    /// Name, parent, group, user and system time, start (proc_pid_stat(5)). The name stands in parentheses and may contain some.
    fn parse(text: &str) -> Option<Stat> {
        let (head, tail) = text.rsplit_once(')')?;
        let fields: Vec<&str> = tail.split_ascii_whitespace().collect();
        let number = |i: usize| fields.get(i)?.parse::<u64>().ok();
        let id = |i: usize| u32::try_from(number(i)?).ok();
        let name = head.split_once('(')?.1.to_owned();
        let ticks = number(11)? + number(12)?;
        Some(Stat { name, parent: id(1)?, group: id(2)?, ticks, began: number(19)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_kernel_is_read() {
        let line = "71 (a (b) c) S 1 71 71 0 -1 4194304 100 0 0 0 12 30 5 6 20 0 9 0 100 1 1";
        let expect = Stat { name: "a (b) c".to_owned(), parent: 1, group: 71, ticks: 42, began: 100 };
        assert_eq!(Stat::parse(line), Some(expect));
        assert_eq!(Stat::parse("71 (a) S 1"), None);
    }

    #[test]
    fn descendants_and_the_group_belong_to_a_process() {
        let stat = |parent, group| Stat { name: String::new(), parent, group, ticks: 0, began: 0 };
        // 5 descends through another group, 6 lost its parent and kept the group, 7 is a stranger.
        let all = [(2, stat(1, 2)), (4, stat(2, 4)), (5, stat(4, 4)), (6, stat(1, 2)), (7, stat(1, 7))];
        let all = BTreeMap::from(all);
        assert_eq!(members(&all, &[2]).into_iter().collect::<Vec<_>>(), [2, 4, 5, 6]);
        assert_eq!(members(&all, &[7]).into_iter().collect::<Vec<_>>(), [7]);
        assert!(members(&all, &[9]).is_empty());
    }

    #[test]
    fn threads_that_ended_are_counted_by_the_process() {
        let thread = |nanos| cpu::Thread { name: "worker".to_owned(), nanos };
        let one = |nanos, ticks| One {
            threads: Reading { process: 0, threads: [(1, thread(nanos))].into() },
            ticks,
            began: 7,
        };
        let check = |before: One, after: One, expect| {
            let used = Tree([(1, after)].into()).since(&Tree([(1, before)].into()));
            assert_eq!((used.request, used.exporter), (expect, 0));
        };
        check(one(100, 0), one(500, 0), 400);
        // Within what rounding may add.
        check(one(100, 3), one(500, 5), 400);
        check(one(100, 3), one(500, 15), 10 * TICK_NANOS);
    }

    #[test]
    fn this_process_is_found() {
        let (proc, pid) = (Path::new("/proc"), std::process::id());
        let tree = Tree::read(proc, &[pid]).unwrap();
        assert!(tree.pids().any(|p| p == pid) && tree.peak_kib(proc) > 0);
        let name = std::fs::read_to_string("/proc/self/comm").unwrap();
        assert!(named(proc, name.trim_end()).unwrap().contains(&pid));
        assert!(Tree::read(proc, &[u32::MAX]).is_err());
    }
}
