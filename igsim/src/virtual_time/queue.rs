//! The event queue of virtual time: ordered by time, then class, then order of insertion.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use shared::time::Time;

/// A queue of events of type `E`.
///
/// Simultaneous events leave in the order of their class, lowest first, and within a class in the order in which they were
/// put in. So a run has one order, whatever the platform.
#[derive(Debug)]
pub struct Queue<E> {
    heap: BinaryHeap<Entry<E>>,
    sequence: u64,
}

#[derive(Debug)]
struct Entry<E> {
    at: Time,
    rank: u64,
    event: E,
}

/// Bits of the insertion counter below the class.
const CLASS_SHIFT: u32 = 56;

impl<E> Entry<E> {
    fn key(&self) -> (Time, u64) {
        (self.at, self.rank)
    }
}

impl<E> PartialEq for Entry<E> {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}
impl<E> Eq for Entry<E> {}
impl<E> PartialOrd for Entry<E> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl<E> Ord for Entry<E> {
    fn cmp(&self, other: &Self) -> Ordering {
        other.key().cmp(&self.key()) // the heap gives the greatest first
    }
}

impl<E> Default for Queue<E> {
    fn default() -> Self {
        Queue { heap: BinaryHeap::new(), sequence: 0 }
    }
}

impl<E> Queue<E> {
    /// Puts an event in.
    pub fn push(&mut self, at: Time, class: u8, event: E) {
        let rank = u64::from(class) << CLASS_SHIFT | self.sequence;
        self.sequence += 1;
        self.heap.push(Entry { at, rank, event });
    }

    /// Takes the next event out.
    pub fn pop(&mut self) -> Option<(Time, E)> {
        self.heap.pop().map(|entry| (entry.at, entry.event))
    }

    /// Events waiting.
    pub fn len(&self) -> usize {
        self.heap.len()
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.heap.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn events_leave_by_time_class_and_order_of_insertion(events in prop::collection::vec((0u64..5, 0u8..3), 0..100)) {
            let mut queue = Queue::default();
            for (i, (at, class)) in events.iter().enumerate() {
                queue.push(Time::from_nanos(*at), *class, i);
            }
            let mut expect: Vec<usize> = (0..events.len()).collect();
            expect.sort_by_key(|i| (events[*i], *i));
            let got: Vec<usize> = std::iter::from_fn(|| queue.pop().map(|(_, i)| i)).collect();
            prop_assert_eq!(got, expect);
        }
    }
}
