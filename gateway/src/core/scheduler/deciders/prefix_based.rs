//! `prefix-based-pd-decider`: it is if the decode endpoint would have to compute at least `nonCachedTokens` of the prompt itself.
//!
//! The prompt has at least `promptTokens` and at least `nonCachedTokens`, and so has its length less the tokens of the matched blocks.
//! `nonCachedTokens: 0`, the default, never says yes.

use crate::core::scheduler::parameters::{PluginError, Reader};
use crate::core::scheduler::{Candidate, Decider, Verdict, View};

/// Says yes to much uncached work.
#[derive(Debug)]
pub struct PrefixBased {
    non_cached_tokens: u32,
    prompt_tokens: u32,
}

impl PrefixBased {
    /// From `nonCachedTokens` and `promptTokens`, and from which index it takes what is cached.
    ///
    /// # Errors
    /// If a parameter is not allowed.
    pub fn read(p: &mut Reader<'_>) -> Result<PrefixBased, PluginError> {
        p.prefix_producer()?;
        Ok(PrefixBased {
            non_cached_tokens: p.count_from("nonCachedTokens", 0, 0)?,
            prompt_tokens: p.count_from("promptTokens", 0, 0)?,
        })
    }

    const fn verdict(&self, disaggregate: bool, reason: &'static str, uncached_tokens: Option<u32>) -> Verdict {
        Verdict { disaggregate, reason, uncached_tokens, threshold_tokens: Some(self.non_cached_tokens) }
    }
}

impl Decider for PrefixBased {
    fn decide(&self, view: &View<'_>, decode: &Candidate) -> Verdict {
        if self.non_cached_tokens == 0 {
            return self.verdict(false, "disabled", None);
        }
        if view.prompt_tokens < self.prompt_tokens.max(self.non_cached_tokens) {
            return self.verdict(false, "short_prompt", None);
        }
        let cached = decode.matched_blocks.saturating_mul(view.block_tokens);
        let uncached = view.prompt_tokens.saturating_sub(cached);
        if uncached < self.non_cached_tokens {
            self.verdict(false, "prefix_cached", Some(uncached))
        } else {
            self.verdict(true, "prefix_not_cached", Some(uncached))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::core::pool::Pool;
    use crate::core::scheduler::parameters::testing::read;
    use crate::core::scheduler::testing::{candidate, view};

    #[test]
    fn the_uncached_part_decides() {
        let pool = Pool::default();
        let check = |parameters: Value, prompt_tokens, matched_blocks, expect: (bool, &str, Option<u32>)| {
            let decider = read(parameters.clone(), PrefixBased::read).unwrap();
            let view = View { prompt_tokens, ..view(&pool) };
            let verdict = decider.decide(&view, &Candidate { matched_blocks, ..candidate(0) });
            let found = (verdict.disaggregate, verdict.reason, verdict.uncached_tokens);
            assert_eq!(found, expect, "{parameters} {prompt_tokens} {matched_blocks}");
        };
        let sixteen = || json!({"nonCachedTokens": 16});
        check(json!({}), 9999, 0, (false, "disabled", None));
        check(sixteen(), 15, 0, (false, "short_prompt", None));
        check(sixteen(), 16, 0, (true, "prefix_not_cached", Some(16)));
        check(sixteen(), 79, 1, (false, "prefix_cached", Some(15)));
        check(sixteen(), 80, 1, (true, "prefix_not_cached", Some(16)));
        check(sixteen(), 64, 1, (false, "prefix_cached", Some(0)));
        check(json!({"nonCachedTokens": 16, "promptTokens": 100}), 99, 0, (false, "short_prompt", None));
        check(json!({"nonCachedTokens": 16, "promptTokens": 100}), 100, 0, (true, "prefix_not_cached", Some(100)));
    }
}
