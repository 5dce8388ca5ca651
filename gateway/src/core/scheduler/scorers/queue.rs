//! `queue-scorer`: (max - waiting) / (max - min) over the candidates; all equal gives 1.

use crate::core::scheduler::scorers::fewest_first;
use crate::core::scheduler::{Candidate, Scorer, View};

/// Prefers short queues.
#[derive(Debug)]
pub struct Queue;

impl Scorer for Queue {
    fn score(&self, _: &View<'_>, candidates: &[Candidate], scores: &mut [f64]) {
        fewest_first(candidates, scores, |c| c.waiting);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::pool::Pool;
    use crate::core::scheduler::testing::{candidates, check, view};

    #[test]
    fn the_shortest_queue_is_best() {
        let pool = Pool::default();
        let waiting = |n: [u32; 3]| candidates(3, move |i, c| c.waiting = n[i]);
        check(&Queue, &view(&pool), waiting([0, 5, 10]), [1.0, 0.5, 0.0]);
        check(&Queue, &view(&pool), waiting([7, 3, 3]), [0.0, 1.0, 1.0]);
        check(&Queue, &view(&pool), waiting([4, 4, 4]), [1.0, 1.0, 1.0]);
    }
}
