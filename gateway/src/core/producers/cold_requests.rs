//! Which endpoints were sent requests that nobody had cached, from the longest ago to the last: what `no-hit-lru-scorer` reads.

use crate::core::pool::EndpointId;

/// The endpoints in order; a bounded number of them.
#[derive(Debug)]
pub(crate) struct ColdRequests {
    capacity: usize,
    /// The longest ago first.
    order: Vec<EndpointId>,
    /// By endpoint.
    position: Vec<Option<u32>>,
}

impl ColdRequests {
    pub(crate) const fn new(capacity: u32) -> ColdRequests {
        ColdRequests { capacity: capacity as usize, order: Vec::new(), position: Vec::new() }
    }

    /// The endpoint's place in the order, 0 for the longest ago; `None` if it is not remembered.
    pub(crate) fn position(&self, endpoint: EndpointId) -> Option<u32> {
        self.position.get(endpoint.index()).copied().flatten()
    }

    /// Remembers that the endpoint was sent one.
    pub(crate) fn sent(&mut self, endpoint: EndpointId) {
        if self.position.len() <= endpoint.index() {
            self.position.resize(endpoint.index() + 1, None);
        }
        let from = match self.position[endpoint.index()] {
            Some(place) => place as usize,
            None if self.order.len() < self.capacity => self.order.len(),
            None => {
                let oldest = self.order[0];
                self.position[oldest.index()] = None;
                0
            }
        };
        if from < self.order.len() {
            self.order.remove(from);
        }
        self.order.push(endpoint);
        for (place, endpoint) in self.order.iter().enumerate().skip(from) {
            self.position[endpoint.index()] = Some(place as u32);
        }
    }

    /// Forgets an endpoint that has left.
    pub(crate) fn forget(&mut self, endpoint: EndpointId) {
        let Some(place) = self.position.get_mut(endpoint.index()).and_then(Option::take) else { return };
        self.order.remove(place as usize);
        for (place, endpoint) in self.order.iter().enumerate().skip(place as usize) {
            self.position[endpoint.index()] = Some(place as u32);
        }
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.order.clear();
        self.position.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_is_that_of_the_last_use() {
        let check = |capacity, sent: &[u32], expect: [Option<u32>; 4]| {
            let mut cold = ColdRequests::new(capacity);
            sent.iter().for_each(|e| cold.sent(EndpointId(*e)));
            assert_eq!([0, 1, 2, 3].map(|e| cold.position(EndpointId(e))), expect, "{capacity} {sent:?}");
        };
        check(9, &[], [None; 4]);
        check(9, &[2, 0, 1], [Some(1), Some(2), Some(0), None]);
        check(9, &[2, 0, 1, 2], [Some(0), Some(1), Some(2), None]);
        check(9, &[2, 2, 2], [None, None, Some(0), None]);
        check(2, &[2, 0, 1], [Some(0), Some(1), None, None]);
        check(2, &[2, 0, 1, 0, 3], [Some(0), None, None, Some(1)]);
        check(1, &[2, 0], [Some(0), None, None, None]);
    }

    #[test]
    fn one_that_left_is_forgotten() {
        let mut cold = ColdRequests::new(9);
        [2, 0, 1].into_iter().for_each(|e| cold.sent(EndpointId(e)));
        [0, 3].into_iter().for_each(|e| cold.forget(EndpointId(e)));
        assert_eq!([0, 1, 2, 3].map(|e| cold.position(EndpointId(e))), [None, Some(1), Some(0), None]);
    }
}
