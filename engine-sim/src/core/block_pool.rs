//! The blocks of the KV cache: who holds them, in which order they are reused, and which content they carry.
//!
//! Semantics of vLLM's `block_pool.py` and `FreeKVCacheBlockQueue`: a free block keeps its content until it is handed out
//! again, so the free list is also the eviction order. Knows blocks and keys, not requests.
//!
//! vLLM's one list has three parts, kept apart here: blocks that were let go of without content, blocks that were never handed out,
//! in order, and blocks with content. The middle part needs no memory, so an idle engine is small.

use std::collections::VecDeque;
use std::hash::{BuildHasherDefault, Hasher};

use rustc_hash::FxHashMap;
use shared::block_hash::BlockKey;

/// Index of a block. Block 0 is the null block: never handed out, here the sentinel of the list of free blocks with content.
pub type BlockIx = u32;

const NULL: BlockIx = 0;

/// All blocks of an engine.
#[derive(Clone, Debug)]
pub struct BlockPool {
    /// Blocks that were handed out at least once, and the null block.
    blocks: Vec<Block>,
    num_blocks: u32,
    /// Free blocks without content, the next to be handed out last.
    spare: Vec<BlockIx>,
    free: u32,
    by_key: std::collections::HashMap<BlockKey, BlockIx, BuildHasherDefault<KeyBits>>,
    /// Later blocks with a key that `by_key` already maps, oldest first. Empty unless equal prompts run side by side.
    duplicates: FxHashMap<BlockKey, VecDeque<BlockIx>>,
    evictions: u64,
}

#[derive(Clone, Debug)]
struct Block {
    key: BlockKey,
    prev: BlockIx,
    next: BlockIx,
    ref_count: u32,
    hashed: bool,
}

impl Block {
    /// A block that was never handed out; the null block is a list of none.
    const NEW: Block = Block { key: BlockKey(0), prev: NULL, next: NULL, ref_count: 0, hashed: false };
}

impl BlockPool {
    /// A pool of `num_blocks`, the null block included; block 1 is handed out first.
    pub fn new(num_blocks: u32) -> BlockPool {
        let num_blocks = num_blocks.max(1);
        BlockPool {
            blocks: vec![Block::NEW],
            num_blocks,
            spare: Vec::new(),
            free: num_blocks - 1,
            by_key: Default::default(),
            duplicates: FxHashMap::default(),
            evictions: 0,
        }
    }

    /// Blocks of the pool, the null block included.
    pub const fn num_blocks(&self) -> u32 {
        self.num_blocks
    }

    /// Blocks that nobody holds.
    pub const fn free_blocks(&self) -> u32 {
        self.free
    }

    /// Fraction of the usable blocks that is held, in 0..=1.
    pub fn usage(&self) -> f64 {
        let usable = self.num_blocks() - 1;
        if usable == 0 { 0.0 } else { 1.0 - f64::from(self.free) / f64::from(usable) }
    }

    /// How many blocks lost their content so far.
    pub const fn evictions(&self) -> u64 {
        self.evictions
    }

    /// The earliest registered of the blocks that carry `key` now.
    pub fn lookup(&self, key: BlockKey) -> Option<BlockIx> {
        self.by_key.get(&key).copied()
    }

    /// Whether nobody holds `block`.
    pub fn is_free(&self, block: BlockIx) -> bool {
        self.blocks[block as usize].ref_count == 0
    }

    /// Holds a block once more; a free one leaves the free list with its content.
    pub fn touch(&mut self, block: BlockIx) {
        if self.is_free(block) {
            self.unlink(block);
        }
        self.blocks[block as usize].ref_count += 1;
    }

    /// Takes the block at the front of the free list; also returns the content it loses.
    ///
    /// The caller has checked that a block is free.
    pub fn pop(&mut self) -> (BlockIx, Option<BlockKey>) {
        let (block, evicted) = self.front();
        self.blocks[block as usize].ref_count = 1;
        (block, evicted)
    }

    fn front(&mut self) -> (BlockIx, Option<BlockKey>) {
        let new = self.blocks.len() as BlockIx;
        if let Some(block) = self.spare.pop() {
            self.free -= 1;
            return (block, None);
        }
        if new < self.num_blocks {
            // Doubled as it grows, but never above what there is.
            if self.blocks.len() == self.blocks.capacity() {
                self.blocks.reserve_exact((self.num_blocks - new).min(new) as usize);
            }
            self.blocks.push(Block::NEW);
            self.free -= 1;
            return (new, None);
        }
        let block = self.blocks[NULL as usize].next;
        assert_ne!(block, NULL, "the caller checks that a block is free");
        self.unlink(block);
        (block, self.forget(block))
    }

    /// Gives a held block a content under which it is found from now on.
    pub fn register(&mut self, block: BlockIx, key: BlockKey) {
        use std::collections::hash_map::Entry;
        let b = &mut self.blocks[block as usize];
        b.key = key;
        b.hashed = true;
        match self.by_key.entry(key) {
            Entry::Vacant(slot) => {
                slot.insert(block);
            }
            Entry::Occupied(_) => self.duplicates.entry(key).or_default().push_back(block),
        }
    }

    /// Lets go of the blocks of one request, given head first.
    ///
    /// Blocks that become free and carry no content go to the front of the free list, the last block foremost; those with
    /// content go to the back, the last block first, so that a chain is evicted from its tail.
    pub fn release(&mut self, blocks: &[BlockIx]) {
        for &block in blocks {
            let b = &mut self.blocks[block as usize];
            b.ref_count -= 1;
            if b.ref_count == 0 && !b.hashed {
                self.spare.push(block);
                self.free += 1;
            }
        }
        for &block in blocks.iter().rev() {
            let b = &self.blocks[block as usize];
            if b.ref_count == 0 && b.hashed {
                self.link_after(self.blocks[NULL as usize].prev, block);
            }
        }
    }

    /// Forgets the content of all blocks; their order in the free list stays. False, and nothing happens, while any is held.
    pub fn clear(&mut self) -> bool {
        let idle = self.free + 1 == self.num_blocks();
        if idle {
            self.by_key.clear();
            self.duplicates.clear();
            self.blocks.iter_mut().for_each(|b| b.hashed = false);
        }
        idle
    }

    fn unlink(&mut self, block: BlockIx) {
        let Block { prev, next, .. } = self.blocks[block as usize];
        self.blocks[prev as usize].next = next;
        self.blocks[next as usize].prev = prev;
        self.free -= 1;
    }

    fn link_after(&mut self, prev: BlockIx, block: BlockIx) {
        let next = self.blocks[prev as usize].next;
        self.blocks[block as usize].prev = prev;
        self.blocks[block as usize].next = next;
        self.blocks[prev as usize].next = block;
        self.blocks[next as usize].prev = block;
        self.free += 1;
    }

    /// Removes a block's content; a duplicate takes its place in the map.
    fn forget(&mut self, block: BlockIx) -> Option<BlockKey> {
        let b = &mut self.blocks[block as usize];
        if !std::mem::take(&mut b.hashed) {
            return None;
        }
        let key = b.key;
        self.evictions += 1;
        let later = if self.duplicates.is_empty() { None } else { self.duplicates.get_mut(&key) };
        let Some(later) = later else {
            self.by_key.remove(&key);
            return Some(key);
        };
        if self.by_key.get(&key) == Some(&block) {
            if let Some(heir) = later.pop_front() {
                self.by_key.insert(key, heir);
            }
        } else {
            later.retain(|&other| other != block);
        }
        if later.is_empty() {
            self.duplicates.remove(&key);
        }
        Some(key)
    }

    /// How many hold `block`.
    #[cfg(test)]
    pub(crate) fn holders(&self, block: BlockIx) -> u32 {
        self.blocks.get(block as usize).map_or(0, |b| b.ref_count)
    }

    /// What is found in `block`.
    #[cfg(test)]
    pub(crate) fn content(&self, block: BlockIx) -> Option<BlockKey> {
        self.blocks.get(block as usize).filter(|b| b.hashed).map(|b| b.key)
    }

    /// The block handed out next, 0 if there is none.
    #[cfg(test)]
    pub(crate) fn next_free(&self) -> BlockIx {
        self.free_list().first().copied().unwrap_or(NULL)
    }

    #[cfg(test)]
    pub(crate) fn free_list(&self) -> Vec<BlockIx> {
        let next = |&b: &BlockIx| Some(self.blocks[b as usize].next).filter(|&n| n != NULL);
        let new = self.blocks.len() as BlockIx..self.num_blocks;
        self.spare.iter().rev().copied().chain(new).chain(std::iter::successors(next(&NULL), next)).collect()
    }
}

/// Block keys are hashes already: their own bits serve as the hash.
#[derive(Default, Debug)]
struct KeyBits(u64);

impl Hasher for KeyBits {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write_u128(&mut self, key: u128) {
        self.0 = key as u64 ^ (key >> 64) as u64;
    }
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.0 = self.0.rotate_left(5) ^ u64::from_le_bytes(word);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pop_n(pool: &mut BlockPool, n: usize) -> Vec<BlockIx> {
        (0..n).map(|_| pool.pop().0).collect()
    }

    #[test]
    fn released_blocks_without_content_are_reused_first_and_tail_first() {
        let mut pool = BlockPool::new(10);
        let blocks = pop_n(&mut pool, 5);
        assert_eq!(blocks, [1, 2, 3, 4, 5]);
        pool.register(1, BlockKey(11));
        pool.register(2, BlockKey(12));
        pool.release(&blocks);
        assert_eq!(pool.free_list(), [5, 4, 3, 6, 7, 8, 9, 2, 1]);
    }

    #[test]
    fn a_free_block_is_found_until_it_is_handed_out() {
        let mut pool = BlockPool::new(3);
        let blocks = pop_n(&mut pool, 2);
        pool.register(1, BlockKey(7));
        pool.release(&blocks);
        assert_eq!(pool.lookup(BlockKey(7)), Some(1));
        assert_eq!(pool.pop(), (2, None));
        assert_eq!(pool.pop(), (1, Some(BlockKey(7))));
        assert_eq!((pool.lookup(BlockKey(7)), pool.evictions()), (None, 1));
    }

    #[test]
    fn a_cleared_pool_finds_nothing() {
        let mut pool = BlockPool::new(4);
        let held = pop_n(&mut pool, 2);
        pool.register(held[0], BlockKey(7));
        assert!(!pool.clear(), "blocks are held");
        assert_eq!(pool.lookup(BlockKey(7)), Some(held[0]));
        pool.release(&held);
        assert!(pool.clear());
        assert_eq!((pool.lookup(BlockKey(7)), pool.free_blocks(), pool.evictions()), (None, 3, 0));
    }

    #[test]
    fn the_earliest_registered_duplicate_is_found() {
        let mut pool = BlockPool::new(4);
        let blocks = pop_n(&mut pool, 3);
        for &b in &blocks {
            pool.register(b, BlockKey(7));
        }
        let mut found = Vec::new();
        for b in blocks {
            found.push(pool.lookup(BlockKey(7)));
            pool.release(&[b]);
            assert_eq!(pool.pop(), (b, Some(BlockKey(7))));
        }
        assert_eq!(found, [Some(1), Some(2), Some(3)]);
        assert_eq!(pool.lookup(BlockKey(7)), None);
    }

    proptest! {
        /// Blocks are conserved: each is either on the free list once or held.
        #[test]
        fn every_block_is_free_or_held(ops in proptest::collection::vec((0u8..3, 1usize..6, 0u128..5), 1..200)) {
            let mut pool = BlockPool::new(20);
            let mut held: Vec<Vec<BlockIx>> = Vec::new();
            for (op, n, key) in ops {
                match op {
                    0 if pool.free_blocks() as usize >= n => {
                        let blocks = pop_n(&mut pool, n);
                        pool.register(blocks[0], BlockKey(key));
                        held.push(blocks);
                    }
                    1 if !held.is_empty() => pool.release(&held.swap_remove(n % held.len())),
                    _ => {
                        if let Some(b) = pool.lookup(BlockKey(key)) {
                            pool.touch(b);
                            held.push(vec![b]);
                        }
                    }
                }
                let list = pool.free_list();
                prop_assert_eq!(list.len(), pool.free_blocks() as usize);
                let mut seen: Vec<BlockIx> = list.into_iter().chain(held.iter().flatten().copied()).collect();
                seen.sort_unstable();
                seen.dedup();
                prop_assert_eq!(seen, (1..20).collect::<Vec<_>>());
            }
        }
    }
}
