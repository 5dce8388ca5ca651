//! Names blocks: the chain of keys over a request's prompt and, later, over its output.
//!
//! Tokens go in and opaque keys come out; nothing keeps the tokens.

use shared::block_hash::{self, BlockKey, CHAIN_ROOT, Digest32, ExtraKeys};
use shared::tokens::TokenId;

use crate::core::config::{CacheConfig, HashAlgo};
use crate::core::kv_events::EventSource;

/// The state of one request's chain: what the next block's key depends on besides its tokens.
#[derive(Clone, Debug)]
pub enum BlockHasher {
    /// The cheap chain.
    Chain(BlockKey),
    /// vLLM's `sha256_cbor`. Boxed: a digest and two names are too large to carry in every request.
    Sha256Cbor(Box<ShaChain>),
}

/// State of a `sha256_cbor` chain.
#[derive(Clone, Debug)]
pub struct ShaChain {
    parent: Digest32,
    first: bool,
    extra: ExtraKeys,
}

impl BlockHasher {
    /// A chain before its first block. `extra` separates LoRA adapters and cache salts.
    pub fn new(algo: HashAlgo, extra: &ExtraKeys) -> BlockHasher {
        match algo {
            HashAlgo::Chain => BlockHasher::Chain(chain_root(extra)),
            HashAlgo::Sha256Cbor => BlockHasher::Sha256Cbor(Box::new(ShaChain {
                parent: block_hash::none_hash(),
                first: true,
                extra: extra.clone(),
            })),
        }
    }

    /// The whole digest of the newest block; the cheap chain has none.
    pub fn digest(&self) -> Option<Digest32> {
        match self {
            BlockHasher::Chain(_) => None,
            BlockHasher::Sha256Cbor(chain) => Some(chain.parent),
        }
    }

    /// The key of the next full block.
    pub fn next_key(&mut self, block: &[TokenId]) -> BlockKey {
        match self {
            BlockHasher::Chain(parent) => {
                *parent = block_hash::chain(*parent, block);
                *parent
            }
            BlockHasher::Sha256Cbor(chain) => {
                chain.parent = block_hash::sha256_cbor(&chain.parent, block, &chain.extra, chain.first);
                chain.first = false;
                block_hash::key_of(&chain.parent)
            }
        }
    }
}

/// A prompt as the scheduler wants it: keys instead of tokens.
#[derive(Clone, Debug)]
pub struct PreparedPrompt {
    /// Length of the prompt.
    pub tokens: u32,
    /// Keys of its full blocks.
    pub keys: Vec<BlockKey>,
    /// The tokens after its last full block.
    pub tail: Vec<TokenId>,
    /// The chain after its last full block.
    pub hasher: BlockHasher,
    /// What KV events tell of the request beside keys; present only where they are published.
    pub source: Option<Box<EventSource>>,
}

/// Names the full blocks of a prompt. With prefix caching off no key is needed and none is made.
pub fn prepare_prompt(cache: &CacheConfig, tokens: &[TokenId], extra: &ExtraKeys) -> PreparedPrompt {
    let mut hasher = BlockHasher::new(cache.prefix_caching_hash_algo, extra);
    let len = u32::try_from(tokens.len()).unwrap_or(u32::MAX);
    if !cache.enable_prefix_caching {
        return PreparedPrompt { tokens: len, keys: Vec::new(), tail: Vec::new(), hasher, source: None };
    }
    let blocks = tokens.chunks_exact(cache.block_size.max(1) as usize);
    let tail = blocks.remainder().to_vec();
    let keys = blocks.map(|b| hasher.next_key(b)).collect();
    PreparedPrompt { tokens: len, keys, tail, hasher, source: None }
}

/// The cheap chain has one root per adapter and salt.
fn chain_root(extra: &ExtraKeys) -> BlockKey {
    let mut root = CHAIN_ROOT;
    let lora = extra.lora.iter().flat_map(|(name, path)| [name.as_str(), path]);
    for (tag, text) in lora.map(|t| (1, t)).chain(extra.cache_salt.as_deref().map(|t| (2, t))) {
        let bytes = text.bytes().map(|b| TokenId(u32::from(b)));
        let text: Vec<TokenId> = std::iter::once(TokenId(tag << 8)).chain(bytes).collect();
        root = block_hash::chain(root, &text);
    }
    root
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(extra: &ExtraKeys, algo: HashAlgo) -> Vec<BlockKey> {
        let cache = CacheConfig { prefix_caching_hash_algo: algo, ..CacheConfig::default() };
        let tokens: Vec<TokenId> = (0..40).map(TokenId).collect();
        let prompt = prepare_prompt(&cache, &tokens, extra);
        assert_eq!((prompt.tokens, prompt.tail.len()), (40, 8));
        prompt.keys
    }

    #[test]
    fn adapters_and_salts_have_blocks_of_their_own() {
        let salted = ExtraKeys { cache_salt: Some("s".into()), ..ExtraKeys::default() };
        let lora = ExtraKeys { lora: Some(("s".into(), "p".into())), ..ExtraKeys::default() };
        for algo in [HashAlgo::Chain, HashAlgo::Sha256Cbor] {
            let all: Vec<_> = [&ExtraKeys::default(), &salted, &lora].into_iter().flat_map(|e| keys(e, algo)).collect();
            let distinct: std::collections::BTreeSet<_> = all.iter().collect();
            assert_eq!(distinct.len(), 6, "{algo:?}");
        }
    }

    #[test]
    fn no_keys_without_prefix_caching() {
        let cache = CacheConfig { enable_prefix_caching: false, ..CacheConfig::default() };
        assert!(prepare_prompt(&cache, &[TokenId(1); 64], &ExtraKeys::default()).keys.is_empty());
    }
}
