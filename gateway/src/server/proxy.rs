//! One request from its head to the last byte of its response: read, decide, send, pass on.
//!
//! Bytes are passed on as they come and never encoded again. Whatever way a request ends, it ends in [`Exchange::end`] once.

mod arrival;
mod attempt;
mod hedge;
mod judging;
mod relay;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use http::header::{CONTENT_ENCODING, HeaderMap, HeaderValue};
use hyper::body::Incoming;
use shared::ids::RequestId;
use shared::metrics::Place;
use shared::time::{Dur, Time};
use shared::trace::{Reason, Started, Tracer, Trail};
use tokio::time::Instant;

use crate::core::gateway::Input;
use crate::core::pool::EndpointId;
use crate::core::pools::PoolId;
use crate::core::request::{Rejection, RequestKey};
use crate::server::access;
use crate::server::membership::Target;
use crate::server::metrics::Ending;
use crate::server::observe::{Learnt, Observer};
use crate::server::pool::Pool;
use crate::server::reply::{QUEUE_DURATION, REQUEST_ID, Refusal, SERVED_BY, TRACERESPONSE, end_to_end};
use crate::server::request::Route;
use crate::server::runtime::Shared;
use crate::server::tail::Tail;
use crate::server::trust;
use crate::spans::{Failure, GatewayFact, bounded_name};
use hedge::Second;
use judging::Candidate;
use relay::Relay;

/// Answers one request.
pub(crate) async fn handle(shared: Arc<Shared>, route: Route, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let mut exchange = Exchange::begin(shared, route, &parts);
    let mut model = Arc::from("");
    let answer = match exchange.read(&parts, body, &mut model).await {
        Ok((mut info, bytes)) => {
            let expected = exchange.look_up(&mut info).await;
            exchange.forward(&parts, bytes, info, &expected).await
        }
        Err(refusal) => {
            exchange.decide(&parts, None);
            Err(refusal)
        }
    };
    match answer {
        Ok(upstream) => exchange.respond(upstream),
        Err(refusal) => exchange.refuse(refusal, &model),
    }
}

/// A request being served. Dropped before its end, it counts as given up by its caller, or by a gateway whose drain is over.
struct Exchange {
    shared: Arc<Shared>,
    /// The pool that it goes to, as soon as its model is known.
    pool: PoolId,
    route: Route,
    received: Time,
    key: RequestKey,
    id: RequestId,
    /// The id as it came, or a new one: what engine and caller see.
    id_header: HeaderValue,
    /// The tracer that the request began with.
    tracer: Arc<Tracer>,
    /// The place in the trace; `None` if telemetry is off.
    started: Option<Started>,
    trail: Trail<GatewayFact>,
    /// The endpoint that has the request, as the core knows.
    at: Option<EndpointId>,
    /// The endpoint that got the request last.
    target: Option<Arc<Target>>,
    /// Whether it waits in the core.
    waits: bool,
    /// Whether it waited there.
    has_waited: bool,
    /// How long it waited there, where requests may wait.
    queued: Option<Dur>,
    /// The attempt that is under way.
    attempt: Option<u32>,
    /// Another one beside it.
    second: Option<Box<Second>>,
    /// The model that it is sent to, once it is known.
    model: Option<Arc<str>>,
    /// The status sent to the caller.
    status: Option<u16>,
    /// How long the first streamed token took.
    first_token: Option<Dur>,
    learnt: Learnt,
    bytes: u64,
    /// What its end is judged by, if it is recorded only for that.
    candidate: Option<Box<Candidate>>,
    over: bool,
}

impl Exchange {
    /// A request whose head was read.
    fn begin(shared: Arc<Shared>, route: Route, parts: &http::request::Parts) -> Exchange {
        let received = shared.clock.now();
        let tracer = shared.tracer.load();
        let (started, trail) = trust::start(shared.trust, &tracer, &parts.headers, received);
        shared.metrics.begun();
        let key = shared.next_key();
        let given =
            parts.headers.get(&REQUEST_ID).and_then(|v| Some((RequestId::sanitise(v.to_str().ok()?), v.clone())));
        let (id, id_header) = given.unwrap_or_else(|| {
            let id = shared.new_request_id(key);
            let header = HeaderValue::from_str(id.as_str()).expect("hexadecimal digits are a header value");
            (id, header)
        });
        let mut exchange = Exchange {
            shared,
            pool: PoolId::default(),
            route,
            received,
            key: RequestKey(key),
            id,
            id_header,
            tracer,
            started,
            trail,
            at: None,
            target: None,
            waits: false,
            has_waited: false,
            queued: None,
            attempt: None,
            second: None,
            model: None,
            status: None,
            first_token: None,
            learnt: Learnt::default(),
            bytes: 0,
            candidate: None,
            over: false,
        };
        if exchange.trail.is_on() {
            exchange.note_received(parts);
        }
        exchange
    }

    fn pool(&self) -> &Pool {
        &self.shared.pools[self.pool.index()]
    }

    /// When the request has to be over.
    fn deadline(&self) -> Instant {
        self.shared.clock.instant(self.received + self.shared.config.timeouts.total.get()).into()
    }

    /// Passes an engine's response on.
    fn respond(mut self, upstream: http::Response<Incoming>) -> Response {
        let (parts, body) = upstream.into_parts();
        let status = parts.status.as_u16();
        self.status = Some(status);
        let now = self.shared.clock.now();
        self.trail.note(now, || GatewayFact::ResponseHead { status });
        if let Some(endpoint) = self.at {
            self.pool().tell(now, Input::ResponseStarted { key: self.key, endpoint, status });
        }
        let mut headers = end_to_end(&parts.headers);
        self.hear(&mut headers);
        self.decorate(&mut headers);
        let facts = self.trail.is_recording() || self.pool().reads_usage;
        let observer = Observer::of(&headers, facts);
        // Where nobody reads what passes, its end says how many tokens there were.
        let counts = (200..300).contains(&status) && self.route != Route::Other;
        let tail = (counts && !facts && !headers.contains_key(CONTENT_ENCODING)).then(Tail::new);
        let deadline = self.deadline();
        let mut response = Response::new(Body::empty());
        *response.status_mut() = parts.status;
        *response.headers_mut() = headers;
        *response.body_mut() = Body::new(Relay::new(body, self, observer, tail, deadline));
        response
    }

    /// Tells the core that the engine's prefill is over.
    fn first_chunk(&self) {
        if let Some(endpoint) = self.at {
            self.pool().tell(self.shared.clock.now(), Input::FirstChunk { key: self.key, endpoint });
        }
    }

    /// Answers with an error of the gateway's own.
    fn refuse(mut self, refusal: Refusal, model: &Arc<str>) -> Response {
        let mut response = refusal.response(&bounded_name(model));
        self.decorate(response.headers_mut());
        self.status = Some(refusal.status());
        self.end(refusal.failure());
        response
    }

    /// Adds what every response carries.
    fn decorate(&self, headers: &mut HeaderMap) {
        headers.insert(REQUEST_ID, self.id_header.clone());
        // Nobody can look up a trace that is not kept: its name is not worth a header of every answer.
        if let Some(started) = &self.started
            && started.context.sampled
            && self.tracer.propagates()
        {
            headers.insert(TRACERESPONSE, started.context.traceparent());
        }
        if let Some(queued) = self.queued {
            headers.insert(QUEUE_DURATION, HeaderValue::from(queued.as_nanos() / 1_000_000));
        }
        // A request that no endpoint has was not answered by one.
        let Some(target) = self.target.as_ref().filter(|_| self.at.is_some() || self.status.is_some()) else { return };
        self.pool().routing.set_session_token(headers, &target.labels);
        if let Some(name) = &target.name {
            headers.insert(SERVED_BY, name.clone());
        }
    }

    /// Ends the request, once.
    fn end(&mut self, failure: Option<Failure>) {
        if std::mem::replace(&mut self.over, true) {
            return;
        }
        self.attempt_ended(failure);
        self.second_ended(failure);
        let now = self.shared.clock.now();
        if std::mem::take(&mut self.waits) {
            self.pool().cancel(now, self.key);
            self.shared.metrics.dropped(Rejection::Cancelled);
        }
        self.tell_usage(now);
        if let Some(endpoint) = self.at.take() {
            self.pool().tell(now, self.ending(endpoint, failure));
        }
        let kept = self.judge(now, failure);
        self.note_end(now, failure, kept);
        std::mem::take(&mut self.trail).judged(now, kept.is_some());
        if kept.is_some() {
            self.spread();
        }
        self.count(now, failure);
    }

    /// Counts the request, and writes its line of the access log where there is one.
    fn count(&self, now: Time, failure: Option<Failure>) {
        let ending = Ending {
            route: self.route,
            model: self.model.as_deref().unwrap_or_default(),
            status: self.status,
            failure,
            took: now.since(self.received),
            first_token: self.first_token,
            usage: self.learnt.usage,
            found: Place::of(self.started.as_ref()).map(|place| (place, now)),
        };
        self.shared.metrics.ended(&ending);
        if self.shared.config.access_log {
            let endpoint = self.target.as_ref().map(|t| &*t.backend.config.name);
            access::log(&ending, &self.id, self.started.as_ref(), endpoint);
        }
    }

    /// What the end says to the core: one that is too late after a part of the response says nothing of the endpoint.
    fn ending(&self, endpoint: EndpointId, failure: Option<Failure>) -> Input {
        let key = self.key;
        match failure {
            Some(failure @ Failure::Reset) => Input::GivenUp { key, endpoint, failure },
            Some(failure @ Failure::Timeout) if self.bytes == 0 => Input::GivenUp { key, endpoint, failure },
            Some(
                Failure::Timeout
                | Failure::Connect
                | Failure::Status(_)
                | Failure::Outrun
                | Failure::Cancelled
                | Failure::Abandoned,
            )
            | None => Input::Finished { key, endpoint },
        }
    }

    fn tell_usage(&self, now: Time) {
        if self.pool().reads_usage
            && let Some(usage) = &self.learnt.usage
        {
            let (prompt_tokens, output_tokens) = (usage.prompt_tokens, usage.completion_tokens);
            self.pool().tell(now, Input::Used { key: self.key, prompt_tokens, output_tokens });
        }
    }

    fn note_end(&mut self, now: Time, failure: Option<Failure>, kept: Option<Reason>) {
        if !self.trail.is_on() {
            return;
        }
        if let Some(reason) = kept {
            self.trail.note(now, || GatewayFact::Kept(reason));
        }
        let (chunks, bytes, complete) = (self.learnt.chunks, self.bytes, failure.is_none());
        self.trail.annotate(now, || GatewayFact::Streamed { chunks, bytes, complete });
        if let Some(usage) = self.learnt.usage {
            let (input, output) = (usage.prompt_tokens, usage.completion_tokens);
            self.trail.annotate(now, || GatewayFact::Usage { input, output });
        }
        if let Some(reason) = self.learnt.finish_reason {
            self.trail.annotate(now, || GatewayFact::FinishReason(reason));
        }
        if let Some(model) = self.learnt.model.take() {
            self.trail.annotate(now, || GatewayFact::ResponseModel(bounded_name(&model.into())));
        }
        let status = self.status;
        self.trail.note(now, || GatewayFact::Ended { status, failure });
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        if self.shared.is_cutting_off() {
            self.end(Some(Failure::Abandoned));
        } else {
            self.shared.metrics.disconnected.fetch_add(1, Ordering::Relaxed);
            self.trail.annotate(self.shared.clock.now(), || GatewayFact::ClientDisconnected);
            self.end(Some(Failure::Cancelled));
        }
    }
}
