//! Simulation time: integer nanoseconds since the start of a run.
//!
//! Cores receive `now` and never read a clock; floating point is for reports only.

use std::fmt;
use std::ops::{Add, AddAssign, Sub};

/// A point in time, in nanoseconds since the start of the run.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Time(u64);

/// A span of time, in nanoseconds.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Dur(u64);

impl Time {
    /// The start of the run.
    pub const ZERO: Time = Time(0);
    /// Later than anything that happens.
    pub const MAX: Time = Time(u64::MAX);

    /// `ns` nanoseconds after the start of the run.
    pub const fn from_nanos(ns: u64) -> Time {
        Time(ns)
    }
    /// Nanoseconds since the start of the run.
    pub const fn as_nanos(self) -> u64 {
        self.0
    }
    /// Seconds since the start of the run, for reports.
    pub fn as_secs_f64(self) -> f64 {
        self.0 as f64 / 1e9
    }
    /// Time elapsed since `earlier`, zero if `earlier` is later.
    pub const fn since(self, earlier: Time) -> Dur {
        Dur(self.0.saturating_sub(earlier.0))
    }
    /// This point moved by `d`, stopping at [`Time::MAX`].
    pub const fn saturating_add(self, d: Dur) -> Time {
        Time(self.0.saturating_add(d.0))
    }
}

impl Dur {
    /// No time at all.
    pub const ZERO: Dur = Dur(0);

    /// A duration of `ns` nanoseconds.
    pub const fn from_nanos(ns: u64) -> Dur {
        Dur(ns)
    }
    /// A duration of `us` microseconds.
    pub const fn from_micros(us: u64) -> Dur {
        Dur(us * 1_000)
    }
    /// A duration of `ms` milliseconds.
    pub const fn from_millis(ms: u64) -> Dur {
        Dur(ms * 1_000_000)
    }
    /// A duration of `s` seconds.
    pub const fn from_secs(s: u64) -> Dur {
        Dur(s * 1_000_000_000)
    }
    /// The duration nearest to `s` seconds; negative, NaN and overlong values are clamped.
    pub fn from_secs_f64(s: f64) -> Dur {
        Dur((s * 1e9).round() as u64)
    }
    /// Nanoseconds.
    pub const fn as_nanos(self) -> u64 {
        self.0
    }
    /// Seconds.
    pub fn as_secs_f64(self) -> f64 {
        self.0 as f64 / 1e9
    }
    /// Milliseconds.
    pub fn as_millis_f64(self) -> f64 {
        self.0 as f64 / 1e6
    }
    /// Microseconds.
    pub fn as_micros_f64(self) -> f64 {
        self.0 as f64 / 1e3
    }
    /// The standard library's duration of the same length.
    pub const fn to_std(self) -> std::time::Duration {
        std::time::Duration::from_nanos(self.0)
    }
    /// The longer of two durations.
    pub fn max(self, other: Dur) -> Dur {
        Dur(self.0.max(other.0))
    }
}

impl From<std::time::Duration> for Dur {
    fn from(d: std::time::Duration) -> Dur {
        Dur(u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
    }
}

impl Add<Dur> for Time {
    type Output = Time;
    fn add(self, d: Dur) -> Time {
        Time(self.0 + d.0)
    }
}
impl AddAssign<Dur> for Time {
    fn add_assign(&mut self, d: Dur) {
        self.0 += d.0;
    }
}
impl Sub<Dur> for Time {
    type Output = Time;
    fn sub(self, d: Dur) -> Time {
        Time(self.0.saturating_sub(d.0))
    }
}
impl Sub for Time {
    type Output = Dur;
    fn sub(self, earlier: Time) -> Dur {
        self.since(earlier)
    }
}
impl Add for Dur {
    type Output = Dur;
    fn add(self, d: Dur) -> Dur {
        Dur(self.0 + d.0)
    }
}
impl AddAssign for Dur {
    fn add_assign(&mut self, d: Dur) {
        self.0 += d.0;
    }
}
impl Sub for Dur {
    type Output = Dur;
    fn sub(self, d: Dur) -> Dur {
        Dur(self.0.saturating_sub(d.0))
    }
}
impl std::ops::Mul<u64> for Dur {
    type Output = Dur;
    fn mul(self, k: u64) -> Dur {
        Dur(self.0 * k)
    }
}

impl fmt::Debug for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "t+{}ns", self.0)
    }
}
impl fmt::Debug for Dur {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
impl fmt::Display for Dur {
    /// Three significant digits and a unit: `12.3 us`, `4.56 ms`, `1.20 s`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ns = self.0 as f64;
        let (value, unit) = match self.0 {
            0..1_000 => return f.pad(&format!("{} ns", self.0)),
            1_000..1_000_000 => (ns / 1e3, "us"),
            1_000_000..1_000_000_000 => (ns / 1e6, "ms"),
            _ => (ns / 1e9, "s"),
        };
        let digits = if value < 10.0 { 2 } else { usize::from(value < 100.0) };
        f.pad(&format!("{value:.digits$} {unit}"))
    }
}

/// Where [`Time::ZERO`] lies on the wall clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Anchor {
    unix_nanos_at_zero: u64,
}

impl Anchor {
    /// 2026-01-01T00:00:00Z: where every virtual run starts, so that its files are reproducible.
    pub const VIRTUAL: Anchor = Anchor { unix_nanos_at_zero: 1_767_225_600_000_000_000 };

    /// An anchor for a run whose start was `ns` nanoseconds after the Unix epoch.
    pub const fn from_unix_nanos(ns: u64) -> Anchor {
        Anchor { unix_nanos_at_zero: ns }
    }
    /// The same moment on a clock that is so many nanoseconds ahead, or behind.
    pub const fn shifted(self, ns: i64) -> Anchor {
        Anchor { unix_nanos_at_zero: self.unix_nanos_at_zero.saturating_add_signed(ns) }
    }
    /// `t` in nanoseconds since the Unix epoch.
    pub const fn unix_nanos(self, t: Time) -> u64 {
        self.unix_nanos_at_zero.saturating_add(t.0)
    }
}

/// What a core was doing since the last lap; a virtual stopwatch charges for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Parsing a request body of so many bytes and hashing its prefix.
    Parse {
        /// Size of the body.
        bytes: u32,
    },
    /// Admission: objective, priority, candidate list.
    Admit,
    /// Walking so many blocks of the index of KV events.
    KvLookup {
        /// Blocks found.
        blocks: u32,
    },
    /// Rating the endpoints by the blocks that were found.
    KvScore {
        /// Blocks found.
        blocks: u32,
        /// Endpoints that are rated.
        endpoints: u32,
    },
    /// Taking a batch of KV events into the index.
    KvEvents {
        /// Blocks named in it.
        blocks: u32,
    },
    /// One filter over so many endpoints.
    Filter {
        /// Candidates looked at.
        endpoints: u32,
    },
    /// One scorer over so many endpoints.
    Score {
        /// Candidates looked at.
        endpoints: u32,
    },
    /// The decision whether another endpoint prefills.
    Decide,
    /// The picker over so many endpoints.
    Pick {
        /// Candidates looked at.
        endpoints: u32,
    },
}

/// Times the stages inside one call of a core.
///
/// Live drivers read the monotonic clock, virtual ones add a constant per stage, tests count.
pub trait Stopwatch {
    /// Ends `stage` and returns the time at which it ended. Never goes back.
    fn lap(&mut self, stage: Stage) -> Time;
}

/// A stopwatch for calls that nobody records: every lap ends at once.
#[derive(Clone, Copy, Debug)]
pub struct Stopped(pub Time);

impl Stopwatch for Stopped {
    #[inline]
    fn lap(&mut self, _: Stage) -> Time {
        self.0
    }
}

/// A stopwatch for tests: every lap takes the same time.
#[derive(Clone, Copy, Debug)]
pub struct Ticking {
    now: Time,
    step: Dur,
}

impl Ticking {
    /// Starts at `now`; each lap takes `step`.
    pub const fn new(now: Time, step: Dur) -> Ticking {
        Ticking { now, step }
    }
}

impl Stopwatch for Ticking {
    fn lap(&mut self, _: Stage) -> Time {
        self.now += self.step;
        self.now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_print_three_digits_and_a_unit() {
        let check = |ns, text: &str| assert_eq!(Dur::from_nanos(ns).to_string(), text);
        check(0, "0 ns");
        check(999, "999 ns");
        check(1_500, "1.50 us");
        check(12_340, "12.3 us");
        check(752_000_000, "752 ms");
        check(3_420_000_000, "3.42 s");
    }

    #[test]
    fn stopwatch_laps_never_go_back() {
        let mut watch = Ticking::new(Time::from_nanos(5), Dur::from_nanos(2));
        let laps: Vec<u64> = (0..3).map(|_| watch.lap(Stage::Admit).as_nanos()).collect();
        assert_eq!(laps, [7, 9, 11]);
        let mut stopped = Stopped(Time::from_nanos(5));
        assert_eq!(stopped.lap(Stage::Admit), stopped.lap(Stage::Pick { endpoints: 9 }));
    }

    #[test]
    fn the_virtual_epoch_is_the_first_of_january_2026() {
        // 56 years of 365 days and 14 leap days after 1970-01-01.
        let days = 56 * 365 + 14;
        assert_eq!(Anchor::VIRTUAL.unix_nanos(Time::ZERO), days * 86_400 * 1_000_000_000);
    }
}
