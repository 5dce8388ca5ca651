//! Figures of the process, as prometheus_client's collector takes them from `/proc` (`prometheus_client/process_collector.py`).
//!
//! They are of the whole process: engines that share one have the same. Where there is no `/proc` there are none.

use std::sync::{Mutex, PoisonError};

use shared::time::{Dur, Time};

use super::page::{Kind, Page};

/// How long a look is good for: a gateway asks twenty times a second, and an operator does not need that.
const FRESH: Dur = Dur::from_secs(1);

/// What was seen last.
#[derive(Debug, Default)]
pub struct ProcessFigures(Mutex<Option<(Time, Figures)>>);

#[derive(Clone, Copy, Debug, PartialEq)]
struct Figures {
    virtual_bytes: f64,
    resident_bytes: f64,
    started: f64,
    cpu_seconds: f64,
    open_fds: Option<f64>,
    max_fds: Option<f64>,
}

impl ProcessFigures {
    /// Writes the figures of `now` or a little earlier.
    pub fn write(&self, now: Time, page: &mut Page) {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.is_none_or(|(at, _)| now.since(at) >= FRESH) {
            *seen = look().map(|figures| (now, figures));
        }
        let Some((_, f)) = *seen else { return };
        drop(seen);
        let mut one = |name: &str, kind, value| {
            page.bare_head(name, kind);
            page.bare(name, "", &[], value);
        };
        one("process_virtual_memory_bytes", Kind::Gauge, f.virtual_bytes);
        one("process_resident_memory_bytes", Kind::Gauge, f.resident_bytes);
        one("process_start_time_seconds", Kind::Gauge, f.started);
        one("process_cpu_seconds_total", Kind::Counter, f.cpu_seconds);
        for (name, n) in [("process_open_fds", f.open_fds), ("process_max_fds", f.max_fds)] {
            if let Some(n) = n {
                one(name, Kind::Gauge, n);
            }
        }
    }
}

fn look() -> Option<Figures> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    let system = std::fs::read_to_string("/proc/stat").ok()?;
    let ticks = rustix::param::clock_ticks_per_second() as f64;
    let mut figures = parse(&stat, &system, ticks, rustix::param::page_size() as f64)?;
    // The listing itself is open while it is read.
    figures.open_fds = std::fs::read_dir("/proc/self/fd").ok().map(|dir| dir.count() as f64 - 1.0);
    figures.max_fds = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.map(|n| n as f64);
    Some(figures)
}

/// Reads proc(5): the fields of `stat` behind the command, which may hold spaces, and the boot time.
fn parse(stat: &str, system: &str, ticks: f64, page: f64) -> Option<Figures> {
    let fields: Vec<f64> =
        stat.rsplit_once(')')?.1.split_ascii_whitespace().map(|f| f.parse().unwrap_or(0.0)).collect();
    let boot: f64 = system.lines().find_map(|l| l.strip_prefix("btime "))?.trim().parse().ok()?;
    let field = |n: usize| fields.get(n).copied();
    Some(Figures {
        virtual_bytes: field(20)?,
        resident_bytes: field(21)? * page,
        started: boot + field(19)? / ticks,
        cpu_seconds: (field(11)? + field(12)?) / ticks,
        open_fds: None,
        max_fds: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_counted_from_behind_the_command() {
        let stat =
            "7 (a (b) c) S 1 7 7 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 4 0 1200 8192000 500 18446744073709551615";
        let found = parse(stat, "cpu 1 2\nbtime 1000\n", 100.0, 4096.0).unwrap();
        let expect = Figures {
            virtual_bytes: 8_192_000.0,
            resident_bytes: 2_048_000.0,
            started: 1012.0,
            cpu_seconds: 3.0,
            open_fds: None,
            max_fds: None,
        };
        assert_eq!(found, expect);
        assert_eq!(parse("", "", 100.0, 4096.0), None);
    }

    #[test]
    fn a_look_is_good_for_a_second() {
        let figures = ProcessFigures::default();
        let at = |s| Time::ZERO + Dur::from_secs(s);
        let seen = || figures.0.lock().unwrap().map(|(at, _)| at);
        for (now, expect) in [(5, 5), (5, 5), (6, 6)] {
            figures.write(at(now), &mut Page::new("m", 0));
            assert!(seen().is_none_or(|t| t == at(expect)));
        }
    }
}
