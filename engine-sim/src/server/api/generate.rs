//! The generation endpoints: a request is read, checked, handed to the engine and answered.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::Request as HttpRequest;
use axum::http::header::{CONTENT_TYPE, TE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use shared::ids::RequestId;
use shared::time::Time;
use shared::trace::{Started, Trail};

use super::ApiError;
use crate::core::engine::{NewRequest, PreparedPrompt, RequestKey, prepare_prompt};
use crate::core::facts::{DecodingFact, EngineFact, Operation};
use crate::core::kv_events::EventSource;
use crate::core::kv_transfer::KvAsk;
use crate::server::App;
use crate::server::answer::Answer;
use crate::server::choice::{Choice, ChoiceText};
use crate::server::condition::{Doomed, guard};
use crate::server::kv;
use crate::server::lora::Adapter;
use crate::server::schema::{read as read_value, with_body};
use crate::server::shape::{Asked, PromptTokens, Shape};
use crate::server::strike::strike;
use crate::server::validate::{Part, Plan, accept, model_name};

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

/// Answers a generation request.
pub(super) async fn generate(app: Arc<App>, api: Api, request: HttpRequest) -> Response {
    let received = app.clock.now();
    let (parts, body) = request.into_parts();
    Entry::new(&app, api, &parts.headers, received).answer(body).await
}

/// `/invocations` of SageMaker: a chat if there are messages, else a completion if there is a prompt.
pub(super) async fn invocations(app: Arc<App>, request: HttpRequest) -> Response {
    let received = app.clock.now();
    let (parts, body) = request.into_parts();
    let bytes = match read_json(&app, &parts.headers, body).await {
        Ok(bytes) => bytes,
        Err(error) => return error.into_response(),
    };
    let api = match read_value(&bytes) {
        Ok(body) if body.get("messages").is_some() => Api::Chat,
        Ok(body) if body.get("prompt").is_some() => Api::Completions,
        Ok(_) => {
            let text = "Cannot find suitable handler for request. Expected one of: ['ChatCompletionRequest', 'CompletionRequest']";
            return ApiError::bad(text).into_response();
        }
        Err(error) => return error.into_response(),
    };
    Entry::new(&app, api, &parts.headers, received).answer(Body::from(bytes)).await
}

/// A request whose first choice the engine has.
struct Admitted {
    answer: Answer,
    plan: Plan,
    /// Further choices, and the first prompt for them.
    rest: Vec<Part>,
    prepared: Option<PreparedPrompt>,
    body_read: Time,
    /// Tells when its connection is to break.
    doomed: Option<Doomed>,
}

/// A request on its way into the engine.
struct Entry<'a> {
    app: &'a Arc<App>,
    api: Api,
    headers: &'a HeaderMap,
    received: Time,
    id: RequestId,
    /// The place in the trace; `None` if telemetry is off.
    started: Option<Started>,
    /// The record of the first choice; further ones have their own, under the same caller.
    trail: Trail<EngineFact>,
}

impl<'a> Entry<'a> {
    fn new(app: &'a Arc<App>, api: Api, headers: &'a HeaderMap, received: Time) -> Entry<'a> {
        let id = request_id(app, api, headers);
        let (started, trail) = app.tracer.load().start::<EngineFact>(headers, received);
        Entry { app, api, headers, received, id, started, trail }
    }

    /// Notes which model and request it is; only the body says the model, and where it cannot be read it is the served one.
    fn note_received(&self, trail: &Trail<EngineFact>, model: Option<&Adapter>, id: impl FnOnce() -> RequestId) {
        trail.annotate(self.received, || EngineFact::Received {
            model: model_name(self.app, model),
            request: id(),
            operation: self.api.operation(),
        });
    }

    async fn answer(self, body: Body) -> Response {
        let response = match self.admit(body).await {
            Ok(mut admitted) => {
                let doomed = admitted.doomed.take();
                guard(self.respond(admitted), doomed).await
            }
            Err(error) => self.refuse(error).into_response(),
        };
        if self.app.frontend.access_log {
            self.log(response.status());
        }
        response
    }

    /// The line of the access log, when the answer begins, as uvicorn writes it: ids, names and numbers, never content.
    fn log(&self, status: StatusCode) {
        let context = self.started.as_ref().map(|s| &s.context);
        tracing::info!(
            target: "access",
            trace_id = context.map(|c| tracing::field::display(c.trace_id)),
            span_id = context.map(|c| tracing::field::display(c.span_id)),
            sampled = context.map(|c| c.sampled),
            request_id = self.id.as_str(),
            status = u64::from(status.as_u16()),
            time_to_head_ms = self.app.clock.now().since(self.received).as_millis_f64(),
            "request"
        );
    }

    /// Waits for the engine's word on the first choice, hands over the others, and answers.
    async fn respond(&self, admitted: Admitted) -> Response {
        let Admitted { mut answer, plan, rest, prepared, body_read, .. } = admitted;
        let taken = answer.taken().await;
        if let (Ok(()), Some(prepared)) = (taken, prepared) {
            self.add_siblings(&plan, rest, prepared, body_read, &mut answer);
        }
        answer.respond(taken).await
    }

    fn refuse(&self, error: ApiError) -> ApiError {
        self.note_received(&self.trail, None, || self.id.clone());
        let now = self.app.clock.now();
        self.trail
            .note(now, || EngineFact::Failed { error_type: error.error_type(), http_status: error.status.as_u16() });
        self.trail.clone().finish(now);
        error
    }

    /// Reads and checks the request and hands its first choice to the engine.
    async fn admit(&self, body: Body) -> Result<Admitted, ApiError> {
        let app = self.app;
        let body = read_json(app, self.headers, body).await?;
        let body_read = app.clock.now();
        let (mut plan, first, rest) = with_body(self.api, &body, |body| accept(app, self.api, self.headers, body))?;
        drop(body);
        let key = app.next_key();
        let doomed = strike(app, self.headers, key, &self.trail, app.clock.now())?;
        self.note_received(&self.trail, plan.lora.as_ref(), || self.id.clone());
        let prepared = self.prepare(&plan, 0);
        let further = (!rest.is_empty()).then(|| prepared.clone());
        let trail = self.trail.clone();
        let kv = plan.kv.for_engine(self.id.as_str(), app.random());
        let choice = self.add(&plan, first, (key, kv), prepared, trail, body_read);
        let asked = Asked {
            api: self.api,
            streaming: plan.streaming,
            include_usage: plan.include_usage,
            continuous_usage: plan.continuous_usage,
            n: plan.n,
            prompt_tokens: PromptTokens {
                first: plan.prompts.first.len() as u32,
                rest: plan.prompts.rest.iter().map(|p| p.len() as u32).collect(),
            },
            details: plan.details.take(),
            model: model_name(app, plan.lora.as_ref()),
        };
        let shape = Shape::new(app, &self.id, asked);
        let answer = Answer::new(Arc::clone(app), body_read, shape, choice).with_trailers(takes_trailers(self.headers));
        Ok(Admitted { answer, plan, rest, prepared: further, body_read, doomed })
    }

    /// Prepares a prompt, with what KV events tell of it where they are published.
    fn prepare(&self, plan: &Plan, prompt: usize) -> PreparedPrompt {
        let (config, tokens) = (&self.app.engine_config, plan.prompts.get(prompt));
        let mut prepared = prepare_prompt(&config.cache, tokens, &plan.extra);
        let events = &config.kv_events_config;
        if events.publishes() {
            let mut source = EventSource::new(&config.cache, tokens, &plan.extra, !events.use_int_block_hashes);
            source.lora_id = plan.lora.as_ref().map(|a| a.number);
            source.session = self.headers.get("x-session-id").and_then(|v| v.to_str().ok()).map(Arc::from);
            prepared.source = Some(Box::new(source));
        }
        prepared
    }

    /// Hands over the further choices. Each is a request of its own with a record of its own, as in vLLM.
    fn add_siblings(
        &self,
        plan: &Plan,
        rest: Vec<Part>,
        mut prepared: PreparedPrompt,
        body_read: Time,
        answer: &mut Answer,
    ) {
        let (mut prompt, mut of_prompt) = (0, 0);
        for part in rest {
            of_prompt += 1;
            if part.prompt != prompt {
                (prompt, of_prompt) = (part.prompt, 0);
                prepared = self.prepare(plan, prompt);
            }
            let (_, trail) = self.app.tracer.load().start::<EngineFact>(self.headers, self.received);
            self.note_received(&trail, plan.lora.as_ref(), || {
                let id = &self.id;
                let of_prompt = if plan.n > 1 { format!("{of_prompt}_") } else { String::new() };
                let prompt = if plan.prompts.rest.is_empty() { String::new() } else { format!("-{prompt}") };
                RequestId::sanitise(&format!("{of_prompt}{id}{prompt}"))
            });
            // The blocks of a prompt are read once: the first choice has them.
            let named = (self.app.next_key(), None);
            answer.push(self.add(plan, part, named, prepared.clone(), trail, body_read));
        }
    }

    fn add(
        &self,
        plan: &Plan,
        part: Part,
        (key, kv): (RequestKey, Option<KvAsk>),
        prompt: PreparedPrompt,
        trail: Trail<EngineFact>,
        body_read: Time,
    ) -> Choice {
        let app = self.app;
        if trail.is_recording() {
            let (model, prefills) = (model_name(app, plan.lora.as_ref()), matches!(plan.kv, kv::Asked::Keep));
            if let Some(generation) = app.tracer.load().generation(&model, prefills) {
                trail.annotate(body_read, || EngineFact::Langfuse(generation));
            }
        }
        trail.annotate(body_read, || plan.fact());
        if trail.detail() >= 3 {
            trail.annotate(body_read, || {
                EngineFact::Decoding(DecodingFact { stop_string_at: part.stops.found_at(), ..plan.decoding })
            });
        }
        if let Some(adapter) = &plan.lora {
            trail.annotate(body_read, || EngineFact::Adapter(Arc::clone(&adapter.name)));
        }
        let arrived = app.clock.now();
        let prompt_tokens = prompt.tokens;
        trail.note(arrived, || EngineFact::InputsProcessed { started: body_read, prompt_tokens, truncated: false });
        let text = ChoiceText::new(app.engine_config.tokenizer, part.content, part.stops);
        let request = NewRequest {
            key,
            prompt,
            params: part.params,
            priority: plan.priority,
            arrival: body_read,
            content: part.content,
            lora: plan.lora.as_ref().map(|a| a.number),
            kv,
            trail: trail.clone(),
        };
        let output = app.engine.add(arrived, Box::new(request));
        Choice::new(key, trail, part.prompt, text, output)
    }
}

/// Whether the caller reads trailers (RFC 9110, 10.1.4).
fn takes_trailers(headers: &HeaderMap) -> bool {
    let values = headers.get_all(TE).iter().filter_map(|v| v.to_str().ok());
    values.flat_map(|v| v.split(',')).any(|coding| coding.trim().eq_ignore_ascii_case("trailers"))
}

/// vLLM's external id: the caller's `X-Request-Id` or a fresh one, behind the prefix of the endpoint.
fn request_id(app: &App, api: Api, headers: &HeaderMap) -> RequestId {
    let given = headers.get("x-request-id").and_then(|v| v.to_str().ok()).map(RequestId::sanitise);
    let base = given.unwrap_or_else(|| app.fresh_id());
    RequestId::sanitise(&format!("{}-{base}", if api == Api::Chat { "chatcmpl" } else { "cmpl" }))
}

/// The body of a request that says it is JSON.
pub(super) async fn read_json(app: &App, headers: &HeaderMap, body: Body) -> Result<Bytes, ApiError> {
    let kind = headers.get(CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default();
    if !kind.eq_ignore_ascii_case("application/json") {
        let text = "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed";
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
