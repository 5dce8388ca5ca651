//! Where an engine publishes its KV events: what it says itself (`GET /kv_event_sources`, vLLM 0.33), else the port that is
//! configured.

use std::time::Duration;

use bytes::Bytes;
use http::uri::PathAndQuery;
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use serde::Deserialize;

use crate::core::config::{TimeoutConfig, UpstreamConfig};
use crate::server::backend::Backend;
use crate::server::connect::Connector;

/// Longer answers are not read.
const MAX_ANSWER: usize = 64 * 1024;
/// How long the question may take.
const PATIENCE: Duration = Duration::from_secs(1);

/// The sockets of an engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Source {
    /// Where batches come from.
    pub(super) publisher: String,
    /// Where lost ones can be asked for.
    pub(super) replay: Option<String>,
}

/// Asks engines.
#[derive(Clone, Debug)]
pub(crate) struct Sources {
    client: Client<Connector, Full<Bytes>>,
    port: u16,
}

/// What the page says of a publisher.
#[derive(Debug, Deserialize)]
struct Published {
    endpoint: String,
    #[serde(default)]
    replay_endpoint: Option<String>,
}

impl Sources {
    /// `port` is that of engines which do not say; `upstream` says whom to trust.
    pub(crate) fn new(port: u16, upstream: &UpstreamConfig) -> Result<Sources, String> {
        let connector = Connector::new(&TimeoutConfig::default(), upstream)?;
        let mut builder = Client::builder(TokioExecutor::new());
        builder.pool_timer(TokioTimer::new()).timer(TokioTimer::new());
        Ok(Sources { client: builder.build(connector), port })
    }

    /// The sockets of the engine at `backend`; `None` if there is no engine to ask.
    pub(super) async fn of(&self, backend: &Backend) -> Option<Source> {
        let host = &backend.config.address;
        let fallback = Source { publisher: format!("tcp://{host}:{}", self.port), replay: None };
        let answer = tokio::time::timeout(PATIENCE, self.page(backend)).await.ok()??;
        Some(answer.and_then(|page| read(&page, host)).unwrap_or(fallback))
    }

    /// The page: `None` if nobody answers, `Some(None)` if there is none.
    async fn page(&self, backend: &Backend) -> Option<Option<Bytes>> {
        let mut request = http::Request::new(Full::new(Bytes::new()));
        *request.uri_mut() = backend.uri(&PathAndQuery::from_static("/kv_event_sources"))?;
        let response = self.client.request(request).await.ok()?;
        if response.status() != http::StatusCode::OK {
            return Some(None);
        }
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
        Some(body.ok().map(http_body_util::Collected::to_bytes))
    }
}

/// Reads the page of an engine at `host`: publishers by rank, of which the first is the engine's.
fn read(page: &[u8], host: &str) -> Option<Source> {
    let all: std::collections::BTreeMap<String, Published> = serde_json::from_slice(page).ok()?;
    let first = all.into_values().next()?;
    // A wildcard is an address of the engine's host.
    let reachable = |endpoint: &str| {
        let rest = endpoint.strip_prefix("tcp://")?;
        let (at, port) = rest.rsplit_once(':')?;
        let wild = matches!(at, "*" | "0.0.0.0" | "[::]" | "::");
        Some(format!("tcp://{}:{port}", if wild { host } else { at }))
    };
    Some(Source {
        publisher: reachable(&first.endpoint)?,
        replay: first.replay_endpoint.as_deref().and_then(reachable),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_says_where_it_publishes() {
        let check = |page: &str, expect: Option<(&str, Option<&str>)>| {
            let found = read(page.as_bytes(), "10.0.0.7");
            assert_eq!(found.as_ref().map(|s| (s.publisher.as_str(), s.replay.as_deref())), expect, "{page}");
        };
        check(r#"{"0":{"endpoint":"tcp://*:5557","replay_endpoint":null}}"#, Some(("tcp://10.0.0.7:5557", None)));
        check(
            r#"{"0":{"endpoint":"tcp://127.0.0.1:1","replay_endpoint":"tcp://0.0.0.0:2","topic":"kv@"}}"#,
            Some(("tcp://127.0.0.1:1", Some("tcp://10.0.0.7:2"))),
        );
        check("{}", None);
        check("[]", None);
        check(r#"{"0":{"endpoint":"inproc://x"}}"#, None);
    }
}
