//! The index of KV-cache blocks: which endpoint holds which blocks of a prompt, by what the engines' own events say (llm-d's
//! `precise-prefix-cache-producer`, llm-d-router `pkg/kvcache`).
//!
//! An engine names its blocks by hashes that only it can compute: they depend on its seed and its hash function. Events carry the
//! tokens too, so the index hashes these as it hashes a request's prompt, each block chained to its parent, and keeps for each
//! endpoint which of its names stands for which key. So a match does not depend on how an engine hashes.
//!
//! Sans-IO: drivers hand over batches and say what became of a gap.

pub mod events;
mod feed;
mod holders;
mod speculation;

use std::sync::Arc;

use rustc_hash::FxHashMap;
use shared::time::Time;

use crate::core::config::PreciseConfig;
use crate::core::pool::EndpointId;
use crate::core::prefix_index::{PrefixHasher, prefix_root};
use events::{Batch, CacheEvent, EngineHash, Stored, Tier};
use feed::{Feed, Verdict};
use holders::Holders;
use speculation::Speculation;

/// The keys of a prompt's blocks, and what an index elsewhere says of them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct KvPrompt {
    /// Keys of its full blocks (see [`PreciseConfig::hasher`]); empty where nobody reads them.
    pub keys: Vec<u64>,
    /// Matches by endpoint, where the index is a service of its own. None too if it did not answer.
    pub answer: Option<Vec<Match>>,
}

/// What an endpoint holds of a prompt.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Match {
    /// Leading blocks that it holds, in whatever tier.
    pub blocks: u32,
    /// Sum of these blocks' weights by tier.
    pub score: f64,
}

/// What became of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    /// It was taken.
    Taken,
    /// It had been taken before.
    Known,
    /// Nothing was done: the batch `from` and those after it are missing. Replay them, or [`KvIndex::resume`].
    Gap {
        /// The number of the first one.
        from: u64,
    },
}

/// How a lookup went: what spans tell of it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Found {
    /// Blocks that were asked for.
    pub keys: u32,
    /// Leading blocks that anybody holds.
    pub found: u32,
    /// Endpoints that were looked at.
    pub endpoints: u32,
    /// Endpoints that hold the first block at least.
    pub scored: u32,
    /// The highest score.
    pub max: f64,
    /// The mean score over all endpoints.
    pub avg: f64,
}

/// What could not be indexed, in blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Skipped {
    /// Their parent is not known: it was stored before anybody listened.
    pub orphans: u64,
    /// Their size or what enters their hash is not what requests are hashed with.
    pub foreign: u64,
    /// The index was full.
    pub refused: u64,
}

/// A block of an endpoint by its engine's name.
#[derive(Clone, Copy, Debug)]
struct Held {
    key: u64,
    /// Copies in each tier: an engine may compute one block twice, and says so each time it stores or drops one.
    copies: [u32; 2],
}

/// One endpoint's blocks and the state of its sequence.
#[derive(Debug, Default)]
struct Cache {
    feed: Feed,
    held: FxHashMap<EngineHash, Held>,
}

/// The index.
#[derive(Debug)]
pub struct KvIndex {
    config: PreciseConfig,
    caches: Vec<Cache>,
    holders: Holders,
    speculation: Speculation,
    skipped: Skipped,
    /// The holders of the blocks that were looked up last, each with its weight, and where each block's end.
    walk: Vec<(EndpointId, f64)>,
    ends: Vec<u32>,
}

impl KvIndex {
    /// An empty index of so many endpoints.
    pub fn new(config: &PreciseConfig, endpoints: usize) -> KvIndex {
        KvIndex {
            caches: (0..endpoints).map(|_| Cache::default()).collect(),
            holders: Holders::new(config.max_blocks, config.max_endpoints_per_block),
            speculation: Speculation::new(config.speculative_ttl.get()),
            skipped: Skipped::default(),
            walk: Vec::new(),
            ends: Vec::new(),
            config: config.clone(),
        }
    }

    /// Makes room for one more endpoint.
    pub fn add_endpoint(&mut self) {
        self.caches.push(Cache::default());
    }

    /// Forgets everything about an endpoint: it went away, or came back empty.
    pub fn clear(&mut self, endpoint: EndpointId) {
        let cache = std::mem::take(&mut self.caches[endpoint.index()]);
        self.forget(endpoint, cache.held);
    }

    /// Takes a batch of an endpoint that serves `model`.
    pub fn apply(&mut self, endpoint: EndpointId, model: &str, batch: &Batch) -> Applied {
        let verdict = self.caches[endpoint.index()].feed.judge(batch.seq, batch.made);
        match verdict {
            Verdict::Next => {
                self.take(endpoint, model, batch);
                Applied::Taken
            }
            Verdict::Known => Applied::Known,
            Verdict::Gap { from } => Applied::Gap { from },
            Verdict::Restarted => {
                self.clear(endpoint);
                self.apply(endpoint, model, batch)
            }
        }
    }

    /// Takes a batch after a gap that nobody can fill: what was known of the endpoint may be gone, so it is forgotten.
    pub fn resume(&mut self, endpoint: EndpointId, model: &str, batch: &Batch) {
        self.clear(endpoint);
        self.take(endpoint, model, batch);
    }

    /// The number of the next batch of an endpoint.
    pub fn next_batch(&self, endpoint: EndpointId) -> u64 {
        self.caches[endpoint.index()].feed.next()
    }

    /// Blocks that are remembered, of all endpoints together.
    pub fn blocks(&self) -> usize {
        self.holders.len()
    }

    /// Requests whose blocks are expected somewhere.
    pub fn expected(&self) -> usize {
        self.speculation.len()
    }

    /// What could not be indexed so far.
    pub const fn skipped(&self) -> Skipped {
        self.skipped
    }

    /// A request with these blocks was sent to an endpoint. Does nothing unless the configuration says so.
    pub fn expect(&mut self, now: Time, endpoint: EndpointId, keys: &[u64]) {
        if !self.config.speculative || keys.is_empty() || endpoint.index() >= self.caches.len() {
            return;
        }
        self.expire(now);
        let until = self.speculation.expect(now, endpoint, keys);
        for key in keys {
            self.skipped.refused += u64::from(!self.holders.expect(*key, endpoint, until));
        }
    }

    /// Finds who holds the leading blocks of a prompt; returns how many somebody holds. [`KvIndex::score`] rates them.
    pub fn walk(&mut self, now: Time, keys: &[u64]) -> u32 {
        self.expire(now);
        self.walk.clear();
        self.ends.clear();
        for key in keys {
            let before = self.walk.len();
            let holders = self.holders.of(*key).iter();
            self.walk.extend(holders.filter_map(|h| Some((h.endpoint, self.config.weight(h.tier(now)?)))));
            if self.walk.len() == before {
                break;
            }
            self.ends.push(self.walk.len() as u32);
        }
        self.ends.len() as u32
    }

    /// Sets `matched` to the longest leading match of every endpoint among the blocks that were walked last: a block counts where
    /// all before it are held too, with the weight of its best tier (llm-d's `LongestPrefixMatch`).
    pub fn score(&mut self, matched: &mut Vec<Match>) {
        matched.clear();
        matched.resize(self.caches.len(), Match::default());
        let mut start = 0;
        for (n, end) in (0..).zip(&self.ends) {
            let mut held = false;
            for (endpoint, weight) in &self.walk[start..*end as usize] {
                let m = &mut matched[endpoint.index()];
                if m.blocks == n {
                    *m = Match { blocks: n + 1, score: m.score + weight };
                    held = true;
                }
            }
            if !held {
                break;
            }
            start = *end as usize;
        }
    }

    fn expire(&mut self, now: Time) {
        while let Some(over) = self.speculation.over(now) {
            over.keys.iter().for_each(|key| self.holders.expire(*key, over.endpoint, over.until));
        }
    }

    fn take(&mut self, endpoint: EndpointId, model: &str, batch: &Batch) {
        for event in &batch.events {
            match event {
                CacheEvent::Stored(stored) => self.stored(endpoint, model, stored),
                CacheEvent::Removed { blocks, tier } => {
                    blocks.iter().for_each(|block| self.removed(endpoint, *block, *tier));
                }
                CacheEvent::Cleared => {
                    let held = std::mem::take(&mut self.caches[endpoint.index()].held);
                    self.forget(endpoint, held);
                }
            }
        }
        self.caches[endpoint.index()].feed.took(batch.seq, batch.made);
    }

    fn stored(&mut self, endpoint: EndpointId, model: &str, stored: &Stored) {
        let size = self.config.block_tokens;
        let whole = stored.tokens.len() == stored.blocks.len() * size as usize;
        if stored.opaque || stored.block_tokens != size || !whole {
            self.skipped.foreign += stored.blocks.len() as u64;
            return;
        }
        let root = || prefix_root(stored.adapter.as_deref().unwrap_or(model), stored.salt.as_deref());
        let parent = match stored.parent {
            None => Some(root()),
            Some(parent) => self.caches[endpoint.index()].held.get(&parent).map(|h| h.key),
        };
        let Some(parent) = parent else {
            self.skipped.orphans += stored.blocks.len() as u64;
            return;
        };
        let mut hasher = PrefixHasher::after(parent, size);
        hasher.tokens(stored.tokens.iter().copied());
        for (block, key) in stored.blocks.iter().zip(hasher.finish()) {
            self.hold(endpoint, *block, key, stored.tier);
        }
    }

    fn hold(&mut self, endpoint: EndpointId, block: EngineHash, key: u64, tier: Tier) {
        let held = &mut self.caches[endpoint.index()].held;
        if held.len() >= self.config.max_blocks as usize && !held.contains_key(&block) {
            self.skipped.refused += 1;
            return;
        }
        let known = held.entry(block).or_insert(Held { key, copies: [0; 2] });
        known.copies[tier as usize] = known.copies[tier as usize].saturating_add(1);
        let key = known.key;
        self.skipped.refused += u64::from(!self.holders.hold(key, endpoint, tier));
    }

    fn removed(&mut self, endpoint: EndpointId, block: EngineHash, tier: Tier) {
        let held = &mut self.caches[endpoint.index()].held;
        let Some(known) = held.get_mut(&block) else { return };
        let (key, copies) = (known.key, &mut known.copies);
        copies[tier as usize] = copies[tier as usize].saturating_sub(1);
        let (here, anywhere) = (copies[tier as usize] > 0, copies.iter().any(|n| *n > 0));
        if !here {
            self.holders.release(key, endpoint, tier);
        }
        if !anywhere {
            held.remove(&block);
        }
    }

    fn forget(&mut self, endpoint: EndpointId, held: FxHashMap<EngineHash, Held>) {
        held.into_values().for_each(|h| self.holders.forget(h.key, endpoint));
    }
}

impl Found {
    /// What a lookup of `keys` blocks found, of which somebody held the first `found`.
    pub fn of(keys: usize, found: u32, matched: &[Match]) -> Found {
        let scores = matched.iter().map(|m| m.score);
        Found {
            keys: keys as u32,
            found,
            endpoints: matched.len() as u32,
            scored: matched.iter().filter(|m| m.blocks > 0).count() as u32,
            max: scores.clone().fold(0.0, f64::max),
            avg: scores.sum::<f64>() / matched.len().max(1) as f64,
        }
    }

    /// Part of the blocks that anybody holds; 0 without blocks.
    pub fn hit_ratio(&self) -> f64 {
        f64::from(self.found) / f64::from(self.keys.max(1))
    }
}

/// The model that a topic names, if it has llm-d's form `kv@POD@MODEL`.
pub fn model_of_topic(topic: &str) -> Option<Arc<str>> {
    let (_, model) = topic.strip_prefix("kv@")?.split_once('@')?;
    (!model.is_empty()).then(|| model.into())
}

#[cfg(test)]
mod tests;
