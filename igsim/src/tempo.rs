//! Reads Grafana Tempo over its HTTP API (3.0): searches, metrics at one moment, a trace by its id.
//!
//! What Tempo does differently from OTLP is undone here: ids without leading zeros, whole numbers as text, keys without their scope.

use bytes::Bytes;
use http::StatusCode;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use shared::clock::RunClock;
use shared::ids::{SpanId, TraceId};
use shared::time::Dur;
use shared::trace::{TraceSet, Value, otlp_json};
use tokio::runtime::Runtime;

use crate::remote::{Kind, Remote};

/// Where Tempo listens unless told otherwise, as deploy/tempo/tempo.yaml has it.
pub const DEFAULT_URL: &str = "http://127.0.0.1:3200";
/// Spans that a search shows of one trace: as many as Tempo gives by default (`max_spans_per_span_set`).
pub const MAX_SPANS: usize = 100;

/// How messages call it.
const KIND: Kind = Kind { what: "a Tempo", example: "http://127.0.0.1:3200", headers: "TEMPO_HEADERS" };
/// How long Tempo may take to answer.
const TIMEOUT: Dur = Dur::from_secs(60);
/// The largest answer that is read.
const MAX_ANSWER: usize = 256 << 20;
/// So much of a refusal is repeated.
const MAX_REASON: usize = 300;

/// Why Tempo did not answer.
#[derive(Debug, thiserror::Error)]
pub enum TempoError {
    /// The address, or a header for it, cannot be used.
    #[error("{0}")]
    Address(String),
    /// Nobody answers, or not in time.
    #[error("{url}: {problem}")]
    Unreachable {
        /// The address without path.
        url: String,
        /// What was asked there, without its query.
        path: String,
        /// What went wrong.
        problem: String,
    },
    /// Tempo refuses, for example a query that is not TraceQL.
    #[error("{url} answered {status}: {reason}")]
    Refused {
        /// The address without path.
        url: String,
        /// HTTP status.
        status: u16,
        /// The start of what it said.
        reason: String,
    },
    /// The answer is not what Tempo 3 says.
    #[error("{url} answered something else than Tempo does: {problem}")]
    Content {
        /// The address without path.
        url: String,
        /// What is wrong.
        problem: String,
    },
}

impl TempoError {
    /// Whether the question was at fault, not the server or the way to it.
    pub fn is_bad_input(&self) -> bool {
        matches!(self, TempoError::Address(_) | TempoError::Refused { status: 400..500, .. })
    }
}

/// A span of time, in seconds since the Unix epoch. Tempo searches only within one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Window {
    /// The first second.
    pub start: u64,
    /// The second before which it ends.
    pub end: u64,
}

impl Window {
    /// The last `length` until now, the present second included.
    pub fn last(length: Dur) -> Window {
        let end = now() + 1;
        Window { start: end.saturating_sub(length.as_nanos().div_ceil(1_000_000_000)), end }
    }
}

/// Seconds since the Unix epoch.
pub(crate) fn now() -> u64 {
    let clock = RunClock::start();
    clock.anchor().unix_nanos(clock.now()) / 1_000_000_000
}

/// A trace that a search found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Found {
    /// Its id.
    #[serde(serialize_with = "as_text")]
    pub trace_id: TraceId,
    /// Service of the root; empty if Tempo does not have it.
    pub root_service: String,
    /// Name of the root; empty if Tempo does not have it.
    pub root_name: String,
    /// From its first start to its last end, as Tempo says: in whole milliseconds.
    pub duration_ms: u64,
    /// Spans that match, [`MAX_SPANS`] at most.
    pub spans: Vec<FoundSpan>,
    /// How many spans match.
    pub matched: u64,
}

/// A span that a search found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FoundSpan {
    /// Its id.
    #[serde(serialize_with = "as_text")]
    pub span_id: SpanId,
    /// Its name, if the query mentions names.
    pub name: String,
    /// Start, in nanoseconds since the Unix epoch.
    pub start_unix_nanos: u64,
    /// Duration in nanoseconds.
    pub duration_nanos: u64,
    /// What the query mentions or selects, sorted by key; keys stand without their scope.
    #[serde(serialize_with = "as_object")]
    pub attributes: Vec<(String, Value)>,
}

/// A figure of a metrics query.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Series {
    /// What it is grouped by, in the query's order, as the query writes it.
    #[serde(serialize_with = "as_object")]
    pub labels: Vec<(String, Value)>,
    /// The figure; durations in seconds.
    pub value: f64,
}

/// A Tempo.
pub struct Tempo {
    remote: Remote,
    runtime: Runtime,
}

impl std::fmt::Debug for Tempo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tempo({:?})", self.remote)
    }
}

impl Tempo {
    /// The Tempo at `url`, a base address such as `http://127.0.0.1:3200`. `headers` go with every request, as `NAME=VALUE` with
    /// commas between: `X-Scope-OrgID=team`, `Authorization=Basic ...`.
    ///
    /// # Errors
    /// If the address or a header is none, or the address holds credentials.
    pub fn new(url: &str, headers: &str) -> Result<Tempo, TempoError> {
        let remote = Remote::new(KIND, url, headers).map_err(TempoError::Address)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|e| TempoError::Address(format!("cannot start: {e}")))?;
        Ok(Tempo { remote, runtime })
    }

    /// Traces that match `traceql` in `window`, `limit` at most, slowest first.
    ///
    /// # Errors
    /// If Tempo does not answer, or refuses.
    pub fn search(&self, traceql: &str, window: Window, limit: usize) -> Result<Vec<Found>, TempoError> {
        let Window { start, end } = window;
        let q = encode(traceql);
        let path = format!("/api/search?q={q}&start={start}&end={end}&limit={limit}&spss={MAX_SPANS}");
        let answer: RawSearch = self.json(&path)?;
        let found: Result<Vec<Found>, String> = answer.traces.into_iter().map(RawTrace::found).collect();
        let mut found = found.map_err(|problem| self.content(problem))?;
        found.sort_by_key(|f| (std::cmp::Reverse(f.duration_ms), f.trace_id));
        Ok(found)
    }

    /// The figures of a metrics query over `window` as a whole, largest first.
    ///
    /// # Errors
    /// If Tempo does not answer, or refuses.
    pub fn metrics(&self, traceql: &str, window: Window) -> Result<Vec<Series>, TempoError> {
        let Window { start, end } = window;
        let answer: RawInstant =
            self.json(&format!("/api/metrics/query?q={}&start={start}&end={end}", encode(traceql)))?;
        let mut series: Vec<Series> = answer.series.into_iter().map(RawSeries::series).collect();
        series.sort_by(|a, b| b.value.total_cmp(&a.value));
        Ok(series)
    }

    /// A trace; `None` if Tempo does not have it. It is there as soon as its spans are accepted, whatever its age.
    ///
    /// # Errors
    /// If Tempo does not answer, or refuses.
    pub fn trace(&self, id: TraceId) -> Result<Option<TraceSet>, TempoError> {
        let Some(text) = self.document(id)? else { return Ok(None) };
        otlp_json::read_str(&text, "answer").map(Some).map_err(|e| self.content(e.to_string()))
    }

    /// The same as OTLP JSON on one line.
    pub(crate) fn document(&self, id: TraceId) -> Result<Option<String>, TempoError> {
        let answer = self.get(&format!("/api/traces/{id}"))?;
        Ok(answer.map(|answer| String::from_utf8_lossy(&answer).trim_end().to_owned()))
    }

    fn json<T: for<'de> Deserialize<'de>>(&self, path: &str) -> Result<T, TempoError> {
        let answer = self.get(path)?.ok_or_else(|| self.content("no such path".to_owned()))?;
        serde_json::from_slice(&answer).map_err(|e| self.content(e.to_string()))
    }

    /// The body of an answer, `None` for 404.
    fn get(&self, path: &str) -> Result<Option<Bytes>, TempoError> {
        let asked = path.split('?').next().unwrap_or_default();
        let unreachable = |problem| TempoError::Unreachable { url: self.url(), path: asked.to_owned(), problem };
        let (status, body) = self.runtime.block_on(self.remote.get(path, TIMEOUT, MAX_ANSWER)).map_err(unreachable)?;
        match status {
            StatusCode::OK => Ok(Some(body)),
            StatusCode::NOT_FOUND => Ok(None),
            status => {
                let reason: String = String::from_utf8_lossy(&body).chars().take(MAX_REASON).collect();
                let reason = reason.split_whitespace().collect::<Vec<_>>().join(" ");
                Err(TempoError::Refused { url: self.url(), status: status.as_u16(), reason })
            }
        }
    }

    fn url(&self) -> String {
        self.remote.url().to_owned()
    }

    fn content(&self, problem: String) -> TempoError {
        TempoError::Content { url: self.url(), problem }
    }
}

/// Percent-encodes a value of a query string.
fn encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len() * 2);
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => out.push(char::from(byte)),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

fn as_text<T: std::fmt::Display, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

fn as_object<S: Serializer>(attributes: &[(String, Value)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(attributes.iter().map(|(key, value)| (key, json(value))))
}

fn json(value: &Value) -> serde_json::Value {
    match value {
        Value::Str(v) => serde_json::Value::from(&**v),
        Value::Shared(v) => serde_json::Value::from(&**v),
        Value::Int(v) => serde_json::Value::from(*v),
        Value::F64(v) => serde_json::Value::from(*v),
        Value::Bool(v) => serde_json::Value::from(*v),
        Value::StrList(v) => v.iter().map(|t| t.to_string()).collect(),
        Value::F64List(v) => v.iter().copied().collect(),
    }
}

#[derive(Deserialize)]
struct RawSearch {
    #[serde(default)]
    traces: Vec<RawTrace>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawTrace {
    #[serde(rename = "traceID")]
    trace_id: String,
    #[serde(default)]
    root_service_name: String,
    #[serde(default)]
    root_trace_name: String,
    #[serde(default, deserialize_with = "number")]
    duration_ms: u64,
    #[serde(default)]
    span_sets: Vec<RawSpanSet>,
}

#[derive(Deserialize)]
struct RawSpanSet {
    #[serde(default)]
    spans: Vec<RawSpan>,
    #[serde(default, deserialize_with = "number")]
    matched: u64,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawSpan {
    #[serde(rename = "spanID")]
    span_id: String,
    #[serde(default)]
    name: String,
    #[serde(default, deserialize_with = "number")]
    start_time_unix_nano: u64,
    #[serde(default, deserialize_with = "number")]
    duration_nanos: u64,
    #[serde(default)]
    attributes: Vec<RawAttribute>,
}

#[derive(Deserialize)]
struct RawAttribute {
    key: String,
    #[serde(default)]
    value: serde_json::Value,
}

#[derive(Deserialize)]
struct RawInstant {
    #[serde(default)]
    series: Vec<RawSeries>,
}

#[derive(Deserialize)]
struct RawSeries {
    #[serde(default)]
    labels: Vec<RawAttribute>,
    #[serde(default)]
    value: serde_json::Value,
}

impl RawTrace {
    fn found(self) -> Result<Found, String> {
        let trace_id = u128::from_str_radix(&self.trace_id, 16).ok().and_then(TraceId::new);
        let mut spans = Vec::new();
        let mut matched = 0;
        for set in self.span_sets {
            matched += set.matched;
            for span in set.spans {
                spans.push(span.found()?);
            }
        }
        // What is still in memory and what is written already may both have a span.
        spans.sort_by_key(|s: &FoundSpan| (s.start_unix_nanos, s.span_id));
        spans.dedup_by_key(|s| s.span_id);
        let known = |name: String| if name.starts_with('<') { String::new() } else { name };
        Ok(Found {
            trace_id: trace_id.ok_or_else(|| format!("`{}` is no trace id", self.trace_id))?,
            root_service: known(self.root_service_name),
            root_name: known(self.root_trace_name),
            duration_ms: self.duration_ms,
            matched: matched.max(spans.len() as u64),
            spans,
        })
    }
}

impl RawSpan {
    fn found(self) -> Result<FoundSpan, String> {
        let span_id = u64::from_str_radix(&self.span_id, 16).ok().and_then(SpanId::new);
        let mut attributes: Vec<_> = self.attributes.into_iter().map(|a| (a.key, value(&a.value))).collect();
        attributes.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(FoundSpan {
            span_id: span_id.ok_or_else(|| format!("`{}` is no span id", self.span_id))?,
            name: self.name,
            start_unix_nanos: self.start_time_unix_nano,
            duration_nanos: self.duration_nanos,
            attributes,
        })
    }
}

impl RawSeries {
    fn series(self) -> Series {
        // A figure of 0 is left out, NaN and infinities are text.
        let figure = match &self.value {
            serde_json::Value::String(text) => text.parse().unwrap_or(f64::NAN),
            value => value.as_f64().unwrap_or(0.0),
        };
        Series { labels: self.labels.into_iter().map(|a| (a.key, value(&a.value))).collect(), value: figure }
    }
}

/// An attribute's value (`AnyValue` of OTLP as JSON).
fn value(raw: &serde_json::Value) -> Value {
    let Some((kind, inner)) = raw.as_object().and_then(|o| o.iter().next()) else { return Value::from("") };
    match (kind.as_str(), inner) {
        ("intValue", serde_json::Value::String(text)) => {
            text.parse().map_or_else(|_| Value::from(text.clone()), Value::Int)
        }
        ("intValue", inner) => Value::Int(inner.as_i64().unwrap_or_default()),
        ("doubleValue", serde_json::Value::String(text)) => Value::F64(text.parse().unwrap_or(f64::NAN)),
        ("doubleValue", inner) => Value::F64(inner.as_f64().unwrap_or(f64::NAN)),
        ("boolValue", inner) => Value::Bool(inner.as_bool().unwrap_or_default()),
        ("arrayValue", inner) => {
            let values = inner.get("values").and_then(serde_json::Value::as_array);
            let texts = values.into_iter().flatten().map(|v| shared::trace::tree::value_text(&value(v)).into());
            Value::StrList(texts.collect())
        }
        (_, serde_json::Value::String(text)) => Value::from(text.clone()),
        (_, inner) => Value::from(inner.to_string()),
    }
}

/// A whole number, or one in a string.
fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let value = serde_json::Value::deserialize(deserializer)?;
    let number = value.as_u64().or_else(|| value.as_str()?.parse().ok());
    number.ok_or_else(|| serde::de::Error::custom(format!("`{value}` is no whole number")))
}

#[cfg(test)]
mod tests;
