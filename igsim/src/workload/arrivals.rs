//! Open-loop arrivals: an endless sequence of times.

use rand_distr::{Distribution, Exp1, Gamma};
use shared::rng::{Seed, Stream};
use shared::time::{Dur, Time};

use crate::scenario::{Arrivals, Step};

/// Times at which sessions start.
#[derive(Debug)]
pub(super) struct Process {
    gaps: Gaps,
    stream: Stream,
    now: Time,
}

#[derive(Debug)]
enum Gaps {
    /// Mean gap in seconds.
    Exponential(f64),
    /// Gaps in seconds.
    Gamma(Gamma<f64>),
    /// Mean gaps that change, with the step that is under way and when it began.
    Steps { steps: Vec<Step>, at: usize, began: Time },
    /// The k-th arrival is at k / rate, so that rounding never adds up.
    Constant { rate: f64, k: u64 },
    /// Nothing comes.
    Never,
}

impl Process {
    /// The process of valid open-loop arrivals.
    pub(super) fn new(arrivals: &Arrivals, seed: Seed) -> Process {
        let gaps = match arrivals {
            Arrivals::Poisson { rate } => Gaps::Exponential(1.0 / rate),
            // Shape 1/cv^2 and scale cv^2/rate have mean 1/rate and coefficient of variation cv.
            Arrivals::Gamma { rate, cv } => {
                Gamma::new(1.0 / (cv * cv), cv * cv / rate).map_or(Gaps::Exponential(1.0 / rate), Gaps::Gamma)
            }
            Arrivals::Steps { steps } => Gaps::Steps { steps: steps.clone(), at: 0, began: Time::ZERO },
            Arrivals::Constant { rate } => Gaps::Constant { rate: *rate, k: 0 },
            Arrivals::Closed { .. } | Arrivals::Replay {} => Gaps::Never,
        };
        Process { gaps, stream: seed.stream("workload/arrivals"), now: Time::ZERO }
    }

    /// The next arrival, never before the one before; [`Time::MAX`] when there is none.
    pub(super) fn next_arrival(&mut self) -> Time {
        let seconds = match &mut self.gaps {
            Gaps::Exponential(mean) => {
                let gap: f64 = Exp1.sample(self.stream.rng());
                gap * *mean
            }
            Gaps::Gamma(gamma) => gamma.sample(self.stream.rng()),
            Gaps::Steps { steps, at, began } => loop {
                let Some(step) = steps.get(*at) else { return Time::MAX };
                let gap: f64 = Exp1.sample(self.stream.rng());
                let next = self.now.saturating_add(Dur::from_secs_f64(gap / step.rate));
                let end = began.saturating_add(step.duration.get());
                if next < end {
                    self.now = next;
                    return next;
                }
                // The process has no memory: the next step begins anew.
                (*at, *began) = (*at + 1, end.saturating_add(step.pause.get()));
                self.now = *began;
            },
            Gaps::Constant { rate, k } => {
                let at = Time::ZERO.saturating_add(Dur::from_secs_f64(*k as f64 / *rate));
                *k += 1;
                return at;
            }
            Gaps::Never => return Time::MAX,
        };
        self.now = self.now.saturating_add(Dur::from_secs_f64(seconds));
        self.now
    }
}
