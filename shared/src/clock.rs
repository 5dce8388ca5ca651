//! The one place in the workspace that reads the real clock.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crate::time::{Anchor, Dur, Stage, Stopwatch, Time};

/// The clock of a live run: monotonic time since its start, anchored to the wall clock once.
#[derive(Clone, Copy, Debug)]
pub struct RunClock {
    start: Instant,
    anchor: Anchor,
}

impl RunClock {
    /// Starts a clock: [`Time::ZERO`] is now.
    #[allow(clippy::disallowed_methods, reason = "the one place that reads the real clock")]
    pub fn start() -> RunClock {
        let start = Instant::now();
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        RunClock { start, anchor: Anchor::from_unix_nanos(Dur::from(unix).as_nanos()) }
    }

    /// Time since the start of the run.
    #[inline]
    pub fn now(&self) -> Time {
        Time::from_nanos(Dur::from(self.start.elapsed()).as_nanos())
    }

    /// Where the run started on the wall clock.
    pub const fn anchor(&self) -> Anchor {
        self.anchor
    }

    /// The instant at which this clock shows `t`, for the runtime's timers.
    pub fn instant(&self, t: Time) -> Instant {
        self.start + std::time::Duration::from_nanos(t.as_nanos())
    }

    /// A stopwatch that reads this clock.
    pub const fn stopwatch(&self) -> LiveStopwatch {
        LiveStopwatch(*self)
    }
}

/// A stopwatch on the monotonic clock.
#[derive(Clone, Copy, Debug)]
pub struct LiveStopwatch(RunClock);

impl Stopwatch for LiveStopwatch {
    #[inline]
    fn lap(&mut self, _: Stage) -> Time {
        self.0.now()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_live_stopwatch_follows_the_clock_and_never_goes_back() {
        let clock = RunClock::start();
        let mut watch = clock.stopwatch();
        let laps: Vec<Time> = (0..100).map(|_| watch.lap(Stage::Admit)).collect();
        assert!(laps.is_sorted());
        assert!(laps[99] <= clock.now());
    }
}
