//! What surrounds every endpoint where it is switched on: the API key, and the request's id in its answer
//! (`vllm/entrypoints/serve/middleware`).

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header::AUTHORIZATION;
use axum::http::{HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::json;
use crate::server::App;

/// Paths that need a key begin so.
const GUARDED: [&str; 4] = ["/v1", "/v2", "/inference", "/cohere"];

/// Lets nobody in without a key.
pub(super) async fn check_key(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    if may_pass(&app, &request) {
        next.run(request).await
    } else {
        (StatusCode::UNAUTHORIZED, json(r#"{"error":"Unauthorized"}"#.to_owned())).into_response()
    }
}

fn may_pass(app: &App, request: &Request) -> bool {
    let guarded = GUARDED.iter().any(|prefix| request.uri().path().starts_with(prefix));
    let given = || request.headers().get(AUTHORIZATION).map_or(&[][..], HeaderValue::as_bytes);
    !guarded || request.method() == Method::OPTIONS || app.frontend.api_keys.allow(given())
}

/// Repeats the caller's request id, or gives the request one.
pub(super) async fn name_request(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let given = request.headers().get("x-request-id").cloned();
    let own = || HeaderValue::try_from(app.fresh_id().as_str()).expect("an id is hexadecimal");
    let id = given.unwrap_or_else(own);
    let mut response = next.run(request).await;
    response.headers_mut().append("x-request-id", id);
    response
}
