//! Endpoints of a development server: pause, sleep, reset, abort (`vllm/entrypoints/serve/dev`, `rl/online`).

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use http_body_util::{BodyExt, Limited};
use serde_json::{Value, json};

use super::{ApiError, json as answer};
use crate::core::engine::{Control, PauseMode};
use crate::server::App;
use crate::server::schema::Errors;

/// Adds the routes.
pub(super) fn routes(router: Router<Arc<App>>) -> Router<Arc<App>> {
    router
        .route("/pause", post(pause))
        .route("/resume", post(resume))
        .route("/is_paused", get(is_paused))
        .route("/abort_requests", post(abort_requests))
        .route("/sleep", post(sleep))
        .route("/wake_up", post(wake_up))
        .route("/is_sleeping", get(is_sleeping))
        .route("/reset_prefix_cache", post(reset_prefix_cache))
        .route("/reset_mm_cache", post(nothing))
        .route("/reset_encoder_cache", post(nothing))
        .route("/server_info", get(server_info))
}

/// Parameters of a URL, in order.
type Params = Query<Vec<(String, String)>>;

async fn pause(State(app): State<Arc<App>>, Query(params): Params) -> Response {
    let orders = mode(&params).and_then(|mode| Ok((mode, flag(&params, "clear_cache", true)?)));
    match orders {
        Ok((mode, clear_cache)) => {
            ordered(&app, Control::Pause { mode, clear_cache }, |_| json!({"status": "paused"})).await
        }
        Err(error) => error.into_response(),
    }
}

async fn resume(State(app): State<Arc<App>>) -> Response {
    ordered(&app, Control::Resume, |_| json!({"status": "resumed"})).await
}

async fn is_paused(State(app): State<Arc<App>>) -> Response {
    let paused = app.engine.inspect(|e| e.is_paused());
    answer(json!({"is_paused": paused}).to_string())
}

async fn sleep(State(app): State<Arc<App>>, Query(params): Params) -> Response {
    let orders = level(&params).and_then(|level| Ok((level, mode(&params)?)));
    match orders {
        Ok((level, mode)) => {
            ordered(&app, Control::Sleep { level, mode }, |_| json!({"status": "sleeping", "level": level})).await
        }
        Err(error) => error.into_response(),
    }
}

async fn wake_up(State(app): State<Arc<App>>, Query(params): Params) -> Response {
    let tags: Vec<&str> = params.iter().filter(|(name, _)| name == "tags").map(|(_, tag)| &**tag).collect();
    let wakes = |tag| tags.is_empty() || tags.contains(&tag);
    let order = Control::WakeUp { weights: wakes("weights"), kv_cache: wakes("kv_cache") };
    let told = if tags.is_empty() { Value::Null } else { json!(tags) };
    ordered(&app, order, |awake| json!({"status": if awake { "awake" } else { "sleeping" }, "tags": told})).await
}

async fn is_sleeping(State(app): State<Arc<App>>) -> Response {
    let sleeping = app.engine.inspect(|e| e.is_paused() || e.asleep().any());
    answer(json!({"is_sleeping": sleeping}).to_string())
}

async fn reset_prefix_cache(State(app): State<Arc<App>>, Query(params): Params) -> Response {
    match flag(&params, "reset_running_requests", false) {
        Ok(running) => {
            ordered(&app, Control::ResetPrefixCache { running }, |success| json!({"success": success})).await
        }
        Err(error) => error.into_response(),
    }
}

/// There is no cache of that kind to reset.
async fn nothing() -> StatusCode {
    StatusCode::OK
}

async fn server_info(State(app): State<Arc<App>>, Query(params): Params) -> Response {
    let as_json = params.iter().any(|(name, value)| name == "config_format" && value == "json");
    let config = serde_json::to_value(&app.engine_config).unwrap_or_default();
    let config = if as_json { config } else { Value::String(config.to_string()) };
    answer(json!({"vllm_config": config, "vllm_env": {}, "system_env": {}}).to_string())
}

/// Ends requests by their ids as answers tell them; all of them if none are given.
async fn abort_requests(State(app): State<Arc<App>>, _: HeaderMap, body: Body) -> Response {
    let invalid = |text| ApiError::new(StatusCode::BAD_REQUEST, "Bad Request", text, None).into_response();
    let Ok(body) = Limited::new(body, app.max_body_bytes).collect().await else {
        return invalid("Invalid JSON format");
    };
    let request: Value = match serde_json::from_slice(&body.to_bytes()) {
        Ok(request) => request,
        Err(_) => return invalid("Invalid JSON format"),
    };
    if !request.is_object() {
        return invalid("Request body must be a JSON object");
    }
    let ids = request.get("request_ids").and_then(Value::as_array).filter(|ids| !ids.is_empty());
    let (order, aborted) = match ids {
        Some(ids) => (Control::Abort(app.open.keys(ids.iter().filter_map(Value::as_str))), ids.len()),
        None => (Control::AbortAll, app.engine.inspect(|e| e.open_requests())),
    };
    ordered(&app, order, |_| json!({"status": "aborted", "aborted": aborted})).await
}

/// Gives an order and tells its result.
async fn ordered(app: &App, order: Control, tell: impl FnOnce(bool) -> Value) -> Response {
    match app.engine.control(app.clock.now(), order).await {
        Ok(done) => answer(tell(done).to_string()),
        Err(_) => ApiError::dead().into_response(),
    }
}

fn value<'p>(params: &'p [(String, String)], name: &str) -> Option<&'p str> {
    params.iter().rev().find(|(n, _)| n == name).map(|(_, v)| &**v)
}

fn mode(params: &[(String, String)]) -> Result<PauseMode, ApiError> {
    match value(params, "mode") {
        None | Some("abort") => Ok(PauseMode::Abort),
        Some("wait") => Ok(PauseMode::Wait),
        Some("keep") => Ok(PauseMode::Keep),
        Some(other) => Err(wrong("literal_error", "mode", "Input should be abort, wait or keep", other)),
    }
}

fn level(params: &[(String, String)]) -> Result<u8, ApiError> {
    let Some(given) = value(params, "level") else { return Ok(1) };
    match given.parse::<u8>().ok().filter(|level| *level <= 2) {
        Some(level) => Ok(level),
        None => Err(wrong("less_than_equal", "level", "Input should be an integer from 0 to 2", given)),
    }
}

fn flag(params: &[(String, String)], name: &str, default: bool) -> Result<bool, ApiError> {
    match value(params, name).map(str::to_ascii_lowercase).as_deref() {
        None => Ok(default),
        Some("true" | "1" | "t" | "yes" | "y" | "on") => Ok(true),
        Some("false" | "0" | "f" | "no" | "n" | "off") => Ok(false),
        Some(other) => {
            let text = "Input should be a valid boolean, unable to interpret input";
            Err(wrong("bool_parsing", name, text, other))
        }
    }
}

fn wrong(kind: &str, name: &str, text: &str, found: &str) -> ApiError {
    let mut errors = Errors::default();
    errors.add(kind, &format!("query.{name}"), text, &Value::String(found.to_owned()));
    errors.finish().err().unwrap_or_else(|| ApiError::bad(text))
}
