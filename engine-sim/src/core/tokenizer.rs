//! How text becomes tokens and tokens text: by length, or with a real vocabulary.
//!
//! [`Tokenizer::Bytes`] is the estimate of [`shared::tokens`]: four bytes are one token, exactly and reversibly. [`Tokenizer::Bpe`] is
//! OpenAI's `cl100k_base` (the crate `bpe-openai` holds it and encodes in time linear in the text): the vocabulary that Llama 3's
//! extends. It is loaded at its first use. See docs/decisions/0008.
//!
//! What the imitated model says is filler in either vocabulary. Of the real one it uses only tokens that are a space and three to
//! eight small letters: the encoder splits text before such a word and a word of the vocabulary is one token, so that filler
//! makes the same tokens again.

use std::borrow::Cow;
use std::sync::LazyLock;

use bpe_openai::{Tokenizer as Bpe, cl100k_base};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use shared::tokens::{self, ContentId, TokenId};

/// Which tokens text has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Tokenizer {
    /// Four bytes of text are a token; the roles of a chat count for nothing.
    #[default]
    Bytes,
    /// Byte pair encoding with the vocabulary `cl100k_base`; chats are in the ChatML template.
    Bpe,
}

/// `<|im_start|>` and `<|im_end|>`, which chats in `cl100k_base` are made with.
const IM_START: TokenId = TokenId(100_264);
const IM_END: TokenId = TokenId(100_265);
/// Ids from here on are no tokens.
const BPE_VOCABULARY: u32 = 100_277;
/// Special tokens, which stand for no bytes of text.
const BPE_SPECIAL: [(u32, &str); 7] = [
    (100_257, "<|endoftext|>"),
    (100_258, "<|fim_prefix|>"),
    (100_259, "<|fim_middle|>"),
    (100_260, "<|fim_suffix|>"),
    (100_264, "<|im_start|>"),
    (100_265, "<|im_end|>"),
    (100_276, "<|endofprompt|>"),
];

/// Tokens that filler is made of.
static WORDS: LazyLock<Vec<u32>> = LazyLock::new(|| {
    let bpe = &cl100k_base().bpe;
    let word = |id: &u32| {
        let bytes = bpe.token_bytes(*id);
        (4..=9).contains(&bytes.len()) && bytes[0] == b' ' && bytes[1..].iter().all(u8::is_ascii_lowercase)
    };
    (0..bpe.num_tokens() as u32).filter(word).collect()
});

impl Tokenizer {
    /// All tokenizers, by name.
    pub const ALL: [(&'static str, Tokenizer); 2] = [("bytes", Tokenizer::Bytes), ("bpe", Tokenizer::Bpe)];

    /// The tokenizer of this name.
    pub fn named(name: &str) -> Option<Tokenizer> {
        Tokenizer::ALL.into_iter().find(|(own, _)| *own == name).map(|(_, tokenizer)| tokenizer)
    }

    /// Longest text of one token in characters: the bound that vLLM has on a text before it makes tokens of it.
    pub const MAX_CHARS: usize = 128;

    /// How many ids there are.
    pub const fn vocabulary(self) -> u64 {
        match self {
            Tokenizer::Bytes => 1 << 32,
            Tokenizer::Bpe => BPE_VOCABULARY as u64,
        }
    }

    /// Loads what is loaded once, so that no request waits for it.
    pub fn load(self) {
        match self {
            Tokenizer::Bytes => {}
            Tokenizer::Bpe => drop(LazyLock::force(&WORDS)),
        }
    }

    /// Appends the tokens of `text`. Names of special tokens in it are text.
    pub fn encode(self, text: &str, out: &mut Vec<TokenId>) {
        match self {
            Tokenizer::Bytes => tokens::encode(text, out),
            Tokenizer::Bpe => out.extend(bpe().encode(text).into_iter().map(TokenId)),
        }
    }

    /// Appends the text of `ids`; bytes that are no text become replacement characters (`?` without a vocabulary).
    pub fn push_text(self, ids: &[TokenId], out: &mut String) {
        match self {
            Tokenizer::Bytes => tokens::push_text(ids, out),
            Tokenizer::Bpe => out.push_str(&String::from_utf8_lossy(&bpe_bytes(ids))),
        }
    }

    /// Appends the tokens of a chat of `(role, content)` in order, and with `prompting` of the head of the next answer.
    pub fn encode_chat<'m>(
        self,
        messages: impl Iterator<Item = (&'m str, Cow<'m, str>)>,
        prompting: bool,
        out: &mut Vec<TokenId>,
    ) {
        match self {
            Tokenizer::Bytes => {
                let mut contents = messages.map(|(_, content)| content);
                let first = contents.next().unwrap_or_default();
                // One message needs no copy.
                let all = match contents.next() {
                    None => first,
                    Some(second) => {
                        let mut all = first.into_owned();
                        all.push_str(&second);
                        all.extend(contents);
                        Cow::Owned(all)
                    }
                };
                tokens::encode(&all, out);
            }
            Tokenizer::Bpe => {
                for (role, content) in messages {
                    out.push(IM_START);
                    self.encode(&format!("{role}\n"), out);
                    self.encode(&content, out);
                    out.push(IM_END);
                    self.encode("\n", out);
                }
                if prompting {
                    out.push(IM_START);
                    self.encode("assistant\n", out);
                }
            }
        }
    }

    /// Token `i` of filler.
    #[inline]
    pub fn filler(self, content: ContentId, i: u64) -> TokenId {
        match self {
            Tokenizer::Bytes => content.token(i),
            Tokenizer::Bpe => {
                let words = &*WORDS;
                let h = shared::rng::mix64(content.0 ^ i.wrapping_mul(0xD6E8_FEB8_6659_FD93));
                TokenId(words[(h % words.len() as u64) as usize])
            }
        }
    }

    /// Appends the text of filler tokens `from..to`.
    pub fn push_filler(self, content: ContentId, from: u32, to: u32, out: &mut String) {
        for i in from..to {
            self.push_text(&[self.filler(content, u64::from(i))], out);
        }
    }

    /// Bytes of text that a filler token has.
    pub fn filler_bytes(self, content: ContentId, i: u32) -> usize {
        match self {
            Tokenizer::Bytes => tokens::BYTES_PER_TOKEN,
            Tokenizer::Bpe => bpe().bpe.token_len(self.filler(content, u64::from(i)).0),
        }
    }
}

fn bpe() -> &'static Bpe {
    cl100k_base()
}

fn bpe_bytes(ids: &[TokenId]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(6 * ids.len());
    for TokenId(id) in ids {
        if (*id as usize) < bpe().bpe.num_tokens() {
            bytes.extend_from_slice(bpe().bpe.token_bytes(*id));
        } else if let Some((_, name)) = BPE_SPECIAL.iter().find(|(special, _)| special == id) {
            bytes.extend_from_slice(name.as_bytes());
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(tokenizer: Tokenizer, text: &str) -> Vec<TokenId> {
        let mut ids = Vec::new();
        tokenizer.encode(text, &mut ids);
        ids
    }

    #[test]
    fn filler_has_the_same_tokens_when_it_is_read_again() {
        for (name, tokenizer) in Tokenizer::ALL {
            for seed in 0..20 {
                let content = ContentId(seed);
                let ids: Vec<TokenId> = (0..300).map(|i| tokenizer.filler(content, i)).collect();
                let mut text = String::new();
                tokenizer.push_filler(content, 0, 300, &mut text);
                assert_eq!(encoded(tokenizer, &text), ids, "{name}");
                let bytes: usize = (0..300).map(|i| tokenizer.filler_bytes(content, i)).sum();
                assert_eq!(bytes, text.len(), "{name}");
                assert!(
                    !text.contains(['"', '\\']) && text.chars().all(|c| !c.is_control()),
                    "filler needs no escapes"
                );
            }
        }
    }

    #[test]
    fn text_survives_and_any_id_has_some_text() {
        for text in ["", "hello world", "žluťoučký kůň", "def f(x):\n\treturn x", "<|im_start|>"] {
            let mut back = String::new();
            Tokenizer::Bpe.push_text(&encoded(Tokenizer::Bpe, text), &mut back);
            assert_eq!(back, text);
        }
        assert_eq!(encoded(Tokenizer::Bpe, "hello world"), [TokenId(15339), TokenId(1917)]);
        for id in [0, 255, 100_255, 100_256, 100_264, 100_277, u32::MAX] {
            let mut text = String::new();
            Tokenizer::Bpe.push_text(&[TokenId(id)], &mut text);
            Tokenizer::Bytes.push_text(&[TokenId(id)], &mut text);
        }
    }

    #[test]
    fn a_template_has_tokens_of_its_own() {
        let chat = |tokenizer: Tokenizer, prompting| {
            let mut ids = Vec::new();
            let messages = [("system", Cow::Borrowed("hi")), ("user", Cow::Borrowed("hello world"))];
            tokenizer.encode_chat(messages.into_iter(), prompting, &mut ids);
            ids.len()
        };
        // Per message start, role, line break, content, end, line break.
        assert_eq!((chat(Tokenizer::Bpe, false), chat(Tokenizer::Bpe, true)), (5 + 1 + 5 + 2, 16));
        assert_eq!((chat(Tokenizer::Bytes, false), chat(Tokenizer::Bytes, true)), (4, 4));
    }
}
