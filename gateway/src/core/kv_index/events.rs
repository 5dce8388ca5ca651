//! What an engine says of its KV cache, as the index takes it: vLLM's KV events without their wire form.
//!
//! Events carry token ids. They are read here to name blocks, and kept nowhere: neither is one printed by `Debug`.

use std::fmt;
use std::sync::Arc;

use shared::tokens::TokenId;

/// A block's name in the events of one engine: the low 64 bits of its hash. It means nothing elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EngineHash(pub u64);

/// Where an engine keeps a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Tier {
    /// In the memory of its GPUs.
    #[default]
    Gpu,
    /// In the memory of its host.
    Cpu,
}

impl Tier {
    /// The tier that an event calls its `medium`; one without a medium is of the GPU. `None` for one that the index does not know.
    pub fn of_medium(medium: Option<&str>) -> Option<Tier> {
        let Some(medium) = medium else { return Some(Tier::Gpu) };
        if medium.eq_ignore_ascii_case("gpu") {
            Some(Tier::Gpu)
        } else if medium.eq_ignore_ascii_case("cpu") {
            Some(Tier::Cpu)
        } else {
            None
        }
    }
}

/// Blocks that are found from now on.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Stored {
    /// Their names, in order.
    pub blocks: Vec<EngineHash>,
    /// The block before the first one; `None` at the start of a prompt.
    pub parent: Option<EngineHash>,
    /// The tokens of all blocks.
    pub tokens: Vec<TokenId>,
    /// Tokens in a block.
    pub block_tokens: u32,
    /// Where they are.
    pub tier: Tier,
    /// The LoRA adapter that they belong to.
    pub adapter: Option<Arc<str>>,
    /// The salt of the prompt, if its first block is among them.
    pub salt: Option<Arc<str>>,
    /// Whether something else enters their hashes, of which a request says nothing: an image, for example.
    pub opaque: bool,
}

impl fmt::Debug for Stored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (blocks, tokens) = (self.blocks.len(), self.tokens.len());
        f.debug_struct("Stored").field("blocks", &blocks).field("tokens", &tokens).finish_non_exhaustive()
    }
}

/// One event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CacheEvent {
    /// Blocks are found from now on.
    Stored(Stored),
    /// Blocks are found no more.
    Removed {
        /// Their names.
        blocks: Vec<EngineHash>,
        /// Where they were.
        tier: Tier,
    },
    /// No block is found any more.
    Cleared,
}

/// What an engine published at once.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Batch {
    /// Counts batches of an engine from 0.
    pub seq: u64,
    /// When it was made, on the engine's clock, in nanoseconds.
    pub made: u64,
    /// What happened, in order.
    pub events: Vec<CacheEvent>,
}

impl Batch {
    /// Blocks that it names.
    pub fn blocks(&self) -> u32 {
        let of = |e: &CacheEvent| match e {
            CacheEvent::Stored(stored) => stored.blocks.len(),
            CacheEvent::Removed { blocks, .. } => blocks.len(),
            CacheEvent::Cleared => 0,
        };
        self.events.iter().map(of).sum::<usize>() as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn media_are_tiers() {
        let check = |medium, expect| assert_eq!(Tier::of_medium(medium), expect, "{medium:?}");
        check(None, Some(Tier::Gpu));
        check(Some("GPU"), Some(Tier::Gpu));
        check(Some("cpu"), Some(Tier::Cpu));
        check(Some("DISK"), None);
    }

    #[test]
    fn tokens_are_not_printed() {
        let stored = Stored { tokens: vec![TokenId(987_654)], ..Stored::default() };
        let batch = Batch { events: vec![CacheEvent::Stored(stored)], ..Batch::default() };
        assert!(!format!("{batch:?}").contains("987654"));
    }
}
