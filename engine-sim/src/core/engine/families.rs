//! Requests that are choices of one prompt: what is counted once they have all ended (`vllm/v1/engine/parallel_sampling.py`).

use rustc_hash::FxHashMap;

use crate::core::metrics::EngineMetrics;
use crate::core::sequence::Parallel;

/// Prompts with open choices, by name.
#[derive(Clone, Debug, Default)]
pub(super) struct Families(FxHashMap<u64, Family>);

#[derive(Clone, Debug, Default)]
struct Family {
    ended: u32,
    longest: u32,
}

impl Families {
    /// A choice ended after `tokens` output tokens.
    pub(super) fn ended(&mut self, parallel: Option<Parallel>, tokens: u32, metrics: &mut EngineMetrics) {
        let Some(Parallel { parent, n, .. }) = parallel.filter(|p| p.n > 1) else {
            return metrics.count_choices(1, tokens);
        };
        let family = self.0.entry(parent).or_default();
        family.ended += 1;
        family.longest = family.longest.max(tokens);
        if family.ended == n {
            metrics.count_choices(n, family.longest);
            self.0.remove(&parent);
        }
    }

    /// The caller of a choice went away, and with it that of its siblings: nothing is counted.
    pub(super) fn aborted(&mut self, parallel: Option<Parallel>) {
        if let Some(Parallel { parent, .. }) = parallel {
            self.0.remove(&parent);
        }
    }
}
