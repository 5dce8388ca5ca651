//! `prefix-cache-scorer`: (1 - w) * matched / total + w * min(1, matched tokens / scale)^2, with w of `matchLengthWeight` and scale of
//! `matchLengthScaleTokens`.

use crate::core::scheduler::parameters::{PluginError, Reader};
use crate::core::scheduler::{Candidate, Scorer, View};

/// Prefers endpoints that were sent the beginning of the prompt.
#[derive(Debug)]
pub struct PrefixCache {
    match_length_weight: f64,
    scale_tokens: f64,
}

impl PrefixCache {
    /// From the parameters named above.
    ///
    /// # Errors
    /// If a parameter is not allowed.
    pub fn read(p: &mut Reader<'_>) -> Result<PrefixCache, PluginError> {
        p.prefix_producer()?;
        Ok(PrefixCache {
            match_length_weight: p.share("matchLengthWeight", 0.0)?,
            scale_tokens: f64::from(p.count_from("matchLengthScaleTokens", 8192, 1)?),
        })
    }
}

impl Scorer for PrefixCache {
    fn score(&self, view: &View<'_>, candidates: &[Candidate], scores: &mut [f64]) {
        let w = self.match_length_weight;
        for (score, c) in scores.iter_mut().zip(candidates) {
            let tokens = f64::from(c.matched_blocks) * f64::from(view.block_tokens);
            let length = (tokens / self.scale_tokens).min(1.0);
            *score = (1.0 - w) * view.matched_share(c) + w * length * length;
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::core::pool::Pool;
    use crate::core::scheduler::parameters::testing::read;
    use crate::core::scheduler::testing::{candidates, check, view};

    #[test]
    fn share_and_length_of_the_match_count() {
        let pool = Pool::default();
        let view = View { prefix_blocks: 128, ..view(&pool) };
        let scores = |parameters: Value, expect| {
            let all = candidates(3, |i, c| c.matched_blocks = [0, 32, 128][i]);
            check(&read(parameters, PrefixCache::read).unwrap(), &view, all, expect);
        };
        scores(json!({}), [0.0, 0.25, 1.0]);
        // 32 blocks are 2048 tokens, a quarter of 8192.
        scores(json!({"matchLengthWeight": 1}), [0.0, 0.0625, 1.0]);
        scores(json!({"matchLengthWeight": 0.5}), [0.0, 0.15625, 1.0]);
        scores(json!({"matchLengthWeight": 1, "matchLengthScaleTokens": 4096}), [0.0, 0.25, 1.0]);
    }

    #[test]
    fn a_prompt_without_a_block_scores_nothing() {
        let pool = Pool::default();
        check(&read(json!({}), PrefixCache::read).unwrap(), &view(&pool), candidates(2, |_, _| {}), [0.0, 0.0]);
    }
}
