//! The pages beside the generation endpoints: health, version, load, metrics.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};

use super::json;
use crate::server::{App, VLLM_VERSION, metrics as page};

/// 200, or 503 once the engine is dead.
pub(super) async fn health(State(app): State<Arc<App>>) -> StatusCode {
    if app.engine.alive() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

pub(super) async fn version() -> Response {
    json(format!("{{\"version\":\"{VLLM_VERSION}\"}}"))
}

/// Requests under way, or 0 where nobody counts.
pub(super) async fn load(State(app): State<Arc<App>>) -> Response {
    json(format!("{{\"server_load\":{}}}", app.open.count()))
}

pub(super) async fn metrics(State(app): State<Arc<App>>) -> Response {
    let now = app.clock.anchor().unix_nanos(app.clock.now()) as f64 / 1e9;
    let names = |loras: &[u32]| app.adapters.names(loras);
    let text = app.engine.inspect(|engine| page::render(engine, &app.model, now, &names));
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}
