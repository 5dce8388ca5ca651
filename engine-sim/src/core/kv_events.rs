//! KV events as consumers see them: which blocks are found from now on, with their tokens, and which no more.
//!
//! This is vLLM's wire protocol for routers that keep an index of what each engine has cached (`vllm/distributed/kv_events.py`),
//! not telemetry: token ids are part of it, and none of it reaches a span, a log or a metric. Knows nothing of sockets or bytes.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use rustc_hash::FxHashMap;
use shared::block_hash::{BlockKey, Digest32, ExtraKeys};
use shared::time::Time;
use shared::tokens::TokenId;

use crate::core::config::{CacheConfig, KvEventsConfig};
use crate::core::hasher::BlockHasher;
use crate::core::kv_cache::KvEvent;

/// Batches that an engine keeps for a driver that does not take them; the oldest go first.
const MAX_UNTAKEN: usize = 4096;

/// What a request keeps for its events: its tokens, and what else separates its blocks from others.
#[derive(Clone, Debug)]
pub struct EventSource {
    tokens: Vec<TokenId>,
    extra: ExtraKeys,
    /// The adapter's number.
    pub lora_id: Option<u32>,
    /// The caller's session (`X-Session-ID`).
    pub session: Option<Arc<str>>,
    /// Whole digests of the full blocks, where events carry them.
    digests: Option<Vec<Digest32>>,
}

impl EventSource {
    /// The source of a prompt prepared with the same arguments; `raw` keeps whole digests.
    pub fn new(cache: &CacheConfig, tokens: &[TokenId], extra: &ExtraKeys, raw: bool) -> EventSource {
        let mut hasher = BlockHasher::new(cache.prefix_caching_hash_algo, extra);
        let blocks = tokens.chunks_exact(cache.block_size.max(1) as usize);
        let whole = raw && hasher.digest().is_some();
        let digest = |block| {
            hasher.next_key(block);
            hasher.digest()
        };
        let digests = if whole { blocks.map(digest).collect() } else { None };
        EventSource { tokens: tokens.to_vec(), extra: extra.clone(), lora_id: None, session: None, digests }
    }

    pub(crate) fn push(&mut self, token: TokenId) {
        self.tokens.push(token);
    }

    pub(crate) fn push_digest(&mut self, hasher: &BlockHasher) {
        if let Some(digests) = &mut self.digests {
            digests.extend(hasher.digest());
        }
    }

    /// What the event of these blocks, each of `block_size` tokens, tells.
    pub(crate) fn content(&self, blocks: &Range<usize>, block_size: u32) -> StoredContent {
        let size = block_size as usize;
        let named = blocks.start.saturating_sub(1)..blocks.end;
        StoredContent {
            tokens: self.tokens[blocks.start * size..blocks.end * size].to_vec(),
            lora_id: self.lora_id,
            lora_name: self.extra.lora.as_ref().map(|(name, _)| name.clone()),
            cache_salt: self.extra.cache_salt.clone().filter(|_| blocks.start == 0),
            session: self.session.clone(),
            digests: self.digests.as_ref().map(|d| d[named].to_vec()),
        }
    }
}

/// What a stored block's event tells beside keys.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoredContent {
    /// Tokens of all blocks.
    pub tokens: Vec<TokenId>,
    /// The adapter's number.
    pub lora_id: Option<u32>,
    /// The adapter's name: an extra key of every block.
    pub lora_name: Option<String>,
    /// The request's salt, if the first block is among these: its extra key.
    pub cache_salt: Option<String>,
    /// The caller's session.
    pub session: Option<Arc<str>>,
    /// Whole digests of the block before the first one, if there is one, and of the blocks.
    pub digests: Option<Vec<Digest32>>,
}

/// A block's name in an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockName {
    /// The engine's key: on the wire its low 64 bits, or its bytes.
    Key(BlockKey),
    /// The whole digest.
    Digest(Digest32),
}

/// One event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CacheEvent {
    /// Blocks are found from now on.
    Stored {
        /// Their names, in order.
        blocks: Vec<BlockName>,
        /// The block before the first one.
        parent: Option<BlockName>,
        /// Tokens in a block.
        block_size: u32,
        /// Tokens and the like; absent where the driver keeps no tokens.
        content: Option<Box<StoredContent>>,
    },
    /// A block is found no more.
    Removed(BlockName),
    /// No block is found any more.
    Cleared,
}

/// Everything since the batch before; at most one for each completed step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvBatch {
    /// Counts batches from 0. A gap is a batch that was lost.
    pub seq: u64,
    /// When the step was complete.
    pub at: Time,
    /// In the order in which they happened; never empty.
    pub events: Vec<CacheEvent>,
}

/// Collects events into batches for whoever publishes them.
#[derive(Clone, Debug)]
pub struct EventLog {
    block_size: u32,
    next_seq: u64,
    ready: VecDeque<KvBatch>,
    dropped: u64,
    /// Digests of the blocks that are found now, with how many blocks carry each; only where events carry digests.
    digests: Option<FxHashMap<BlockKey, (Digest32, u32)>>,
    scratch: Vec<KvEvent>,
}

impl EventLog {
    /// An empty log, if events are asked for.
    pub fn new(config: &KvEventsConfig, block_size: u32) -> Option<EventLog> {
        config.enable_kv_cache_events.then(|| EventLog {
            block_size,
            next_seq: 0,
            ready: VecDeque::new(),
            dropped: 0,
            digests: (!config.use_int_block_hashes).then(FxHashMap::default),
            scratch: Vec::new(),
        })
    }

    /// The log of an engine with an empty cache that takes the place of this log's: its numbers go on, its first event says so.
    pub(crate) fn renewed(&self, config: &KvEventsConfig, at: Time) -> Option<EventLog> {
        let mut log = EventLog::new(config, self.block_size)?;
        log.next_seq = self.next_seq;
        log.push(at, vec![CacheEvent::Cleared]);
        Some(log)
    }

    /// Makes a batch of what `drain` moves out, unless that is nothing.
    pub fn collect(&mut self, at: Time, drain: impl FnOnce(&mut Vec<KvEvent>)) {
        let mut drained = std::mem::take(&mut self.scratch);
        drain(&mut drained);
        if !drained.is_empty() {
            let events = drained.drain(..).map(|e| self.named(e)).collect();
            self.push(at, events);
        }
        self.scratch = drained;
    }

    /// The oldest batch that was not taken.
    pub fn take(&mut self) -> Option<KvBatch> {
        self.ready.pop_front()
    }

    /// Batches that nobody took in time.
    pub const fn dropped(&self) -> u64 {
        self.dropped
    }

    fn push(&mut self, at: Time, events: Vec<CacheEvent>) {
        if self.ready.len() == MAX_UNTAKEN {
            self.ready.pop_front();
            self.dropped += 1;
        }
        self.ready.push_back(KvBatch { seq: self.next_seq, at, events });
        self.next_seq += 1;
    }

    fn named(&mut self, event: KvEvent) -> CacheEvent {
        match event {
            KvEvent::Stored { parent, keys, mut content, .. } => {
                let digests = content.as_mut().and_then(|c| c.digests.take()).filter(|d| !d.is_empty());
                let (parent, blocks) = match digests {
                    Some(digests) => self.by_digest(parent, &keys, &digests),
                    None => (parent.map(BlockName::Key), keys.into_iter().map(BlockName::Key).collect()),
                };
                CacheEvent::Stored { blocks, parent, block_size: self.block_size, content }
            }
            KvEvent::Removed(key) => CacheEvent::Removed(self.forget(key)),
            KvEvent::Cleared => {
                self.digests.iter_mut().for_each(FxHashMap::clear);
                CacheEvent::Cleared
            }
        }
    }

    fn by_digest(
        &mut self,
        parent: Option<BlockKey>,
        keys: &[BlockKey],
        digests: &[Digest32],
    ) -> (Option<BlockName>, Vec<BlockName>) {
        let (before, blocks) = digests.split_at(usize::from(parent.is_some()));
        for (key, digest) in keys.iter().zip(blocks) {
            if let Some(known) = &mut self.digests {
                known.entry(*key).or_insert((*digest, 0)).1 += 1;
            }
        }
        (before.first().copied().map(BlockName::Digest), blocks.iter().copied().map(BlockName::Digest).collect())
    }

    fn forget(&mut self, key: BlockKey) -> BlockName {
        use std::collections::hash_map::Entry;
        let Some(known) = &mut self.digests else { return BlockName::Key(key) };
        match known.entry(key) {
            Entry::Vacant(_) => BlockName::Key(key),
            Entry::Occupied(mut entry) => {
                entry.get_mut().1 -= 1;
                let (digest, left) = *entry.get();
                if left == 0 {
                    entry.remove();
                }
                BlockName::Digest(digest)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use shared::block_hash::none_hash;

    use super::*;
    use crate::core::config::HashAlgo;

    fn log(raw: bool) -> EventLog {
        let on =
            KvEventsConfig { enable_kv_cache_events: true, use_int_block_hashes: !raw, ..KvEventsConfig::default() };
        EventLog::new(&on, 2).unwrap()
    }

    fn collected(log: &mut EventLog, events: Vec<KvEvent>) -> Vec<CacheEvent> {
        log.collect(Time::ZERO, |out| out.extend(events));
        log.take().unwrap().events
    }

    #[test]
    fn a_batch_nobody_takes_makes_room_and_leaves_a_gap() {
        let mut log = log(false);
        log.collect(Time::ZERO, |_| ());
        assert_eq!(log.take(), None, "a step without events makes no batch");
        for _ in 0..MAX_UNTAKEN + 3 {
            log.collect(Time::ZERO, |out| out.push(KvEvent::Cleared));
        }
        let first = log.take().unwrap().seq;
        assert_eq!((first, log.dropped(), log.ready.len()), (3, 3, MAX_UNTAKEN - 1));
    }

    #[test]
    fn a_removed_block_has_the_digest_it_was_stored_with_as_long_as_one_carries_it() {
        let cache =
            CacheConfig { block_size: 2, prefix_caching_hash_algo: HashAlgo::Sha256Cbor, ..CacheConfig::default() };
        let tokens: Vec<TokenId> = (0..4).map(TokenId).collect();
        let source = EventSource::new(&cache, &tokens, &ExtraKeys::default(), true);
        let first = shared::block_hash::sha256_cbor(&none_hash(), &tokens[..2], &ExtraKeys::default(), true);
        let second = shared::block_hash::sha256_cbor(&first, &tokens[2..], &ExtraKeys::default(), false);
        let stored = |range: Range<usize>, parent| KvEvent::Stored {
            tag: 0,
            parent,
            first_block: range.start as u32,
            keys: [BlockKey(1), BlockKey(2)][range.clone()].to_vec(),
            content: Some(Box::new(source.content(&range, 2))),
        };
        let mut log = log(true);
        let events = collected(&mut log, vec![stored(0..1, None), stored(1..2, Some(BlockKey(1))), stored(0..1, None)]);
        let CacheEvent::Stored { blocks, parent, .. } = &events[1] else { panic!("{events:?}") };
        assert_eq!(
            (blocks.as_slice(), *parent),
            ([BlockName::Digest(second)].as_slice(), Some(BlockName::Digest(first)))
        );
        let gone = || KvEvent::Removed(BlockKey(1));
        let events = collected(&mut log, vec![gone(), gone(), gone()]);
        let name = CacheEvent::Removed(BlockName::Digest(first));
        assert_eq!(events, [name.clone(), name, CacheEvent::Removed(BlockName::Key(BlockKey(1)))]);
        collected(&mut log, vec![stored(0..1, None), KvEvent::Cleared]);
        assert!(log.digests.unwrap().is_empty());
    }

    #[test]
    fn a_renewed_engine_goes_on_counting_and_says_that_its_cache_is_empty() {
        let mut old = log(false);
        collected(&mut old, vec![KvEvent::Cleared]);
        let config = KvEventsConfig { enable_kv_cache_events: true, ..KvEventsConfig::default() };
        let batch = old.renewed(&config, Time::ZERO).unwrap().take().unwrap();
        assert_eq!((batch.seq, batch.events), (1, vec![CacheEvent::Cleared]));
    }
}
