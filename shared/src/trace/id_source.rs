//! Where trace and span ids come from: the operating system's randomness in live runs, the seed in virtual ones.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::ids::{SpanId, TraceId};
use crate::rng::{Seed, Stream, mix64};

/// A source of ids for all threads of a process.
#[derive(Debug)]
pub(crate) enum IdSource {
    /// A counter mixed with random keys: no lock and no system call per id, and no id twice in a process.
    Live { keys: [u64; 3], next: AtomicU64 },
    /// A named stream of the run's seed.
    Seeded(Box<Mutex<Stream>>),
}

impl IdSource {
    pub(crate) fn live() -> IdSource {
        let mut os = Stream::from_os();
        IdSource::Live { keys: std::array::from_fn(|_| os.next_u64()), next: AtomicU64::new(0) }
    }

    /// Ids that repeat with the seed.
    pub(crate) fn seeded(seed: Seed) -> IdSource {
        IdSource::seeded_as(seed, "trace-ids")
    }

    /// Ids that repeat with the seed, from the stream called `name`.
    pub(crate) fn seeded_as(seed: Seed, name: &str) -> IdSource {
        IdSource::Seeded(Box::new(Mutex::new(seed.stream(name))))
    }

    pub(crate) fn trace_id(&self) -> TraceId {
        loop {
            let [high, low] = self.draw([0, 1]);
            if let Some(id) = TraceId::new(u128::from(high) << 64 | u128::from(low)) {
                return id;
            }
        }
    }

    pub(crate) fn span_id(&self) -> SpanId {
        loop {
            let [value] = self.draw([2]);
            if let Some(id) = SpanId::new(value) {
                return id;
            }
        }
    }

    fn draw<const N: usize>(&self, key: [usize; N]) -> [u64; N] {
        match self {
            IdSource::Live { keys, next } => {
                let n = mix64(next.fetch_add(1, Ordering::Relaxed));
                key.map(|k| mix64(keys[k] ^ n))
            }
            IdSource::Seeded(stream) => {
                let mut stream = stream.lock().unwrap_or_else(PoisonError::into_inner);
                key.map(|_| stream.next_u64())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn live_ids_differ_and_spread_over_all_bits() {
        let ids = IdSource::live();
        let spans: HashSet<u64> = (0..10_000).map(|_| ids.span_id().get()).collect();
        assert_eq!(spans.len(), 10_000);
        for bit in 0..64 {
            let ones = spans.iter().filter(|id| **id >> bit & 1 == 1).count();
            // Ten standard deviations around one half.
            assert!((4_500..5_500).contains(&ones), "bit {bit}: {ones}");
        }
        assert_ne!(IdSource::live().trace_id(), IdSource::live().trace_id());
    }

    #[test]
    fn seeded_ids_repeat_with_the_seed() {
        let first = |seed| IdSource::seeded(Seed(seed)).trace_id();
        assert_eq!(first(1), first(1));
        assert_ne!(first(1), first(2));
    }
}
