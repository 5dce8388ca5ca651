//! Inference on the means of few blocks: intervals, adjusted p-values, ratios of means.
//!
//! Knows nothing of blocks, arms or latencies. A run looks once, at its end, after a number of rounds that was fixed before: no
//! interval here is corrected for repeated looks.

mod bootstrap;
mod student;

pub use bootstrap::bootstrap_t;
pub use student::{normal_cdf, student_cdf, student_quantile};

use serde::{Deserialize, Serialize};

/// The confidence level of every interval that is not adjusted.
pub const LEVEL: f64 = 0.95;

/// The probability of a right conclusion for which resolutions are given.
pub const POWER: f64 = 0.8;

/// A closed range of values.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// The lower bound.
    pub low: f64,
    /// The upper bound.
    pub high: f64,
}

impl Interval {
    /// Whether `value` lies within, bounds included.
    pub fn contains(&self, value: f64) -> bool {
        self.low <= value && value <= self.high
    }

    /// The interval of an increasing function of the value.
    pub fn map(self, f: impl Fn(f64) -> f64) -> Interval {
        Interval { low: f(self.low), high: f(self.high) }
    }

    /// The largest absolute value in it.
    pub fn reach(&self) -> f64 {
        self.low.abs().max(self.high.abs())
    }

    /// Half of its width.
    pub fn half(&self) -> f64 {
        (self.high - self.low) / 2.0
    }
}

/// What is known of a mean from independent values.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Moments {
    /// Values, at least 2.
    pub n: usize,
    /// Their arithmetic mean.
    pub mean: f64,
    /// The standard error of the mean.
    pub se: f64,
}

impl Moments {
    /// Of at least two finite values; nothing otherwise.
    pub fn of(values: &[f64]) -> Option<Moments> {
        let n = values.len();
        if n < 2 || values.iter().any(|v| !v.is_finite()) {
            return None;
        }
        let mean = values.iter().sum::<f64>() / n as f64;
        let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
        Some(Moments { n, mean, se: (squares / (n - 1) as f64 / n as f64).sqrt() })
    }

    /// Degrees of freedom.
    pub fn df(&self) -> f64 {
        (self.n - 1) as f64
    }

    /// Student's interval of the mean at confidence `level`.
    pub fn interval(&self, level: f64) -> Interval {
        let half = student_quantile(self.df(), 0.5 + level / 2.0) * self.se;
        Interval { low: self.mean - half, high: self.mean + half }
    }

    /// Two-sided p-value of Student's test that the mean is 0.
    pub fn p_value(&self) -> f64 {
        if self.se > 0.0 {
            return (2.0 * student_cdf(self.df(), -(self.mean / self.se).abs())).min(1.0);
        }
        if self.mean == 0.0 { 1.0 } else { 0.0 }
    }

    /// The distance from a bound at which a 95 % interval clears it with probability [`POWER`].
    ///
    /// `(t(0.975) + t(POWER)) * se`, the usual approximation of the noncentral t distribution by a shifted one (Cohen, Statistical
    /// Power Analysis, 2.5; error below 2 % of the distance from 10 degrees of freedom on).
    pub fn resolution(&self) -> f64 {
        (student_quantile(self.df(), 0.5 + LEVEL / 2.0) + student_quantile(self.df(), POWER)) * self.se
    }
}

/// One hypothesis of a family after Holm's adjustment.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Adjusted {
    /// The adjusted p-value.
    pub p: f64,
    /// The confidence level at which its interval excludes 0 exactly if the hypothesis is rejected.
    pub level: f64,
}

/// Holm's step-down adjustment (Scandinavian Journal of Statistics 6, 1979) of the p-values of one family.
///
/// The error rate of the family is `1 - LEVEL`. The hypothesis of rank `k` of `m` is tested at `alpha / (m - k + 1)`; from the first one that
/// is not rejected on, all keep its level. Intervals at these levels agree with the tests; they are not simultaneous intervals.
pub fn holm(p_values: &[f64]) -> Vec<Adjusted> {
    let alpha = 1.0 - LEVEL;
    let m = p_values.len();
    let mut order: Vec<usize> = (0..m).collect();
    order.sort_by(|&a, &b| p_values[a].total_cmp(&p_values[b]));
    let mut adjusted = vec![Adjusted { p: 1.0, level: LEVEL }; m];
    let (mut p, mut level, mut rejecting) = (0.0_f64, LEVEL, true);
    for (rank, &i) in order.iter().enumerate() {
        let left = (m - rank) as f64;
        p = p.max((p_values[i] * left).min(1.0));
        if rejecting {
            level = 1.0 - alpha / left;
            rejecting = p_values[i] <= alpha / left;
        }
        adjusted[i] = Adjusted { p, level };
    }
    adjusted
}

/// The ratio of two means of paired values, with its interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RatioOfMeans {
    /// Pairs.
    pub n: usize,
    /// Mean of the first by mean of the second.
    pub ratio: f64,
    /// Fieller's interval; none where the second mean cannot be told from 0, so that the ratio has no bounds.
    pub interval: Option<Interval>,
}

/// Fieller's interval (Journal of the Royal Statistical Society B 16, 1954) of `mean(first) / mean(second)`: all ratios `r` for which
/// `mean(first - r * second)` cannot be told from 0 at [`LEVEL`]. Nothing below two pairs or where the second mean is 0.
pub fn ratio_of_means(pairs: &[(f64, f64)]) -> Option<RatioOfMeans> {
    let (x, y): (Vec<f64>, Vec<f64>) = pairs.iter().copied().unzip();
    let (mx, my) = (Moments::of(&x)?, Moments::of(&y)?);
    let n = pairs.len();
    if my.mean == 0.0 {
        return None;
    }
    let cross: f64 = pairs.iter().map(|(a, b)| (a - mx.mean) * (b - my.mean)).sum();
    let cov = cross / (n - 1) as f64 / n as f64;
    let t2 = student_quantile(mx.df(), 0.5 + LEVEL / 2.0).powi(2);
    let a = my.mean.powi(2) - t2 * my.se.powi(2);
    let b = mx.mean * my.mean - t2 * cov;
    let c = mx.mean.powi(2) - t2 * mx.se.powi(2);
    let root = (b * b - a * c).max(0.0).sqrt();
    let interval = (a > 0.0).then(|| Interval { low: (b - root) / a, high: (b + root) / a });
    Some(RatioOfMeans { n, ratio: mx.mean / my.mean, interval })
}

#[cfg(test)]
mod tests;
