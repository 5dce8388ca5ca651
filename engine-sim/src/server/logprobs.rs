//! Log probabilities: the numbers, which are made up, and their shapes, which are vLLM's.
//!
//! There is no model. A token's figures follow from what is said and where, so the same request gets the same ones. An output token
//! is the likeliest with a probability of 0.35 to 1, as with a greedy sampler; what is left is halved from one alternative to the
//! next. A prompt token is the likeliest in half of all places and else less likely than every alternative that can be told.

use std::fmt::Write as _;

use shared::rng::mix64;
use shared::tokens::{ContentId, TokenId};

use crate::core::tokenizer::Tokenizer;

/// More alternatives than any request gets (`--max-logprobs`, 20).
pub(super) const MAX_LOGPROBS: u32 = 20;

/// A token and what else could have stood in its place.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Scored {
    pub(super) token: TokenId,
    pub(super) logprob: f32,
    pub(super) rank: u32,
    /// The likeliest tokens with their log probabilities, best first; the token itself among them if it is one of them.
    pub(super) top: Vec<(TokenId, f32)>,
}

/// How tokens are called.
#[derive(Clone, Copy, Debug)]
pub(super) struct Names {
    pub(super) tokenizer: Tokenizer,
    /// `token_id:5` instead of the text.
    pub(super) ids: bool,
}

impl Names {
    pub(super) fn of(self, token: TokenId) -> String {
        if self.ids {
            return format!("token_id:{}", token.0);
        }
        let mut text = String::new();
        self.tokenizer.push_text(&[token], &mut text);
        text
    }
}

/// Output token `i` of `content` with `k` alternatives, itself included.
pub(super) fn output(tokenizer: Tokenizer, content: ContentId, i: u32, k: u32) -> Scored {
    let token = tokenizer.filler(content, u64::from(i));
    let place = mix64(content.0 ^ mix64(u64::from(i)));
    let best = likeliest(place);
    Scored { token, logprob: best.ln() as f32, rank: 1, top: top(tokenizer, place, k, best, Some(token)) }
}

/// A prompt token at position `i` with `k` alternatives.
pub(super) fn prompt(tokenizer: Tokenizer, token: TokenId, i: usize, k: u32) -> Scored {
    let place = mix64(u64::from(token.0) ^ mix64(i as u64 | 1 << 63));
    let best = likeliest(place);
    if place >> 63 == 0 {
        return Scored { token, logprob: best.ln() as f32, rank: 1, top: top(tokenizer, place, k, best, Some(token)) };
    }
    let least = (1.0 - best) * 0.5f64.powi(MAX_LOGPROBS as i32 + 1);
    let rank = MAX_LOGPROBS + 1 + (place >> 32) as u32 % 1000;
    Scored { token, logprob: least.ln() as f32, rank, top: top(tokenizer, place, k, best, None) }
}

/// Probability of the likeliest token, in 0.35..1.
fn likeliest(place: u64) -> f64 {
    0.35 + 0.649 * ((place >> 11) as f64 / (1u64 << 53) as f64)
}

/// `k` different tokens, `first` foremost if it is given.
fn top(tokenizer: Tokenizer, place: u64, k: u32, best: f64, first: Option<TokenId>) -> Vec<(TokenId, f32)> {
    let mut top: Vec<(TokenId, f32)> = Vec::with_capacity(k as usize);
    let others = (0u64..).map(|j| tokenizer.filler(ContentId(place), j));
    for token in first.into_iter().chain(others) {
        if top.len() == k as usize {
            break;
        }
        if top.iter().all(|(t, _)| *t != token) {
            let j = top.len() as i32;
            let p = if j == 0 { best } else { (1.0 - best) * 0.5f64.powi(j) };
            top.push((token, p.ln() as f32));
        }
    }
    top
}

/// `logprobs` of a completion, as far as one answer or chunk has come.
#[derive(Debug, Default)]
pub(super) struct CompletionLogprobs {
    offsets: Vec<usize>,
    logprobs: Vec<Option<f32>>,
    tokens: Vec<String>,
    tops: Vec<Option<Vec<(TokenId, f32)>>>,
}

impl CompletionLogprobs {
    /// Adds a token; the first of a prompt has no figures. `offset` is where its text begins, in characters, and is moved on.
    pub(super) fn push(
        &mut self,
        names: Names,
        token: TokenId,
        scored: Option<&Scored>,
        told: u32,
        offset: &mut usize,
    ) {
        let name = names.of(token);
        self.offsets.push(*offset);
        *offset += name.chars().count();
        self.tokens.push(name);
        self.logprobs.push(scored.map(|s| s.logprob));
        // The token itself comes first, then the likeliest; those told are one more than asked for.
        self.tops.push(scored.map(|s| {
            let mut all = vec![(s.token, s.logprob)];
            all.extend(s.top.iter().filter(|(t, _)| *t != s.token).take(told as usize));
            all.truncate(told as usize + 1);
            all
        }));
    }

    pub(super) fn write(&self, names: Names, out: &mut String) {
        out.push_str("{\"text_offset\":");
        out.push_str(&json(&self.offsets));
        out.push_str(",\"token_logprobs\":");
        out.push_str(&json(&self.logprobs));
        out.push_str(",\"tokens\":");
        out.push_str(&json(&self.tokens));
        out.push_str(",\"top_logprobs\":[");
        for (i, top) in self.tops.iter().enumerate() {
            out.push_str(if i == 0 { "" } else { "," });
            match top {
                None => out.push_str("null"),
                Some(top) => {
                    let entries = top.iter().map(|(token, p)| format!("{}:{}", json(&names.of(*token)), json(p)));
                    let _ = write!(out, "{{{}}}", entries.collect::<Vec<_>>().join(","));
                }
            }
        }
        out.push_str("]}");
    }
}

/// `logprobs` of a chat: a list of the tokens, each with `told` of the likeliest.
pub(super) fn write_chat(names: Names, scored: impl Iterator<Item = Scored>, told: u32, out: &mut String) {
    let one = |token: TokenId, logprob: f32| {
        let name = names.of(token);
        format!("\"token\":{},\"logprob\":{},\"bytes\":{}", json(&name), json(&logprob), json(&name.as_bytes()))
    };
    out.push_str("{\"content\":[");
    for (i, s) in scored.enumerate() {
        let top = s.top.iter().take(told as usize).map(|(t, p)| format!("{{{}}}", one(*t, *p)));
        let top = top.collect::<Vec<_>>().join(",");
        let comma = if i == 0 { "" } else { "," };
        let _ = write!(out, "{comma}{{{},\"top_logprobs\":[{top}]}}", one(s.token, s.logprob));
    }
    out.push_str("]}");
}

/// `prompt_logprobs`: per token the likeliest by id, the token itself first; nothing for the first token.
pub(super) fn write_prompt(tokenizer: Tokenizer, tokens: &[TokenId], k: u32, out: &mut String) {
    let names = Names { tokenizer, ids: false };
    out.push('[');
    for (i, token) in tokens.iter().enumerate() {
        if i == 0 {
            out.push_str("null");
            continue;
        }
        let s = prompt(tokenizer, *token, i, k);
        let others = s.top.iter().enumerate().filter(|(_, (t, _))| *t != s.token);
        let others = others.map(|(j, (t, p))| (*t, *p, j as u32 + 1));
        let entry = |(token, p, rank): (TokenId, f32, u32)| {
            let name = json(&names.of(token));
            format!("\"{}\":{{\"logprob\":{},\"rank\":{rank},\"decoded_token\":{name}}}", token.0, json(&p))
        };
        let all = std::iter::once((s.token, s.logprob, s.rank)).chain(others).map(entry);
        let _ = write!(out, ",{{{}}}", all.collect::<Vec<_>>().join(","));
    }
    out.push(']');
}

fn json<T: serde::Serialize + ?Sized>(value: &T) -> String {
    serde_json::to_string(value).expect("numbers and text serialise")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_log_probabilities_in_order() {
        for i in 0..200 {
            for tokenizer in [Tokenizer::Bytes, Tokenizer::Bpe] {
                let s = output(tokenizer, ContentId(5), i, MAX_LOGPROBS);
                let mass: f64 = s.top.iter().map(|(_, p)| f64::from(*p).exp()).sum();
                assert!(mass <= 1.0 + 1e-6 && s.logprob < 0.0, "{s:?}");
                assert!(s.top.is_sorted_by(|a, b| a.1 >= b.1), "{s:?}");
                let distinct: std::collections::BTreeSet<_> = s.top.iter().map(|(t, _)| t).collect();
                assert_eq!((distinct.len(), s.top[0]), (20, (s.token, s.logprob)));
                let p = prompt(tokenizer, TokenId(77), i as usize, MAX_LOGPROBS);
                let among = p.top.iter().any(|(t, _)| *t == p.token);
                assert_eq!(among, p.rank == 1, "{p:?}");
                assert!(among || p.top.iter().all(|(_, q)| *q >= p.logprob), "{p:?}");
            }
        }
    }
}
