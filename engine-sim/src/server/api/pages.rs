//! The pages beside the generation endpoints: health, version, load, metrics.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use http_body_util::{BodyExt, Limited};
use shared::trace::verdict;

use super::json;
use crate::core::faults::PageFault;
use crate::server::strike::refusal;
use crate::server::{App, VLLM_VERSION, metrics as page};

/// 200, or 503 once the engine is dead. One that hangs is not dead: vLLM's page does not ask its core either.
pub(super) async fn health(State(app): State<Arc<App>>) -> StatusCode {
    let dead = app.condition.borrow().down.is_some();
    if app.engine.alive() && !dead { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

/// Publishers of KV events by data-parallel rank; an engine here is its only rank.
pub(super) async fn kv_event_sources(State(app): State<Arc<App>>) -> Response {
    let sources = app.kv_events.iter().map(|p| ("0".to_owned(), p.source()));
    json(serde_json::Value::from_iter(sources).to_string())
}

pub(super) async fn version() -> Response {
    json(format!("{{\"version\":\"{VLLM_VERSION}\"}}"))
}

/// Requests under way, or 0 where nobody counts.
pub(super) async fn load(State(app): State<Arc<App>>) -> Response {
    json(format!("{{\"server_load\":{}}}", app.open.count()))
}

pub(super) async fn metrics(State(app): State<Arc<App>>) -> Response {
    let fault = app.condition.borrow().page;
    let render = || whole_page(&app);
    let text = match fault {
        None => render(),
        Some(PageFault::Stale(since)) => app.frozen.page(since, render),
        Some(PageFault::Status(status)) => return refusal(status).into_response(),
        Some(PageFault::Timeout) => {
            // Whoever asked gives up first, or is answered when it is over.
            let _ = app.condition.clone().wait_for(|c| c.page != Some(PageFault::Timeout)).await;
            render()
        }
    };
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}

/// Ids of traces that the edge keeps: what is held of them is exported.
pub(super) async fn keep(State(app): State<Arc<App>>, body: Body) -> StatusCode {
    let read = Limited::new(body, verdict::MAX_BYTES).collect().await;
    let Some(traces) = read.ok().and_then(|body| verdict::read(&body.to_bytes())) else {
        return StatusCode::BAD_REQUEST;
    };
    app.tracer.load().keep(traces);
    StatusCode::NO_CONTENT
}

/// The engine's part of the page and what is the server's.
fn whole_page(app: &App) -> String {
    let now = app.clock.anchor().unix_nanos(app.clock.now()) as f64 / 1e9;
    let names = |loras: &[u32]| app.adapters.names(loras);
    let mut page = app.engine.inspect(|engine| page::render(engine, &app.model, now, &names));
    if let Some(events) = &app.kv_events {
        page::kv_events(events.counts(), &mut page);
    }
    app.http_metrics.write(&mut page);
    app.process.write(app.clock.now(), &mut page);
    page.into_text()
}
