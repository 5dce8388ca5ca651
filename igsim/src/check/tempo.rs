//! Traces out of a Tempo: those that a TraceQL query finds, each read whole by its id.
//!
//! `/api/search` names traces, without the leading zeros of their ids; `/api/v2/traces/{id}` has their spans. Answers are bounded.

use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client as Pool;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::Deserialize;
use shared::trace::{TraceSet, otlp_json};

/// The longest answer that is read, in bytes.
const MOST_BYTES: usize = 256 << 20;
/// How long to wait for an answer.
const PATIENCE: Duration = Duration::from_secs(60);
/// The longest reason that is repeated of a refusal.
const MOST_REASON: usize = 300;

/// What to look for.
#[derive(Clone, Debug)]
pub struct Query {
    /// In TraceQL.
    pub traceql: String,
    /// From when, in seconds since the Unix epoch; without it Tempo looks at the last minutes.
    pub start: Option<u64>,
    /// Until when.
    pub end: Option<u64>,
    /// Traces at most.
    pub limit: u32,
}

/// Why there are no traces.
#[derive(Debug, thiserror::Error)]
pub enum TempoError {
    /// The address is none.
    #[error("{url}: found no address of a Tempo, expected one such as http://127.0.0.1:3200")]
    Address {
        /// As it was given.
        url: String,
    },
    /// Tempo does not take the query.
    #[error("Tempo refuses the query ({status}): {reason}")]
    Query {
        /// The status of its answer.
        status: StatusCode,
        /// What it says.
        reason: String,
    },
    /// Nobody answers, or not in time.
    #[error("cannot reach {url}: {reason}")]
    Unreachable {
        /// What was asked.
        url: String,
        /// Why not.
        reason: String,
    },
    /// The answer is another one than Tempo gives.
    #[error("{url}: {reason}")]
    Answer {
        /// What was asked.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl TempoError {
    /// Whether what was asked is at fault, not whoever was asked.
    pub fn is_input(&self) -> bool {
        match self {
            TempoError::Address { .. } | TempoError::Query { .. } => true,
            TempoError::Unreachable { .. } | TempoError::Answer { .. } => false,
        }
    }
}

/// Traces, and the ids of those that were found and are not there.
#[derive(Debug)]
pub struct Fetched {
    /// The traces.
    pub set: TraceSet,
    /// What the search names and nobody has.
    pub missing: Vec<String>,
}

/// Asks the Tempo at `url`.
///
/// # Errors
/// If it cannot be reached, or does not answer as Tempo does.
pub fn fetch(url: &str, query: &Query) -> Result<Fetched, TempoError> {
    let unreachable = |e: std::io::Error| TempoError::Unreachable { url: url.to_owned(), reason: e.to_string() };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(unreachable)?;
    runtime.block_on(Tempo::new(url)?.fetch(query))
}

struct Tempo {
    base: String,
    pool: Pool<HttpsConnector<HttpConnector>, Full<Bytes>>,
}

/// What a search answers.
#[derive(Deserialize)]
struct Search {
    #[serde(default)]
    traces: Option<Vec<Named>>,
}

#[derive(Deserialize)]
struct Named {
    #[serde(rename = "traceID")]
    id: String,
}

impl Tempo {
    fn new(url: &str) -> Result<Tempo, TempoError> {
        let base = url.trim_end_matches('/').to_owned();
        let parsed: Option<Uri> = base.parse().ok();
        if !parsed.is_some_and(|u| {
            u.host().is_some() && matches!(u.scheme_str(), Some("http" | "https")) && u.query().is_none()
        }) {
            return Err(TempoError::Address { url: url.to_owned() });
        }
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.enforce_http(false);
        let tls = hyper_rustls::HttpsConnectorBuilder::new()
            .with_provider_and_webpki_roots(rustls::crypto::ring::default_provider())
            .expect("ring supports the default protocol versions")
            .https_or_http()
            .enable_http1()
            .wrap_connector(connector);
        Ok(Tempo { base, pool: Pool::builder(TokioExecutor::new()).build(tls) })
    }

    async fn fetch(&self, query: &Query) -> Result<Fetched, TempoError> {
        let mut path = format!("/api/search?q={}&limit={}", encoded(&query.traceql), query.limit);
        for (name, at) in [("start", query.start), ("end", query.end)] {
            if let Some(at) = at {
                path.push_str(&format!("&{name}={at}"));
            }
        }
        let (status, body) = self.get(&path).await?;
        match status {
            StatusCode::OK => {}
            StatusCode::BAD_REQUEST => return Err(TempoError::Query { status, reason: reason(&body) }),
            other => return Err(self.odd(&path, format!("answers {other}: {}", reason(&body)))),
        }
        let found: Search = serde_json::from_slice(&body).map_err(|e| self.odd(&path, e.to_string()))?;
        let (mut documents, mut missing) = (String::new(), Vec::new());
        for named in found.traces.unwrap_or_default() {
            let id = format!("{:0>32}", named.id);
            match self.trace(&id).await? {
                Some(document) => {
                    documents.push_str(&document);
                    documents.push('\n');
                }
                None => missing.push(id),
            }
        }
        let set = otlp_json::read_str(&documents, &self.base).map_err(|e| self.odd("", e.to_string()))?;
        Ok(Fetched { set, missing })
    }

    /// A whole trace as OTLP JSON; `None` if it is not there.
    async fn trace(&self, id: &str) -> Result<Option<String>, TempoError> {
        let path = format!("/api/v2/traces/{id}");
        let (status, body) = self.get(&path).await?;
        match status {
            StatusCode::OK => {}
            StatusCode::NOT_FOUND => return Ok(None),
            other => return Err(self.odd(&path, format!("answers {other}: {}", reason(&body)))),
        }
        // A trace that is not there is one without spans.
        let answer: serde_json::Value = serde_json::from_slice(&body).map_err(|e| self.odd(&path, e.to_string()))?;
        let trace = answer.get("trace").unwrap_or(&answer);
        let groups = ["resourceSpans", "batches"].iter().find_map(|key| trace.get(key)?.as_array());
        if groups.is_none_or(Vec::is_empty) {
            return Ok(None);
        }
        match String::from_utf8(body.to_vec()) {
            Ok(text) => Ok(Some(text)),
            Err(_) => Err(self.odd(&path, "is not UTF-8".to_owned())),
        }
    }

    async fn get(&self, path: &str) -> Result<(StatusCode, Bytes), TempoError> {
        let url = format!("{}{path}", self.base);
        let unreachable = |reason: String| TempoError::Unreachable { url: url.clone(), reason };
        let exchange = async {
            let request = Request::get(&url).header(http::header::ACCEPT, "application/json");
            let request = request.body(Full::default()).map_err(|e| unreachable(e.to_string()))?;
            let response = self.pool.request(request).await.map_err(|e| unreachable(cause(&e)))?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MOST_BYTES).collect().await;
            Ok((status, body.map_err(|e| unreachable(e.to_string()))?.to_bytes()))
        };
        let waited = tokio::time::timeout(PATIENCE, exchange).await;
        waited.unwrap_or_else(|_| Err(unreachable(format!("no answer within {} s", PATIENCE.as_secs()))))
    }

    fn odd(&self, path: &str, reason: String) -> TempoError {
        TempoError::Answer { url: format!("{}{path}", self.base), reason }
    }
}

/// The innermost reason of an error: the outer ones only say that a request failed.
fn cause(error: &dyn std::error::Error) -> String {
    let mut at = error;
    while let Some(source) = at.source() {
        at = source;
    }
    at.to_string()
}

/// The start of what a refusal says.
fn reason(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    let text = text.trim();
    text[..text.floor_char_boundary(MOST_REASON)].to_owned()
}

/// A value as it may stand in a query (RFC 3986: unreserved characters stay).
fn encoded(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_stands_in_a_url() {
        assert_eq!(encoded("{ name = \"a-b\" }"), "%7B%20name%20%3D%20%22a-b%22%20%7D");
    }

    #[test]
    fn only_an_address_is_asked() {
        for bad in ["", "runs/x", "ftp://h", "http://", "http://h/?q=1"] {
            assert!(matches!(Tempo::new(bad), Err(TempoError::Address { .. })), "{bad}");
        }
        assert!(Tempo::new("http://127.0.0.1:3200/").is_ok());
    }
}
