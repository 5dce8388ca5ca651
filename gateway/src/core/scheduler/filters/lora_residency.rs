//! `lora-residency-filter`: keeps a request where its LoRA adapter is on the GPU, and says when another endpoint may load a copy
//! (llm-d-router, September 2026).
//!
//! Homes are endpoints with the adapter on the GPU. They are kept while one of them has room, and also when `maxReplicas` is
//! reached or nobody else has room; otherwise the other endpoints with room are kept, one of which gets a copy. Without a home
//! everything is kept. vLLM reports adapters on the GPU only, so copies in host memory, which llm-d prefers, are not seen.

use shared::rng::Stream;

use crate::core::pool::AdapterState;
use crate::core::scheduler::parameters::{PluginError, Reader};
use crate::core::scheduler::{Candidate, Filter, View};

/// Keeps homes.
#[derive(Debug)]
pub struct LoraResidency {
    /// 0 is no bound.
    max_replicas: u32,
    /// 0 does not look.
    queue_threshold: u32,
    /// 0 does not look.
    kv_cache_threshold: f64,
}

impl LoraResidency {
    /// From `maxReplicas`, `queueThreshold` and `kvCacheThreshold`.
    ///
    /// # Errors
    /// If a parameter is not allowed.
    pub fn read(p: &mut Reader<'_>) -> Result<LoraResidency, PluginError> {
        Ok(LoraResidency {
            max_replicas: p.count_from("maxReplicas", 0, 0)?,
            queue_threshold: p.count_from("queueThreshold", 8, 0)?,
            kv_cache_threshold: p.share("kvCacheThreshold", 0.8)?,
        })
    }

    fn saturated(&self, c: &Candidate) -> bool {
        let queue = self.queue_threshold > 0 && c.waiting > self.queue_threshold;
        queue || (self.kv_cache_threshold > 0.0 && c.kv_usage > self.kv_cache_threshold)
    }
}

impl Filter for LoraResidency {
    fn filter(&self, view: &View<'_>, candidates: &mut Vec<Candidate>, _: &mut Stream) {
        let home = |c: &Candidate| c.adapter == AdapterState::Running;
        let homes = candidates.iter().filter(|c| home(c)).count();
        if candidates.len() <= 1 || view.model.is_empty() || homes == 0 {
            return;
        }
        let room = |c: &Candidate| !self.saturated(c);
        let at_home = candidates.iter().any(|c| home(c) && room(c));
        let full = self.max_replicas > 0 && homes >= self.max_replicas as usize;
        let elsewhere = candidates.iter().any(|c| !home(c) && room(c));
        if at_home || full || !elsewhere {
            candidates.retain(home);
        } else {
            candidates.retain(|c| !home(c) && room(c));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::core::pool::Pool;
    use crate::core::scheduler::parameters::testing::read;
    use crate::core::scheduler::testing::{candidates, kept, view};

    #[test]
    fn copies_are_made_only_when_all_homes_are_full() {
        let pool = Pool::default();
        let check = |parameters: Value, homes: [bool; 4], waiting: [u32; 4], expect: &[u32]| {
            let filter = read(parameters.clone(), LoraResidency::read).unwrap();
            let all = candidates(4, |i, c| {
                c.adapter = if homes[i] { AdapterState::Running } else { AdapterState::Room };
                c.waiting = waiting[i];
            });
            assert_eq!(kept(&filter, &view(&pool), all), expect, "{parameters} {homes:?} {waiting:?}");
        };
        let two = [true, true, false, false];
        check(json!({}), [false; 4], [9; 4], &[0, 1, 2, 3]);
        check(json!({}), two, [9, 8, 0, 0], &[0, 1]);
        check(json!({}), two, [9, 9, 0, 9], &[2]);
        check(json!({}), two, [9, 9, 9, 9], &[0, 1]);
        check(json!({"maxReplicas": 2}), two, [9, 9, 0, 0], &[0, 1]);
        check(json!({"maxReplicas": 3}), two, [9, 9, 0, 0], &[2, 3]);
        check(json!({"queueThreshold": 0}), two, [9, 9, 0, 0], &[0, 1]);
    }

    #[test]
    fn a_full_cache_is_no_room() {
        let pool = Pool::default();
        let filter = read(json!({}), LoraResidency::read).unwrap();
        let all = candidates(2, |i, c| {
            c.adapter = [AdapterState::Running, AdapterState::Full][i];
            c.kv_usage = [0.81, 0.8][i];
        });
        assert_eq!(kept(&filter, &view(&pool), all), [1]);
    }
}
