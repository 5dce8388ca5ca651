//! Intervals against published figures, and how often they hold the truth when the truth is known.

use proptest::prelude::*;
use rand_distr::{Distribution, LogNormal, Normal};
use shared::rng::Seed;

use super::*;

fn near(found: f64, expect: f64, tolerance: f64) {
    assert!((found - expect).abs() <= tolerance, "{found} is not {expect}");
}

#[test]
fn the_interval_of_a_mean_is_students() {
    // The sleep data of Student's own paper (Biometrika 6, 1908): R gives t = -4.0621, p = 0.002833, interval -2.4599 .. -0.7001.
    let sleep = [-1.2, -2.4, -1.3, -1.3, 0.0, -1.0, -1.8, -0.8, -4.6, -1.4];
    let m = Moments::of(&sleep).unwrap();
    near(m.mean / m.se, -4.0621, 5e-5);
    near(m.p_value(), 0.002833, 5e-7);
    let i = m.interval(LEVEL);
    near(i.low, -2.4599, 5e-5);
    near(i.high, -0.7001, 5e-5);
}

#[test]
fn too_little_is_nothing_and_no_spread_is_no_width() {
    assert_eq!(Moments::of(&[]), None);
    assert_eq!(Moments::of(&[1.0]), None);
    assert_eq!(Moments::of(&[1.0, f64::NAN]), None);
    let same = Moments::of(&[0.25; 6]).unwrap();
    assert_eq!((same.interval(LEVEL), same.p_value()), (Interval { low: 0.25, high: 0.25 }, 0.0));
    assert_eq!(Moments::of(&[0.0; 6]).unwrap().p_value(), 1.0);
    let mut stream = Seed(1).stream("t");
    assert_eq!(bootstrap_t(&[0.25; 6], &mut stream), Some(Interval { low: 0.25, high: 0.25 }));
    assert_eq!(bootstrap_t(&[0.1, 0.2, 0.3, 0.4], &mut stream), None);
    // All values but one are the same: a third of the resamples has no spread, the rest still makes an interval.
    let lone = bootstrap_t(&[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0], &mut stream).unwrap();
    assert!(lone.low.is_finite() && lone.high.is_finite(), "{lone:?}");
}

#[test]
fn holm_adjusts_as_r_does() {
    // R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") gives 0.03 0.06 0.06 0.02.
    let found: Vec<f64> = holm(&[0.01, 0.04, 0.03, 0.005]).iter().map(|a| (a.p * 1e9).round() / 1e9).collect();
    assert_eq!(found, [0.03, 0.06, 0.06, 0.02]);
    assert_eq!(holm(&[]), []);
    assert_eq!(holm(&[0.2]), [Adjusted { p: 0.2, level: LEVEL }]);
}

#[test]
fn fiellers_interval_holds_exactly_the_ratios_that_a_test_allows() {
    let pairs: Vec<(f64, f64)> =
        (0..20).map(|i| (5.0 + f64::from(i % 5), 20.0 + f64::from(i % 7) + 0.5 * f64::from(i % 5))).collect();
    let found = ratio_of_means(&pairs).unwrap();
    let interval = found.interval.unwrap();
    let p = |r: f64| Moments::of(&pairs.iter().map(|(x, y)| x - r * y).collect::<Vec<_>>()).unwrap().p_value();
    near(p(interval.low), 0.05, 1e-9);
    near(p(interval.high), 0.05, 1e-9);
    assert!(interval.contains(found.ratio));
    let around_zero: Vec<(f64, f64)> = (0..20).map(|i| (5.0, f64::from(i % 5) - 2.1)).collect();
    assert_eq!(ratio_of_means(&around_zero).unwrap().interval, None);
}

/// How often each interval of 20 values holds their true mean.
fn coverage(draw: impl Fn(&mut shared::rng::Stream) -> f64, truth: f64, runs: usize) -> (f64, f64) {
    let mut stream = Seed(20).stream("coverage");
    let (mut t, mut boot) = (0, 0);
    for _ in 0..runs {
        let values: Vec<f64> = (0..20).map(|_| draw(&mut stream)).collect();
        t += usize::from(Moments::of(&values).unwrap().interval(LEVEL).contains(truth));
        boot += usize::from(bootstrap_t(&values, &mut stream).unwrap().contains(truth));
    }
    (t as f64 / runs as f64, boot as f64 / runs as f64)
}

/// With 1,000 runs of a true 95 % the standard deviation of a coverage is 0.7 points.
#[test]
fn both_intervals_hold_the_truth_as_often_as_they_say() {
    let normal = Normal::new(0.03, 0.05).unwrap();
    let (t, boot) = coverage(|s| normal.sample(s.rng()), 0.03, 1_000);
    assert!((0.93..=0.97).contains(&t) && (0.93..=0.97).contains(&boot), "normal: t {t}, bootstrap-t {boot}");
    // A skew of 1, as of latencies with rare slow blocks: both lose a little, and stay within the bounds of the calibration.
    let skewed = LogNormal::new(0.0, 0.31).unwrap();
    let (t, boot) = coverage(|s| skewed.sample(s.rng()), (0.31_f64 * 0.31 / 2.0).exp(), 1_000);
    assert!((0.92..=0.98).contains(&t) && (0.92..=0.98).contains(&boot), "skewed: t {t}, bootstrap-t {boot}");
}

/// What the resolution promises: at that distance from a bound, the interval clears it in 80 % of runs.
#[test]
fn the_resolution_has_the_power_that_it_promises() {
    let mut stream = Seed(21).stream("power");
    let (sd, n) = (0.05, 20_usize);
    let shift = Moments { n, mean: 0.0, se: sd / (n as f64).sqrt() }.resolution();
    let noise = Normal::new(shift, sd).unwrap();
    let clears = |_: &usize| {
        let values: Vec<f64> = (0..n).map(|_| noise.sample(stream.rng())).collect();
        Moments::of(&values).unwrap().interval(LEVEL).low > 0.0
    };
    let power = (0..2_000_usize).filter(clears).count() as f64 / 2_000.0;
    near(power, POWER, 0.03);
}

proptest! {
    #[test]
    fn an_adjusted_interval_excludes_zero_exactly_where_holm_rejects(
        means in prop::collection::vec((-4.0f64..4.0, 0.1f64..2.0), 1..30),
    ) {
        let family: Vec<Moments> = means.iter().map(|&(mean, se)| Moments { n: 20, mean, se }).collect();
        let adjusted = holm(&family.iter().map(Moments::p_value).collect::<Vec<_>>());
        for (m, a) in family.iter().zip(&adjusted) {
            prop_assert!(a.p >= m.p_value() && a.p <= 1.0 && a.level >= LEVEL);
            prop_assert_eq!(!m.interval(a.level).contains(0.0), a.p <= 0.05, "{:?} {:?}", m, a);
        }
    }

    #[test]
    fn scaling_the_values_scales_the_interval(
        values in prop::collection::vec(-1.0f64..1.0, 2..40), scale in 0.01f64..100.0,
    ) {
        let scaled: Vec<f64> = values.iter().map(|v| v * scale).collect();
        let (a, b) = (Moments::of(&values).unwrap().interval(LEVEL), Moments::of(&scaled).unwrap().interval(LEVEL));
        prop_assert!((a.low * scale - b.low).abs() < 1e-9 * scale && (a.high * scale - b.high).abs() < 1e-9 * scale);
    }
}
