//! vLLM's OpenAI-compatible HTTP surface over an emulated engine.
//!
//! Moves data and makes no decisions: requests are validated as vLLM does (`vllm/entrypoints/openai`), turned into engine
//! inputs, and what the engine produces is written as it comes. Output text is filler; prompts are never stored.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request as HttpRequest, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use shared::ids::RequestId;
use shared::openai::{ErrorBody, Request};
use shared::time::Time;
use shared::tokens::TokenId;
use shared::trace::Trail;

use super::App;
use super::answer::{Answer, Shape};
use super::validate::{Accepted, accept};
use crate::core::engine::{NewRequest, prepare_prompt};
use crate::core::facts::{EngineFact, Operation};
use crate::core::kv_events::EventSource;

/// Which of the two generation endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Api {
    Completions,
    Chat,
}

impl Api {
    /// The operation's name in GenAI conventions.
    pub(super) const fn operation(self) -> Operation {
        match self {
            Api::Completions => Operation::TextCompletion,
            Api::Chat => Operation::Chat,
        }
    }
}

/// An error as vLLM answers it.
#[derive(Debug)]
pub(super) struct ApiError {
    pub(super) status: StatusCode,
    pub(super) body: ErrorBody,
}

impl ApiError {
    pub(super) fn new(status: StatusCode, kind: &str, message: impl Into<String>, param: Option<&str>) -> ApiError {
        ApiError { status, body: ErrorBody::new(status.as_u16(), kind, message, param) }
    }

    /// Value of `error.type`: the status, as HTTP conventions have it.
    pub(super) fn error_type(&self) -> &'static str {
        match self.status {
            StatusCode::BAD_REQUEST => "400",
            StatusCode::NOT_FOUND => "404",
            StatusCode::PAYLOAD_TOO_LARGE => "413",
            StatusCode::SERVICE_UNAVAILABLE => "503",
            _ => "500",
        }
    }

    /// A parameter out of range: vLLM appends which one and what was found.
    pub(super) fn parameter(message: &str, param: &str, found: impl std::fmt::Display) -> ApiError {
        let text = format!("{message} (parameter={param}, value={found})");
        ApiError::new(StatusCode::BAD_REQUEST, "BadRequestError", text, Some(param))
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.status, [(CONTENT_TYPE, "application/json")], self.body.to_json()).into_response()
    }
}

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
        .with_state(app)
}

fn json(body: String) -> Response {
    ([(CONTENT_TYPE, "application/json")], body).into_response()
}

/// 200, or 503 once the engine is dead.
async fn health(State(app): State<Arc<App>>) -> StatusCode {
    if app.engine.alive() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

/// Publishers of KV events by data-parallel rank; an engine here is its only rank.
async fn kv_event_sources(State(app): State<Arc<App>>) -> Response {
    let sources = app.kv_events.iter().map(|p| ("0".to_owned(), p.source()));
    json(serde_json::Value::from_iter(sources).to_string())
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    let text = app.engine.inspect(|engine| super::metrics::render(engine, &app.model));
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}

async fn models(State(app): State<Arc<App>>) -> Response {
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

async fn generate(app: Arc<App>, api: Api, request: HttpRequest) -> Response {
    let received = app.clock.now();
    let (parts, body) = request.into_parts();
    let (_, trail) = app.tracer.load().start::<EngineFact>(&parts.headers, received);
    let id = request_id(&app, api, &parts.headers);
    trail.annotate(received, || EngineFact::Received {
        model: Arc::clone(&app.model),
        request: id.clone(),
        operation: api.operation(),
    });
    match admit(&app, api, &id, &parts.headers, body, &trail).await {
        Ok(answer) => answer.respond().await,
        Err(error) => {
            let now = app.clock.now();
            trail.note(now, || EngineFact::Failed {
                error_type: error.error_type(),
                http_status: error.status.as_u16(),
            });
            trail.finish(now);
            error.into_response()
        }
    }
}

/// vLLM's external id: the caller's `X-Request-Id` or a fresh one, behind the prefix of the endpoint.
fn request_id(app: &App, api: Api, headers: &HeaderMap) -> RequestId {
    let given = headers.get("x-request-id").and_then(|v| v.to_str().ok()).map(RequestId::sanitise);
    let base = given.unwrap_or_else(|| app.fresh_id());
    RequestId::sanitise(&format!("{}-{base}", if api == Api::Chat { "chatcmpl" } else { "cmpl" }))
}

async fn admit(
    app: &Arc<App>,
    api: Api,
    id: &RequestId,
    headers: &HeaderMap,
    body: Body,
    trail: &Trail<EngineFact>,
) -> Result<Answer, ApiError> {
    let body = read(app, headers, body).await?;
    let body_read = app.clock.now();
    let mut tokens = Vec::new();
    let accepted = parse(app, api, headers, &body, &mut tokens)?;
    drop(body);
    let key = app.next_key();
    trail.annotate(body_read, || accepted.fact());
    let mut new = engine_request(app, key, &accepted, &tokens, trail, body_read);
    keep_source(app, headers, &accepted, &tokens, &mut new);
    let arrived = app.clock.now();
    trail.note(arrived, || EngineFact::InputsProcessed {
        started: body_read,
        prompt_tokens: accepted.prompt_tokens,
        truncated: false,
    });
    let shape = Shape::new(app, api, id, accepted);
    let output = app.engine.add(arrived, new);
    Ok(Answer::new(Arc::clone(app), key, trail.clone(), body_read, shape, output))
}

/// Keeps what KV events tell of the request, where they are published.
fn keep_source(app: &App, headers: &HeaderMap, accepted: &Accepted, tokens: &[TokenId], new: &mut NewRequest) {
    let events = &app.engine_config.kv_events_config;
    if events.publishes() {
        let (cache, raw) = (&app.engine_config.cache, !events.use_int_block_hashes);
        let mut source = EventSource::new(cache, tokens, &accepted.extra, raw);
        source.lora_id = new.lora;
        source.session = headers.get("x-session-id").and_then(|v| v.to_str().ok()).map(Arc::from);
        new.prompt.source = Some(Box::new(source));
    }
}

async fn read(app: &App, headers: &HeaderMap, body: Body) -> Result<Bytes, ApiError> {
    let json = headers.get(CONTENT_TYPE).is_some_and(|v| v.as_bytes().starts_with(b"application/json"));
    if !json {
        let text = "Unsupported Media Type: Only 'application/json' is allowed";
        return Err(ApiError::new(StatusCode::BAD_REQUEST, "Bad Request", text, None));
    }
    match Limited::new(body, app.max_body_bytes).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(_) => {
            let text = format!("The request body could not be read, or is larger than {} bytes.", app.max_body_bytes);
            Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "BadRequestError", text, None))
        }
    }
}

fn parse(
    app: &App,
    api: Api,
    headers: &HeaderMap,
    body: &[u8],
    tokens: &mut Vec<TokenId>,
) -> Result<Accepted, ApiError> {
    let request: Request<'_> = serde_json::from_slice(body).map_err(|error| {
        // serde's message can quote a value, and a value can be a prompt: say where it is wrong, not what stands there.
        let (class, line, column) = (error.classify(), error.line(), error.column());
        let text = format!("1 validation error:\n  {{'type': '{class:?}', 'loc': ('body', {line}, {column})}}");
        ApiError::new(StatusCode::BAD_REQUEST, "Bad Request", text, None)
    })?;
    accept(app, api, headers, &request, tokens)
}

fn engine_request(
    app: &App,
    key: crate::core::engine::RequestKey,
    accepted: &Accepted,
    tokens: &[TokenId],
    trail: &Trail<EngineFact>,
    arrival: Time,
) -> Box<NewRequest> {
    let prompt = prepare_prompt(&app.engine_config.cache, tokens, &accepted.extra);
    Box::new(NewRequest {
        key,
        prompt,
        params: accepted.params.clone(),
        priority: accepted.priority,
        arrival,
        content: accepted.content,
        lora: None,
        trail: trail.clone(),
    })
}
