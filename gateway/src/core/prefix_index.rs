//! The approximate index of prompt prefixes: which endpoint was sent which blocks.

/// Tokens in a block of the index: llm-d raises every smaller block size to this.
pub const BLOCK_TOKENS: usize = 64;
