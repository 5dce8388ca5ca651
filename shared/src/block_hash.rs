//! Identity of KV-cache blocks: a chain of hashes over the tokens of full blocks.
//!
//! The cores treat a [`BlockKey`] as opaque. Two hashers make them: [`sha256_cbor`] as vLLM does on the wire
//! (`vllm/v1/core/kv_cache_utils.py`, `hash_block_tokens`), and [`chain`], a cheap one for replays of millions of blocks.

use std::fmt;

use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::xxh3_128_with_seed;

use crate::tokens::TokenId;

/// The identity of a full block of tokens and of everything before it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockKey(pub u128);

impl BlockKey {
    /// The integer that stands for this block in KV events: the last 8 bytes of the digest, big endian.
    pub const fn event_hash(self) -> u64 {
        self.0 as u64
    }
}

impl fmt::Debug for BlockKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// What else than tokens makes a block different (`generate_block_hash_extra_keys`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExtraKeys {
    /// Name and path of the LoRA adapter: part of every block's hash.
    pub lora: Option<(String, String)>,
    /// The request's cache salt: part of the first block's hash.
    pub cache_salt: Option<String>,
}

/// A full SHA-256 digest, the parent of the next block.
pub type Digest32 = [u8; 32];

/// The digest that stands before the first block: SHA-256 of the CBOR text `vllm-none-hash`.
pub fn none_hash() -> Digest32 {
    let mut cbor = Vec::new();
    cbor_head(3, 14, &mut cbor);
    cbor.extend_from_slice(b"vllm-none-hash");
    Sha256::digest(&cbor).into()
}

/// The digest of one full block in vLLM's `sha256_cbor`; `first` says whether it is the first block of the prompt.
pub fn sha256_cbor(parent: &Digest32, tokens: &[TokenId], extra: &ExtraKeys, first: bool) -> Digest32 {
    let mut cbor = Vec::with_capacity(64 + 5 * tokens.len());
    cbor_head(4, 3, &mut cbor);
    cbor_head(2, 32, &mut cbor);
    cbor.extend_from_slice(parent);
    cbor_head(4, tokens.len() as u64, &mut cbor);
    for t in tokens {
        cbor_head(0, u64::from(t.0), &mut cbor);
    }
    let salt = extra.cache_salt.as_deref().filter(|_| first);
    let keys = u64::from(extra.lora.is_some()) + u64::from(salt.is_some());
    if keys == 0 {
        cbor.push(0xF6);
    } else {
        cbor_head(4, keys, &mut cbor);
        if let Some((name, path)) = &extra.lora {
            cbor_texts(&["lora", name, path], &mut cbor);
        }
        if let Some(salt) = salt {
            cbor_texts(&["cache_salt", salt], &mut cbor);
        }
    }
    Sha256::digest(&cbor).into()
}

/// The key of a digest: its last 16 bytes.
pub fn key_of(digest: &Digest32) -> BlockKey {
    let mut low = [0; 16];
    low.copy_from_slice(&digest[16..]);
    BlockKey(u128::from_be_bytes(low))
}

/// The next key of the cheap chain: xxh3-128 of the block's tokens seeded with its parent.
#[inline]
pub fn chain(parent: BlockKey, tokens: &[TokenId]) -> BlockKey {
    // Token ids as little-endian bytes: what the text they stand for looks like in memory.
    let mut bytes = [0u8; 512];
    let mut state = parent.0;
    for part in tokens.chunks(128) {
        for (slot, t) in bytes.chunks_exact_mut(4).zip(part) {
            slot.copy_from_slice(&t.0.to_le_bytes());
        }
        let seed = (state >> 64) as u64 ^ (state as u64).rotate_left(32);
        state = xxh3_128_with_seed(&bytes[..4 * part.len()], seed) ^ (state << 1);
    }
    BlockKey(state)
}

/// The key that stands before the first block of the cheap chain.
pub const CHAIN_ROOT: BlockKey = BlockKey(0x6967_7369_6d2d_6e6f_6e65_2d68_6173_6821);

/// CBOR major type and length in the shortest form (RFC 8949, 4.2.1).
fn cbor_head(major: u8, value: u64, out: &mut Vec<u8>) {
    let top = major << 5;
    match value {
        0..24 => out.push(top | value as u8),
        24..0x100 => out.extend_from_slice(&[top | 24, value as u8]),
        0x100..0x1_0000 => {
            out.push(top | 25);
            out.extend_from_slice(&(value as u16).to_be_bytes());
        }
        0x1_0000..0x1_0000_0000 => {
            out.push(top | 26);
            out.extend_from_slice(&(value as u32).to_be_bytes());
        }
        _ => {
            out.push(top | 27);
            out.extend_from_slice(&value.to_be_bytes());
        }
    }
}

fn cbor_texts(texts: &[&str], out: &mut Vec<u8>) {
    cbor_head(4, texts.len() as u64, out);
    for t in texts {
        cbor_head(3, t.len() as u64, out);
        out.extend_from_slice(t.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(d: &Digest32) -> String {
        d.iter().map(|b| format!("{b:02x}")).collect()
    }

    #[test]
    fn none_hash_is_vllms() {
        assert_eq!(hex(&none_hash()), "9bd96a485ad84efdafb72ee48a1d7a69bcead0f8f0433173941b276b9581eef0");
    }

    #[test]
    fn first_blocks_of_a_recorded_vllm_request() {
        // Request `a` of the golden trace chunked_prefill_async: tokens 100, 101, ...
        let tokens: Vec<TokenId> = (100..132).map(TokenId).collect();
        let extra = ExtraKeys::default();
        let first = sha256_cbor(&none_hash(), &tokens[..16], &extra, true);
        assert_eq!(hex(&first), "c78a554a1b648c084577886fa29e20b89d606beb26cafd7f90ba7482f31901bc");
        assert_eq!(key_of(&first).event_hash(), 10_428_775_992_902_877_628);
        let second = sha256_cbor(&first, &tokens[16..], &extra, false);
        assert_eq!(hex(&second), "ce46e4cdf9f7c965a59bd3429627f27c1400980fc64be5e6706e1a9c55f39878");
    }

    #[test]
    fn the_cheap_chain_depends_on_parent_and_every_token() {
        let tokens: Vec<TokenId> = (0..200).map(TokenId).collect();
        let a = chain(CHAIN_ROOT, &tokens);
        for i in 0..200 {
            let mut other = tokens.clone();
            other[i] = TokenId(999);
            assert_ne!(chain(CHAIN_ROOT, &other), a);
        }
        assert_ne!(chain(a, &tokens), a);
    }
}
