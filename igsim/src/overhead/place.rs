//! Which process runs on which CPUs, and what the machine says about itself.
//!
//! The gateway gets a CPU of its own where there are two, since what it shares a CPU with decides what a hop costs, and how CPU time is
//! divided between the processes that take turns on it. A process is placed before its first thread starts: threads inherit the place,
//! and runtimes count their workers by it.

use std::io;
use std::path::Path;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use super::cpu::kib;
use super::model::{Machine, Regime};

/// CPUs for the processes of the lab.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The gateway's.
    pub gateway: Vec<usize>,
    /// Those of engines, load generator and receiver.
    pub others: Vec<usize>,
}

impl Placement {
    /// For a regime, on `cpus`.
    pub fn of(cpus: &[usize], regime: Regime) -> Placement {
        let (first, rest) = cpus.split_at(cpus.len().min(1));
        match regime {
            Regime::FloorUnpinned => Placement::anywhere(cpus),
            Regime::Realistic | Regime::Floor | Regime::Saturation if rest.is_empty() => Placement::anywhere(cpus),
            Regime::Realistic | Regime::Floor | Regime::Saturation => {
                Placement { gateway: first.to_vec(), others: rest.to_vec() }
            }
        }
    }

    /// Everything on all of `cpus`.
    pub fn anywhere(cpus: &[usize]) -> Placement {
        Placement { gateway: cpus.to_vec(), others: cpus.to_vec() }
    }

    /// In words.
    pub fn describe(&self) -> String {
        let list = |cpus: &[usize]| cpus.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        let (gateway, others) = (list(&self.gateway), list(&self.others));
        if self.gateway != self.others {
            format!("gateway on CPU {gateway}; engines, client and receiver on CPU {others}")
        } else if self.gateway.len() == 1 {
            format!("everything on CPU {gateway}: there is one")
        } else {
            format!("not pinned, CPUs {gateway}")
        }
    }
}

/// The CPUs that this process may use.
///
/// # Errors
/// If the system does not say.
pub fn allowed_cpus() -> io::Result<Vec<usize>> {
    let set = sched_getaffinity(None)?;
    Ok((0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect())
}

/// Puts the calling thread, and threads that it starts from now on, on `cpus`.
///
/// # Errors
/// If none of them may be used.
pub fn run_on(cpus: &[usize]) -> io::Result<()> {
    let mut set = CpuSet::new();
    cpus.iter().filter(|cpu| **cpu < CpuSet::MAX_CPU).for_each(|cpu| set.set(*cpu));
    Ok(sched_setaffinity(None, &set)?)
}

/// What the machine says about itself; what it does not say stays empty.
pub fn machine() -> Machine {
    let read = |path: &str| std::fs::read_to_string(Path::new("/proc").join(path)).unwrap_or_default();
    let (cpuinfo, meminfo) = (read("cpuinfo"), read("meminfo"));
    let field = |name: &str| {
        let line = cpuinfo.lines().find(|l| l.split(':').next().is_some_and(|key| key.trim() == name));
        line.and_then(|l| l.split_once(':')).map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
    };
    Machine {
        cpu: field("model name"),
        cpus: allowed_cpus().map_or(0, |cpus| cpus.len() as u32),
        memory_mib: kib(&meminfo, "MemTotal:").unwrap_or(0) / 1024,
        kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        virtual_machine: field("flags").split(' ').any(|flag| flag == "hypervisor"),
        awake: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gateway_has_a_cpu_of_its_own_where_there_are_two() {
        let check = |cpus: &[usize], regime, gateway: &[usize], others: &[usize], words: &str| {
            let found = Placement::of(cpus, regime);
            assert_eq!((&found.gateway[..], &found.others[..]), (gateway, others));
            assert_eq!(found.describe(), words);
        };
        let apart = "gateway on CPU 2; engines, client and receiver on CPU 3,5";
        check(&[2, 3, 5], Regime::Floor, &[2], &[3, 5], apart);
        check(&[2, 3, 5], Regime::Saturation, &[2], &[3, 5], apart);
        check(&[2, 3], Regime::FloorUnpinned, &[2, 3], &[2, 3], "not pinned, CPUs 2,3");
        check(&[7], Regime::Saturation, &[7], &[7], "everything on CPU 7: there is one");
    }

    #[test]
    fn the_machine_is_described() {
        let machine = machine();
        assert!(machine.cpus > 0 && machine.memory_mib > 0 && !machine.kernel.is_empty(), "{machine:?}");
    }
}
