//! `running-requests-size-scorer`: (max - running) / (max - min) over the candidates; all equal gives 1.

use crate::core::scheduler::scorers::fewest_first;
use crate::core::scheduler::{Candidate, Scorer, View};

/// Prefers small batches.
#[derive(Debug)]
pub struct RunningRequests;

impl Scorer for RunningRequests {
    fn score(&self, _: &View<'_>, candidates: &[Candidate], scores: &mut [f64]) {
        fewest_first(candidates, scores, |c| c.running);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::pool::Pool;
    use crate::core::scheduler::testing::{candidates, check, view};

    #[test]
    fn the_smallest_batch_is_best() {
        let pool = Pool::default();
        let running = |n: [u32; 3]| candidates(3, move |i, c| c.running = n[i]);
        check(&RunningRequests, &view(&pool), running([2, 4, 10]), [1.0, 0.75, 0.0]);
        check(&RunningRequests, &view(&pool), running([0, 0, 0]), [1.0, 1.0, 1.0]);
    }
}
