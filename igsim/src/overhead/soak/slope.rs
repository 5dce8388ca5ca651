//! Whether memory grows: a line through it over time, with an interval that knows that neighbours resemble each other.
//!
//! Knows only numbers.

use serde::{Deserialize, Serialize};

use crate::overhead::stats::{Interval, LEVEL, student_quantile};

/// The fewest points that a line is drawn through.
const MIN_POINTS: usize = 8;

/// The growth of something over time.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Slope {
    /// Growth per unit of time, by least squares.
    pub value: f64,
    /// Its 95 % interval.
    pub interval: Interval,
    /// Points it comes from.
    pub points: usize,
}

impl Slope {
    /// The least-squares line through `points` of (time, value), in order of time; `None` with fewer than 8 or without any
    /// extent in time.
    ///
    /// The standard error is that of Newey and West (1987): residuals up to `L` points apart are taken as correlated, with
    /// Bartlett's weights, `L = floor(4 (n/100)^(2/9))` (Newey and West 1994), times `n / (n-2)`; quantiles are Student's with
    /// `n - 2` degrees of freedom. With some fifty points and a correlation of 0.5 between neighbours the interval covers
    /// the slope in about 89 % of cases instead of 95 %, and one for independent residuals in about 76 % (both by the
    /// simulation in the tests).
    pub fn of(points: &[(f64, f64)]) -> Option<Slope> {
        let lag = (4.0 * (points.len() as f64 / 100.0).powf(2.0 / 9.0)) as usize;
        Slope::with_lag(points, lag)
    }

    fn with_lag(points: &[(f64, f64)], lag: usize) -> Option<Slope> {
        let n = points.len() as f64;
        let mean = |pick: fn(&(f64, f64)) -> f64| points.iter().map(pick).sum::<f64>() / n;
        let (x_mean, y_mean) = (mean(|p| p.0), mean(|p| p.1));
        let extent: f64 = points.iter().map(|(x, _)| (x - x_mean).powi(2)).sum();
        if points.len() < MIN_POINTS || extent <= 0.0 {
            return None;
        }
        let value = points.iter().map(|(x, y)| (x - x_mean) * (y - y_mean)).sum::<f64>() / extent;
        let score = |(x, y): &(f64, f64)| (x - x_mean) * (y - y_mean - value * (x - x_mean));
        let scores: Vec<f64> = points.iter().map(score).collect();
        let covariance = |l: usize| scores.iter().zip(&scores[l..]).map(|(a, b)| a * b).sum::<f64>();
        let weight = |l: usize| 1.0 - l as f64 / (lag + 1) as f64;
        let long_run = covariance(0) + 2.0 * (1..=lag).map(|l| weight(l) * covariance(l)).sum::<f64>();
        // Bartlett's weights cannot make it negative; rounding can.
        let error = (long_run.max(0.0) * n / (n - 2.0)).sqrt() / extent;
        let reach = error * student_quantile(n - 2.0, 0.5 + LEVEL / 2.0);
        let interval = Interval { low: value - reach, high: value + reach };
        Some(Slope { value, interval, points: points.len() })
    }
}

/// Medians of the values in each `width` of time, at its middle. Values of a part that is not over are left out.
pub(super) fn medians(values: &[(f64, f64)], from: f64, width: f64) -> Vec<(f64, f64)> {
    let mut parts: Vec<Vec<f64>> = Vec::new();
    for (time, value) in values.iter().filter(|(time, _)| *time >= from) {
        let part = ((time - from) / width) as usize;
        if parts.len() <= part {
            parts.resize(part + 1, Vec::new());
        }
        parts[part].push(*value);
    }
    parts.pop();
    let middle = |i: usize| from + (i as f64 + 0.5) * width;
    let points = parts.into_iter().enumerate().filter_map(|(i, mut part)| {
        part.sort_by(f64::total_cmp);
        let upper = *part.get(part.len() / 2)?;
        let lower = part[(part.len() - 1) / 2];
        Some((middle(i), (lower + upper) / 2.0))
    });
    points.collect()
}

#[cfg(test)]
mod tests {
    use rand_distr::{Distribution, StandardNormal};
    use shared::rng::Seed;

    use super::*;

    #[test]
    fn a_line_is_found_exactly() {
        let line: Vec<_> = (0..20).map(|i| (f64::from(i), 3.0 + 0.25 * f64::from(i))).collect();
        let slope = Slope::of(&line).unwrap();
        assert!((slope.value - 0.25).abs() < 1e-12 && slope.interval.half() < 1e-9, "{slope:?}");
        assert_eq!(Slope::of(&line[..7]), None);
        assert_eq!(Slope::of(&[(1.0, 2.0); 9]), None);
    }

    #[test]
    fn the_interval_is_that_of_newey_and_west() {
        // Values computed by hand from the definition, with exact fractions: residuals of an alternating sequence around its
        // line, whose neighbours are opposed, so that every lag narrows the interval.
        let y = [1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0];
        let points: Vec<_> = y.iter().enumerate().map(|(i, y)| (i as f64, *y)).collect();
        // x - mean = -4..4, extent 60, slope 0, residuals y - 1/9; scores (x - mean)(y - 1/9).
        let residual = |i: usize| y[i] - 1.0 / 9.0;
        let score = |i: usize| (i as f64 - 4.0) * residual(i);
        let s0: f64 = (0..9).map(|i| score(i).powi(2)).sum();
        let s1: f64 = (0..8).map(|i| score(i) * score(i + 1)).sum();
        // t with 7 degrees of freedom, 97.5 %: 2.3646 (any table).
        let half = |long_run: f64| 2.364_624 * (long_run * 9.0 / 7.0).sqrt() / 60.0;
        for (lag, long_run) in [(0, s0), (1, s0 + s1)] {
            let slope = Slope::with_lag(&points, lag).unwrap();
            assert!(slope.value.abs() < 1e-12);
            assert!((slope.interval.half() / half(long_run) - 1.0).abs() < 1e-5, "lag {lag}: {slope:?}");
        }
        assert!(s1 < 0.0);
    }

    /// Share of runs of `n` values with a correlation of `rho` between neighbours whose interval holds the true slope.
    fn coverage(n: usize, rho: f64, lag: Option<usize>) -> f64 {
        let mut stream = Seed(11).stream("soak/slope");
        let mut draw = || -> f64 { StandardNormal.sample(stream.rng()) };
        let holds = |points: &[(f64, f64)]| {
            let slope = lag.map_or_else(|| Slope::of(points), |lag| Slope::with_lag(points, lag)).unwrap();
            slope.interval.contains(0.3)
        };
        let runs = 2_000;
        let mut held = 0;
        for _ in 0..runs {
            let mut noise = draw() / (1.0 - rho * rho).sqrt();
            let points: Vec<_> = (0..n)
                .map(|i| {
                    noise = rho * noise + draw();
                    (i as f64, 0.3 * i as f64 + noise)
                })
                .collect();
            held += usize::from(holds(&points));
        }
        held as f64 / runs as f64
    }

    #[test]
    fn the_interval_covers_what_its_documentation_says() {
        let (white, correlated, naive) = (coverage(48, 0.0, None), coverage(48, 0.5, None), coverage(48, 0.5, Some(0)));
        assert!((0.90..0.96).contains(&white), "{white}");
        assert!((0.86..0.92).contains(&correlated), "{correlated}");
        assert!((0.72..0.80).contains(&naive), "{naive}");
    }

    #[test]
    fn medians_leave_out_what_is_before_and_what_is_not_over() {
        let values: Vec<_> = (0..35).map(|s| (f64::from(s), if s == 17 { 1e9 } else { f64::from(s) })).collect();
        assert_eq!(medians(&values, 10.0, 10.0), [(15.0, 14.5), (25.0, 24.5)]);
        assert_eq!(medians(&values, 40.0, 10.0), []);
    }
}
