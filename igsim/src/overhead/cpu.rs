//! CPU time of processes by thread, stolen time of the machine, peak memory: what `/proc` says, in nanoseconds where it can.
//!
//! `/proc/PID/task/TID/schedstat` counts what the scheduler gave a thread, to the nanosecond (kernel documentation,
//! `scheduler/sched-stats`); the ticks of `/proc/PID/stat` would be 10 ms. Threads that ended are in no such file: what the
//! process as a whole used beyond its threads' sum is theirs. Knows nothing of arms or blocks.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

/// CPU time of one thread so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Thread {
    /// Its name, as the kernel keeps it: at most 15 bytes.
    pub name: String,
    /// CPU time in nanoseconds.
    pub nanos: u64,
}

/// CPU time of a process so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// Of the whole process, threads that ended included, in nanoseconds.
    pub process: u64,
    /// Of each thread that lives, by its id.
    pub threads: BTreeMap<u32, Thread>,
}

/// CPU time of a process between two readings, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Used {
    /// Of threads that fold, encode and send spans.
    pub exporter: u64,
    /// Of all other threads, those that came and went between the readings included.
    pub request: u64,
}

/// CPU time that this process used so far, in nanoseconds: all its threads, those that ended too.
pub fn of_this_process() -> u64 {
    nanos_of(rustix::time::ClockId::ProcessCPUTime)
}

/// CPU time that the calling thread used so far, in nanoseconds.
pub fn of_this_thread() -> u64 {
    nanos_of(rustix::time::ClockId::ThreadCPUTime)
}

fn nanos_of(clock: rustix::time::ClockId) -> u64 {
    let used = rustix::time::clock_gettime(clock);
    u64::try_from(used.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(used.tv_nsec).unwrap_or(0)
}

/// Reads the threads of process `pid` below `proc` (`/proc`); `process` is what the process says of itself.
///
/// # Errors
/// If there is no such process, or the kernel keeps no such figures.
pub fn read(proc: &Path, pid: u32, process: u64) -> io::Result<Reading> {
    let mut threads = BTreeMap::new();
    for entry in std::fs::read_dir(proc.join(pid.to_string()).join("task"))? {
        let path = entry?.path();
        let Some(tid) = path.file_name().and_then(|n| n.to_str()?.parse().ok()) else { continue };
        // A thread may end between the listing and the reading.
        let Ok(name) = std::fs::read_to_string(path.join("comm")) else { continue };
        let Ok(text) = std::fs::read_to_string(path.join("schedstat")) else { continue };
        let nanos = on_cpu(&text).ok_or_else(|| bad(&path.join("schedstat"), &text))?;
        threads.insert(tid, Thread { name: name.trim_end().to_owned(), nanos });
    }
    if threads.is_empty() {
        return Err(io::Error::other(format!("no thread of process {pid} tells its CPU time (schedstat)")));
    }
    Ok(Reading { process, threads })
}

/// What a process used between two readings.
pub fn between(before: &Reading, after: &Reading) -> Used {
    let mut used = Used::default();
    for (tid, thread) in &after.threads {
        // An id may be given again: a thread that has used less than before is another one.
        let earlier = before.threads.get(tid).map_or(0, |t| t.nanos);
        let nanos = thread.nanos.checked_sub(earlier).unwrap_or(thread.nanos);
        if is_exporter(&thread.name) {
            used.exporter += nanos;
        } else {
            used.request += nanos;
        }
    }
    let process = after.process.saturating_sub(before.process);
    used.request += process.saturating_sub(used.exporter + used.request);
    used
}

/// Whether a thread of this name folds, encodes or sends spans: ours begin with `telemetry`, the SDK's with `OpenTelemetry`.
fn is_exporter(name: &str) -> bool {
    name.starts_with("telemetry") || name.starts_with("OpenTelemetry")
}

/// The first field of `schedstat`: time spent on a CPU.
fn on_cpu(schedstat: &str) -> Option<u64> {
    schedstat.split_ascii_whitespace().next()?.parse().ok()
}

/// Time of all CPUs since the machine started, in ticks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ticks {
    total: u64,
    stolen: u64,
}

impl Ticks {
    /// Reads `/proc/stat`.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn read(proc: &Path) -> io::Result<Ticks> {
        let path = proc.join("stat");
        let text = std::fs::read_to_string(&path)?;
        Ticks::parse(&text).ok_or_else(|| bad(&path, text.lines().next().unwrap_or_default()))
    }

    /// The line of all CPUs: user, nice, system, idle, iowait, irq, softirq, steal; guest times are in user and nice already
    /// (proc_stat(5)).
    fn parse(text: &str) -> Option<Ticks> {
        let line = text.lines().find_map(|l| l.strip_prefix("cpu "))?;
        let fields: Vec<u64> = line.split_ascii_whitespace().map_while(|f| f.parse().ok()).take(8).collect();
        Some(Ticks { total: fields.iter().sum(), stolen: *fields.get(7)? })
    }

    /// Share of the time since `before` that the hypervisor took.
    pub fn steal_since(&self, before: &Ticks) -> f64 {
        let (total, stolen) = (self.total.saturating_sub(before.total), self.stolen.saturating_sub(before.stolen));
        if total == 0 { 0.0 } else { stolen as f64 / total as f64 }
    }
}

/// The largest resident memory of process `pid` so far, in KiB (`VmHWM`).
///
/// # Errors
/// If there is no such process.
pub fn peak_rss_kib(proc: &Path, pid: u32) -> io::Result<u64> {
    status_kib(proc, pid, "VmHWM:")
}

/// The resident memory of process `pid`, in KiB (`VmRSS`).
///
/// # Errors
/// If there is no such process.
pub fn rss_kib(proc: &Path, pid: u32) -> io::Result<u64> {
    status_kib(proc, pid, "VmRSS:")
}

fn status_kib(proc: &Path, pid: u32, field: &str) -> io::Result<u64> {
    let path = proc.join(pid.to_string()).join("status");
    let text = std::fs::read_to_string(&path)?;
    kib(&text, field).ok_or_else(|| bad(&path, field))
}

/// A field of `status` or `meminfo`, in KiB.
pub(super) fn kib(text: &str, field: &str) -> Option<u64> {
    let line = text.lines().find_map(|l| l.strip_prefix(field))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

fn bad(path: &Path, found: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{}: found `{}`", path.display(), found.trim_end()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(process: u64, threads: &[(u32, &str, u64)]) -> Reading {
        let threads = threads.iter().map(|(id, name, nanos)| (*id, Thread { name: (*name).to_owned(), nanos: *nanos }));
        Reading { process, threads: threads.collect() }
    }

    #[test]
    fn threads_are_told_apart_by_name() {
        let check = |before: &[(u32, &str, u64)], after: &[(u32, &str, u64)], process, request, exporter| {
            let used = between(&reading(0, before), &reading(process, after));
            assert_eq!(used, Used { request, exporter }, "{before:?} {after:?}");
        };
        let gateway = [(1, "igsim", 50), (2, "tokio-rt-worker", 100)];
        check(&gateway, &[(1, "igsim", 60), (2, "tokio-rt-worker", 400)], 310, 310, 0);
        // What the kernel keeps of `OpenTelemetry.Traces.BatchProcessor` is 15 bytes.
        let exporters = [(1, "igsim", 50), (3, "telemetry", 7), (4, "telemetry-otlp", 20), (5, "OpenTelemetry.T", 3)];
        check(&[(1, "igsim", 50)], &exporters, 30, 0, 30);
        // A thread that ended between the readings, and one whose id was given again.
        check(&gateway, &[(1, "igsim", 60)], 500, 500, 0);
        check(&[(9, "telemetry", 1_000)], &[(9, "tokio-rt-worker", 40)], 40, 40, 0);
        // The readings are not taken at one instant: the process may seem to have used less than its threads.
        check(&gateway, &[(1, "igsim", 60), (2, "tokio-rt-worker", 400)], 300, 310, 0);
    }

    #[test]
    fn files_of_proc_are_read_as_the_kernel_writes_them() {
        assert_eq!(on_cpu("1295378412 105908 3\n"), Some(1_295_378_412));
        assert_eq!(on_cpu(""), None);
        let status = "Name:\tigsim\nVmPeak:\t  803088 kB\nVmHWM:\t   21420 kB\nVmRSS:\t   20100 kB\n";
        assert_eq!(
            (kib(status, "VmHWM:"), kib(status, "VmRSS:"), kib(status, "VmPin:")),
            (Some(21_420), Some(20_100), None)
        );
        let before = Ticks::parse("cpu  962094 81543 132556 1203135 4989 0 4038 295 7 0\ncpu0 1 2 3\n").unwrap();
        let after = Ticks::parse("cpu  962144 81543 132556 1203175 4989 0 4038 305 9 0\ncpu0 1 2 3\n").unwrap();
        assert_eq!(after.steal_since(&before), 0.1);
        assert_eq!(before.steal_since(&before), 0.0);
        assert_eq!(Ticks::parse("intr 1\n"), None);
    }

    #[test]
    fn this_process_has_threads_that_used_time() {
        let pid = std::process::id();
        let proc = Path::new("/proc");
        let found = read(proc, pid, of_this_process()).unwrap();
        assert!(found.process > 0 && found.threads.values().any(|t| t.nanos > 0), "{found:?}");
        assert!(peak_rss_kib(proc, pid).unwrap() >= rss_kib(proc, pid).unwrap() / 2);
        assert!(Ticks::read(proc).unwrap().total > 0);
        assert!(read(Path::new("/nowhere"), pid, 0).is_err());
    }
}
