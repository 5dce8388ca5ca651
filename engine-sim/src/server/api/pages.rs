//! The pages beside the generation endpoints: health, models, metrics.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};

use super::json;
use crate::server::{App, metrics as page};

/// 200, or 503 once the engine is dead.
pub(super) async fn health(State(app): State<Arc<App>>) -> StatusCode {
    if app.engine.alive() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

/// Publishers of KV events by data-parallel rank; an engine here is its only rank.
pub(super) async fn kv_event_sources(State(app): State<Arc<App>>) -> Response {
    let sources = app.kv_events.iter().map(|p| ("0".to_owned(), p.source()));
    json(serde_json::Value::from_iter(sources).to_string())
}

pub(super) async fn metrics(State(app): State<Arc<App>>) -> Response {
    let mut page = app.engine.inspect(|engine| page::render(engine, &app.model));
    if let Some(events) = &app.kv_events {
        page::kv_events(events.counts(), &mut page);
    }
    app.http_metrics.write(&mut page);
    app.process.write(app.clock.now(), &mut page);
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], page.into_text()).into_response()
}

pub(super) async fn models(State(app): State<Arc<App>>) -> Response {
    let (id, created) = (&*app.model, app.started_unix);
    let permission = serde_json::json!({
        "id": format!("modelperm-{:016x}", app.salt), "object": "model_permission", "created": created,
        "allow_create_engine": false, "allow_sampling": true, "allow_logprobs": true, "allow_search_indices": false,
        "allow_view": true, "allow_fine_tuning": false, "organization": "*", "group": null, "is_blocking": false,
    });
    let card = serde_json::json!({
        "id": id, "object": "model", "created": created, "owned_by": "vllm", "root": id, "parent": null,
        "max_model_len": app.max_model_len, "permission": [permission],
    });
    json(serde_json::json!({"object": "list", "data": [card]}).to_string())
}
