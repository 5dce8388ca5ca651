//! Records of candidates, held until the edge has judged: a ring bounded in bytes and time.
//!
//! A record and the verdict on its trace may come in either order, so verdicts are remembered as long as records are. What is evicted
//! or outlives its time is counted. Reads no clock; `now` is an argument.

use std::collections::VecDeque;
use std::sync::Arc;

use rustc_hash::FxHashMap;

use crate::ids::{InstanceId, TraceId};
use crate::time::{Dur, Time};
use crate::trace::policy::Hold;
use crate::trace::record::Closed;
use crate::trace::stats::Counters;

/// The most verdicts that are remembered; the oldest ones go first.
const MAX_VERDICTS: usize = 65_536;
/// What a record costs beside its facts: its places in the ring and in the index.
const BESIDE: usize = 128;

/// A service instance's part of a trace.
type Part = (InstanceId, TraceId);

/// The ring.
pub(super) struct Held {
    limit: usize,
    time: Dur,
    /// In the order in which they were closed; `None` where one was taken out.
    ring: VecDeque<Option<Entry>>,
    /// The number of the first place of the ring.
    first: u64,
    places: FxHashMap<Part, Vec<u64>>,
    bytes: usize,
    /// Verdicts in their order, and until when each holds.
    verdicts: VecDeque<(Time, Part)>,
    kept: FxHashMap<Part, Time>,
    counters: Arc<Counters>,
}

struct Entry {
    closed: Time,
    bytes: usize,
    record: Box<dyn Closed>,
}

fn part(record: &dyn Closed) -> Part {
    let head = record.head();
    (head.instance, head.trace_id)
}

impl Held {
    pub(super) fn new(hold: Hold, counters: Arc<Counters>) -> Held {
        Held {
            limit: hold.bytes,
            time: hold.time,
            ring: VecDeque::new(),
            first: 0,
            places: FxHashMap::default(),
            bytes: 0,
            verdicts: VecDeque::new(),
            kept: FxHashMap::default(),
            counters,
        }
    }

    /// Holds a record of a candidate, or gives it back if its trace is kept.
    pub(super) fn put(&mut self, record: Box<dyn Closed>) -> Option<Box<dyn Closed>> {
        let (part, closed) = (part(&*record), record.ending().closed);
        self.expire(closed);
        if self.kept.contains_key(&part) {
            return Some(record);
        }
        let bytes = record.bytes() + BESIDE;
        self.bytes += bytes;
        self.places.entry(part).or_default().push(self.first + self.ring.len() as u64);
        self.ring.push_back(Some(Entry { closed, bytes, record }));
        while self.bytes > self.limit {
            if self.drop_first() {
                self.counters.evicted.add(1);
            }
        }
        None
    }

    /// Takes out what `instance` holds of these traces, and what it closes of them later comes back from [`Held::put`].
    pub(super) fn keep(&mut self, now: Time, instance: InstanceId, traces: &[TraceId]) -> Vec<Box<dyn Closed>> {
        self.expire(now);
        let mut out = Vec::new();
        for trace in traces {
            let part = (instance, *trace);
            let until = now.saturating_add(self.time);
            if self.kept.insert(part, until).is_none() {
                self.verdicts.push_back((until, part));
            }
            for place in self.places.remove(&part).unwrap_or_default() {
                let entry = self.ring.get_mut((place - self.first) as usize).and_then(Option::take);
                if let Some(entry) = entry {
                    self.bytes -= entry.bytes;
                    out.push(entry.record);
                }
            }
        }
        while self.verdicts.len() > MAX_VERDICTS {
            self.forget_first();
        }
        self.drop_gaps();
        out
    }

    /// When something expires next.
    pub(super) fn next_wakeup(&self) -> Time {
        let first = self.ring.front().and_then(Option::as_ref);
        first.map_or(Time::MAX, |entry| entry.closed.saturating_add(self.time))
    }

    /// Drops what is older than may be at `now`.
    pub(super) fn expire(&mut self, now: Time) {
        while self.next_wakeup() <= now {
            self.drop_first();
            self.counters.expired.add(1);
        }
        while self.verdicts.front().is_some_and(|(until, _)| *until <= now) {
            self.forget_first();
        }
    }

    /// Drops everything: no verdict comes any more.
    pub(super) fn clear(&mut self) {
        self.counters.expired.add(self.ring.iter().flatten().count());
        self.ring.clear();
        self.places.clear();
        self.bytes = 0;
    }

    /// Drops the oldest record; false if its place was empty.
    fn drop_first(&mut self) -> bool {
        let Some(first) = self.ring.pop_front() else { return false };
        let place = self.first;
        self.first += 1;
        let Some(entry) = first else { return false };
        self.bytes -= entry.bytes;
        let part = part(&*entry.record);
        if let Some(places) = self.places.get_mut(&part) {
            places.retain(|p| *p != place);
            if places.is_empty() {
                self.places.remove(&part);
            }
        }
        self.drop_gaps();
        true
    }

    /// The first place is never empty, so that it says what expires next.
    fn drop_gaps(&mut self) {
        while matches!(self.ring.front(), Some(None)) {
            self.ring.pop_front();
            self.first += 1;
        }
    }

    fn forget_first(&mut self) {
        if let Some((_, part)) = self.verdicts.pop_front() {
            self.kept.remove(&part);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::any::Any;

    use proptest::prelude::*;

    use super::*;
    use crate::ids::SpanId;
    use crate::trace::otlp_bytes::Encoder;
    use crate::trace::record::{Ending, Head};
    use crate::trace::span::Span;

    struct Weighed {
        head: Head,
        closed: Time,
        bytes: usize,
    }

    impl Closed for Weighed {
        fn head(&self) -> &Head {
            &self.head
        }
        fn ending(&self) -> Ending {
            Ending { closed: self.closed, abandoned: false, cut: 0 }
        }
        fn fold(&self, _: &mut Vec<Span>) {}
        fn encode(&self, _: &mut Encoder) {}
        fn emptied(self: Box<Self>) -> Box<dyn Any + Send> {
            self
        }
        fn bytes(&self) -> usize {
            self.bytes
        }
    }

    fn at(seconds: u64) -> Time {
        Time::ZERO.saturating_add(Dur::from_secs(seconds))
    }

    fn record(trace: u128, instance: u16, closed: Time, bytes: usize) -> Box<dyn Closed> {
        let head = Head {
            trace_id: TraceId::new(trace).unwrap(),
            span_id: SpanId::new(1).unwrap(),
            parent: None,
            tracestate: None,
            instance: InstanceId(instance),
            opened: Time::ZERO,
            detail: 2,
            naming: Default::default(),
        };
        Box::new(Weighed { head, closed, bytes })
    }

    fn held(bytes: usize) -> Held {
        Held::new(Hold { bytes, time: Dur::from_secs(60) }, Arc::default())
    }

    fn keep(held: &mut Held, now: Time, instance: u16, traces: &[u128]) -> Vec<u128> {
        let ids: Vec<_> = traces.iter().map(|t| TraceId::new(*t).unwrap()).collect();
        held.keep(now, InstanceId(instance), &ids).iter().map(|r| r.head().trace_id.get()).collect()
    }

    fn counts(held: &Held) -> (u64, u64) {
        (held.counters.expired.get(), held.counters.evicted.get())
    }

    #[test]
    fn what_is_kept_comes_out_once_and_only_of_its_instance() {
        let mut held = held(1 << 20);
        for (trace, instance) in [(1, 0), (2, 0), (1, 1), (1, 0)] {
            assert!(held.put(record(trace, instance, at(1), 100)).is_none());
        }
        assert_eq!(keep(&mut held, at(2), 0, &[1, 3]), [1, 1]);
        assert_eq!(keep(&mut held, at(2), 0, &[1]), [0u128; 0]);
        assert_eq!(keep(&mut held, at(2), 1, &[1, 2]), [1]);
        held.clear();
        assert_eq!((counts(&held), held.bytes), ((1, 0), 0), "trace 2 of instance 0");
    }

    #[test]
    fn a_record_may_come_after_its_verdict() {
        let mut held = held(1 << 20);
        assert_eq!(keep(&mut held, at(0), 0, &[1]), [0u128; 0]);
        assert!(held.put(record(1, 0, at(59), 100)).is_some());
        assert!(held.put(record(1, 1, at(59), 100)).is_none(), "another instance's part");
        assert!(held.put(record(1, 0, at(60), 100)).is_none(), "the verdict is forgotten by now");
    }

    #[test]
    fn the_oldest_give_way_to_the_bound_and_to_time() {
        let mut held = held(4 * (100 + BESIDE));
        (1..=6).for_each(|trace| assert!(held.put(record(trace, 0, at(trace as u64), 100)).is_none()));
        assert_eq!(counts(&held), (0, 2));
        assert_eq!(keep(&mut held, at(7), 0, &[1, 2, 4]), [4]);
        assert_eq!(held.next_wakeup(), at(63));
        held.expire(at(65));
        assert_eq!(counts(&held), (2, 2), "3 and 5");
        assert_eq!(keep(&mut held, at(65), 0, &[6]), [6]);
        assert_eq!((held.bytes, held.ring.len(), held.places.len()), (0, 0, 0));
    }

    #[test]
    fn one_record_larger_than_the_bound_is_not_held() {
        let mut held = held(50);
        assert!(held.put(record(1, 0, at(0), 100)).is_none());
        assert_eq!((counts(&held), held.bytes), ((0, 1), 0));
    }

    #[test]
    fn verdicts_are_bounded() {
        let mut held = held(1 << 20);
        for chunk in (1..=MAX_VERDICTS as u128 + 100).collect::<Vec<_>>().chunks(1000) {
            keep(&mut held, at(0), 0, chunk);
        }
        assert_eq!((held.verdicts.len(), held.kept.len()), (MAX_VERDICTS, MAX_VERDICTS));
    }

    proptest! {
        /// Whatever comes in whatever order: bounds hold, and every record comes out, expires or is evicted, once.
        #[test]
        fn records_are_conserved(
            steps in proptest::collection::vec((1u128..12, 0u16..3, 0u64..20, 10usize..400, any::<bool>()), 1..300),
        ) {
            let mut held = held(3_000);
            let (mut now, mut put, mut out) = (0, 0u64, 0u64);
            for (trace, instance, gap, bytes, keeps) in steps {
                now += gap;
                if keeps {
                    out += keep(&mut held, at(now), instance, &[trace]).len() as u64;
                } else {
                    put += 1;
                    out += u64::from(held.put(record(trace, instance, at(now), bytes)).is_some());
                }
                prop_assert!(held.bytes <= 3_000);
                let inside: usize = held.ring.iter().flatten().map(|e| e.bytes).sum();
                prop_assert_eq!(inside, held.bytes);
                let named: usize = held.places.values().map(Vec::len).sum();
                prop_assert_eq!(named, held.ring.iter().flatten().count());
                prop_assert!(held.ring.iter().flatten().all(|e| at(now).since(e.closed) < Dur::from_secs(60)));
            }
            held.clear();
            let (expired, evicted) = counts(&held);
            prop_assert_eq!(put, out + expired + evicted);
        }
    }
}
