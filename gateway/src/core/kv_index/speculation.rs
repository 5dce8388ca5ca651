//! What is expected of engines for a while: a request was sent there, its blocks will be cached there soon.
//!
//! Until the engine's own events say so, requests that come right after it find its prefix where it went.

use std::collections::VecDeque;

use shared::time::{Dur, Time};

use crate::core::pool::EndpointId;

/// Requests remembered at a time; beyond that the oldest expectation ends early.
const MAX_REQUESTS: usize = 65_536;

/// An expectation, and when it ends.
#[derive(Debug)]
pub(super) struct Expected {
    pub(super) until: Time,
    pub(super) endpoint: EndpointId,
    pub(super) keys: Box<[u64]>,
}

/// Expectations in the order of their ends.
#[derive(Debug)]
pub(super) struct Speculation {
    ttl: Dur,
    queue: VecDeque<Expected>,
}

impl Speculation {
    pub(super) const fn new(ttl: Dur) -> Speculation {
        Speculation { ttl, queue: VecDeque::new() }
    }

    /// Expects these blocks at an endpoint, and says until when.
    pub(super) fn expect(&mut self, now: Time, endpoint: EndpointId, keys: &[u64]) -> Time {
        // Times handed over late do not disturb the order.
        let last = self.queue.back().map_or(Time::ZERO, |e| e.until);
        let until = now.saturating_add(self.ttl).max(last);
        self.queue.push_back(Expected { until, endpoint, keys: keys.into() });
        until
    }

    /// The next expectation that is over at `now`, or too many.
    pub(super) fn over(&mut self, now: Time) -> Option<Expected> {
        let oldest = self.queue.front()?;
        (oldest.until <= now || self.queue.len() > MAX_REQUESTS).then(|| self.queue.pop_front()).flatten()
    }

    pub(super) fn len(&self) -> usize {
        self.queue.len()
    }
}
