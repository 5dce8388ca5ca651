//! A measured curve, read between its points.

use std::collections::BTreeMap;

/// Points of a curve in whole numbers; straight between them, in proportion beyond the last.
#[derive(Clone, Debug, Default)]
pub(super) struct Curve(BTreeMap<u64, f64>);

impl Curve {
    pub(super) fn insert(&mut self, x: f64, y: f64) {
        self.0.insert(x as u64, y);
    }

    /// The last point's place.
    pub(super) fn last(&self) -> f64 {
        self.0.last_key_value().map_or(0.0, |(x, _)| *x as f64)
    }

    pub(super) fn at(&self, x: f64) -> f64 {
        let (below, above) = neighbours(&self.0, x);
        match (below, above) {
            (Some((x0, y0)), Some((x1, y1))) => between(x, x0, x1, *y0, *y1),
            (Some((x0, y0)), None) => y0 * x / x0,
            (None, Some((_, y))) => *y,
            (None, None) => 0.0,
        }
    }
}

/// An entry and where it stands.
type Place<'a, T> = (f64, &'a T);

/// The entries around `x`; the same entry twice on a point.
pub(super) fn neighbours<T>(map: &BTreeMap<u64, T>, x: f64) -> (Option<Place<'_, T>>, Option<Place<'_, T>>) {
    let place = |(x, y): (&u64, _)| (*x as f64, y);
    let below = map.range(..=x.floor() as u64).next_back().map(place);
    let above = map.range(x.ceil() as u64..).next().map(place);
    (below, above)
}

/// The value at `x` on the line through two points.
pub(super) fn between(x: f64, x0: f64, x1: f64, y0: f64, y1: f64) -> f64 {
    if x1 > x0 { y0 + (y1 - y0) * (x - x0) / (x1 - x0) } else { y0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_is_straight_between_its_points_and_in_proportion_beyond() {
        let mut curve = Curve::default();
        for (x, y) in [(2.0, 10.0), (4.0, 20.0), (8.0, 60.0)] {
            curve.insert(x, y);
        }
        assert_eq!([1.0, 2.0, 3.0, 6.0, 16.0].map(|x| curve.at(x)), [10.0, 10.0, 15.0, 40.0, 120.0]);
    }
}
