//! The studentised bootstrap, shown beside Student's interval for those who doubt that block means are normal.

use shared::rng::Stream;

use super::{Interval, LEVEL, Moments};

/// Resamples of one interval: its ends then vary by about 3 % of its width from seed to seed.
const RESAMPLES: usize = 2_000;

/// Fewer values have too few different resamples for a 95 % interval.
const FEWEST: usize = 5;

/// The bootstrap-t interval of the mean at [`LEVEL`] (Efron and Tibshirani, An Introduction to the Bootstrap, 12.5).
///
/// Resamples in which all values are equal have no t and are left out; nothing comes back below five values, or where half of the
/// resamples or more are left out although the values differ. Values that are all equal give an interval of no width.
pub fn bootstrap_t(values: &[f64], stream: &mut Stream) -> Option<Interval> {
    let whole = Moments::of(values)?;
    if whole.n < FEWEST {
        return None;
    }
    if whole.se == 0.0 {
        return Some(Interval { low: whole.mean, high: whole.mean });
    }
    let mut drawn = vec![0.0; values.len()];
    let mut ts: Vec<f64> = (0..RESAMPLES).filter_map(|_| resampled(values, &whole, &mut drawn, stream)).collect();
    if ts.len() * 2 <= RESAMPLES {
        return None;
    }
    ts.sort_by(f64::total_cmp);
    let (low, high) = (quantile(&ts, 0.5 - LEVEL / 2.0), quantile(&ts, 0.5 + LEVEL / 2.0));
    Some(Interval { low: whole.mean - high * whole.se, high: whole.mean - low * whole.se })
}

/// The t of one resample against the mean of all values.
fn resampled(values: &[f64], whole: &Moments, drawn: &mut [f64], stream: &mut Stream) -> Option<f64> {
    drawn.fill_with(|| values[stream.below(values.len())]);
    let part = Moments::of(drawn)?;
    // A resample of one value repeated has a spread of rounding errors only.
    (part.se > whole.se * 1e-9).then(|| (part.mean - whole.mean) / part.se)
}

/// The quantile of sorted values, between neighbours in proportion (definition 7 of Hyndman and Fan, 1996).
fn quantile(sorted: &[f64], p: f64) -> f64 {
    let at = p * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    below + (above - below) * at.fract()
}
