//! Blocks for requests: prefix lookup, the capacity tests of an allocation, registration of full blocks.
//!
//! Semantics of vLLM's `kv_cache_manager.py`. Knows the blocks and keys of one request at a time, not queues or batches.

use shared::block_hash::BlockKey;
use shared::time::Time;

use crate::core::block_pool::{BlockIx, BlockPool};
use crate::core::config::ObservabilityConfig;
use crate::core::kv_events::StoredContent;
use crate::core::residency::Residency;
use crate::core::sequence::Sequence;

/// Something that happened to the cache, in order. Hashes are [`BlockKey::event_hash`]es on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KvEvent {
    /// Blocks of a request are found from now on.
    Stored {
        /// The request's tag: whoever publishes the event knows its tokens.
        tag: u64,
        /// The block before the first new one.
        parent: Option<BlockKey>,
        /// Index of the first new block within the request.
        first_block: u32,
        /// Keys of the new blocks.
        keys: Vec<BlockKey>,
        /// Tokens and the like, where the request keeps them for its events.
        content: Option<Box<StoredContent>>,
    },
    /// A block was reused and is found no more.
    Removed(BlockKey),
    /// All blocks lost their content.
    Cleared,
}

/// What an allocation has to leave free.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Demand {
    /// Whether the whole sequence must fit, not only this step's tokens.
    pub(crate) full_sequence: bool,
    /// Blocks that stay free in both tests.
    pub(crate) watermark: u32,
    /// Blocks promised to prefills under way, kept out of this step's test.
    pub(crate) reserved: u32,
    /// Whether registration waits until a remote load is complete.
    pub(crate) delay_registration: bool,
}

/// The KV cache of one engine.
#[derive(Clone, Debug)]
pub struct KvCache {
    pool: BlockPool,
    block_size: u32,
    max_model_len: u32,
    caching: bool,
    events: Option<Vec<KvEvent>>,
    residency: Option<Box<Residency>>,
}

impl KvCache {
    pub(crate) fn new(num_blocks: u32, block_size: u32, max_model_len: u32, caching: bool, events: bool) -> KvCache {
        KvCache {
            pool: BlockPool::new(num_blocks),
            block_size,
            max_model_len,
            caching,
            events: events.then(Vec::new),
            residency: None,
        }
    }

    /// Follows the life of blocks, if that is asked for.
    pub(crate) fn measure(&mut self, config: &ObservabilityConfig) {
        self.residency = Residency::new(config).map(Box::new);
    }

    /// How long blocks keep their content, if that is measured.
    pub fn residency(&self) -> Option<&Residency> {
        self.residency.as_deref()
    }

    pub(crate) fn set_now(&mut self, now: Time) {
        if let Some(residency) = &mut self.residency {
            residency.set_now(now);
        }
    }

    /// The blocks.
    pub const fn pool(&self) -> &BlockPool {
        &self.pool
    }

    /// Whether blocks are found by content.
    pub const fn caching(&self) -> bool {
        self.caching
    }

    /// Tokens in a block.
    pub const fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Events since the last call.
    pub(crate) fn drain_events(&mut self, out: &mut Vec<KvEvent>) {
        if let Some(events) = &mut self.events {
            out.append(events);
        }
    }

    /// The longest chain of cached blocks from the start, over at most all but the last token.
    pub(crate) fn lookup(&self, seq: &Sequence, hits: &mut Vec<BlockIx>) {
        hits.clear();
        if !self.caching || seq.new.params.skip_reading_prefix_cache {
            return;
        }
        let most = (seq.num_tokens().saturating_sub(1) / self.block_size) as usize;
        let found = seq.new.keys.iter().take(most).map_while(|&key| self.pool.lookup(key));
        hits.extend(found);
    }

    /// Blocks that the whole sequence lacks.
    pub(crate) fn missing_blocks(&self, seq: &Sequence) -> u32 {
        let all = seq.num_tokens().min(self.max_model_len).div_ceil(self.block_size);
        all.saturating_sub(seq.blocks.len() as u32)
    }

    /// Gives `seq` blocks for tokens up to `computed + k`, `hits` adopted first; `false` and no change if they do not fit.
    #[inline]
    pub(crate) fn allocate(
        &mut self,
        seq: &mut Sequence,
        computed: u32,
        k: u32,
        hits: &[BlockIx],
        demand: Demand,
    ) -> bool {
        let target = (computed + k).min(self.max_model_len);
        let owned = seq.blocks.len() as u32 + hits.len() as u32;
        if target > owned * self.block_size || !hits.is_empty() || demand.full_sequence {
            if !self.fits(seq, target, hits, demand) {
                return false;
            }
            self.take(seq, target, hits);
        }
        if self.caching && !demand.delay_registration {
            self.register(seq, (computed + k).min(seq.num_tokens()));
        }
        true
    }

    fn fits(&self, seq: &Sequence, target: u32, hits: &[BlockIx], demand: Demand) -> bool {
        // Hit blocks that nobody holds are in the free list: adopting them uses up free capacity.
        let adopted = hits.iter().filter(|&&b| self.pool.is_free(b)).count() as u32;
        let owned = seq.blocks.len() as u32 + hits.len() as u32;
        let need = |tokens: u32| tokens.div_ceil(self.block_size).saturating_sub(owned) + adopted + demand.watermark;
        let free = self.pool.free_blocks();
        let whole = seq.num_tokens().min(self.max_model_len);
        (!demand.full_sequence || need(whole) <= free) && need(target) <= free.saturating_sub(demand.reserved)
    }

    fn take(&mut self, seq: &mut Sequence, target: u32, hits: &[BlockIx]) {
        for &block in hits {
            self.pool.touch(block);
            if let Some(residency) = &mut self.residency {
                residency.used(block);
            }
        }
        seq.blocks.extend_from_slice(hits);
        seq.registered = seq.registered.max(hits.len() as u32);
        let want = target.div_ceil(self.block_size) as usize;
        while seq.blocks.len() < want {
            let (block, evicted) = self.pool.pop();
            seq.blocks.push(block);
            if let Some(residency) = &mut self.residency {
                residency.allocated(block, evicted.is_some());
            }
            if let (Some(events), Some(key)) = (&mut self.events, evicted) {
                events.push(KvEvent::Removed(key));
            }
        }
    }

    /// Registers the full blocks within the first `tokens` tokens.
    #[inline]
    pub(crate) fn register(&mut self, seq: &mut Sequence, tokens: u32) {
        let full = tokens / self.block_size;
        if full > seq.registered && self.caching {
            self.register_blocks(seq, full);
        }
    }

    fn register_blocks(&mut self, seq: &mut Sequence, full: u32) {
        let range = seq.registered as usize..(full as usize).min(seq.new.keys.len()).min(seq.blocks.len());
        for i in range.clone() {
            self.pool.register(seq.blocks[i], seq.new.keys[i]);
        }
        if let Some(events) = &mut self.events
            && !range.is_empty()
        {
            events.push(KvEvent::Stored {
                tag: seq.new.tag,
                parent: range.start.checked_sub(1).map(|i| seq.new.keys[i]),
                first_block: seq.registered,
                keys: seq.new.keys[range.clone()].to_vec(),
                content: seq.new.source.as_ref().map(|s| Box::new(s.content(&range, self.block_size))),
            });
        }
        seq.registered = seq.registered.max(range.end as u32);
    }

    /// Forgets the content of all blocks. False, and nothing happens, while any block is held.
    pub(crate) fn reset(&mut self) -> bool {
        let done = self.pool.clear();
        if let Some(residency) = self.residency.as_mut().filter(|_| done) {
            residency.forget_all();
        }
        if let Some(events) = self.events.as_mut().filter(|_| done) {
            events.push(KvEvent::Cleared);
        }
        done
    }

    /// Takes all blocks from `seq`.
    pub(crate) fn release(&mut self, seq: &mut Sequence) {
        self.pool.release(&seq.blocks);
        seq.blocks.clear();
        seq.registered = 0;
    }

    /// Takes back blocks whose request is gone already.
    pub(crate) fn release_blocks(&mut self, blocks: &[BlockIx]) {
        self.pool.release(blocks);
    }
}
