//! What a response says of itself, read as it passes: first token, chunks, usage, finish reason. Text is never kept longer than
//! its line.

use std::borrow::Cow;
use std::sync::LazyLock;

use bytes::Bytes;
use memchr::memmem;
use serde::Deserialize;
use shared::openai::Usage;

/// Longer lines than this carry no facts.
const MAX_LINE: usize = 16 * 1024;
/// Larger bodies than this are passed on without facts.
const MAX_JSON: usize = 1024 * 1024;

/// What was learnt from a response.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Learnt {
    /// Server-sent events with data, or body frames.
    pub(crate) chunks: u32,
    /// Whether an event with data was seen.
    pub(crate) first_token: bool,
    pub(crate) usage: Option<Usage>,
    pub(crate) finish_reason: Option<&'static str>,
    pub(crate) model: Option<String>,
    /// Whether a stream ended with an error event.
    pub(crate) failed: bool,
}

/// Reads a response as it passes.
#[derive(Debug)]
pub(crate) enum Observer {
    /// Counts frames only.
    Count,
    /// A stream of events.
    Events {
        /// Whether to read more than that an event has data.
        facts: bool,
        /// The unfinished line.
        line: Vec<u8>,
    },
    /// One JSON body.
    Json {
        /// What came so far; shared with what is passed on.
        parts: Vec<Bytes>,
        size: usize,
    },
}

impl Observer {
    /// The observer for a response: `recorded` says whether facts are wanted beyond the first token.
    pub(crate) fn of(headers: &http::HeaderMap, recorded: bool) -> Observer {
        let kind = headers.get(http::header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
        let encoded = headers.contains_key(http::header::CONTENT_ENCODING);
        if !encoded && kind.starts_with("text/event-stream") {
            Observer::Events { facts: recorded, line: Vec::new() }
        } else if !encoded && recorded && kind.starts_with("application/json") {
            Observer::Json { parts: Vec::new(), size: 0 }
        } else {
            Observer::Count
        }
    }

    /// Reads the next piece of the body.
    pub(crate) fn data(&mut self, data: &Bytes, learnt: &mut Learnt) {
        match self {
            Observer::Count => learnt.chunks += 1,
            Observer::Events { facts, line } => {
                if *facts || !learnt.first_token {
                    events(data, *facts, line, learnt);
                }
            }
            Observer::Json { parts, size } => {
                learnt.chunks += 1;
                *size += data.len();
                if *size <= MAX_JSON {
                    parts.push(data.clone());
                } else {
                    *self = Observer::Count;
                }
            }
        }
    }

    /// Reads what can only be read at the end.
    pub(crate) fn end(&mut self, learnt: &mut Learnt) {
        if let Observer::Json { parts, .. } = self {
            match parts.as_slice() {
                [one] => message(one, learnt),
                parts => message(&parts.concat(), learnt),
            }
        }
    }
}

fn events(data: &[u8], facts: bool, line: &mut Vec<u8>, learnt: &mut Learnt) {
    for piece in data.split_inclusive(|b| *b == b'\n') {
        let (complete, whole) = (piece.ends_with(b"\n"), line.is_empty());
        match (complete, whole) {
            (true, true) => event_line(piece, facts, learnt),
            (true, false) => {
                line.extend_from_slice(&piece[..piece.len().min(MAX_LINE)]);
                event_line(line, facts, learnt);
                line.clear();
            }
            // Beyond the limit the rest of the line is not needed: it is only counted.
            (false, _) => line.extend_from_slice(&piece[..piece.len().min(MAX_LINE.saturating_sub(line.len()))]),
        }
    }
}

fn event_line(line: &[u8], facts: bool, learnt: &mut Learnt) {
    let Some(data) = line.strip_prefix(b"data:") else { return };
    let data = data.trim_ascii();
    if data == b"[DONE]" {
        return;
    }
    learnt.chunks += 1;
    learnt.first_token = true;
    if !facts {
        return;
    }
    learnt.failed |= data.starts_with(b"{\"error\":");
    if let Some(usage) = after(data, &KEYS.usage, b'{') {
        // Not the whole event: the other members of it are found by their names.
        let usage = Usage::deserialize(&mut serde_json::Deserializer::from_slice(usage));
        learnt.usage = usage.ok().or(learnt.usage);
    }
    if let Some(reason) = after(data, &KEYS.finish_reason, b'"').and_then(plain_text) {
        learnt.finish_reason = Some(known_reason(reason));
        if learnt.model.is_none() {
            learnt.model = after(data, &KEYS.model, b'"').and_then(plain_text).map(str::to_owned);
        }
    }
}

/// The first value of `key` that begins with `first`. Within JSON text the quotes of a key are escaped, so this is no content.
fn after<'t>(text: &'t [u8], key: &memmem::Finder<'_>, first: u8) -> Option<&'t [u8]> {
    let values = key.find_iter(text).map(|i| text[i + key.needle().len()..].trim_ascii_start());
    values.into_iter().find(|value| value.first() == Some(&first))
}

/// The text at the start of a JSON value, if it needs no decoding.
fn plain_text(value: &[u8]) -> Option<&str> {
    let text = value.strip_prefix(b"\"")?;
    let text = &text[..memchr::memchr2(b'"', b'\\', text)?];
    (value[text.len() + 1] == b'"').then(|| std::str::from_utf8(text).ok()).flatten()
}

/// The keys of facts. Most chunks have nulls there; to search them is cheaper than to parse them.
struct Keys {
    usage: memmem::Finder<'static>,
    finish_reason: memmem::Finder<'static>,
    model: memmem::Finder<'static>,
}

static KEYS: LazyLock<Keys> = LazyLock::new(|| Keys {
    usage: memmem::Finder::new(b"\"usage\":"),
    finish_reason: memmem::Finder::new(b"\"finish_reason\":"),
    model: memmem::Finder::new(b"\"model\":"),
});

/// The part of a response or chunk that is no content.
#[derive(Deserialize)]
struct Message<'a> {
    #[serde(default, borrow)]
    model: Option<Cow<'a, str>>,
    #[serde(default)]
    usage: Option<Usage>,
    #[serde(default, borrow)]
    choices: Vec<Choice<'a>>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(default, borrow)]
    finish_reason: Option<Cow<'a, str>>,
}

fn message(json: &[u8], learnt: &mut Learnt) {
    let Ok(message) = serde_json::from_slice::<Message<'_>>(json) else { return };
    learnt.usage = message.usage.or(learnt.usage);
    let reason = message.choices.iter().find_map(|c| c.finish_reason.as_deref());
    learnt.finish_reason = reason.map(known_reason).or(learnt.finish_reason);
    if learnt.model.is_none() {
        learnt.model = message.model.map(Cow::into_owned);
    }
}

/// Reasons as OpenAI and vLLM write them; anything else is one value, so that the attribute stays small.
fn known_reason(reason: &str) -> &'static str {
    const KNOWN: [&str; 8] =
        ["stop", "length", "tool_calls", "function_call", "content_filter", "abort", "error", "repetition"];
    KNOWN.into_iter().find(|k| *k == reason).unwrap_or("other")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const STREAM: &str = concat!(
        ": keep-alive\n\n",
        "data: {\"model\":\"m\",\"choices\":[{\"delta\":{\"content\":\"\"},\"finish_reason\":null}]}\n\n",
        "data: {\"model\":\"m\",\"choices\":[{\"delta\":{\"content\":\"a \\\"usage\\\":{\"}}]}\r\n\r\n",
        "data: {\"model\":\"m\",\"choices\":[{\"delta\":{},\"finish_reason\": \"length\"}]}\n\n",
        "data: {\"model\":\"m\",\"choices\":[],\"usage\":{\"prompt_tokens\":9,\"total_tokens\":11,\"completion_tokens\":2}}\n\n",
        "data: [DONE]\n\n",
    );

    fn read(mut observer: Observer, pieces: &[&[u8]]) -> Learnt {
        let mut learnt = Learnt::default();
        pieces.iter().for_each(|p| observer.data(&Bytes::copy_from_slice(p), &mut learnt));
        observer.end(&mut learnt);
        learnt
    }

    fn events() -> Observer {
        Observer::Events { facts: true, line: Vec::new() }
    }

    fn expected() -> Learnt {
        let usage = Usage { prompt_tokens: 9, total_tokens: 11, completion_tokens: 2, prompt_tokens_details: None };
        Learnt {
            chunks: 4,
            first_token: true,
            usage: Some(usage),
            finish_reason: Some("length"),
            model: Some("m".to_owned()),
            failed: false,
        }
    }

    #[test]
    fn an_error_event_is_a_failure() {
        let stream = b"data: {\"choices\":[]}\n\ndata: {\"error\":{\"message\":\"x\"}}\n\ndata: [DONE]\n\n";
        assert!(read(events(), &[stream]).failed);
    }

    #[test]
    fn a_stream_tells_its_facts() {
        assert_eq!(read(events(), &[STREAM.as_bytes()]), expected());
    }

    #[test]
    fn comments_are_no_token() {
        assert!(!read(events(), &[b": keep-alive\n\n"]).first_token);
    }

    #[test]
    fn a_body_tells_its_facts() {
        let json = br#"{"model":"m","choices":[{"message":{"content":"x"},"finish_reason":"odd"}],"usage":{"prompt_tokens":1,"total_tokens":2,"completion_tokens":1}}"#;
        let learnt = read(Observer::Json { parts: Vec::new(), size: 0 }, &[&json[..20], &json[20..]]);
        assert_eq!((learnt.finish_reason, learnt.usage.map(|u| u.total_tokens)), (Some("other"), Some(2)));
    }

    #[test]
    fn a_long_line_is_counted_and_not_kept() {
        let long = [b"data: {".as_slice(), &[b'x'; 3 * MAX_LINE], b"\n\ndata: {}\n\n"].concat();
        let mut observer = events();
        let mut learnt = Learnt::default();
        for piece in long.chunks(1000) {
            observer.data(&Bytes::copy_from_slice(piece), &mut learnt);
            let Observer::Events { line, .. } = &observer else { unreachable!("it stays what it is") };
            assert!(line.len() <= 2 * MAX_LINE);
        }
        assert_eq!(learnt.chunks, 2);
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(mut cuts in proptest::collection::vec(0..STREAM.len(), 0..12)) {
            cuts.extend([0, STREAM.len()]);
            cuts.sort();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|w| &STREAM.as_bytes()[w[0]..w[1]]).collect();
            prop_assert_eq!(read(events(), &pieces), expected());
        }
    }
}
