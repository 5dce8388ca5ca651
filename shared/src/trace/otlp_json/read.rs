//! OTLP JSON to spans: our own files, a Collector's, and the answers of Tempo's API.
//!
//! Tolerated: numbers where strings are usual and the reverse, enum names where numbers are usual, ids in base64 (Tempo),
//! `batches` for `resourceSpans`, an object wrapped in `trace`, unknown members, documents over several lines, a last line cut
//! off. Producer and consumer spans are read as client and server, value kinds we do not have as their JSON text.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;

use crate::ids::{InstanceId, SpanId, TraceId};
use crate::time::{Anchor, Time};
use crate::trace::otlp_json::{IS_REMOTE, SAMPLED};
use crate::trace::resource::Resource;
use crate::trace::set::TraceSet;
use crate::trace::span::{Attr, Event, Kind, Link, Span, Status, Text, Value};

/// A trace file that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The file cannot be opened or read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// A document is not OTLP JSON.
    #[error("{path}:{line}: {problem}")]
    Content {
        /// The file.
        path: String,
        /// The line, counted from 1.
        line: usize,
        /// What is wrong.
        problem: String,
    },
}

/// Reads a file of OTLP JSON documents, usually one per line.
///
/// # Errors
/// If the file cannot be read or holds something else than OTLP JSON traces; the error names file and line.
pub fn read_file(path: impl AsRef<Path>) -> Result<TraceSet, ReadError> {
    let shown = path.as_ref().display().to_string();
    match std::fs::read_to_string(&path) {
        Ok(text) => read_str(&text, &shown),
        Err(source) => Err(ReadError::Io { path: shown, source }),
    }
}

/// Reads OTLP JSON documents from `text`; `path` is for errors.
///
/// # Errors
/// Like [`read_file`].
pub fn read_str(text: &str, path: &str) -> Result<TraceSet, ReadError> {
    let mut reader = Reader::default();
    let mut documents = serde_json::Deserializer::from_str(text).into_iter::<Document>();
    let mut truncated = false;
    let mut line = 1;
    let mut counted = 0;
    while let Some(document) = documents.next() {
        let content = |line, problem: String| ReadError::Content { path: path.to_owned(), line, problem };
        let document = match document {
            Ok(document) => document,
            // A writer that was killed leaves its last line unfinished; what comes before it is whole.
            Err(e) if e.is_eof() && counted > 0 => {
                truncated = true;
                break;
            }
            Err(e) => return Err(content(e.line(), e.to_string())),
        };
        let start = counted + text[counted..].len() - text[counted..].trim_start().len();
        line += text[counted..start].matches('\n').count();
        reader.document(document).map_err(|problem| content(line, problem))?;
        line += text[start..documents.byte_offset()].matches('\n').count();
        counted = documents.byte_offset();
    }
    Ok(reader.finish(truncated))
}

#[derive(Default)]
struct Reader {
    resources: Vec<Resource>,
    known: HashMap<String, InstanceId>,
    /// Times are nanoseconds since the Unix epoch until the anchor is known.
    spans: Vec<Span>,
    ok_statuses: Vec<(TraceId, SpanId)>,
    unsampled: Vec<(TraceId, SpanId)>,
    flags_known: bool,
    texts: HashMap<String, Arc<str>>,
}

impl Reader {
    fn document(&mut self, document: Document) -> Result<(), String> {
        let inner = document
            .trace
            .map(|t| *t)
            .unwrap_or(Groups { resource_spans: document.resource_spans, batches: document.batches });
        let groups = match (inner.resource_spans, inner.batches) {
            (Some(groups), _) | (None, Some(groups)) => groups,
            (None, None) => return Err("found neither `resourceSpans` nor `batches`".to_owned()),
        };
        for group in groups {
            let instance = self.instance(attributes(group.resource.attributes)?)?;
            for scope in group.scope_spans {
                for span in scope.spans {
                    self.span(span, instance)?;
                }
            }
        }
        Ok(())
    }

    fn instance(&mut self, attributes: Vec<Attr>) -> Result<InstanceId, String> {
        let key = format!("{attributes:?}");
        if let Some(id) = self.known.get(&key) {
            return Ok(*id);
        }
        let id = u16::try_from(self.resources.len()).map_err(|_| "more than 65,536 resources".to_owned())?;
        self.resources.push(Resource::from_attributes(attributes));
        self.known.insert(key, InstanceId(id));
        Ok(InstanceId(id))
    }

    fn span(&mut self, raw: RawSpan, instance: InstanceId) -> Result<(), String> {
        let trace_id = trace_id(&raw.trace_id)?;
        let span_id = span_id(&raw.span_id)?.ok_or("a span has no spanId")?;
        let flags = raw.flags.as_ref().and_then(Num::as_u64).unwrap_or(0);
        self.flags_known |= flags != 0;
        if flags & u64::from(SAMPLED) == 0 {
            self.unsampled.push((trace_id, span_id));
        }
        let status = match raw.status.code.as_ref().map_or("", Name::as_text) {
            "2" | "STATUS_CODE_ERROR" => Status::Error(raw.status.message.into()),
            "1" | "STATUS_CODE_OK" => {
                self.ok_statuses.push((trace_id, span_id));
                Status::Unset
            }
            _ => Status::Unset,
        };
        let state = if raw.trace_state.is_empty() { None } else { Some(self.text(raw.trace_state)) };
        self.spans.push(Span {
            trace_id,
            span_id,
            parent: span_id_opt(raw.parent_span_id.as_deref())?,
            parent_is_remote: flags & u64::from(IS_REMOTE) != 0,
            tracestate: state,
            instance,
            name: raw.name.into(),
            kind: kind(raw.kind.as_ref().map_or("", Name::as_text)),
            start: time(raw.start.as_ref(), "startTimeUnixNano")?,
            end: time(raw.end.as_ref(), "endTimeUnixNano")?,
            attrs: attributes(raw.attributes)?,
            events: raw.events.into_iter().map(event).collect::<Result<_, _>>()?,
            links: raw.links.into_iter().map(link).collect::<Result<_, _>>()?,
            status,
        });
        Ok(())
    }

    /// One copy of a text that many spans share.
    fn text(&mut self, text: String) -> Arc<str> {
        let shared = self.texts.entry(text).or_insert_with_key(|t| t.as_str().into());
        Arc::clone(shared)
    }

    /// Moves the anchor to the first start, so that times are small.
    fn finish(mut self, truncated: bool) -> TraceSet {
        let mut spans = std::mem::take(&mut self.spans);
        let first = spans.iter().map(|s| s.start.as_nanos()).min().unwrap_or(0);
        let zero = Time::from_nanos(first);
        let shift = |t: &mut Time| *t = Time::ZERO + t.since(zero);
        for span in &mut spans {
            shift(&mut span.start);
            shift(&mut span.end);
            span.events.iter_mut().for_each(|e| shift(&mut e.at));
        }
        let anchor = Anchor::from_unix_nanos(first);
        let Reader { resources, ok_statuses, unsampled, flags_known, .. } = self;
        // Nothing to tell by is no reason to doubt.
        let flags_known = flags_known || spans.is_empty();
        TraceSet { resources, spans, anchor, ok_statuses, unsampled, flags_known, truncated }
    }
}

fn event(raw: RawEvent) -> Result<Event, String> {
    let at = time(raw.time.as_ref(), "timeUnixNano")?;
    Ok(Event { name: raw.name.into(), at, attrs: attributes(raw.attributes)? })
}

fn link(raw: RawLink) -> Result<Link, String> {
    let span_id = span_id(&raw.span_id)?.ok_or("a link has no spanId")?;
    Ok(Link { trace_id: trace_id(&raw.trace_id)?, span_id, attrs: attributes(raw.attributes)? })
}

fn kind(name: &str) -> Kind {
    match name {
        "2" | "SPAN_KIND_SERVER" | "5" | "SPAN_KIND_CONSUMER" => Kind::Server,
        "3" | "SPAN_KIND_CLIENT" | "4" | "SPAN_KIND_PRODUCER" => Kind::Client,
        _ => Kind::Internal,
    }
}

fn time(value: Option<&Num>, member: &str) -> Result<Time, String> {
    let nanos = value.and_then(Num::as_u64).ok_or_else(|| format!("`{member}` is missing or no number"))?;
    Ok(Time::from_nanos(nanos))
}

fn trace_id(text: &str) -> Result<TraceId, String> {
    let bytes = id_bytes(text, 16).filter(|b| b.len() == 16).ok_or_else(|| format!("`{text}` is no trace id"))?;
    let value = bytes.iter().fold(0u128, |n, b| n << 8 | u128::from(*b));
    TraceId::new(value).ok_or_else(|| "a trace id is zero".to_owned())
}

fn span_id(text: &str) -> Result<Option<SpanId>, String> {
    if text.is_empty() {
        return Ok(None);
    }
    let bytes = id_bytes(text, 8).filter(|b| b.len() == 8).ok_or_else(|| format!("`{text}` is no span id"))?;
    Ok(SpanId::new(bytes.iter().fold(0u64, |n, b| n << 8 | u64::from(*b))))
}

fn span_id_opt(text: Option<&str>) -> Result<Option<SpanId>, String> {
    text.map_or(Ok(None), span_id)
}

/// An id of `len` bytes in hex (OTLP) or base64 (plain protobuf JSON, as Tempo answers); the length tells which.
fn id_bytes(text: &str, len: usize) -> Option<Vec<u8>> {
    if text.len() == 2 * len {
        let digits: Option<Vec<u8>> = text.chars().map(|c| c.to_digit(16).map(|d| d as u8)).collect();
        return digits.map(|d| d.chunks_exact(2).map(|p| p[0] << 4 | p[1]).collect());
    }
    let mut bits = 0u32;
    let mut held = 0;
    let mut bytes = Vec::with_capacity(len);
    for c in text.trim_end_matches('=').bytes() {
        let six = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' | b'-' => 62,
            b'/' | b'_' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(six);
        held += 6;
        if held >= 8 {
            held -= 8;
            bytes.push((bits >> held) as u8);
        }
    }
    Some(bytes)
}

fn attributes(raw: Vec<RawAttr>) -> Result<Vec<Attr>, String> {
    raw.into_iter().map(|a| Ok((Text::from(a.key), value(a.value)?))).collect()
}

fn value(raw: RawValue) -> Result<Value, String> {
    Ok(match raw {
        RawValue { string: Some(v), .. } => Value::Str(v.into()),
        RawValue { boolean: Some(v), .. } => Value::Bool(v),
        RawValue { int: Some(v), .. } => Value::Int(v.as_i64().ok_or("an intValue is no 64-bit integer")?),
        RawValue { double: Some(v), .. } => Value::F64(v.as_f64().ok_or("a doubleValue is no number")?),
        RawValue { array: Some(v), .. } => list(v.values)?,
        RawValue { bytes: Some(v), .. } => Value::Str(v.into()),
        RawValue { map: Some(v), .. } => Value::Str(v.to_string().into()),
        RawValue { .. } => Value::Str(Text::Borrowed("")),
    })
}

fn list(raw: Vec<RawValue>) -> Result<Value, String> {
    let values: Vec<Value> = raw.into_iter().map(value).collect::<Result<_, _>>()?;
    let numbers: Option<Vec<f64>> = values.iter().map(Value::as_f64).collect();
    Ok(match numbers {
        Some(numbers) if !numbers.is_empty() => Value::F64List(numbers),
        Some(_) | None => Value::StrList(values.into_iter().map(as_text).collect()),
    })
}

fn as_text(value: Value) -> Text {
    match value {
        Value::Str(v) => v,
        Value::Shared(v) => v.to_string().into(),
        Value::Int(v) => v.to_string().into(),
        Value::F64(v) => v.to_string().into(),
        Value::Bool(v) => v.to_string().into(),
        Value::StrList(v) => v.join(",").into(),
        Value::F64List(v) => v.iter().map(f64::to_string).collect::<Vec<_>>().join(",").into(),
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    resource_spans: Option<Vec<RawGroup>>,
    batches: Option<Vec<RawGroup>>,
    trace: Option<Box<Groups>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Groups {
    resource_spans: Option<Vec<RawGroup>>,
    batches: Option<Vec<RawGroup>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawGroup {
    #[serde(default)]
    resource: RawResource,
    #[serde(default, alias = "instrumentationLibrarySpans")]
    scope_spans: Vec<RawScope>,
}

#[derive(Default, Deserialize)]
struct RawResource {
    #[serde(default)]
    attributes: Vec<RawAttr>,
}

#[derive(Deserialize)]
struct RawScope {
    #[serde(default)]
    spans: Vec<RawSpan>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawSpan {
    #[serde(default)]
    trace_id: String,
    #[serde(default)]
    span_id: String,
    #[serde(default)]
    trace_state: String,
    parent_span_id: Option<String>,
    flags: Option<Num>,
    #[serde(default)]
    name: String,
    kind: Option<Name>,
    #[serde(rename = "startTimeUnixNano")]
    start: Option<Num>,
    #[serde(rename = "endTimeUnixNano")]
    end: Option<Num>,
    #[serde(default)]
    attributes: Vec<RawAttr>,
    #[serde(default)]
    events: Vec<RawEvent>,
    #[serde(default)]
    links: Vec<RawLink>,
    #[serde(default)]
    status: RawStatus,
}

#[derive(Deserialize)]
struct RawEvent {
    #[serde(rename = "timeUnixNano")]
    time: Option<Num>,
    #[serde(default)]
    name: String,
    #[serde(default)]
    attributes: Vec<RawAttr>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawLink {
    #[serde(default)]
    trace_id: String,
    #[serde(default)]
    span_id: String,
    #[serde(default)]
    attributes: Vec<RawAttr>,
}

#[derive(Default, Deserialize)]
struct RawStatus {
    #[serde(default)]
    message: String,
    code: Option<Name>,
}

#[derive(Deserialize)]
struct RawAttr {
    key: String,
    #[serde(default)]
    value: RawValue,
}

#[derive(Default, Deserialize)]
struct RawValue {
    #[serde(rename = "stringValue")]
    string: Option<String>,
    #[serde(rename = "boolValue")]
    boolean: Option<bool>,
    #[serde(rename = "intValue")]
    int: Option<Num>,
    #[serde(rename = "doubleValue")]
    double: Option<Num>,
    #[serde(rename = "arrayValue")]
    array: Option<RawArray>,
    #[serde(rename = "bytesValue")]
    bytes: Option<String>,
    #[serde(rename = "kvlistValue")]
    map: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct RawArray {
    #[serde(default)]
    values: Vec<RawValue>,
}

/// A number, or a number in a string.
#[derive(Deserialize)]
#[serde(untagged)]
enum Num {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Text(String),
}

impl Num {
    fn as_u64(&self) -> Option<u64> {
        match self {
            Num::Unsigned(n) => Some(*n),
            Num::Text(t) => t.parse().ok(),
            Num::Signed(_) | Num::Float(_) => None,
        }
    }
    fn as_i64(&self) -> Option<i64> {
        match self {
            Num::Unsigned(n) => i64::try_from(*n).ok(),
            Num::Signed(n) => Some(*n),
            Num::Text(t) => t.parse().ok(),
            Num::Float(_) => None,
        }
    }
    fn as_f64(&self) -> Option<f64> {
        match self {
            Num::Unsigned(n) => Some(*n as f64),
            Num::Signed(n) => Some(*n as f64),
            Num::Float(n) => Some(*n),
            Num::Text(t) => t.parse().ok(),
        }
    }
}

/// An enum as its number or its name.
#[derive(Deserialize)]
#[serde(from = "serde_json::Value")]
struct Name(String);

impl From<serde_json::Value> for Name {
    fn from(value: serde_json::Value) -> Name {
        match value {
            serde_json::Value::String(name) => Name(name),
            other => Name(other.to_string()),
        }
    }
}

impl Name {
    fn as_text(&self) -> &str {
        &self.0
    }
}
