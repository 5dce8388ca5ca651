//! `token-load-scorer`: 1 - min(1, tokens / `queueThresholdTokens`), of the tokens in flight there and those of this request that are
//! not cached there.

use crate::core::scheduler::parameters::{PluginError, Reader};
use crate::core::scheduler::{Candidate, Scorer, View};

/// Prefers endpoints with few tokens to compute.
#[derive(Debug)]
pub struct TokenLoad {
    threshold: f64,
}

/// 128 requests of 32 Ki tokens.
const DEFAULT_THRESHOLD: u32 = 4_194_304;

impl TokenLoad {
    /// From `queueThresholdTokens`.
    ///
    /// # Errors
    /// If a parameter is not allowed.
    pub fn read(p: &mut Reader<'_>) -> Result<TokenLoad, PluginError> {
        p.in_flight_producer()?;
        Ok(TokenLoad { threshold: f64::from(p.count_from("queueThresholdTokens", DEFAULT_THRESHOLD, 1)?) })
    }
}

impl Scorer for TokenLoad {
    fn score(&self, view: &View<'_>, candidates: &[Candidate], scores: &mut [f64]) {
        for (score, c) in scores.iter_mut().zip(candidates) {
            let own = view.uncached_tokens(c.matched_blocks) + u64::from(view.output_tokens);
            let tokens = c.in_flight_tokens.saturating_add(own);
            *score = 1.0 - (tokens as f64 / self.threshold).min(1.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::core::pool::Pool;
    use crate::core::scheduler::parameters::testing::read;
    use crate::core::scheduler::testing::{candidates, check, view};

    #[test]
    fn tokens_in_flight_and_to_come_count() {
        let pool = Pool::default();
        let scorer = |parameters| read(parameters, TokenLoad::read).unwrap();
        let all = || {
            candidates(4, |i, c| {
                (c.in_flight_tokens, c.matched_blocks) = ([0, 872, 872, 9999][i], [0, 0, 2, 0][i]);
            })
        };
        // A prompt of 128 tokens in two blocks.
        let view = View { prompt_tokens: 128, prefix_blocks: 2, ..view(&pool) };
        check(&scorer(json!({"queueThresholdTokens": 1000})), &view, all(), [0.872, 0.0, 0.128, 0.0]);
        let output = View { output_tokens: 72, ..view };
        check(&scorer(json!({"queueThresholdTokens": 2000})), &output, all(), [0.9, 0.464, 0.528, 0.0]);
        check(
            &scorer(json!({})),
            &View { prompt_tokens: 0, prefix_blocks: 0, ..view },
            candidates(1, |_, _| {}),
            [1.0],
        );
    }
}
