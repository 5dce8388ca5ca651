//! What became of the requests of a soak, in bounded memory.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use shared::time::{Dur, Time};

use crate::overhead::load::Sample;
use crate::stats::{Distribution, Quantiles, Unit};

/// Counts and distributions so far.
#[derive(Debug, Default)]
pub(super) struct Tally {
    sent: u64,
    failures: BTreeMap<String, u64>,
    sampled: u64,
    e2e: Distribution,
    ttft: Distribution,
    late: Distribution,
    first_intended: Option<Time>,
    last_intended: Time,
    last_end: Time,
}

/// What became of the requests. Latencies in microseconds, from the intended send time, answered requests only.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Requests {
    /// Requests sent.
    pub sent: u64,
    /// Answered in full.
    pub answered: u64,
    /// Failures by kind.
    pub failures: BTreeMap<String, u64>,
    /// Answers that say that their trace is kept.
    pub sampled: u64,
    /// Requests asked for per second, by their intended times.
    pub asked_per_second: f64,
    /// Answered requests per second, from the first intended time to the last end.
    pub answered_per_second: f64,
    /// From the last intended time to the last end, in seconds: how far behind the load was in the end.
    pub backlog: f64,
    /// To the end of the answer.
    pub e2e: Quantiles,
    /// To the first token.
    pub ttft: Quantiles,
    /// By how much the client sent late.
    pub late: Quantiles,
}

impl Tally {
    pub(super) fn add(&mut self, sample: &Sample) {
        self.sent += 1;
        self.sampled += u64::from(sample.sampled);
        self.late.record(sample.sent.since(sample.intended));
        match sample.failure {
            Some(failure) => *self.failures.entry(failure.to_string()).or_default() += 1,
            None => {
                self.e2e.record(sample.e2e());
                self.ttft.record(sample.ttft().unwrap_or(Dur::ZERO));
            }
        }
        let first = self.first_intended.get_or_insert(sample.intended);
        *first = (*first).min(sample.intended);
        self.last_intended = self.last_intended.max(sample.intended);
        self.last_end = self.last_end.max(sample.last);
    }

    /// Requests that ended, and those of them that failed.
    pub(super) fn ended(&self) -> (u64, u64) {
        (self.sent, self.failures.values().sum())
    }

    pub(super) fn requests(&self) -> Requests {
        let (sent, failed) = self.ended();
        let first = self.first_intended.unwrap_or(Time::ZERO);
        let per_second = |n: u64, until: Time| {
            let seconds = until.since(first).as_secs_f64();
            if seconds > 0.0 { n as f64 / seconds } else { 0.0 }
        };
        Requests {
            sent,
            answered: sent - failed,
            failures: self.failures.clone(),
            sampled: self.sampled,
            asked_per_second: per_second(sent.saturating_sub(1), self.last_intended),
            answered_per_second: per_second(sent - failed, self.last_end),
            backlog: self.last_end.since(self.last_intended).as_secs_f64(),
            e2e: self.e2e.summary(Unit::Micros),
            ttft: self.ttft.summary(Unit::Micros),
            late: self.late.summary(Unit::Micros),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Failure;

    #[test]
    fn requests_are_counted_and_timed_from_when_they_were_due() {
        let ms = |n| Time::ZERO + Dur::from_millis(n);
        let sample = |at: u64, failure, sampled| Sample {
            intended: ms(at),
            sent: ms(at + 1),
            first_token: Some(ms(at + 2)),
            last: ms(at + 4),
            failure,
            sampled,
            ..Sample::default()
        };
        let mut tally = Tally::default();
        // Ends come in any order.
        tally.add(&sample(2_000, Some(Failure::Timeout), true));
        tally.add(&sample(1_000, None, true));
        tally.add(&sample(1_500, None, false));
        assert_eq!(tally.ended(), (3, 1));
        let r = tally.requests();
        assert_eq!((r.sent, r.answered, r.sampled), (3, 2, 2));
        assert_eq!(r.failures, BTreeMap::from([("timeout".to_owned(), 1)]));
        assert_eq!((r.e2e.mean, r.ttft.mean, r.late.mean), (4_000.0, 2_000.0, 1_000.0));
        assert_eq!((r.e2e.count, r.late.count, r.backlog), (2, 3, 0.004));
        assert_eq!((r.asked_per_second, (r.answered_per_second * 1e3).round()), (2.0, 1992.0));
        assert_eq!(Tally::default().requests(), Requests::default());
    }
}
