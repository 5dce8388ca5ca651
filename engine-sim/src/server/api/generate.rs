//! The two generation endpoints: a request is read, checked, handed to the engine and answered.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::Request as HttpRequest;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use shared::ids::RequestId;
use shared::openai::Request;
use shared::time::Time;
use shared::tokens::TokenId;
use shared::trace::Trail;

use super::ApiError;
use crate::core::engine::{NewRequest, RequestKey, prepare_prompt};
use crate::core::facts::{EngineFact, Operation};
use crate::core::kv_events::EventSource;
use crate::server::App;
use crate::server::answer::{Answer, Shape};
use crate::server::condition::{Doomed, guard};
use crate::server::strike::strike;
use crate::server::validate::{Accepted, accept};

/// Which of the two generation endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::server) enum Api {
    Completions,
    Chat,
}

impl Api {
    /// The operation's name in GenAI conventions.
    pub(in crate::server) const fn operation(self) -> Operation {
        match self {
            Api::Completions => Operation::TextCompletion,
            Api::Chat => Operation::Chat,
        }
    }
}

pub(super) async fn generate(app: Arc<App>, api: Api, request: HttpRequest) -> Response {
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
        Ok((answer, doomed)) => guard(answer.respond(), doomed).await,
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
) -> Result<(Answer, Option<Doomed>), ApiError> {
    let body = read(app, headers, body).await?;
    let body_read = app.clock.now();
    let mut tokens = Vec::new();
    let accepted = parse(app, api, headers, &body, &mut tokens)?;
    drop(body);
    let key = app.next_key();
    trail.annotate(body_read, || accepted.fact());
    if trail.detail() >= 3 {
        trail.annotate(body_read, || EngineFact::Decoding(accepted.decoding));
    }
    let mut new = engine_request(app, key, &accepted, &tokens, trail, body_read);
    keep_source(app, headers, &accepted, &tokens, &mut new);
    let arrived = app.clock.now();
    trail.note(arrived, || EngineFact::InputsProcessed {
        started: body_read,
        prompt_tokens: accepted.prompt_tokens,
        truncated: false,
    });
    let doomed = strike(app, headers, key, trail, arrived)?;
    let shape = Shape::new(app, api, id, accepted);
    let output = app.engine.add(arrived, new);
    Ok((Answer::new(Arc::clone(app), key, trail.clone(), body_read, shape, output), doomed))
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
    key: RequestKey,
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
