//! Student's t distribution and its limit, the normal distribution. Knows only numbers.

use std::f64::consts::PI;

/// Probability that Student's t with `df` degrees of freedom is at most `t`; `df` may be infinite.
///
/// `I_x(df/2, 1/2) / 2` with `x = df / (df + t^2)` for negative `t` (DLMF 8.17, Abramowitz and Stegun 26.7.1).
pub fn student_cdf(df: f64, t: f64) -> f64 {
    if df.is_infinite() {
        return normal_cdf(t);
    }
    let tail = 0.5 * regularised_beta(df / (df + t * t), df / 2.0, 0.5);
    if t < 0.0 { tail } else { 1.0 - tail }
}

/// The value that Student's t with `df` degrees of freedom stays below with probability `p`, `0 < p < 1`; `df` may be infinite.
pub fn student_quantile(df: f64, p: f64) -> f64 {
    assert!(df > 0.0 && p > 0.0 && p < 1.0, "no quantile {p} with {df} degrees of freedom");
    if p < 0.5 {
        return -student_quantile(df, 1.0 - p);
    }
    let mut high = 1.0;
    while student_cdf(df, high) < p && high < 1e12 {
        high *= 2.0;
    }
    let mut low = 0.0;
    // Each step halves the range: 60 of them exhaust the digits of a double.
    for _ in 0..60 {
        let middle = 0.5 * (low + high);
        if student_cdf(df, middle) < p {
            low = middle;
        } else {
            high = middle;
        }
    }
    0.5 * (low + high)
}

/// Probability that a standard normal value is at most `x`, to about 1e-14 absolute.
///
/// The Taylor series of Marsaglia (Evaluating the Normal Distribution, Journal of Statistical Software 11, 2004).
pub fn normal_cdf(x: f64) -> f64 {
    if x.abs() > 8.0 {
        return if x < 0.0 { 0.0 } else { 1.0 };
    }
    let (mut term, mut sum, mut i) = (x, x, 1.0);
    while term.abs() > 1e-17 {
        i += 2.0;
        term *= x * x / i;
        sum += term;
    }
    0.5 + sum * (-0.5 * x * x).exp() / (2.0 * PI).sqrt()
}

/// The regularised incomplete beta function `I_x(a, b)`, by its continued fraction (DLMF 8.17.22) on the side where that converges fast.
fn regularised_beta(x: f64, a: f64, b: f64) -> f64 {
    if x <= 0.0 {
        return 0.0;
    }
    if x >= 1.0 {
        return 1.0;
    }
    if x > (a + 1.0) / (a + b + 2.0) {
        return 1.0 - regularised_beta(1.0 - x, b, a);
    }
    let ln_front = a * x.ln() + b * (-x).ln_1p() - (a.ln() + ln_gamma(a) + ln_gamma(b) - ln_gamma(a + b));
    ln_front.exp() / beta_fraction(x, a, b)
}

/// The denominator `1 + d1/(1 + d2/(1 + ...))` of DLMF 8.17.22, by the modified Lentz method.
fn beta_fraction(x: f64, a: f64, b: f64) -> f64 {
    const TINY: f64 = 1e-300;
    let away_from_zero = |v: f64| if v.abs() < TINY { TINY } else { v };
    let (mut value, mut c, mut d) = (1.0, 1.0, 0.0);
    for i in 1..=10_000_u32 {
        let m = f64::from(i / 2);
        let coefficient = if i % 2 == 0 {
            m * (b - m) * x / ((a + 2.0 * m - 1.0) * (a + 2.0 * m))
        } else {
            -(a + m) * (a + b + m) * x / ((a + 2.0 * m) * (a + 2.0 * m + 1.0))
        };
        d = 1.0 / away_from_zero(1.0 + coefficient * d);
        c = away_from_zero(1.0 + coefficient / c);
        value *= c * d;
        if (c * d - 1.0).abs() < 1e-15 {
            break;
        }
    }
    value
}

/// The logarithm of the gamma function of a positive number: Stirling's series (DLMF 5.11.1) after a shift to where it is exact to 1e-14.
fn ln_gamma(x: f64) -> f64 {
    let (mut x, mut shift) = (x, 0.0);
    while x < 12.0 {
        shift += x.ln();
        x += 1.0;
    }
    let y = 1.0 / (x * x);
    let series = (1.0 / 12.0 - y * (1.0 / 360.0 - y * (1.0 / 1260.0 - y * (1.0 / 1680.0 - y / 1188.0)))) / x;
    (x - 0.5) * x.ln() - x + 0.5 * (2.0 * PI).ln() + series - shift
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNLIMITED: f64 = f64::INFINITY;

    /// Table of the t distribution as printed in NIST's e-Handbook of Statistical Methods, 1.3.6.7.2, and Abramowitz and Stegun 26.10.
    #[test]
    fn quantiles_are_those_of_the_tables() {
        let check = |df: f64, expect: [f64; 5]| {
            for (p, expect) in [0.9, 0.95, 0.975, 0.99, 0.995].into_iter().zip(expect) {
                let found = student_quantile(df, p);
                // The tables give three decimals.
                assert!((found - expect).abs() <= 0.000_51, "df {df} p {p}: {found} is not {expect}");
                assert!((student_quantile(df, 1.0 - p) + found).abs() < 1e-9, "not symmetric at df {df} p {p}");
                assert!((student_cdf(df, found) - p).abs() < 1e-12);
            }
        };
        check(1.0, [3.078, 6.314, 12.706, 31.821, 63.657]);
        check(2.0, [1.886, 2.920, 4.303, 6.965, 9.925]);
        check(5.0, [1.476, 2.015, 2.571, 3.365, 4.032]);
        check(10.0, [1.372, 1.812, 2.228, 2.764, 3.169]);
        check(19.0, [1.328, 1.729, 2.093, 2.539, 2.861]);
        check(20.0, [1.325, 1.725, 2.086, 2.528, 2.845]);
        check(30.0, [1.310, 1.697, 2.042, 2.457, 2.750]);
        check(60.0, [1.296, 1.671, 2.000, 2.390, 2.660]);
        check(UNLIMITED, [1.282, 1.645, 1.960, 2.326, 2.576]);
    }

    #[test]
    fn closed_forms_agree_to_many_digits() {
        let check = |found: f64, expect: f64| assert!((found - expect).abs() < 1e-12, "{found} is not {expect}");
        for t in [-40.0, -3.2, -1.0, -0.1, 0.0, 0.4, 2.0, 17.0_f64] {
            check(student_cdf(1.0, t), 0.5 + t.atan() / PI);
            check(student_cdf(2.0, t), 0.5 + t / (2.0 * (2.0 + t * t).sqrt()));
            let u = t / 5.0_f64.sqrt();
            let third = 2.0 / 3.0 * u / (1.0 + u * u).powi(2);
            check(student_cdf(5.0, t), 0.5 + (third + u / (1.0 + u * u) + u.atan()) / PI);
        }
        check(normal_cdf(1.0), 0.841_344_746_068_542_9);
        check(normal_cdf(-3.0), 0.001_349_898_031_630_094_6);
        check(ln_gamma(0.5), PI.sqrt().ln());
        check(ln_gamma(11.0), 3_628_800.0_f64.ln());
        assert!((student_cdf(100_000.0, 1.5) - normal_cdf(1.5)).abs() < 1e-5);
    }
}
