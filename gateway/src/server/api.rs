//! The HTTP surface: which path is answered how.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, post};
use http::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use http::{Method, StatusCode};
use serde_json::json;
use shared::metrics::text::Format;

use crate::server::proxy;
use crate::server::reply::Refusal;
use crate::server::request::Route;
use crate::server::runtime::Shared;

/// All routes. A wrong method is answered by the engine, so that its answer is the engine's.
pub(crate) fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route(Route::Chat.template(), post(chat).fallback(other))
        .route(Route::Completions.template(), post(completions).fallback(other))
        .route("/v1/models", get(models).fallback(other))
        .route(Route::Other.template(), any(other))
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .fallback(nothing)
        .with_state(shared)
}

async fn chat(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    proxy::handle(shared, Route::Chat, request).await
}

async fn completions(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    proxy::handle(shared, Route::Completions, request).await
}

async fn other(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    proxy::handle(shared, Route::Other, request).await
}

/// The models of all endpoints, as each of them lists its own.
async fn models(State(shared): State<Arc<Shared>>, headers: HeaderMap) -> Response {
    if !shared.may_call(&headers) {
        return Refusal::Unauthorized.response("");
    }
    let mut all: Vec<serde_json::Value> = Vec::new();
    for card in shared.pools.iter().flat_map(|pool| pool.membership.cards()) {
        if !all.iter().any(|c| c.get("id") == card.get("id")) {
            all.push(card);
        }
    }
    axum::Json(json!({ "object": "list", "data": all })).into_response()
}

/// 200 if a request would find an endpoint.
async fn health(State(shared): State<Arc<Shared>>) -> StatusCode {
    if shared.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

/// All metrics, in the format that the reader asks for.
async fn metrics(State(shared): State<Arc<Shared>>, headers: HeaderMap) -> Response {
    let format = Format::asked(&headers);
    let text = format.write(&shared.families(), shared.clock.anchor());
    let mut response = Response::new(Body::from(text));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(format.content_type()));
    response
}

async fn nothing() -> Response {
    Refusal::NoRoute.response("")
}

/// The method as spans name it (`_OTHER` as in the HTTP semantic conventions).
pub(crate) fn method_name(method: &Method) -> &'static str {
    const KNOWN: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"];
    KNOWN.into_iter().find(|k| *k == method.as_str()).unwrap_or("_OTHER")
}
