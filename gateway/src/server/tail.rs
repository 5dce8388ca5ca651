//! The last bytes of a response that nobody reads as it passes, kept to find its usage when it is over.
//!
//! Engines say how many tokens there were at the very end: in the last event of a stream, or behind the text of a body. To keep the end
//! costs a copy of at most [`Tail::BYTES`] for each piece and nothing else, so that requests whose trace is not kept have token counts too.

use bytes::Bytes;
use memchr::memmem;
use serde::Deserialize;
use shared::openai::Usage;

/// The last bytes that passed.
pub(crate) struct Tail {
    bytes: [u8; Tail::BYTES],
    len: usize,
}

impl Tail {
    /// Longer than the last event of a stream and its end together.
    const BYTES: usize = 1024;

    pub(crate) fn new() -> Tail {
        Tail { bytes: [0; Tail::BYTES], len: 0 }
    }

    /// Takes the next piece.
    pub(crate) fn push(&mut self, piece: &Bytes) {
        let piece = &piece[piece.len().saturating_sub(Tail::BYTES)..];
        let kept = self.len.min(Tail::BYTES - piece.len());
        self.bytes.copy_within(self.len - kept..self.len, 0);
        self.bytes[kept..kept + piece.len()].copy_from_slice(piece);
        self.len = kept + piece.len();
    }

    /// What the response says of its tokens, if it does. Within JSON text the quotes of a key are escaped, so this is no content.
    pub(crate) fn usage(&self) -> Option<Usage> {
        const KEY: &[u8] = b"\"usage\":";
        let text = &self.bytes[..self.len];
        let at = memmem::rfind(text, KEY)? + KEY.len();
        Usage::deserialize(&mut serde_json::Deserializer::from_slice(&text[at..])).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn usage(pieces: &[&[u8]]) -> Option<(u32, u32)> {
        let mut tail = Tail::new();
        pieces.iter().for_each(|p| tail.push(&Bytes::copy_from_slice(p)));
        tail.usage().map(|u| (u.prompt_tokens, u.completion_tokens))
    }

    const END: &[u8] = b"data: {\"choices\":[],\"usage\":{\"prompt_tokens\":9,\"total_tokens\":11,\"completion_tokens\":2}}\n\ndata: [DONE]\n\n";

    #[test]
    fn the_end_says_it() {
        let text = [b"data: {\"x\":\"".as_slice(), &[b'y'; 5_000], b"\"}\n\n"].concat();
        assert_eq!(usage(&[&text, END]), Some((9, 2)));
        assert_eq!(usage(&[&[text.as_slice(), END].concat()]), Some((9, 2)));
        assert_eq!(usage(&[&text]), None);
        assert_eq!(usage(&[br#"{"choices":[{"text":"\"usage\":{\"prompt_tokens\":1}"}]}"#]), None);
        assert_eq!(usage(&[br#"{"usage":null}"#]), None);
        assert_eq!(usage(&[]), None);
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(mut cuts in proptest::collection::vec(0..END.len(), 0..12), before in 0..2_000usize) {
            let text = [vec![b'x'; before].as_slice(), END].concat();
            cuts.extend([0, END.len()]);
            cuts.sort();
            let mut pieces: Vec<&[u8]> = vec![&text[..before]];
            pieces.extend(cuts.windows(2).map(|w| &END[w[0]..w[1]]));
            prop_assert_eq!(usage(&pieces), Some((9, 2)));
        }
    }
}
