//! The gateway's side: asks a kv-cache-manager, within a time limit, and does without if it does not answer.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, Method, Uri, header};
use http_body_util::{BodyExt, Full, Limited};
use tokio::sync::Semaphore;

use super::api::{EXPECT_PATH, Expect, Score, Scores};
use crate::core::config::PreciseConfig;
use crate::core::kv_index::Match;
use crate::server::backend::Backend;
use crate::server::runtime::Upstream;
use crate::spans::{Failure, SCORE_PATH};

/// Longer answers are not read, in bytes.
const MAX_ANSWER: usize = 4 << 20;
/// Dispatches that are being told at a time; further ones are not told.
const MAX_TELLING: usize = 256;

/// A kv-cache-manager.
#[derive(Clone, Debug)]
pub(crate) struct Manager {
    client: Upstream,
    authority: Authority,
    /// Its address and port, as spans name them.
    pub(crate) address: Arc<str>,
    pub(crate) port: u16,
    limit: Duration,
    telling: Arc<Semaphore>,
}

/// What came of a question.
#[derive(Debug, Default)]
pub(crate) struct Asked {
    /// Matches by endpoint id.
    pub(crate) answer: Option<Vec<Match>>,
    pub(crate) status: Option<u16>,
    pub(crate) failure: Option<Failure>,
}

impl Manager {
    /// The manager that a valid configuration names.
    pub(crate) fn of(config: &PreciseConfig, client: &Upstream) -> Option<Manager> {
        let uri: Uri = config.manager.as_ref()?.parse().ok()?;
        let authority = uri.authority()?.clone();
        Some(Manager {
            client: client.clone(),
            address: authority.host().into(),
            port: authority.port_u16().unwrap_or(80),
            authority,
            limit: config.manager_timeout.get().to_std(),
            telling: Arc::new(Semaphore::new(MAX_TELLING)),
        })
    }

    /// The URL of a path there.
    pub(crate) fn uri(&self, path: &'static str) -> Option<Uri> {
        let uri = Uri::builder().scheme(Scheme::HTTP).authority(self.authority.clone());
        uri.path_and_query(PathAndQuery::from_static(path)).build().ok()
    }

    /// Asks who of `backends` holds the leading blocks of a prompt; `headers` carry the trace and the request's id.
    pub(crate) async fn ask(&self, model: &Arc<str>, keys: &[u64], headers: HeaderMap, backends: &[Backend]) -> Asked {
        let question = Score { model: Arc::clone(model), block_keys: keys.to_vec() };
        let Some(request) = self.request(SCORE_PATH, headers, &question) else { return Asked::default() };
        match tokio::time::timeout(self.limit, self.answer(request, backends)).await {
            Ok(asked) => asked,
            Err(_) => Asked { failure: Some(Failure::Timeout), ..Asked::default() },
        }
    }

    async fn answer(&self, request: http::Request<Full<Bytes>>, backends: &[Backend]) -> Asked {
        let response = match self.client.request(request).await {
            Ok(response) => response,
            Err(error) => {
                let failure = if error.is_connect() { Failure::Connect } else { Failure::Reset };
                return Asked { failure: Some(failure), ..Asked::default() };
            }
        };
        let status = Some(response.status().as_u16());
        if !response.status().is_success() {
            return Asked { status, ..Asked::default() };
        }
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
        let scores = body.ok().and_then(|b| serde_json::from_slice::<Scores>(&b.to_bytes()).ok());
        match scores {
            Some(scores) => Asked { answer: Some(matches(&scores, backends)), status, failure: None },
            None => Asked { answer: None, status, failure: Some(Failure::Reset) },
        }
    }

    /// Tells that a request with these blocks was sent to `endpoint`, without waiting; nobody is told where too many tell.
    /// `headers` carry its id.
    pub(crate) fn tell(&self, endpoint: &Arc<str>, keys: Vec<u64>, headers: HeaderMap) {
        let told = Expect { endpoint: Arc::clone(endpoint), block_keys: keys };
        let Some(request) = self.request(EXPECT_PATH, headers, &told) else { return };
        let Ok(place) = Arc::clone(&self.telling).try_acquire_owned() else { return };
        let (client, limit) = (self.client.clone(), self.limit);
        tokio::spawn(async move {
            let _place = place;
            // What is not told is learnt from the engine's events a little later.
            let _ = tokio::time::timeout(limit, client.request(request)).await;
        });
    }

    /// The status of an answer to whatever request.
    #[cfg(test)]
    pub(super) async fn raw(&self, request: http::Request<Full<Bytes>>) -> u16 {
        self.client.request(request).await.unwrap().status().as_u16()
    }

    fn request(
        &self,
        path: &'static str,
        headers: HeaderMap,
        body: &impl serde::Serialize,
    ) -> Option<http::Request<Full<Bytes>>> {
        let uri = self.uri(path)?;
        let mut request = http::Request::new(Full::new(Bytes::from(serde_json::to_vec(body).ok()?)));
        (*request.method_mut(), *request.uri_mut(), *request.headers_mut()) = (Method::POST, uri, headers);
        let json = header::HeaderValue::from_static("application/json");
        request.headers_mut().insert(header::CONTENT_TYPE, json);
        Some(request)
    }
}

/// Matches by endpoint id. Endpoints that the gateway does not have are left out.
fn matches(scores: &Scores, backends: &[Backend]) -> Vec<Match> {
    let held = |b: &Backend| scores.endpoints.get(&b.config.name).copied();
    let held =
        backends.iter().map(|b| held(b).map_or_else(Match::default, |h| Match { blocks: h.blocks, score: h.score }));
    held.collect()
}
