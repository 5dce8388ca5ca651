//! What the imitated model says: filler that depends on the prompt alone, as with a greedy sampler.
//!
//! Server, virtual driver and load client share this, so that a conversation repeats the answers it got and finds them cached.

use shared::rng::mix64;
use shared::tokens::{ContentId, TokenId};

/// Tokens at the end of the prompt that decide the answer.
const TAIL: usize = 64;

/// The answer to a prompt; a seed makes another one.
pub fn output_content(prompt: &[TokenId], seed: Option<i64>) -> ContentId {
    let start = mix64(prompt.len() as u64 ^ seed.unwrap_or(0) as u64);
    ContentId(prompt.iter().rev().take(TAIL).fold(start, |h, t| mix64(h ^ u64::from(t.0))))
}

/// Where an answer ends by itself unless the caller ignores that: after 32 to 543 tokens.
pub fn natural_length(content: ContentId) -> u32 {
    32 + (mix64(content.0) % 512) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_prompt_gets_the_same_answer_and_another_one_another() {
        let prompt: Vec<TokenId> = (0..100).map(TokenId).collect();
        let answer = output_content(&prompt, None);
        assert_eq!(answer, output_content(&prompt, None));
        assert_ne!(answer, output_content(&prompt[..99], None));
        assert_ne!(answer, output_content(&prompt, Some(7)));
        assert!((32..544).contains(&natural_length(answer)));
    }
}
