//! `decode-filter`, `prefill-filter` and `encode-filter`: endpoints that serve a stage by their label `llm-d.ai/role`. Only
//! `decode-filter` keeps endpoints without the label.

use shared::rng::Stream;

use crate::core::pool::Role;
use crate::core::scheduler::{Candidate, Filter, View};

/// A stage of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Encoding images and the like.
    Encode,
    /// Computing the prompt.
    Prefill,
    /// Generating tokens.
    Decode,
}

/// Keeps what serves the stage.
#[derive(Debug)]
pub struct ByRole(pub Stage);

impl Filter for ByRole {
    fn filter(&self, _: &View<'_>, candidates: &mut Vec<Candidate>, _: &mut Stream) {
        let serves: fn(Role) -> bool = match self.0 {
            Stage::Encode => Role::encodes,
            Stage::Prefill => Role::prefills,
            Stage::Decode => Role::decodes,
        };
        candidates.retain(|c| serves(c.role));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::pool::Pool;
    use crate::core::scheduler::testing::{candidates, kept, view};

    #[test]
    fn each_stage_has_its_endpoints() {
        let pool = Pool::default();
        let roles = [Role::Unlabelled, Role::Decode, Role::Prefill, Role::PrefillDecode, Role::Encode, Role::Unknown];
        let check = |stage, expect: &[u32]| {
            let all = candidates(roles.len() as u32, |i, c| c.role = roles[i]);
            assert_eq!(kept(&ByRole(stage), &view(&pool), all), expect, "{stage:?}");
        };
        check(Stage::Decode, &[0, 1, 3]);
        check(Stage::Prefill, &[2, 3]);
        check(Stage::Encode, &[4]);
    }
}
