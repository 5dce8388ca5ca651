//! `always-disagg-pd-decider`: it always is.

use crate::core::scheduler::{Candidate, Decider, Verdict, View};

/// Says yes.
#[derive(Debug)]
pub struct Always;

impl Decider for Always {
    fn decide(&self, _: &View<'_>, _: &Candidate) -> Verdict {
        Verdict { disaggregate: true, reason: "always", uncached_tokens: None, threshold_tokens: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::pool::Pool;
    use crate::core::scheduler::testing::{candidate, view};

    #[test]
    fn it_says_yes() {
        assert!(Always.decide(&view(&Pool::default()), &candidate(0)).disaggregate);
    }
}
