//! vLLM's OpenAI-compatible HTTP surface over an emulated engine.
//!
//! Moves data and makes no decisions: requests are validated as vLLM does (`vllm/entrypoints`), turned into engine inputs, and what
//! the engine produces is written as it comes. Output text is filler; prompts are never stored.

mod auth;
mod dev;
mod error;
mod generate;
mod models;
mod pages;
mod tokenize;

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

use shared::trace::verdict::KEEP_PATH;

use super::App;
use super::metrics::http::count;
use generate::{generate, invocations};

/// The routes of the server. Endpoints that are not switched on do not exist.
pub(super) fn router(app: Arc<App>) -> Router {
    let mut router = Router::new()
        .route("/v1/chat/completions", post(|State(app): State<Arc<App>>, r: HttpRequest| generate(app, Api::Chat, r)))
        .route(
            "/v1/completions",
            post(|State(app): State<Arc<App>>, r: HttpRequest| generate(app, Api::Completions, r)),
        )
        .route("/invocations", post(|State(app): State<Arc<App>>, r: HttpRequest| invocations(app, r)))
        .route("/v1/models", get(models::list))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/health", get(pages::health))
        .route("/ping", get(pages::health).post(pages::health))
        .route("/version", get(pages::version))
        .route("/load", get(pages::load))
        .route("/kv_event_sources", get(pages::kv_event_sources))
        .route("/metrics", get(pages::metrics));
    if app.tracer.load().holds() {
        router = router.route(KEEP_PATH, post(pages::keep));
    }
    if app.frontend.runtime_lora {
        router = router
            .route("/v1/load_lora_adapter", post(models::load_adapter))
            .route("/v1/unload_lora_adapter", post(models::unload_adapter));
    }
    if app.frontend.dev_mode {
        router = dev::routes(router);
    }
    router = router
        .fallback(|| async { detail(StatusCode::NOT_FOUND, "Not Found") })
        .method_not_allowed_fallback(|| async { detail(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed") });
    if !app.frontend.api_keys.is_empty() {
        router = router.layer(from_fn_with_state(Arc::clone(&app), auth::check_key));
    }
    if app.frontend.request_id_headers {
        router = router.layer(from_fn_with_state(Arc::clone(&app), auth::name_request));
    }
    router.layer(from_fn_with_state(Arc::clone(&app), count)).with_state(app)
}

fn json(body: String) -> Response {
    ([(CONTENT_TYPE, "application/json")], body).into_response()
}

/// What FastAPI says where vLLM has nothing to say.
fn detail(status: StatusCode, text: &str) -> Response {
    (status, json(serde_json::json!({"detail": text}).to_string())).into_response()
}
