//! Tokens without a vocabulary: four bytes of text are one token.
//!
//! The estimate of four bytes a token is llm-d's own (`token-producer`, backend estimate). Taken literally it gives the
//! emulator an exact, reversible tokenizer: a token's id is its four bytes, little endian. So a prompt generated for a live run
//! as text and the same prompt handed to a virtual run as ids have the same length, the same blocks and the same prefix hits.

/// A token id.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
#[repr(transparent)]
pub struct TokenId(pub u32);

/// Names an endless sequence of filler tokens; equal ids are equal text.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ContentId(pub u64);

/// Bytes of text in a token.
pub const BYTES_PER_TOKEN: usize = 4;

impl ContentId {
    /// Token `i` of this content: three letters and a space.
    #[inline]
    pub fn token(self, i: u64) -> TokenId {
        let h = crate::rng::mix64(self.0 ^ i.wrapping_mul(0xD6E8_FEB8_6659_FD93));
        // 15 bits pick three of 32 letters-or-digits each: 32,768 different words.
        const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyzaeioun";
        let letter = |shift: u32| u32::from(ALPHABET[(h >> shift) as usize & 31]);
        TokenId(letter(0) | letter(5) << 8 | letter(10) << 16 | u32::from(b' ') << 24)
    }

    /// Appends tokens `from..to` to `out`.
    pub fn extend(self, from: u64, to: u64, out: &mut Vec<TokenId>) {
        out.extend((from..to).map(|i| self.token(i)));
    }
}

/// Appends the text of `tokens` to `out`; bytes that are no text become `?`.
pub fn push_text(tokens: &[TokenId], out: &mut String) {
    for t in tokens {
        for b in t.0.to_le_bytes() {
            out.push(if b.is_ascii() && b != 0 { b as char } else { '?' });
        }
    }
}

/// The tokens of `text`: four bytes each, the last one padded with zeros.
pub fn encode(text: &str, out: &mut Vec<TokenId>) {
    let (whole, rest) = text.as_bytes().as_chunks::<BYTES_PER_TOKEN>();
    out.extend(whole.iter().map(|&b| TokenId(u32::from_le_bytes(b))));
    if !rest.is_empty() {
        let mut last = [0; BYTES_PER_TOKEN];
        last[..rest.len()].copy_from_slice(rest);
        out.push(TokenId(u32::from_le_bytes(last)));
    }
}

/// How many tokens [`encode`] makes of so many bytes.
pub const fn count(bytes: usize) -> usize {
    bytes.div_ceil(BYTES_PER_TOKEN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filler_survives_the_way_through_text() {
        let mut tokens = Vec::new();
        ContentId(9).extend(0, 500, &mut tokens);
        let mut text = String::new();
        push_text(&tokens, &mut text);
        assert_eq!(text.len(), 2000);
        let mut back = Vec::new();
        encode(&text, &mut back);
        assert_eq!(back, tokens);
    }

    #[test]
    fn any_text_has_a_length_in_tokens() {
        for text in ["", "a", "abcd", "abcde", "žluťoučký"] {
            let mut tokens = Vec::new();
            encode(text, &mut tokens);
            assert_eq!(tokens.len(), count(text.len()), "{text}");
        }
    }
}
