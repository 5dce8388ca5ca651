//! Outliers: an endpoint whose answers fail several times in a row gets no requests for a while, longer every time.
//!
//! After Envoy's outlier detection (`consecutive_5xx`, `base_ejection_time`, `max_ejection_time`, `max_ejection_percent`). What counts
//! as a failure is said by the caller; a refusal for load is none, it is an answer of a healthy engine.

use shared::time::{Dur, Time};

use crate::core::config::OutlierConfig;

/// Failures of one endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outlier {
    /// Since the last good answer.
    failures: u32,
    /// Ejections without a long good time between them.
    ejections: u32,
    /// Until when it is out; the past if it is back.
    until: Option<Time>,
}

impl Outlier {
    /// Whether it gets no requests now.
    pub fn is_ejected(&self, now: Time) -> bool {
        self.until.is_some_and(|until| now < until)
    }

    /// A good answer came.
    pub const fn succeeded(&mut self) {
        self.failures = 0;
    }

    /// An answer failed; whether that was one too many.
    pub(crate) fn failed(&mut self, now: Time, config: &OutlierConfig) -> bool {
        if self.is_ejected(now) {
            // Of a request that it had before.
            return false;
        }
        self.failures = self.failures.saturating_add(1);
        config.consecutive_failures > 0 && self.failures >= config.consecutive_failures
    }

    /// Takes it out from `now` on: as many times the base time as it was out before and once more, up to the longest time. Having
    /// been back for the longest time makes up for all of that.
    pub(crate) fn eject(&mut self, now: Time, config: &OutlierConfig) {
        let longest = config.max_time.get();
        let is_old = self.until.is_some_and(|until| now.since(until) >= longest);
        self.ejections = if is_old { 1 } else { self.ejections.saturating_add(1) };
        let nanos = config.base_time.get().as_nanos().saturating_mul(u64::from(self.ejections));
        self.until = Some(now + Dur::from_nanos(nanos).min(longest));
        self.failures = 0;
    }
}

/// Whether one more endpoint may be out, where `out` of `members` are: never more than the share, so that a fault of all of them
/// leaves somebody to ask.
pub(crate) fn may_eject(out: usize, members: usize, config: &OutlierConfig) -> bool {
    (out + 1) as f64 <= config.max_share * members as f64
}

#[cfg(test)]
mod tests {
    use shared::units::HumanDur;

    use super::*;

    fn config() -> OutlierConfig {
        OutlierConfig {
            consecutive_failures: 2,
            base_time: HumanDur::secs(10),
            max_time: HumanDur::secs(25),
            ..OutlierConfig::default()
        }
    }

    #[test]
    fn failures_in_a_row_take_it_out_longer_every_time() {
        let (config, mut outlier) = (config(), Outlier::default());
        let at = |s| Time::ZERO + Dur::from_secs(s);
        // Seconds at which it fails once too often, and until when it is out.
        for (second, until) in [(0, 10), (20, 40), (50, 75), (80, 105), (130, 140)] {
            assert!(!outlier.is_ejected(at(second)));
            assert!(!outlier.failed(at(second), &config));
            assert!(outlier.failed(at(second), &config));
            outlier.eject(at(second), &config);
            assert!(outlier.is_ejected(at(until - 1)) && !outlier.is_ejected(at(until)), "{second}");
            assert!(!outlier.failed(at(until - 1), &config), "what it had before does not count");
        }
    }

    #[test]
    fn a_good_answer_makes_up_for_failures() {
        let (config, mut outlier) = (config(), Outlier::default());
        assert!(!outlier.failed(Time::ZERO, &config));
        outlier.succeeded();
        assert!(!outlier.failed(Time::ZERO, &config));
        let off = OutlierConfig { consecutive_failures: 0, ..config };
        assert!((0..100).all(|_| !outlier.failed(Time::ZERO, &off)));
    }

    #[test]
    fn some_endpoints_always_stay() {
        let config = OutlierConfig { max_share: 0.5, ..OutlierConfig::default() };
        let check = |out, members, expect| assert_eq!(may_eject(out, members, &config), expect, "{out} of {members}");
        check(0, 1, false);
        check(0, 2, true);
        check(1, 2, false);
        check(0, 3, true);
        check(1, 3, false);
        check(4, 10, true);
        check(5, 10, false);
    }
}
