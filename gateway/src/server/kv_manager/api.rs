//! What a kv-cache-manager answers.
//!
//! | | |
//! |---|---|
//! | POST `/v1/score` | `{"model", "block_keys": [...]}`: the longest match of every endpoint that holds the first block |
//! | POST `/v1/expect` | `{"endpoint", "block_keys": [...]}`: a request with these blocks was sent there |
//! | POST `/internal/sampling/keep` | ids of traces that the gateway keeps, where records of candidates are held |
//! | GET `/health` | 200 |

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, State as Shared};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use shared::time::Time;
use shared::trace::Trail;
use shared::trace::verdict::{self, KEEP_PATH};

use super::State;
use super::access::Line;
use crate::core::kv_index::Found;
use crate::core::pool::EndpointId;
use crate::spans::{KvScored, ManagerFact, SCORE_PATH, bounded_name};

/// Where a dispatch is told.
pub(super) const EXPECT_PATH: &str = "/v1/expect";
/// Larger bodies are refused, in bytes.
const MAX_BODY: usize = 4 << 20;
/// More blocks than this are refused: the longest prompt of the default configuration, token by token.
const MAX_KEYS: usize = 131_072;

/// A question.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Score {
    pub(super) model: Arc<str>,
    pub(super) block_keys: Vec<u64>,
}

/// Its answer.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Scores {
    /// Leading blocks that anybody holds.
    pub(super) blocks_found: u32,
    /// Endpoints that hold the first block at least.
    pub(super) endpoints: BTreeMap<Arc<str>, Held>,
}

/// What one endpoint holds.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Held {
    pub(super) blocks: u32,
    pub(super) score: f64,
}

/// A dispatch.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Expect {
    pub(super) endpoint: Arc<str>,
    pub(super) block_keys: Vec<u64>,
}

pub(super) fn router(state: Arc<State>) -> Router {
    Router::new()
        .route(SCORE_PATH, post(score))
        .route(EXPECT_PATH, post(expect))
        .route(KEEP_PATH, post(keep))
        .route("/health", get(async || StatusCode::OK))
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(state)
}

async fn score(Shared(state): Shared<Arc<State>>, headers: HeaderMap, body: Body) -> Response {
    let received = state.clock.now();
    let (started, trail) = state.tracer.start::<ManagerFact>(&headers, received);
    let mut line = Line::new(SCORE_PATH, received, started.as_ref());
    let response = match read::<Score>(body, |s| s.block_keys.len()) {
        Ok(asked) => {
            trail.note(received, || ManagerFact::Asked { model: bounded_name(&asked.model) });
            let scores = state.scores(&asked.block_keys, &trail);
            (line.blocks, line.found) = (Some(asked.block_keys.len()), Some(scores.blocks_found));
            line.model = Some(asked.model);
            Json(scores).into_response()
        }
        Err(refusal) => refusal.into_response(),
    };
    let answered = state.clock.now();
    trail.note(answered, || ManagerFact::Answered(response.status().as_u16()));
    trail.finish(answered);
    state.log(&line, &headers, response.status());
    response
}

async fn keep(Shared(state): Shared<Arc<State>>, body: Bytes) -> StatusCode {
    match verdict::read(&body) {
        _ if !state.tracer.holds() => StatusCode::NOT_FOUND,
        None => StatusCode::BAD_REQUEST,
        Some(traces) => {
            state.tracer.keep(traces);
            StatusCode::NO_CONTENT
        }
    }
}

async fn expect(Shared(state): Shared<Arc<State>>, headers: HeaderMap, body: Body) -> Response {
    let received = state.clock.now();
    let mut line = Line::new(EXPECT_PATH, received, None);
    let response = match read::<Expect>(body, |e| e.block_keys.len()) {
        Ok(told) => state.told(received, &told, &mut line),
        Err(refusal) => refusal.into_response(),
    };
    state.log(&line, &headers, response.status());
    response
}

/// A body as far as it came: one that is too long or breaks off is answered, and logged, like any other.
type Body = Result<Bytes, BytesRejection>;

/// Reads a body; what it holds is never repeated.
fn read<T: DeserializeOwned>(body: Body, keys: impl FnOnce(&T) -> usize) -> Result<T, (StatusCode, &'static str)> {
    const UNREADABLE: &str = "the body cannot be read";
    let body = body.map_err(|rejection| (rejection.status(), UNREADABLE))?;
    let read: T = serde_json::from_slice(&body).map_err(|_| (StatusCode::BAD_REQUEST, UNREADABLE))?;
    if keys(&read) > MAX_KEYS {
        return Err((StatusCode::PAYLOAD_TOO_LARGE, "too many blocks"));
    }
    Ok(read)
}

impl State {
    /// Takes in a dispatch.
    fn told(&self, now: Time, told: &Expect, line: &mut Line<'_>) -> Response {
        let Some(place) = self.backends.iter().position(|b| b.config.name == told.endpoint) else {
            return (StatusCode::NOT_FOUND, "no such endpoint").into_response();
        };
        (line.endpoint, line.blocks) = (Some(Arc::clone(&told.endpoint)), Some(told.block_keys.len()));
        self.index().expect(now, EndpointId(place as u32), &told.block_keys);
        StatusCode::NO_CONTENT.into_response()
    }

    /// Asks the index.
    fn scores(&self, keys: &[u64], trail: &Trail<ManagerFact>) -> Scores {
        let mut matched = Vec::new();
        let mut index = self.index();
        let started = self.clock.now();
        let found = index.walk(started, keys);
        let walked = self.clock.now();
        index.score(&mut matched);
        drop(index);
        let at = self.clock.now();
        trail.note(at, || {
            let found = Found::of(keys.len(), found, &matched);
            ManagerFact::Scored(Box::new(KvScored { started, walked, found }))
        });
        let held = self.backends.iter().zip(&matched).filter(|(_, m)| m.blocks > 0);
        let held = held.map(|(b, m)| (Arc::clone(&b.config.name), Held { blocks: m.blocks, score: m.score }));
        Scores { blocks_found: found, endpoints: held.collect() }
    }
}
