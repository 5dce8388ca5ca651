//! `healthy-filter`: endpoints that were scraped successfully and are neither ejected nor draining. llm-d has no such filter: its
//! candidates are ready pods.

use shared::rng::Stream;

use crate::core::scheduler::{Candidate, Filter, View};

/// Keeps what may get requests.
#[derive(Debug)]
pub struct Healthy;

impl Filter for Healthy {
    fn filter(&self, _: &View<'_>, candidates: &mut Vec<Candidate>, _: &mut Stream) {
        candidates.retain(|c| c.available);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::pool::Pool;
    use crate::core::scheduler::testing::{candidates, kept, view};

    #[test]
    fn available_endpoints_are_kept_in_order() {
        let pool = Pool::default();
        assert_eq!(kept(&Healthy, &view(&pool), candidates(4, |i, c| c.available = i % 2 == 1)), [1, 3]);
    }
}
