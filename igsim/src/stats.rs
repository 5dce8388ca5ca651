//! Figures of many values: latency distributions, and how many traces a sampler should keep.
//!
//! Knows nothing of requests or reports. Durations are recorded in integer nanoseconds; floating point begins at the summary.

use hdrhistogram::Histogram;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use shared::time::Dur;

/// A distribution of durations: exact count, mean, minimum and maximum, quantiles to three significant digits.
#[derive(Clone, Debug)]
pub struct Distribution {
    histogram: Histogram<u64>,
    sum: u128,
}

/// The unit of a summary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Microseconds.
    Micros,
    /// Milliseconds.
    Millis,
}

/// What a report says of a distribution, in the unit that the field's name gives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Quantiles {
    /// How many values.
    pub count: u64,
    /// Arithmetic mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 90 % are not above this.
    pub p90: f64,
    /// 95 % are not above this.
    pub p95: f64,
    /// 99 % are not above this.
    pub p99: f64,
    /// The largest.
    pub max: f64,
}

impl Default for Distribution {
    fn default() -> Distribution {
        Distribution::new()
    }
}

impl Distribution {
    /// An empty distribution.
    pub fn new() -> Distribution {
        let histogram = Histogram::new(3).expect("three significant digits are within the range of the histogram");
        Distribution { histogram, sum: 0 }
    }

    /// Adds a duration.
    pub fn record(&mut self, value: Dur) {
        self.record_n(value, 1);
    }

    /// Adds a duration `n` times.
    pub fn record_n(&mut self, value: Dur, n: u64) {
        // A resizing histogram of 64-bit values refuses none; if it did, the value must not count in the mean either.
        if self.histogram.record_n(value.as_nanos(), n).is_ok() {
            self.sum += u128::from(value.as_nanos()) * u128::from(n);
        }
    }

    /// How many values were recorded.
    pub fn count(&self) -> u64 {
        self.histogram.len()
    }

    /// The figures in `unit`; all zero when nothing was recorded.
    pub fn summary(&self, unit: Unit) -> Quantiles {
        let count = self.count();
        if count == 0 {
            return Quantiles::default();
        }
        let scale = match unit {
            Unit::Micros => 1e3,
            Unit::Millis => 1e6,
        };
        let at = |q| rounded(self.histogram.value_at_quantile(q) as f64 / scale);
        Quantiles {
            count,
            mean: rounded(self.sum as f64 / count as f64 / scale),
            p50: at(0.50),
            p90: at(0.90),
            p95: at(0.95),
            p99: at(0.99),
            max: at(1.0),
        }
    }
}

/// `value` to six decimals: below that a figure of a report is noise.
pub fn rounded(value: f64) -> f64 {
    (value * 1e6).round() / 1e6
}

/// How many of `n` independent draws of probability `p` come out, with 99 % confidence: the central interval of the binomial
/// distribution, ends included.
///
/// Weights are summed outwards from the mode by the ratio `P(k+1)/P(k) = (n-k)p / ((k+1)(1-p))`, so nothing under- or overflows.
pub fn binomial_99(n: u64, p: f64) -> (u64, u64) {
    if n == 0 || p.is_nan() || p <= 0.0 {
        return (0, 0);
    }
    if p >= 1.0 {
        return (n, n);
    }
    let odds = p / (1.0 - p);
    let mode = (((n + 1) as f64 * p) as u64).min(n);
    let up = |k: u64| (n - k) as f64 * odds / (k + 1) as f64;
    let (mut below, mut weight, mut k) = (Vec::new(), 1.0, mode);
    while k > 0 && weight > NEGLIGIBLE {
        weight /= up(k - 1);
        below.push(weight);
        k -= 1;
    }
    let first = k;
    let mut weights: Vec<f64> = below.into_iter().rev().collect();
    (weight, k) = (1.0, mode);
    weights.push(weight);
    while k < n && weight > NEGLIGIBLE {
        weight *= up(k);
        weights.push(weight);
        k += 1;
    }
    let tail = weights.iter().sum::<f64>() * 0.005;
    let skip = |weights: &mut dyn Iterator<Item = &f64>| {
        let mut sum = 0.0;
        weights.take_while(|w| (sum += **w, sum <= tail).1).count() as u64
    };
    let low = first + skip(&mut weights.iter());
    let high = first + weights.len() as u64 - 1 - skip(&mut weights.iter().rev());
    (low, high)
}

/// Relative weight below which the tail of a distribution is nothing.
const NEGLIGIBLE: f64 = 1e-18;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_distribution_knows_its_figures() {
        let mut d = Distribution::new();
        assert_eq!(d.summary(Unit::Millis), Quantiles::default());
        (1..=1000).for_each(|ms| d.record(Dur::from_millis(ms)));
        let s = d.summary(Unit::Millis);
        assert_eq!((s.count, s.mean), (1000, 500.5));
        for (found, expected) in [(s.p50, 500.0), (s.p90, 900.0), (s.p95, 950.0), (s.p99, 990.0), (s.max, 1000.0)] {
            assert!((found / expected - 1.0).abs() < 1.1e-3, "{found} is not {expected}");
        }
        assert!((d.summary(Unit::Micros).p50 / 500e3 - 1.0).abs() < 1.1e-3);
    }

    #[test]
    fn the_interval_is_that_of_the_tables() {
        // R: qbinom(c(0.005, 0.995), n, p)
        let check = |n, p, expect| assert_eq!(binomial_99(n, p), expect, "n {n} p {p}");
        check(300, 0.1, (17, 44));
        check(100, 0.5, (37, 63));
        check(10, 0.01, (0, 1));
        check(0, 0.5, (0, 0));
        check(50, 0.0, (0, 0));
        check(50, 1.0, (50, 50));
    }

    proptest! {
        #[test]
        fn the_interval_holds_the_mean_and_narrows(n in 1u64..2_000_000, p in 0.0001f64..0.9999) {
            let (low, high) = binomial_99(n, p);
            let mean = n as f64 * p;
            prop_assert!(low as f64 <= mean.ceil() && mean.floor() <= high as f64 && high <= n);
            let half = (high - low) as f64 / 2.0;
            let normal = 2.5758 * (mean * (1.0 - p)).sqrt();
            prop_assert!(half <= normal + 2.0 && half >= normal - 2.0, "{low}..{high} around {mean}");
        }
    }
}
