//! Scorers: how good each of the candidates is. The formulas and defaults are those of llm-d's plugins of the same names
//! (llm-d-router `pkg/epp/framework/plugins/scheduling/scorer`, August 2026).

mod active_request;
mod context_length_aware;
mod kv_cache_utilization;
mod latency;
mod load_aware;
mod lora_affinity;
mod no_hit_lru;
mod precise_prefix_cache;
mod prefix_cache;
mod queue;
mod running_requests;
mod session_affinity;
mod token_load;

pub use active_request::ActiveRequest;
pub use context_length_aware::ContextLengthAware;
pub use kv_cache_utilization::KvCacheUtilization;
pub use latency::Latency;
pub use load_aware::LoadAware;
pub use lora_affinity::LoraAffinity;
pub use no_hit_lru::NoHitLru;
pub use precise_prefix_cache::PrecisePrefixCache;
pub use prefix_cache::PrefixCache;
pub use queue::Queue;
pub use running_requests::RunningRequests;
pub use session_affinity::{SessionAffinity, SessionStrategy};
pub use token_load::TokenLoad;

use crate::core::scheduler::Candidate;

/// (max - load) / (max - min) over the candidates; all equal gives 1.
fn fewest_first(candidates: &[Candidate], scores: &mut [f64], load: impl Fn(&Candidate) -> u32) {
    let (min, max) = candidates.iter().map(&load).fold((u32::MAX, 0), |(lo, hi), n| (lo.min(n), hi.max(n)));
    if max <= min {
        scores.fill(1.0);
        return;
    }
    let span = f64::from(max - min);
    for (score, c) in scores.iter_mut().zip(candidates) {
        *score = f64::from(max - load(c)) / span;
    }
}
