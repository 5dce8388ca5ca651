//! Latency distributions of arms, merged over the blocks of a run, for plots.
//!
//! Kept apart from the blocks: nothing is judged by them.

use serde::{Deserialize, Serialize};

use super::model::{Arm, Regime};

/// The distributions of a run, one for each regime and arm.
pub type Distributions = Vec<Distribution>;

/// End-to-end latencies of one arm in one regime.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Distribution {
    /// The regime.
    pub regime: Regime,
    /// The arm.
    pub arm: Arm,
    /// Microseconds, and the share of requests that took no longer; both rise.
    pub points: Vec<(f64, f64)>,
}

impl Distribution {
    /// Of latencies in microseconds, in any order; at most `points` points, evenly spaced in shares, the largest value last.
    pub fn of(regime: Regime, arm: Arm, mut micros: Vec<f64>, points: usize) -> Distribution {
        micros.sort_by(f64::total_cmp);
        let (n, points) = (micros.len(), points.min(micros.len()));
        let point = |i: usize| {
            let rank = i * n / points;
            (micros[rank - 1], rank as f64 / n as f64)
        };
        let points = (1..=points).map(point).collect();
        Distribution { regime, arm, points }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_quantiles() {
        let check = |values: &[f64], points, expect: &[(f64, f64)]| {
            let found = Distribution::of(Regime::Floor, Arm::Off, values.to_vec(), points);
            assert_eq!(found.points, expect);
        };
        check(&[4.0, 1.0, 3.0, 2.0], 4, &[(1.0, 0.25), (2.0, 0.5), (3.0, 0.75), (4.0, 1.0)]);
        check(&[4.0, 1.0, 3.0, 2.0], 2, &[(2.0, 0.5), (4.0, 1.0)]);
        check(&[5.0], 100, &[(5.0, 1.0)]);
        check(&[], 100, &[]);
    }
}
