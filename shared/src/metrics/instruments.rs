//! What is counted where things happen: atomics, never a lock but for a value whose trace is kept.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::metrics::{Distribution, Exemplar, Place};
use crate::time::{Dur, Time};

/// A number that only goes up.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds one.
    #[inline]
    pub fn one(&self) {
        self.add(1);
    }

    /// Adds `n`.
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The number so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Counts of values by size, with a sum that is exact, and for each bucket the newest value whose trace is kept.
#[derive(Debug)]
pub struct Histogram {
    bounds: &'static [f64],
    counts: Box<[AtomicU64]>,
    /// In steps of a value of 1 / `scale`.
    sum: AtomicU64,
    scale: f64,
    /// Empty until the first one.
    exemplars: Mutex<Vec<Option<Exemplar>>>,
}

impl Histogram {
    /// Of durations, with bounds in seconds.
    pub fn seconds(bounds: &'static [f64]) -> Histogram {
        Histogram::new(bounds, 1e9)
    }

    /// Of whole numbers.
    pub fn whole(bounds: &'static [f64]) -> Histogram {
        Histogram::new(bounds, 1.0)
    }

    fn new(bounds: &'static [f64], scale: f64) -> Histogram {
        let counts = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Histogram { bounds, counts, sum: AtomicU64::new(0), scale, exemplars: Mutex::default() }
    }

    /// Records a duration; `found` is where and when, if its trace is kept.
    pub fn record(&self, value: Dur, found: Option<(Place, Time)>) {
        self.record_raw(value.as_nanos(), found);
    }

    /// Records a whole number; `found` is where and when, if its trace is kept.
    pub fn record_whole(&self, value: u64, found: Option<(Place, Time)>) {
        self.record_raw(value, found);
    }

    fn record_raw(&self, raw: u64, found: Option<(Place, Time)>) {
        let value = raw as f64 / self.scale;
        let bucket = self.bounds.iter().position(|bound| value <= *bound).unwrap_or(self.bounds.len());
        self.counts[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add(raw, Ordering::Relaxed);
        if let Some((place, at)) = found {
            let mut exemplars = self.exemplars();
            exemplars.resize(self.counts.len(), None);
            exemplars[bucket] = Some(Exemplar { place, value, at });
        }
    }

    /// The counts at this moment.
    pub fn read(&self) -> Distribution {
        let exemplars = self.exemplars().iter().enumerate().filter_map(|(i, e)| Some((i, (*e)?))).collect();
        Distribution {
            bounds: self.bounds,
            counts: self.counts.iter().map(|c| c.load(Ordering::Relaxed)).collect(),
            sum: self.sum.load(Ordering::Relaxed) as f64 / self.scale,
            exemplars,
        }
    }

    fn exemplars(&self) -> MutexGuard<'_, Vec<Option<Exemplar>>> {
        self.exemplars.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{SpanId, TraceId};

    #[test]
    fn bounds_are_inclusive_and_the_last_bucket_has_none() {
        let histogram = Histogram::seconds(&[0.1, 1.0]);
        for ms in [1, 100, 101, 1000, 1001, 5000] {
            histogram.record(Dur::from_millis(ms), None);
        }
        let read = histogram.read();
        assert_eq!((read.counts.as_slice(), read.count(), read.sum), (&[2, 2, 2][..], 6, 7.203));
        assert_eq!(read.exemplars, []);
    }

    #[test]
    fn the_newest_kept_value_of_a_bucket_is_its_exemplar() {
        let histogram = Histogram::whole(&[1.0, 4.0]);
        let place = |n| Place { trace_id: TraceId::new(n).unwrap(), span_id: SpanId::new(9).unwrap() };
        for (n, value) in [(1, 3), (2, 4), (3, 90)] {
            histogram.record_whole(value, Some((place(n), Time::from_nanos(n as u64))));
        }
        histogram.record_whole(2, None);
        let found: Vec<_> =
            histogram.read().exemplars.iter().map(|(i, e)| (*i, e.place.trace_id.get(), e.value)).collect();
        assert_eq!(found, [(1, 2, 4.0), (2, 3, 90.0)]);
    }
}
