//! How long blocks keep their content: `--kv-cache-metrics` (`vllm/v1/core/kv_cache_metrics.py`).
//!
//! Of all allocations a sample is followed: birth, uses, eviction. A block that is never evicted tells nothing. The sample is drawn from a
//! sequence of its own, so that following blocks changes nothing else and a run repeats.

use std::collections::VecDeque;

use rustc_hash::FxHashMap;
use shared::rng::mix64;
use shared::time::Time;

use crate::core::block_pool::BlockIx;
use crate::core::config::{BucketFamily, ObservabilityConfig};
use crate::core::metrics::{Histogram, RESIDENCY, times};

/// Uses remembered of a block.
const USES: usize = 4;

/// Blocks that are followed, and what was learnt from those that were evicted.
#[derive(Clone, Debug)]
pub struct Residency {
    sample: f64,
    drawn: u64,
    now: Time,
    followed: FxHashMap<BlockIx, Followed>,
    lifetime: Histogram,
    idle: Histogram,
    reuse_gap: Histogram,
}

#[derive(Clone, Debug)]
struct Followed {
    born: Time,
    last_use: Time,
    uses: VecDeque<Time>,
}

impl Residency {
    /// An empty one, if it is asked for.
    pub fn new(config: &ObservabilityConfig) -> Option<Residency> {
        let histogram = || times(config, BucketFamily::KvCacheResidency, &RESIDENCY);
        config.kv_cache_metrics.then(|| Residency {
            sample: config.kv_cache_metrics_sample,
            drawn: 0,
            now: Time::ZERO,
            followed: FxHashMap::default(),
            lifetime: histogram(),
            idle: histogram(),
            reuse_gap: histogram(),
        })
    }

    /// The histograms with vLLM's names.
    pub fn histograms(&self) -> [(&'static str, &Histogram); 3] {
        [
            ("kv_block_lifetime_seconds", &self.lifetime),
            ("kv_block_idle_before_evict_seconds", &self.idle),
            ("kv_block_reuse_gap_seconds", &self.reuse_gap),
        ]
    }

    /// What happens from here on happens at `now`.
    pub(crate) fn set_now(&mut self, now: Time) {
        self.now = now;
    }

    /// A block was handed out, and perhaps lost its content before.
    pub(crate) fn allocated(&mut self, block: BlockIx, evicted: bool) {
        if evicted && let Some(followed) = self.followed.remove(&block) {
            self.learn(&followed);
        }
        self.drawn += 1;
        // 53 bits: a uniform fraction in 0..1.
        let draw = (mix64(self.drawn) >> 11) as f64 / (1u64 << 53) as f64;
        if draw < self.sample {
            let followed = Followed { born: self.now, last_use: self.now, uses: VecDeque::with_capacity(USES) };
            self.followed.insert(block, followed);
        }
    }

    /// A block was found and adopted.
    pub(crate) fn used(&mut self, block: BlockIx) {
        if let Some(followed) = self.followed.get_mut(&block) {
            followed.last_use = self.now;
            if followed.uses.len() == USES {
                followed.uses.pop_front();
            }
            followed.uses.push_back(self.now);
        }
    }

    /// The cache was emptied.
    pub(crate) fn forget_all(&mut self) {
        self.followed.clear();
    }

    fn learn(&mut self, followed: &Followed) {
        self.lifetime.observe_time(self.now - followed.born);
        self.idle.observe_time(self.now - followed.last_use);
        for (earlier, later) in followed.uses.iter().zip(followed.uses.iter().skip(1)) {
            self.reuse_gap.observe_time(*later - *earlier);
        }
    }
}

#[cfg(test)]
mod tests {
    use shared::time::Dur;

    use super::*;

    fn residency(sample: f64) -> Residency {
        let config = ObservabilityConfig {
            kv_cache_metrics: true,
            kv_cache_metrics_sample: sample,
            ..ObservabilityConfig::default()
        };
        Residency::new(&config).unwrap()
    }

    #[test]
    fn an_eviction_tells_of_the_life_before_it() {
        let mut r = residency(1.0);
        let at = |s| Time::ZERO + Dur::from_secs(s);
        r.set_now(at(10));
        r.allocated(1, false);
        for s in [11, 13, 16, 20, 25] {
            r.set_now(at(s));
            r.used(1);
        }
        r.used(2);
        r.set_now(at(40));
        r.allocated(1, true);
        let sums = r.histograms().map(|(_, h)| (h.count(), h.sum / 1_000_000_000));
        // The use at 11 is forgotten: four are kept, with three gaps of 3, 4 and 5.
        assert_eq!(sums, [(1, 30), (1, 15), (3, 12)]);
        r.forget_all();
        r.allocated(1, true);
        assert_eq!(r.histograms()[0].1.count(), 1, "an emptied cache evicts nothing");
    }

    #[test]
    fn so_many_allocations_are_followed_as_were_asked_for() {
        let mut r = residency(0.01);
        (0..100_000).for_each(|block| r.allocated(block, false));
        assert!((900..1100).contains(&r.followed.len()), "{}", r.followed.len());
    }
}
