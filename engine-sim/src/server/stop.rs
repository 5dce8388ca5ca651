//! Where the text of an answer ends: stop strings and stop tokens, as vLLM's frontend treats them
//! (`vllm/v1/engine/detokenizer.py`).
//!
//! vLLM looks for stop strings in the text as it comes and then aborts the request in the engine. Here what the model will say is
//! known in advance, so the token that completes a stop string is planned as the last one, and the engine ends the request with
//! `stop` by itself. Stop strings are content: they are in answers, never in spans or metrics.

use std::ops::Range;

use shared::tokens::{ContentId, TokenId};

use super::request::Body;
use crate::core::sequence::FinishReason;
use crate::core::tokenizer::Tokenizer;

/// What a request says about the end of its text.
#[derive(Debug, Default)]
pub(super) struct Stops {
    found: Option<Found>,
    /// Bytes that are held back while more text may come, since they could be the beginning of a stop string.
    hold: usize,
    tokens: Vec<TokenId>,
    include: bool,
}

/// A stop string that the answer contains.
#[derive(Debug, PartialEq, Eq)]
struct Found {
    /// Output tokens when it is complete.
    at: u32,
    /// Bytes of text in the answer.
    keep: usize,
    text: String,
}

/// How much of its text an answer keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keep {
    /// All.
    All,
    /// So many bytes.
    Bytes(usize),
    /// All but that of the last token.
    ButLast,
}

/// The end of an answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TextEnd {
    pub(super) keep: Keep,
    /// `stop_reason` as JSON: the stop string, the stop token's id, or null.
    pub(super) stop_reason: String,
}

impl Stops {
    /// `looked_at` are the output tokens, counted from 0, whose text can complete a stop string: those after `min_tokens` that are
    /// sampled at all.
    pub(super) fn new(body: &Body<'_>, tokenizer: Tokenizer, content: ContentId, looked_at: Range<u32>) -> Stops {
        let include = body.include_stop_str_in_output.unwrap_or(false);
        let texts = body.stop_texts();
        let longest = texts.iter().map(|t| t.len()).max().unwrap_or(0);
        Stops {
            found: if texts.is_empty() { None } else { find(texts, tokenizer, content, looked_at, include) },
            hold: if include { 0 } else { longest.saturating_sub(1) },
            tokens: body.stop_token_ids.iter().flatten().copied().map(TokenId).collect(),
            include,
        }
    }

    /// After how many output tokens the answer ends with a stop string.
    pub(super) fn found_at(&self) -> Option<u32> {
        self.found.as_ref().map(|f| f.at)
    }

    /// Bytes of text that wait for more to come.
    pub(super) const fn hold(&self) -> usize {
        self.hold
    }

    /// How the text of an answer of so many tokens ends, the last of which is `last`.
    pub(super) fn end(&self, tokens: u32, last: Option<TokenId>, reason: FinishReason) -> TextEnd {
        let whole = TextEnd { keep: Keep::All, stop_reason: "null".to_owned() };
        match reason {
            FinishReason::Length | FinishReason::Abort | FinishReason::Error => whole,
            FinishReason::Stop => match (&self.found, last.filter(|t| self.tokens.contains(t))) {
                (Some(found), _) if found.at == tokens => TextEnd {
                    keep: Keep::Bytes(found.keep),
                    stop_reason: serde_json::to_string(&found.text).expect("text serialises"),
                },
                (_, Some(token)) => {
                    let keep = if self.include { Keep::All } else { Keep::ButLast };
                    TextEnd { keep, stop_reason: token.0.to_string() }
                }
                (_, None) => whole,
            },
        }
    }
}

/// The stop string that is complete first; of those complete with the same token, the first in the list.
fn find<T: AsRef<str>>(
    stops: &[T],
    tokenizer: Tokenizer,
    content: ContentId,
    looked_at: Range<u32>,
    include: bool,
) -> Option<Found> {
    // Where each token's text ends.
    let (mut text, mut ends) = (String::new(), Vec::with_capacity(looked_at.end as usize));
    for i in 0..looked_at.end {
        tokenizer.push_filler(content, i, i + 1, &mut text);
        ends.push(text.len());
    }
    let unseen = (looked_at.start as usize).checked_sub(1).map_or(0, |i| ends.get(i).copied().unwrap_or(text.len()));
    let found = |stop: &str| {
        // What ends before this lies in text that is not looked at.
        let from = (unseen + 1).saturating_sub(stop.len());
        let start = from + text.get(from..)?.find(stop)?;
        let end = start + stop.len();
        let at = ends.partition_point(|e| *e < end) + 1;
        Some(Found { at: at as u32, keep: if include { end } else { start }, text: stop.to_owned() })
    };
    // The least of equal ones is the first.
    stops.iter().filter_map(|s| found(s.as_ref())).min_by_key(|f| f.at)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTENT: ContentId = ContentId(9);

    /// The text of tokens `range`.
    fn text(range: Range<u64>) -> String {
        let mut text = String::new();
        Tokenizer::Bytes.push_filler(CONTENT, range.start as u32, range.end as u32, &mut text);
        text
    }

    fn check(stops: &[&str], looked_at: Range<u32>, include: bool, expect: Option<(u32, usize, &str)>) {
        let found = find(stops, Tokenizer::Bytes, CONTENT, looked_at, include);
        assert_eq!(found.as_ref().map(|f| (f.at, f.keep, f.text.as_str())), expect, "{stops:?}");
    }

    #[test]
    fn the_stop_string_that_is_complete_first_ends_the_text() {
        let (third, across) = (&text(2..3)[..3], &text(4..6)[2..6]);
        check(&[third], 0..20, false, Some((3, 8, third)));
        check(&[third], 0..20, true, Some((3, 11, third)));
        check(&[across], 0..20, false, Some((6, 18, across)));
        check(&[across, third], 0..20, false, Some((3, 8, third)));
        check(&["?", "never in filler"], 0..20, false, None);
        // It would be complete with a token that is not sampled.
        check(&[across], 0..5, false, None);
        // Of two that one token completes, the first in the list.
        let both = [&third[..2], &third[..1]];
        check(&both, 2..20, false, Some((3, 8, both[0])));
    }

    #[test]
    fn tokens_before_the_least_number_are_not_looked_at() {
        // Every token ends with a space: the first one after two tokens is at the end of the third.
        check(&[" "], 0..20, false, Some((1, 3, " ")));
        check(&[" "], 2..20, false, Some((3, 11, " ")));
        // The beginning may lie in text that is not looked at, the end may not.
        let across = &text(1..3)[3..5];
        check(&[across], 2..20, false, Some((3, 7, across)));
        check(&[&text(1..2)], 2..20, false, None);
    }

    #[test]
    fn a_stop_string_is_found_in_words_of_any_length() {
        let mut text = String::new();
        Tokenizer::Bpe.push_filler(CONTENT, 0, 20, &mut text);
        let words: Vec<&str> = text.split_inclusive(' ').collect();
        // Filler words begin with their space: the second one lies between the first and the second space.
        let second = words[2].trim_end();
        let found = find(&[second], Tokenizer::Bpe, CONTENT, 0..20, false).unwrap();
        assert_eq!((found.at, found.keep), (2, words[0].len() + words[1].len()));
    }

    #[test]
    fn a_stop_token_ends_the_text_before_itself() {
        let token = CONTENT.token(5);
        let stops = |include| Stops { tokens: vec![token], include, ..Stops::default() };
        let end = |include, last, reason| {
            let end = stops(include).end(6, Some(last), reason);
            (end.keep, end.stop_reason)
        };
        let id = token.0.to_string();
        assert_eq!(end(false, token, FinishReason::Stop), (Keep::ButLast, id.clone()));
        assert_eq!(end(true, token, FinishReason::Stop), (Keep::All, id));
        assert_eq!(end(false, CONTENT.token(6), FinishReason::Stop), (Keep::All, "null".into()));
        assert_eq!(end(false, token, FinishReason::Length), (Keep::All, "null".into()));
    }
}
