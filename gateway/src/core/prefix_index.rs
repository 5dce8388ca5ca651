//! The approximate index of prompt prefixes: which endpoint was sent which blocks, as llm-d's `approx-prefix-cache-producer`.
//!
//! It is written when a request is dispatched, in the hope that the engine will cache it, and knows nothing of what the engine
//! really keeps. Blocks are 64 tokens; each endpoint remembers a bounded number, least recently used first out.

use rustc_hash::FxHashMap;
use shared::rng::mix64;
use shared::tokens::{self, BYTES_PER_TOKEN, TokenId};
use xxhash_rust::xxh3::xxh3_64;

use crate::core::pool::EndpointId;

/// Tokens in a block of the index: llm-d raises every smaller block size to this.
pub const BLOCK_TOKENS: usize = 64;
/// The largest block size, in tokens: what is hashed lies in a buffer of this size.
pub const MAX_BLOCK_TOKENS: usize = 256;

const MAX_BLOCK_BYTES: usize = MAX_BLOCK_TOKENS * BYTES_PER_TOKEN;

/// Hashes a prompt block by block, each block chained to the one before it and the first to model and salt.
///
/// Text and the tokens it encodes to give the same hashes.
#[derive(Debug)]
pub struct PrefixHasher {
    parent: u64,
    buffer: [u8; MAX_BLOCK_BYTES],
    /// Bytes of text in a block.
    block: usize,
    filled: usize,
    bytes: usize,
    max_blocks: usize,
    hashes: Vec<u64>,
}

impl PrefixHasher {
    /// A hasher for prompts to `model` in blocks of [`BLOCK_TOKENS`]; `salt` separates caches, `max_tokens` bounds the part that
    /// is hashed.
    pub fn new(model: &str, salt: Option<&str>, max_tokens: u32) -> PrefixHasher {
        PrefixHasher::with_blocks(model, salt, max_tokens, BLOCK_TOKENS as u32)
    }

    /// As [`PrefixHasher::new`], with blocks of `block_tokens`.
    ///
    /// # Panics
    /// If that is 0 or more than [`MAX_BLOCK_TOKENS`].
    pub fn with_blocks(model: &str, salt: Option<&str>, max_tokens: u32, block_tokens: u32) -> PrefixHasher {
        let whole = PrefixHasher::after(prefix_root(model, salt), block_tokens);
        PrefixHasher { max_blocks: max_tokens as usize / block_tokens as usize, ..whole }
    }

    /// A hasher for the blocks of `block_tokens` that follow the one called `parent`: their hashes are those of the whole prompt.
    ///
    /// # Panics
    /// As [`PrefixHasher::with_blocks`].
    pub fn after(parent: u64, block_tokens: u32) -> PrefixHasher {
        let tokens = block_tokens as usize;
        assert!((1..=MAX_BLOCK_TOKENS).contains(&tokens), "a block of {tokens} tokens");
        PrefixHasher {
            parent,
            buffer: [0; MAX_BLOCK_BYTES],
            block: tokens * BYTES_PER_TOKEN,
            filled: 0,
            bytes: 0,
            max_blocks: usize::MAX,
            hashes: Vec::new(),
        }
    }

    /// Appends text to the prompt.
    pub fn text(&mut self, mut text: &[u8]) {
        self.bytes += text.len();
        while !text.is_empty() && self.hashes.len() < self.max_blocks {
            if self.filled == 0 && text.len() >= self.block {
                self.push(xxh3_64(&text[..self.block]));
                text = &text[self.block..];
                continue;
            }
            let part = text.len().min(self.block - self.filled);
            self.buffer[self.filled..self.filled + part].copy_from_slice(&text[..part]);
            self.filled += part;
            text = &text[part..];
            self.flush_if(self.block);
        }
    }

    /// Appends token ids to the prompt; not to be mixed with text that ends inside a token.
    pub fn tokens(&mut self, ids: impl IntoIterator<Item = TokenId>) {
        for id in ids {
            self.bytes += BYTES_PER_TOKEN;
            if self.hashes.len() < self.max_blocks {
                self.buffer[self.filled..self.filled + BYTES_PER_TOKEN].copy_from_slice(&id.0.to_le_bytes());
                self.filled += BYTES_PER_TOKEN;
                self.flush_if(self.block);
            }
        }
    }

    /// The prompt's length in tokens so far, four bytes each.
    pub const fn token_count(&self) -> usize {
        tokens::count(self.bytes)
    }

    /// The hashes of all full blocks. A last token of fewer than four bytes counts as a token.
    pub fn finish(mut self) -> Vec<u64> {
        self.flush_if(self.block - BYTES_PER_TOKEN + 1);
        self.hashes
    }

    fn flush_if(&mut self, least: usize) {
        if self.filled >= least && self.hashes.len() < self.max_blocks {
            self.buffer[self.filled..self.block].fill(0);
            self.push(xxh3_64(&self.buffer[..self.block]));
            self.filled = 0;
        }
    }

    fn push(&mut self, block: u64) {
        self.parent = mix64(self.parent.rotate_left(29) ^ block);
        self.hashes.push(self.parent);
    }
}

/// What stands before the first block of prompts to `model`; `salt` separates caches.
pub fn prefix_root(model: &str, salt: Option<&str>) -> u64 {
    let salt = salt.map_or(0, |s| mix64(xxh3_64(s.as_bytes())));
    xxh3_64(model.as_bytes()) ^ salt
}

/// The block hashes of a prompt given as text.
pub fn prefix_hashes(model: &str, salt: Option<&str>, text: &[u8], max_tokens: u32) -> Vec<u64> {
    let mut hasher = PrefixHasher::new(model, salt, max_tokens);
    hasher.text(text);
    hasher.finish()
}

/// The block hashes of a prompt given as tokens: those of the text that encodes to them.
pub fn prefix_hashes_of_tokens(model: &str, salt: Option<&str>, ids: &[TokenId], max_tokens: u32) -> Vec<u64> {
    let mut hasher = PrefixHasher::new(model, salt, max_tokens);
    hasher.tokens(ids.iter().copied());
    hasher.finish()
}

/// Which endpoint was sent which blocks.
///
/// One map finds a block, a bit set beside it says who holds it; so a lookup costs one probe a block for any number of endpoints.
#[derive(Debug)]
pub struct PrefixIndex {
    /// Blocks remembered for an endpoint of which nothing else is known.
    capacity: u32,
    /// Blocks remembered for each endpoint.
    capacities: Vec<u32>,
    /// Words in a block's bit set.
    words: usize,
    slots: FxHashMap<u64, u32>,
    hashes: Vec<u64>,
    holders: Vec<u64>,
    free: Vec<u32>,
    recent: Vec<Recent>,
    /// Endpoints that match so far, during a lookup.
    alive: Vec<u64>,
}

impl PrefixIndex {
    /// An index of `endpoints` endpoints that remembers `capacity` blocks for each.
    pub fn new(endpoints: usize, capacity: u32) -> PrefixIndex {
        assert!(capacity > 0, "an index without room cannot be written");
        let words = endpoints.div_ceil(64).max(1);
        PrefixIndex {
            capacity,
            capacities: vec![capacity; endpoints],
            words,
            slots: FxHashMap::default(),
            hashes: Vec::new(),
            holders: Vec::new(),
            free: Vec::new(),
            recent: (0..endpoints).map(|_| Recent::default()).collect(),
            alive: vec![0; words],
        }
    }

    /// Makes room for one more endpoint.
    pub fn add_endpoint(&mut self) {
        self.capacities.push(self.capacity);
        self.recent.push(Recent::default());
        let words = self.recent.len().div_ceil(64);
        if words > self.words {
            let mut wider = vec![0; self.hashes.len() * words];
            for (new, old) in wider.chunks_exact_mut(words).zip(self.holders.chunks_exact(self.words)) {
                new[..self.words].copy_from_slice(old);
            }
            (self.holders, self.words) = (wider, words);
            self.alive.resize(words, 0);
        }
    }

    /// How many endpoints it has room for.
    pub const fn endpoints(&self) -> usize {
        self.capacities.len()
    }

    /// Remembers at most `blocks` for an endpoint from now on; what is remembered already stays until something newer comes.
    pub fn set_capacity(&mut self, endpoint: EndpointId, blocks: u32) {
        self.capacities[endpoint.index()] = blocks.max(1);
    }

    /// Blocks remembered for an endpoint.
    pub fn len(&self, endpoint: EndpointId) -> usize {
        self.recent[endpoint.index()].nodes.len()
    }

    /// Sets `matched[e]` to the number of leading blocks of `prefix` that endpoint `e` was sent.
    pub fn matches(&mut self, prefix: &[u64], matched: &mut Vec<u32>) {
        matched.clear();
        matched.resize(self.recent.len(), 0);
        self.alive.fill(u64::MAX);
        let mut length = 0;
        for hash in prefix {
            let Some(&slot) = self.slots.get(hash) else { break };
            let start = slot as usize * self.words;
            if settle(&mut self.alive, &self.holders[start..start + self.words], length, matched) {
                return;
            }
            length += 1;
        }
        if length > 0 {
            for (w, bits) in self.alive.iter().enumerate() {
                set_all(w, *bits, length as u32, matched);
            }
        }
    }

    /// Remembers that `endpoint` was sent `prefix`.
    pub fn insert(&mut self, endpoint: EndpointId, prefix: &[u64]) {
        let (word, bit) = (endpoint.index() / 64, 1 << (endpoint.index() % 64));
        let capacity = self.capacities[endpoint.index()];
        for &hash in prefix {
            let slot = self.slot(hash);
            let evicted = self.recent[endpoint.index()].touch(slot, capacity);
            self.holders[slot as usize * self.words + word] |= bit;
            if let Some(old) = evicted {
                self.release(old, word, bit);
            }
        }
    }

    /// Forgets everything about `endpoint`: it went away, or came back empty.
    pub fn clear(&mut self, endpoint: EndpointId) {
        let (word, bit) = (endpoint.index() / 64, 1 << (endpoint.index() % 64));
        let recent = std::mem::take(&mut self.recent[endpoint.index()]);
        for node in &recent.list {
            self.release(node.slot, word, bit);
        }
    }

    fn slot(&mut self, hash: u64) -> u32 {
        *self.slots.entry(hash).or_insert_with(|| {
            if let Some(slot) = self.free.pop() {
                self.hashes[slot as usize] = hash;
                return slot;
            }
            self.hashes.push(hash);
            self.holders.resize(self.hashes.len() * self.words, 0);
            (self.hashes.len() - 1) as u32
        })
    }

    fn release(&mut self, slot: u32, word: usize, bit: u64) {
        let start = slot as usize * self.words;
        let holders = &mut self.holders[start..start + self.words];
        holders[word] &= !bit;
        if holders.iter().all(|w| *w == 0) {
            self.slots.remove(&self.hashes[slot as usize]);
            self.free.push(slot);
        }
    }
}

/// Ends the match, at `length` blocks, of endpoints that do not hold the next block; true if none is left.
fn settle(alive: &mut [u64], holders: &[u64], length: usize, matched: &mut [u32]) -> bool {
    let mut left = 0;
    for (w, (word, held)) in alive.iter_mut().zip(holders).enumerate() {
        let dropped = *word & !held;
        *word &= held;
        left |= *word;
        if length > 0 {
            set_all(w, dropped, length as u32, matched);
        }
    }
    left == 0
}

/// Sets the length of the match of every endpoint whose bit is set in `bits`, the `w`-th word of a bit set.
fn set_all(w: usize, mut bits: u64, length: u32, matched: &mut [u32]) {
    while bits != 0 {
        if let Some(m) = matched.get_mut(w * 64 + bits.trailing_zeros() as usize) {
            *m = length;
        }
        bits &= bits - 1;
    }
}

const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, Debug)]
struct Node {
    slot: u32,
    newer: u32,
    older: u32,
}

/// The blocks of one endpoint, from the least to the most recently used: a doubly linked list in a vector.
#[derive(Debug)]
struct Recent {
    nodes: FxHashMap<u32, u32>,
    list: Vec<Node>,
    newest: u32,
    oldest: u32,
}

impl Default for Recent {
    fn default() -> Recent {
        Recent { nodes: FxHashMap::default(), list: Vec::new(), newest: NONE, oldest: NONE }
    }
}

impl Recent {
    /// Makes `slot` the most recently used one; returns the slot that had to go for it.
    fn touch(&mut self, slot: u32, capacity: u32) -> Option<u32> {
        if let Some(&node) = self.nodes.get(&slot) {
            if node != self.newest {
                self.unlink(node);
                self.push_newest(node);
            }
            return None;
        }
        let full = self.list.len() as u32 >= capacity;
        let (node, evicted) = if full { self.reuse_oldest(slot) } else { (self.grow(slot), None) };
        self.nodes.insert(slot, node);
        self.push_newest(node);
        evicted
    }

    fn grow(&mut self, slot: u32) -> u32 {
        self.list.push(Node { slot, newer: NONE, older: NONE });
        (self.list.len() - 1) as u32
    }

    fn reuse_oldest(&mut self, slot: u32) -> (u32, Option<u32>) {
        let node = self.oldest;
        self.unlink(node);
        let old = std::mem::replace(&mut self.list[node as usize].slot, slot);
        self.nodes.remove(&old);
        (node, Some(old))
    }

    fn unlink(&mut self, node: u32) {
        let Node { newer, older, .. } = self.list[node as usize];
        match newer {
            NONE => self.newest = older,
            n => self.list[n as usize].older = older,
        }
        match older {
            NONE => self.oldest = newer,
            n => self.list[n as usize].newer = newer,
        }
    }

    fn push_newest(&mut self, node: u32) {
        let older = std::mem::replace(&mut self.newest, node);
        let links = &mut self.list[node as usize];
        (links.newer, links.older) = (NONE, older);
        match older {
            NONE => self.oldest = node,
            n => self.list[n as usize].newer = node,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use shared::tokens::{ContentId, encode, push_text};

    const ALL: u32 = u32::MAX;

    #[test]
    fn text_and_its_tokens_hash_alike() {
        for bytes in [0, 3, 252, 253, 255, 256, 257, 509, 512, 5000] {
            let mut ids = Vec::new();
            ContentId(4).extend(0, 1300, &mut ids);
            let mut text = String::new();
            push_text(&ids, &mut text);
            text.truncate(bytes);
            ids.clear();
            encode(&text, &mut ids);
            let hashes = prefix_hashes("m", None, text.as_bytes(), ALL);
            assert_eq!(hashes.len(), ids.len() / BLOCK_TOKENS, "{bytes} bytes");
            assert_eq!(hashes, prefix_hashes_of_tokens("m", None, &ids, ALL), "{bytes} bytes");
            let mut pieces = PrefixHasher::new("m", None, ALL);
            text.as_bytes().chunks(101).for_each(|p| pieces.text(p));
            assert_eq!(pieces.token_count(), ids.len());
            assert_eq!(pieces.finish(), hashes);
        }
    }

    #[test]
    fn hashes_depend_on_model_salt_and_everything_before() {
        let text = [b'a'; 4 * BLOCK_TOKENS * BYTES_PER_TOKEN];
        let base = prefix_hashes("m", None, &text, ALL);
        assert_eq!(base.len(), 4);
        assert_eq!(prefix_hashes("m", None, &text, 128), base[..2]);
        assert!(base.iter().zip(prefix_hashes("n", None, &text, ALL)).all(|(a, b)| *a != b));
        assert!(base.iter().zip(prefix_hashes("m", Some("s"), &text, ALL)).all(|(a, b)| *a != b));
        let mut other = text;
        other[BLOCK_TOKENS * BYTES_PER_TOKEN] = b'b';
        let changed = prefix_hashes("m", None, &other, ALL);
        assert_eq!(changed[0], base[0]);
        assert!(base[1..].iter().zip(&changed[1..]).all(|(a, b)| a != b));
    }

    #[test]
    fn larger_blocks_are_fewer() {
        let text = [b'a'; 4 * BLOCK_TOKENS * BYTES_PER_TOKEN];
        let blocks = |tokens| {
            let mut hasher = PrefixHasher::with_blocks("m", None, ALL, tokens);
            text.chunks(33).for_each(|part| hasher.text(part));
            hasher.finish().len()
        };
        assert_eq!([64, 100, 128, 256].map(blocks), [4, 2, 2, 1]);
    }

    #[test]
    fn an_endpoint_may_have_a_bound_of_its_own() {
        let mut index = PrefixIndex::new(2, 2);
        index.set_capacity(EndpointId(1), 4);
        for endpoint in [0, 1].map(EndpointId) {
            index.insert(endpoint, &[1, 2, 3, 4, 5]);
        }
        assert_eq!([0, 1].map(|e| index.len(EndpointId(e))), [2, 4]);
        index.clear(EndpointId(1));
        index.insert(EndpointId(1), &[1, 2, 3, 4, 5]);
        assert_eq!(index.len(EndpointId(1)), 4);
    }

    #[test]
    fn the_longest_leading_match_counts() {
        let mut index = PrefixIndex::new(3, 100);
        index.insert(EndpointId(0), &[1, 2, 3]);
        index.insert(EndpointId(1), &[1, 9, 3]);
        let mut matched = Vec::new();
        index.matches(&[1, 2, 3, 4], &mut matched);
        assert_eq!(matched, [3, 1, 0]);
        index.matches(&[2, 3], &mut matched);
        assert_eq!(matched, [2, 0, 0]);
        index.clear(EndpointId(0));
        index.matches(&[1, 2, 3, 4], &mut matched);
        assert_eq!(matched, [0, 1, 0]);
        index.matches(&[], &mut matched);
        assert_eq!(matched, [0, 0, 0]);
    }

    #[test]
    fn endpoints_can_be_added_beyond_a_word() {
        let mut index = PrefixIndex::new(64, 4);
        index.insert(EndpointId(63), &[1, 2]);
        index.add_endpoint();
        index.insert(EndpointId(64), &[1]);
        let mut matched = Vec::new();
        index.matches(&[1, 2], &mut matched);
        assert_eq!((matched[63], matched[64], matched.len()), (2, 1, 65));
    }

    /// The plainest index that can be: a list of blocks for each endpoint, oldest first.
    fn naive_insert(list: &mut Vec<u64>, prefix: &[u64], capacity: usize) {
        for h in prefix {
            list.retain(|x| x != h);
            list.push(*h);
            if list.len() > capacity {
                list.remove(0);
            }
        }
    }

    proptest! {
        #[test]
        fn agrees_with_a_naive_index(
            steps in proptest::collection::vec((0u32..3, proptest::collection::vec(0u64..12, 0..6)), 0..60),
            capacity in 1u32..8,
        ) {
            let mut index = PrefixIndex::new(3, capacity);
            let mut naive = vec![Vec::new(); 3];
            let mut matched = Vec::new();
            for (endpoint, prefix) in steps {
                index.matches(&prefix, &mut matched);
                let expect: Vec<u32> = naive
                    .iter()
                    .map(|held: &Vec<u64>| prefix.iter().take_while(|h| held.contains(h)).count() as u32)
                    .collect();
                prop_assert_eq!(&matched, &expect);
                index.insert(EndpointId(endpoint), &prefix);
                naive_insert(&mut naive[endpoint as usize], &prefix, capacity as usize);
                prop_assert_eq!(index.len(EndpointId(endpoint)), naive[endpoint as usize].len());
            }
            let held: std::collections::BTreeSet<u64> = naive.concat().into_iter().collect();
            prop_assert_eq!(index.slots.len(), held.len());
        }
    }
}
