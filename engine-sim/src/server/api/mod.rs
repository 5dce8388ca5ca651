//! vLLM's OpenAI-compatible HTTP surface over an emulated engine.
//!
//! Moves data and makes no decisions: requests are validated as vLLM does (`vllm/entrypoints/openai`), turned into engine
//! inputs, and what the engine produces is written as it comes. Output text is filler; prompts are never stored.

mod error;
mod generate;
mod pages;

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request as HttpRequest, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};

pub(super) use error::ApiError;
pub(super) use generate::Api;

use super::App;
use super::metrics::http::count;
use generate::generate;
use pages::{health, kv_event_sources, metrics, models};

/// The routes of the server.
pub(super) fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(|State(app): State<Arc<App>>, r: HttpRequest| generate(app, Api::Chat, r)))
        .route(
            "/v1/completions",
            post(|State(app): State<Arc<App>>, r: HttpRequest| generate(app, Api::Completions, r)),
        )
        .route("/v1/models", get(models))
        .route("/health", get(health))
        .route("/ping", get(health).post(health))
        .route("/version", get(|| async { json(format!("{{\"version\":\"{}\"}}", super::VLLM_VERSION)) }))
        .route(
            "/load",
            get(|State(app): State<Arc<App>>| async move { json(format!("{{\"server_load\":{}}}", app.open())) }),
        )
        .route("/kv_event_sources", get(kv_event_sources))
        .route("/metrics", get(metrics))
        .fallback(|| async { ApiError::new(StatusCode::NOT_FOUND, "NotFoundError", "Not Found", None) })
        .layer(from_fn_with_state(Arc::clone(&app), count))
        .with_state(app)
}

fn json(body: String) -> Response {
    ([(CONTENT_TYPE, "application/json")], body).into_response()
}
