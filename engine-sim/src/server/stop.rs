//! Where the text of an answer ends: stop strings and stop tokens, as vLLM's frontend treats them
//! (`vllm/v1/engine/detokenizer.py`).
//!
//! vLLM looks for stop strings in the text as it comes and then aborts the request in the engine. Here what the model will say is
//! known in advance, so the token that completes a stop string is planned as the last one, and the engine ends the request with
//! `stop` by itself. Stop strings are content: they are in answers, never in spans or metrics.

use std::ops::Range;

use shared::openai::Request;
use shared::tokens::{self, BYTES_PER_TOKEN, ContentId, TokenId};

use crate::core::sequence::FinishReason;

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

/// The end of an answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TextEnd {
    /// Bytes of text in all.
    pub(super) bytes: usize,
    /// `stop_reason` as JSON: the stop string, the stop token's id, or null.
    pub(super) stop_reason: String,
}

impl Stops {
    /// `looked_at` are the output tokens, counted from 0, whose text can complete a stop string: those after `min_tokens` that are
    /// sampled at all.
    pub(super) fn new(request: &Request<'_>, content: ContentId, looked_at: Range<u32>) -> Stops {
        let include = request.include_stop_str_in_output.unwrap_or(false);
        let texts = request.stop_texts();
        let longest = texts.iter().map(|t| t.len()).max().unwrap_or(0);
        Stops {
            found: if texts.is_empty() { None } else { find(texts, content, looked_at, include) },
            hold: if include { 0 } else { longest.saturating_sub(1) },
            tokens: request.stop_token_ids.iter().flatten().copied().map(TokenId).collect(),
            include,
        }
    }

    /// After how many output tokens the answer ends with a stop string.
    pub(super) fn found_at(&self) -> Option<u32> {
        self.found.as_ref().map(|f| f.at)
    }

    /// Bytes of text that are written when there are so many tokens and more to come.
    pub(super) fn shown(&self, tokens: u32) -> usize {
        bytes(tokens).saturating_sub(self.hold)
    }

    /// How the text of an answer of so many tokens ends.
    pub(super) fn end(&self, content: ContentId, tokens: u32, reason: FinishReason) -> TextEnd {
        let whole = TextEnd { bytes: bytes(tokens), stop_reason: "null".to_owned() };
        let last = tokens.checked_sub(1).map(|i| content.token(u64::from(i)));
        match reason {
            FinishReason::Length | FinishReason::Abort | FinishReason::Error => whole,
            FinishReason::Stop => match (&self.found, last.filter(|t| self.tokens.contains(t))) {
                (Some(found), _) if found.at == tokens => TextEnd {
                    bytes: found.keep,
                    stop_reason: serde_json::to_string(&found.text).expect("text serialises"),
                },
                (_, Some(token)) => {
                    let kept = if self.include { tokens } else { tokens - 1 };
                    TextEnd { bytes: bytes(kept), stop_reason: token.0.to_string() }
                }
                (_, None) => whole,
            },
        }
    }
}

fn bytes(tokens: u32) -> usize {
    tokens as usize * BYTES_PER_TOKEN
}

/// The stop string that is complete first; of those complete with the same token, the first in the list.
fn find<T: AsRef<str>>(stops: &[T], content: ContentId, looked_at: Range<u32>, include: bool) -> Option<Found> {
    let mut ids = Vec::new();
    content.extend(0, u64::from(looked_at.end), &mut ids);
    let mut text = String::new();
    tokens::push_text(&ids, &mut text);
    let found = |stop: &str| {
        // What ends before this lies in text that is not looked at.
        let from = (bytes(looked_at.start) + 1).saturating_sub(stop.len());
        let start = from + text.get(from..)?.find(stop)?;
        let end = start + stop.len();
        let at = u32::try_from(end.div_ceil(BYTES_PER_TOKEN)).ok()?;
        Some(Found { at, keep: if include { end } else { start }, text: stop.to_owned() })
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
        let (mut ids, mut text) = (Vec::new(), String::new());
        CONTENT.extend(range.start, range.end, &mut ids);
        tokens::push_text(&ids, &mut text);
        text
    }

    fn check(stops: &[&str], looked_at: Range<u32>, include: bool, expect: Option<(u32, usize, &str)>) {
        let found = find(stops, CONTENT, looked_at, include);
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
    fn a_stop_token_ends_the_text_before_itself() {
        let ids = vec![CONTENT.token(5)];
        let stops = |include| Stops { tokens: ids.clone(), include, ..Stops::default() };
        let end = |stops: Stops, n, reason| {
            let end = stops.end(CONTENT, n, reason);
            (end.bytes, end.stop_reason)
        };
        let id = ids[0].0.to_string();
        assert_eq!(end(stops(false), 6, FinishReason::Stop), (20, id.clone()));
        assert_eq!(end(stops(true), 6, FinishReason::Stop), (24, id));
        assert_eq!(end(stops(false), 7, FinishReason::Stop), (28, "null".into()));
        assert_eq!(end(stops(false), 6, FinishReason::Length), (24, "null".into()));
    }
}
