//! A waiting queue: first come first served, or by priority.

use std::collections::{BTreeSet, VecDeque};

use crate::core::config::Policy;
use crate::core::sequence::{SeqIx, Slab};

/// Requests that wait, in the order in which they are looked at.
#[derive(Clone, Debug)]
pub(super) enum Queue {
    Fcfs(VecDeque<SeqIx>),
    Priority(BTreeSet<((i32, u64, u64), SeqIx)>),
}

impl Queue {
    pub(super) fn new(policy: Policy) -> Queue {
        match policy {
            Policy::Fcfs => Queue::Fcfs(VecDeque::new()),
            Policy::Priority => Queue::Priority(BTreeSet::new()),
        }
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Queue::Fcfs(q) => q.len(),
            Queue::Priority(q) => q.len(),
        }
    }

    pub(super) fn head(&self) -> Option<SeqIx> {
        match self {
            Queue::Fcfs(q) => q.front().copied(),
            Queue::Priority(q) => q.first().map(|&(_, ix)| ix),
        }
    }

    pub(super) fn pop(&mut self) {
        match self {
            Queue::Fcfs(q) => drop(q.pop_front()),
            Queue::Priority(q) => drop(q.pop_first()),
        }
    }

    /// Puts a new request where it belongs.
    pub(super) fn push(&mut self, slab: &Slab, ix: SeqIx) {
        match self {
            Queue::Fcfs(q) => q.push_back(ix),
            Queue::Priority(q) => drop(q.insert((slab[ix].order(), ix))),
        }
    }

    /// Puts a request back that was in front of everything in the queue.
    pub(super) fn push_front(&mut self, slab: &Slab, ix: SeqIx) {
        match self {
            Queue::Fcfs(q) => q.push_front(ix),
            Queue::Priority(q) => drop(q.insert((slab[ix].order(), ix))),
        }
    }

    /// Takes a request out, wherever it is.
    pub(super) fn remove(&mut self, slab: &Slab, ix: SeqIx) {
        match self {
            Queue::Fcfs(q) => {
                if let Some(at) = q.iter().position(|&other| other == ix) {
                    q.remove(at);
                }
            }
            Queue::Priority(q) => drop(q.remove(&(slab[ix].order(), ix))),
        }
    }

    pub(super) fn iter(&self) -> Box<dyn Iterator<Item = SeqIx> + '_> {
        match self {
            Queue::Fcfs(q) => Box::new(q.iter().copied()),
            Queue::Priority(q) => Box::new(q.iter().map(|&(_, ix)| ix)),
        }
    }
}
