//! One request from its head to the last byte of its answer. Whatever way it ends, it ends in [`Exchange::end`] once.

use std::sync::Arc;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderValue};
use http::request::Parts;
use http::uri::PathAndQuery;
use hyper::body::Incoming;
use shared::ids::RequestId;
use shared::time::Time;
use shared::trace::{Started, Tracer, Trail};
use tokio::time::Instant;

use super::answer::No;
use super::call::{self, failure_of};
use super::relay::Relay;
use super::runtime::Shared;
use crate::pd_proxy::core::{Asked, Dance, Done, Failure, Leg, Object, PrefillEnd, Step, Target};
use crate::pd_proxy::spans::{PdFact, call_span_id};
use crate::server::api::method_name;
use crate::server::reply::{self, PREEMPTIONS, REQUEST_ID, end_to_end};
use crate::server::request;
use crate::server::routing::PREFILLER;
use crate::spans::bounded_path;

/// A request being served. Dropped before its end, it counts as given up by its caller, or by a proxy whose drain is over.
pub(super) struct Exchange {
    shared: Arc<Shared>,
    /// The tracer that the request began with.
    tracer: Arc<Tracer>,
    /// The place in the trace; `None` if telemetry is off.
    started: Option<Started>,
    dance: Dance,
    received: Time,
    id: RequestId,
    id_header: HeaderValue,
    status: Option<u16>,
    /// How often the engine that prefilled a candidate preempted it, as it says.
    preemptions: Option<HeaderValue>,
}

/// An answer of an engine on its way to the caller.
enum Answer {
    /// Of the one that decodes.
    Decode(http::Response<Incoming>),
    /// Of the one that prefills, which is an error.
    Prefill(http::response::Parts, Bytes),
}

/// Answers a request for inference.
pub(super) async fn handle(shared: Arc<Shared>, route: &'static str, parts: &Parts, body: Body) -> Response {
    let mut exchange = Exchange::begin(shared, route, parts);
    let deadline = exchange.deadline();
    match tokio::time::timeout_at(deadline, exchange.answer(parts, body)).await {
        Ok(Ok(Answer::Decode(response))) => exchange.respond(response, deadline),
        Ok(Ok(Answer::Prefill(head, body))) => exchange.pass_on(&head, body),
        Ok(Err(no)) => exchange.refuse(no),
        Err(_) => exchange.too_late(),
    }
}

impl Exchange {
    /// A request whose head was read.
    fn begin(shared: Arc<Shared>, route: &'static str, parts: &Parts) -> Exchange {
        let received = shared.clock.now();
        let tracer = shared.tracer.load();
        let (started, trail): (_, Trail<PdFact>) = tracer.start(&parts.headers, received);
        let connector = shared.config.connector;
        trail.annotate(received, || PdFact::Received {
            method: method_name(&parts.method),
            path: bounded_path(parts.uri.path(), route),
            route,
            connector,
        });
        let given =
            parts.headers.get(&REQUEST_ID).and_then(|v| Some((RequestId::sanitise(v.to_str().ok()?), v.clone())));
        let (id, id_header) = given.unwrap_or_else(|| shared.new_request_id());
        let dance = Dance::arrived(received, &shared.config, trail);
        shared.metrics.begun();
        Exchange { shared, tracer, started, dance, received, id, id_header, status: None, preemptions: None }
    }

    /// When the request has to be over.
    fn deadline(&self) -> Instant {
        self.shared.clock.instant(self.received + self.shared.config.timeouts.total.get()).into()
    }

    pub(super) fn now(&self) -> Time {
        self.shared.clock.now()
    }

    pub(super) fn dance(&mut self) -> &mut Dance {
        &mut self.dance
    }

    /// Reads the request and does what the core says, until there is an answer to pass on.
    async fn answer(&mut self, parts: &Parts, body: Body) -> Result<Answer, No> {
        let limit = self.shared.config.limits.max_body_bytes;
        let body = request::body(body, &parts.headers, limit).await.map_err(No::Body)?;
        // A value that is no text names no engine, and is told from none.
        let prefiller = parts.headers.get(PREFILLER).map(|v| v.to_str().unwrap_or_default());
        let object = prefiller.and_then(|_| Object::read(body.clone()).ok());
        let asked = Asked {
            id: self.id.clone(),
            size_bytes: u32::try_from(body.len()).unwrap_or(u32::MAX),
            prefiller,
            readable: object.is_some(),
        };
        let mut headers = call::forwarded(&parts.headers);
        headers.insert(REQUEST_ID, self.id_header.clone());
        let mut step = self.dance.asked(self.now(), &asked, &self.shared.allowed);
        let mut prefilled = None;
        loop {
            step = match (step, &object) {
                (Step::Prefill { target, attempt }, Some(object)) => {
                    let answer = self.prefill(parts, &headers, object.for_prefill(), &target, attempt).await;
                    let end = judge(&answer);
                    prefilled = answer.ok();
                    self.dance.prefill_ended(self.now(), end)
                }
                (Step::BackOff(pause), _) => {
                    tokio::time::sleep(pause.to_std()).await;
                    self.dance.waited()
                }
                (Step::Decode { transferred: true }, Some(object)) => {
                    let params = prefilled.and_then(|(_, _, params)| params);
                    return self.decode(parts, headers, object.for_decode(params.as_deref())).await;
                }
                // Without a cache to read, the request goes on as it came.
                (Step::Decode { .. }, _) => return self.decode(parts, headers, body).await,
                (Step::PassOn, _) => {
                    let (head, body, _) = prefilled.expect("an answer was judged");
                    return Ok(Answer::Prefill(head, body));
                }
                (Step::Refuse(refusal), _) => return Err(No::Refused(refusal)),
                (Step::Prefill { .. }, None) => unreachable!("only a body that was read is sent to prefill"),
            };
        }
    }

    /// Asks an engine to prefill, and reads its whole answer.
    async fn prefill(
        &mut self,
        parts: &Parts,
        headers: &HeaderMap,
        body: Bytes,
        target: &Target,
        attempt: u32,
    ) -> Result<Prefilled, Failure> {
        let uri = call::prefill_uri(target, path_of(parts))?;
        let headers = self.traced(call::of_prefill(headers), Leg::Prefill, attempt);
        let request = call::request(parts.method.clone(), uri, headers, body);
        self.dance.call_started(self.now(), Leg::Prefill, attempt, &target.host, target.port);
        let limit = self.shared.config.timeouts.prefill.get().to_std();
        let answer = tokio::time::timeout(limit, self.prefill_call(request)).await.unwrap_or(Err(Failure::Timeout));
        self.dance.call_ended(self.now(), answer.as_ref().err().copied());
        answer
    }

    async fn prefill_call(
        &mut self,
        request: http::Request<http_body_util::Full<Bytes>>,
    ) -> Result<Prefilled, Failure> {
        let response = self.shared.client.request(request).await.map_err(|e| failure_of(&e))?;
        let (head, body) = response.into_parts();
        self.dance.call_head(self.now(), head.status.as_u16());
        self.preemptions = head.headers.get(&PREEMPTIONS).filter(|_| self.is_candidate()).cloned();
        let body = call::whole(body, self.shared.config.limits.max_prefill_answer_bytes).await?;
        if head.status != http::StatusCode::OK {
            return Ok((head, body, None));
        }
        let params = Object::read(body.clone()).map_err(|_| Failure::BadAnswer)?.transfer_params();
        Ok((head, body, params))
    }

    /// Asks the own engine, and waits for the head of its answer.
    async fn decode(&mut self, parts: &Parts, headers: HeaderMap, body: Bytes) -> Result<Answer, No> {
        let uri = self.shared.engine.uri(path_of(parts)).ok_or(No::Decode(Failure::Connect))?;
        let headers = self.traced(headers, Leg::Decode, 0);
        let request = call::request(parts.method.clone(), uri, headers, body);
        let config = &self.shared.engine.config;
        self.dance.call_started(self.shared.clock.now(), Leg::Decode, 0, &config.address, config.port);
        let limit = self.shared.config.timeouts.response_head.get().to_std();
        let response = match tokio::time::timeout(limit, self.shared.client.request(request)).await {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => return Err(No::Decode(failure_of(&error))),
            Err(_) => return Err(No::Decode(Failure::Timeout)),
        };
        self.dance.call_head(self.now(), response.status().as_u16());
        Ok(Answer::Decode(response))
    }

    /// Adds the place of a call in the trace.
    fn traced(&self, mut headers: HeaderMap, leg: Leg, attempt: u32) -> HeaderMap {
        if let Some(started) = &self.started {
            let span = call_span_id(started.context.span_id, leg, attempt);
            self.tracer.inject(&started.context.child(span), &mut headers);
            if started.is_candidate() {
                headers.insert(header::TE, HeaderValue::from_static("trailers"));
            }
        }
        headers
    }

    /// Whether the request may be kept for what becomes of it.
    fn is_candidate(&self) -> bool {
        self.started.as_ref().is_some_and(Started::is_candidate)
    }

    /// Passes the answer of the own engine on.
    fn respond(mut self, upstream: http::Response<Incoming>, deadline: Instant) -> Response {
        let (head, body) = upstream.into_parts();
        self.status = Some(head.status.as_u16());
        let mut response = answered(&head, Body::empty());
        if self.is_candidate() {
            // What engines say of preemptions goes on to whoever asked for it.
            let announced = head.headers.get(header::TRAILER).cloned();
            announced.map(|names| response.headers_mut().insert(header::TRAILER, names));
            self.preemptions.take().map(|count| response.headers_mut().insert(PREEMPTIONS, count));
        }
        *response.body_mut() = Body::new(Relay::new(body, self, deadline));
        response
    }

    /// Passes on what the engine that prefills answered, which was no 200.
    fn pass_on(mut self, head: &http::response::Parts, body: Bytes) -> Response {
        self.status = Some(head.status.as_u16());
        self.end(None);
        answered(head, Body::from(body))
    }

    /// Answers with an error of the proxy's own.
    fn refuse(mut self, no: No) -> Response {
        self.status = Some(no.status());
        self.end(no.failure());
        let mut response = no.response();
        response.headers_mut().insert(REQUEST_ID, self.id_header.clone());
        response
    }

    /// The total time is over before an answer began: during the body, the prefill, a pause or the decode.
    fn too_late(self) -> Response {
        match self.dance.leg() {
            None => self.refuse(No::Body(reply::Refusal::SlowBody)),
            Some(_) => self.refuse(No::Decode(Failure::Timeout)),
        }
    }

    /// Ends the request, once.
    pub(super) fn end(&mut self, failure: Option<Failure>) {
        let done = self.dance.ended(self.now(), self.status, failure);
        self.tell(done);
    }

    fn tell(&self, done: Option<Done>) {
        let Some(done) = done else { return };
        self.shared.metrics.done(&done);
        if self.shared.config.access_log {
            self.log(&done);
        }
        if let Some(hook) = &self.shared.on_done {
            hook(&done);
        }
    }

    /// The line of the access log: ids, names and numbers, never content.
    fn log(&self, done: &Done) {
        let context = self.started.as_ref().map(|s| &s.context);
        tracing::info!(
            target: "access",
            trace_id = context.map(|c| tracing::field::display(c.trace_id)),
            span_id = context.map(|c| tracing::field::display(c.span_id)),
            sampled = context.map(|c| c.sampled),
            request_id = self.id.as_str(),
            status = done.status.map(u64::from),
            failed = done.failure.is_some(),
            reason = done.reason.as_str(),
            prefill_attempts = u64::from(done.prefill_attempts),
            duration_ms = self.now().since(self.received).as_millis_f64(),
            "request"
        );
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if self.dance.is_over() {
            return;
        }
        if self.shared.is_cutting_off() {
            self.end(Some(Failure::Abandoned));
        } else {
            let now = self.now();
            let done = self.dance.disconnected(now, self.status);
            self.tell(done);
        }
    }
}

/// An answer to a prefill: head, body, and where the cache is.
type Prefilled = (http::response::Parts, Bytes, Option<Bytes>);

fn judge(answer: &Result<Prefilled, Failure>) -> PrefillEnd {
    match answer {
        Ok((head, _, params)) if head.status == http::StatusCode::OK => {
            PrefillEnd::Answered { params: params.is_some() }
        }
        Ok((head, ..)) => PrefillEnd::Status(head.status.as_u16()),
        Err(failure) => PrefillEnd::Failed(*failure),
    }
}

fn path_of(parts: &Parts) -> &PathAndQuery {
    static ROOT: std::sync::LazyLock<PathAndQuery> = std::sync::LazyLock::new(|| PathAndQuery::from_static("/"));
    parts.uri.path_and_query().unwrap_or(&ROOT)
}

/// The head of an engine's answer, over `body`.
pub(super) fn answered(head: &http::response::Parts, body: Body) -> Response {
    let mut response = Response::new(body);
    *response.status_mut() = head.status;
    *response.headers_mut() = end_to_end(&head.headers);
    response
}
