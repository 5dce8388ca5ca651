//! `context-length-aware`, a scorer and, with `enableFiltering`, a filter: by the range of prompt lengths in a label of the endpoint,
//! `llm-d.ai/context-length-range: 0-2048`.
//!
//! In range: 0.3 + 0.7 * (0.7 / (1 + width / 10000) + 0.3 * (max - length) / width), and 1 for a range of one length. Outside: 0.3 /
//! (1 + distance / 1000). Without the label 0.5, with one that is no range 0. As a filter it keeps what is in range or has no label.

use shared::rng::Stream;

use crate::core::scheduler::parameters::{PluginError, Reader};
use crate::core::scheduler::{Candidate, Filter, Scorer, View};

/// Prefers endpoints made for prompts of this length.
#[derive(Debug)]
pub struct ContextLengthAware {
    label: String,
    enable_filtering: bool,
}

const DEFAULT_LABEL: &str = "llm-d.ai/context-length-range";

impl ContextLengthAware {
    /// From `label` and `enableFiltering`.
    ///
    /// # Errors
    /// If a parameter is not allowed.
    pub fn read(p: &mut Reader<'_>) -> Result<ContextLengthAware, PluginError> {
        let label = p.text_or("label", DEFAULT_LABEL)?;
        if label.is_empty() {
            return Err(p.refuse("label", "the name of a label"));
        }
        Ok(ContextLengthAware { label, enable_filtering: p.flag("enableFiltering", false)? })
    }

    fn range<'v>(&self, view: &View<'v>, c: &Candidate) -> Option<Result<(i64, i64), &'v str>> {
        let text = view.pool.get(c.id).config.labels().get(&self.label)?;
        Some(range(text).ok_or(text))
    }
}

/// `min-max`, in tokens.
fn range(text: &str) -> Option<(i64, i64)> {
    let (min, max) = text.split_once('-')?;
    let (min, max) = (min.trim().parse::<u32>().ok()?, max.trim().parse::<u32>().ok()?);
    (min <= max).then_some((i64::from(min), i64::from(max)))
}

fn fit(length: i64, (min, max): (i64, i64)) -> f64 {
    if length < min || length > max {
        let distance = (min - length).max(length - max);
        return 0.3 / (1.0 + distance as f64 / 1000.0);
    }
    if min == max {
        return 1.0;
    }
    let width = (max - min) as f64;
    let tightness = 0.7 / (1.0 + width / 10_000.0);
    let headroom = 0.3 * (max - length) as f64 / width;
    0.3 + 0.7 * (tightness + headroom)
}

impl Scorer for ContextLengthAware {
    fn score(&self, view: &View<'_>, candidates: &[Candidate], scores: &mut [f64]) {
        for (score, c) in scores.iter_mut().zip(candidates) {
            *score = match self.range(view, c) {
                None => 0.5,
                Some(Err(_)) => 0.0,
                Some(Ok(range)) => fit(i64::from(view.prompt_tokens), range),
            };
        }
    }
}

impl Filter for ContextLengthAware {
    fn filter(&self, view: &View<'_>, candidates: &mut Vec<Candidate>, _: &mut Stream) {
        if !self.enable_filtering {
            return;
        }
        let length = i64::from(view.prompt_tokens);
        candidates.retain(|c| match self.range(view, c) {
            None => true,
            Some(Err(_)) => false,
            Some(Ok((min, max))) => (min..=max).contains(&length),
        });
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::core::pool::Pool;
    use crate::core::scheduler::parameters::testing::read;
    use crate::core::scheduler::testing::{candidates, check, kept, pool, view};

    fn endpoints() -> Pool {
        let label = DEFAULT_LABEL;
        pool(&[&[], &[(label, "0-10000")], &[(label, "2000-2000")], &[(label, "5000-6000")], &[(label, "any")]])
    }

    #[test]
    fn tight_ranges_with_headroom_are_best() {
        let pool = endpoints();
        let scorer = read(json!({}), ContextLengthAware::read).unwrap();
        let at = |prompt_tokens, expect| {
            check(&scorer, &View { prompt_tokens, ..view(&pool) }, candidates(5, |_, _| {}), expect);
        };
        // 0.3 + 0.7 (0.7 / 2 + 0.3 * 0.8), and 3000 tokens short of the third.
        at(2000, [0.5, 0.713, 1.0, 0.075, 0.0]);
        // 0.3 + 0.7 (0.7 / 1.1 + 0.3 * 0.5), 500 and 3500 tokens beyond.
        at(5500, [0.5, 0.6395, 0.3 / 4.5, 0.3 + 0.7 * (0.7 / 1.1 + 0.15), 0.0]);
        at(11_000, [0.5, 0.15, 0.03, 0.05, 0.0]);
    }

    #[test]
    fn as_a_filter_it_keeps_what_is_in_range() {
        let pool = endpoints();
        let view = View { prompt_tokens: 5500, ..view(&pool) };
        let filter = |on: bool| read(json!({"enableFiltering": on}), ContextLengthAware::read).unwrap();
        assert_eq!(kept(&filter(true), &view, candidates(5, |_, _| {})), [0, 1, 3]);
        assert_eq!(kept(&filter(false), &view, candidates(5, |_, _| {})), [0, 1, 2, 3, 4]);
    }
}
