//! One request from its head to the last byte of its response: read, decide, send, pass on.
//!
//! Bytes are passed on as they come and never encoded again. Whatever way a request ends, it ends in [`Exchange::end`] once.

use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderValue};
use http::uri::PathAndQuery;
use http_body_util::Full;
use hyper::body::{Body as _, Frame, Incoming, SizeHint};
use shared::ids::RequestId;
use shared::metrics::Place;
use shared::time::{Dur, Time};
use shared::trace::{Started, Tracer, Trail};
use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use crate::core::gateway::Input;
use crate::core::kv_index::KvPrompt;
use crate::core::pool::EndpointId;
use crate::core::request::{Deadlines, Output, Rejection, RequestInfo, RequestKey};
use crate::server::access;
use crate::server::api::method_name;
use crate::server::membership::Target;
use crate::server::metrics::Ending;
use crate::server::observe::{Learnt, Observer};
use crate::server::queue::Answer;
use crate::server::reply::{QUEUE_DURATION, REQUEST_ID, Refusal, SERVED_BY, TRACERESPONSE, end_to_end};
use crate::server::request::{self, Caller, MODEL_REWRITE, Parsed, Route};
use crate::server::routing::Routing;
use crate::server::runtime::Shared;
use crate::server::tail::Tail;
use crate::server::trust;
use crate::spans::{Failure, GatewayFact, bounded_name, bounded_path, lookup_span_id, proxy_span_id};

/// Answers one request.
pub(crate) async fn handle(shared: Arc<Shared>, route: Route, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let mut exchange = Exchange::begin(shared, route, &parts);
    let mut model = Arc::from("");
    let answer = match exchange.read(&parts.headers, body, &mut model).await {
        Ok((mut info, bytes)) => {
            let expected = exchange.look_up(&mut info).await;
            exchange.forward(&parts, bytes, info, &expected).await
        }
        Err(refusal) => Err(refusal),
    };
    match answer {
        Ok(upstream) => exchange.respond(upstream),
        Err(refusal) => exchange.refuse(refusal, &model),
    }
}

/// A request being served. Dropped before its end, it counts as given up by its caller, or by a gateway whose drain is over.
struct Exchange {
    shared: Arc<Shared>,
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
    /// How long it waited there, where requests may wait.
    queued: Option<Dur>,
    /// The attempt that is under way.
    attempt: Option<u32>,
    /// The model that it is sent to, once it is known.
    model: Option<Arc<str>>,
    /// The status sent to the caller.
    status: Option<u16>,
    /// How long the first streamed token took.
    first_token: Option<Dur>,
    learnt: Learnt,
    bytes: u64,
    over: bool,
}

impl Exchange {
    /// A request whose head was read.
    fn begin(shared: Arc<Shared>, route: Route, parts: &http::request::Parts) -> Exchange {
        let received = shared.clock.now();
        let tracer = shared.tracer.load();
        let (started, trail) = trust::start(shared.trust, &tracer, &parts.headers, received);
        trail.annotate(received, || GatewayFact::Received {
            method: method_name(&parts.method),
            path: bounded_path(parts.uri.path(), route.template()),
            route: Some(route.template()),
        });
        if trail.is_recording() && tracer.tells_langfuse() {
            trail.annotate(received, || GatewayFact::Langfuse);
        }
        shared.metrics.begun();
        let key = shared.next_key();
        let given =
            parts.headers.get(&REQUEST_ID).and_then(|v| Some((RequestId::sanitise(v.to_str().ok()?), v.clone())));
        let (id, id_header) = given.unwrap_or_else(|| {
            let id = shared.new_request_id(key);
            let header = HeaderValue::from_str(id.as_str()).expect("hexadecimal digits are a header value");
            (id, header)
        });
        Exchange {
            shared,
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
            queued: None,
            attempt: None,
            model: None,
            status: None,
            first_token: None,
            learnt: Learnt::default(),
            bytes: 0,
            over: false,
        }
    }

    /// Reads and parses the body.
    async fn read(
        &mut self,
        headers: &HeaderMap,
        body: Body,
        model: &mut Arc<str>,
    ) -> Result<(Box<RequestInfo>, Bytes), Refusal> {
        if self.shared.is_draining() {
            return Err(Refusal::Rejected(Rejection::ShuttingDown));
        }
        let config = &self.shared.config;
        if !request::headers_fit(headers, &config.limits) {
            return Err(Refusal::HeadersTooLarge);
        }
        if !self.shared.may_call(headers) {
            return Err(Refusal::Unauthorized);
        }
        let body = request::body(body, headers, config.limits.max_body_bytes);
        let mut bytes = tokio::time::timeout_at(self.deadline(), body).await.unwrap_or(Err(Refusal::SlowBody))?;
        let precise = self.shared.reads_kv_events.then_some(&config.precise_prefix);
        let mut parsed = request::parse(self.route, &bytes, &config.prefix, precise)?;
        *model = parsed.model.clone().unwrap_or_else(|| self.shared.default_model());
        if let Some(target) = self.target(headers, model)
            && let Some(rewritten) = request::with_model(&bytes, &target)
        {
            bytes = rewritten;
            parsed = request::parse(self.route, &bytes, &config.prefix, precise)?;
            let asked = std::mem::replace(model, target);
            self.trail.annotate(self.received, || GatewayFact::Rewritten { asked: bounded_name(&asked) });
        }
        let mut caller = Caller::of(headers, &self.shared.routing);
        self.model = Some(Arc::clone(model));
        if self.shared.queue.is_some() || self.trail.is_recording() {
            caller.deadlines = request::deadlines(headers);
        }
        if self.trail.is_recording() {
            caller.user_id = self.shared.routing.user_id(headers).map(request::clean);
        }
        let info = self.info(parsed, caller, model, bytes.len());
        Ok((info, bytes))
    }

    /// The model that the request is sent to, if it is not the one it asks for.
    fn target(&self, headers: &HeaderMap, model: &str) -> Option<Arc<str>> {
        let named = headers.get(&MODEL_REWRITE).and_then(|v| v.to_str().ok());
        self.shared.rewrites.target(model, named, &self.id)
    }

    /// When the request has to be over.
    fn deadline(&self) -> Instant {
        self.shared.clock.instant(self.received + self.shared.config.timeouts.total.get()).into()
    }

    fn info(&self, parsed: Parsed, caller: Caller, model: &Arc<str>, size: usize) -> Box<RequestInfo> {
        let Deadlines { ttft, tpot, .. } = caller.deadlines;
        if ttft.is_some() || tpot.is_some() {
            self.trail.annotate(self.received, || GatewayFact::Objectives { ttft, tpot });
        }
        let session = caller.session_id.as_ref().filter(|_| self.shared.config.identity_in_spans).cloned();
        let user = caller.user_id.clone();
        if user.is_some() || session.is_some() {
            self.trail.annotate(self.received, || GatewayFact::Identity { user, session });
        }
        Box::new(RequestInfo {
            key: self.key,
            id: self.id.clone(),
            model: Arc::clone(model),
            streaming: parsed.streaming,
            size_bytes: u32::try_from(size).unwrap_or(u32::MAX),
            priority: 0,
            session: caller.session(),
            session_endpoint: caller.session_endpoint,
            selection: caller.selection,
            objective: caller.objective,
            fairness_id: caller.fairness_id,
            prompt_tokens_estimate: parsed.prompt_tokens,
            max_output_tokens: parsed.max_tokens,
            deadlines: caller.deadlines,
            prefix: parsed.prefix,
            kv: KvPrompt { keys: parsed.kv_keys, answer: None },
            trail: self.trail.clone(),
        })
    }

    /// Asks a kv-cache-manager who holds the prompt, where there is one; returns the blocks that it is to expect where the request
    /// goes. Without an answer the request is scheduled without.
    async fn look_up(&self, info: &mut RequestInfo) -> Vec<u64> {
        let Some(manager) = self.shared.kv_manager.as_ref().filter(|_| !info.kv.keys.is_empty()) else {
            return Vec::new();
        };
        let (mut headers, started) = (HeaderMap::new(), self.shared.clock.now());
        if let Some(own) = self.started.as_ref().map(|s| &s.context) {
            self.tracer.inject(&own.child(lookup_span_id(own.span_id)), &mut headers);
        }
        let asked = manager.ask(&info.model, &info.kv.keys, headers, &self.shared.membership.backends()).await;
        info.kv.answer = asked.answer;
        let (address, port, status, failure) = (&manager.address, manager.port, asked.status, asked.failure);
        self.trail.note(self.shared.clock.now(), || GatewayFact::KvAsked {
            started,
            address: Arc::clone(address),
            port,
            status,
            failure,
        });
        if self.shared.config.precise_prefix.speculative { info.kv.keys.clone() } else { Vec::new() }
    }

    /// Tells the kv-cache-manager where the request goes.
    fn expect(&self, endpoints: [Option<EndpointId>; 2], keys: &[u64]) {
        if let Some(manager) = self.shared.kv_manager.as_ref().filter(|_| !keys.is_empty()) {
            for endpoint in endpoints.into_iter().flatten() {
                manager.tell(&self.shared.membership.get(endpoint).backend.config.name, keys.to_vec());
            }
        }
    }

    /// Sends the request where the core says, until an endpoint answers.
    async fn forward(
        &mut self,
        parts: &http::request::Parts,
        body: Bytes,
        info: Box<RequestInfo>,
        expected: &[u64],
    ) -> Result<http::Response<Incoming>, Refusal> {
        let mut headers = self.headers(&parts.headers);
        let deadline = self.deadline();
        let mut input = Input::Request(info);
        let (mut last, mut held) = (None, None);
        loop {
            let (endpoint, prefill, attempt) = match (self.ask(input, last).await, held.take()) {
                (Ok(next), _) => next,
                // Nobody else can be asked: the engine's own answer is better than none.
                (Err(_), Some(response)) => return Ok(response),
                (Err(refusal), None) => return Err(refusal),
            };
            self.expect([Some(endpoint), prefill], expected);
            self.attempt_started(attempt);
            let prefill = prefill.map(|id| self.shared.membership.get(id));
            Routing::set_prefiller(&mut headers, prefill.as_ref().map(|p| &p.labels));
            let request = self.outgoing(parts, &mut headers, body.clone(), attempt)?;
            let failure = match tokio::time::timeout_at(deadline, self.head(request)).await {
                Ok(Ok(response)) if self.is_retried(response.status()) => {
                    let status = response.status().as_u16();
                    held = Some(response);
                    Failure::Status(status)
                }
                Ok(Ok(response)) => return Ok(response),
                Ok(Err(Failure::Timeout)) if !self.shared.config.retry.on_timeout => {
                    return Err(Refusal::Failed(Failure::Timeout));
                }
                Ok(Err(failure)) => failure,
                Err(_) => return Err(Refusal::Failed(Failure::Timeout)),
            };
            self.attempt_ended(Some(failure));
            last = Some(failure);
            input = Input::AttemptFailed { key: self.key, endpoint, failure };
        }
    }

    /// Whether an answer with this status is asked for elsewhere.
    fn is_retried(&self, status: http::StatusCode) -> bool {
        self.shared.config.retry.on_status.contains(&status.as_u16())
    }

    /// Where the request goes next, who prefills, and the attempt; `last` is what went wrong before.
    async fn ask(
        &mut self,
        input: Input,
        last: Option<Failure>,
    ) -> Result<(EndpointId, Option<EndpointId>, u32), Refusal> {
        let now = self.shared.clock.now();
        let output = match self.shared.ask(now, self.key, input, self.trail.is_recording()) {
            Answer::Now(output) => output,
            Answer::Later(answer) => self.wait(answer).await?,
        };
        if self.shared.queue.is_some() && last.is_none() {
            self.waited(self.shared.clock.now().since(now));
        }
        match output {
            Output::Dispatch { endpoint, prefill, attempt, .. } => {
                self.at = Some(endpoint);
                self.target = Some(self.shared.membership.get(endpoint));
                if attempt > 0 {
                    self.shared.metrics.retries.fetch_add(1, Ordering::Relaxed);
                }
                Ok((endpoint, prefill, attempt))
            }
            Output::Reject { rejection, .. } => {
                self.at = None;
                if last.is_none() {
                    self.shared.metrics.rejected(rejection);
                }
                Err(last.map_or(Refusal::Rejected(rejection), Refusal::Failed))
            }
        }
    }

    /// Waits for its turn, at most as long as the whole request may take.
    async fn wait(&mut self, answer: oneshot::Receiver<Output>) -> Result<Output, Refusal> {
        self.waits = true;
        let answer = tokio::time::timeout_at(self.deadline(), answer).await;
        let output = answer.map_err(|_| Refusal::Failed(Failure::Timeout))?;
        self.waits = false;
        output.map_err(|_| Refusal::Rejected(Rejection::Cancelled))
    }

    fn waited(&mut self, time: Dur) {
        self.queued = Some(time);
        self.shared.metrics.queue_duration(time);
    }

    /// Sends an attempt and waits for the head of its response.
    async fn head(&self, request: http::Request<Full<Bytes>>) -> Result<http::Response<Incoming>, Failure> {
        let limit = self.shared.config.timeouts.response_head.get().to_std();
        let sent = tokio::time::timeout(limit, self.shared.client.request(request)).await;
        sent.map_err(|_| Failure::Timeout)?.map_err(|e| failure_of(&e))
    }

    /// The headers of every attempt.
    fn headers(&self, inbound: &HeaderMap) -> HeaderMap {
        let mut headers = end_to_end(inbound);
        headers.remove(header::HOST);
        headers.remove(header::CONTENT_LENGTH);
        headers.remove(header::EXPECT);
        headers.insert(REQUEST_ID, self.id_header.clone());
        if self.shared.tokens.is_some() {
            // The token is ours; engines have their own.
            headers.remove(header::AUTHORIZATION);
        }
        trust::strip(self.shared.trust, &mut headers);
        headers
    }

    fn outgoing(
        &self,
        parts: &http::request::Parts,
        headers: &mut HeaderMap,
        body: Bytes,
        attempt: u32,
    ) -> Result<http::Request<Full<Bytes>>, Refusal> {
        if let Some(started) = &self.started {
            let span = proxy_span_id(started.context.span_id, attempt);
            // Into the headers of every attempt, which have room for it: those of one attempt have none to spare.
            self.tracer.inject(&started.context.child(span), headers);
        }
        let root = PathAndQuery::from_static("/");
        let path = parts.uri.path_and_query().unwrap_or(&root);
        let mut request = http::Request::new(Full::new(body));
        *request.method_mut() = parts.method.clone();
        let uri = self.target.as_ref().and_then(|target| target.backend.uri(path));
        *request.uri_mut() = uri.ok_or(Refusal::NoRoute)?;
        request.headers_mut().clone_from(headers);
        Ok(request)
    }

    fn attempt_started(&mut self, attempt: u32) {
        self.attempt = Some(attempt);
        if self.trail.is_on()
            && let Some(target) = &self.target
        {
            let config = &target.backend.config;
            let (name, address, port) = (config.name.clone(), config.address.clone(), config.port);
            let now = self.shared.clock.now();
            self.trail.note(now, || GatewayFact::AttemptStarted { attempt, endpoint: name, address, port });
        }
    }

    fn attempt_ended(&mut self, failure: Option<Failure>) {
        if let Some(attempt) = self.attempt.take()
            && self.trail.is_on()
        {
            self.trail.note(self.shared.clock.now(), || GatewayFact::AttemptEnded { attempt, failure });
        }
    }

    /// Passes an engine's response on.
    fn respond(mut self, upstream: http::Response<Incoming>) -> Response {
        let (parts, body) = upstream.into_parts();
        let status = parts.status.as_u16();
        self.status = Some(status);
        let now = self.shared.clock.now();
        self.trail.note(now, || GatewayFact::ResponseHead { status });
        if let Some(endpoint) = self.at {
            self.shared.tell(now, Input::ResponseStarted { key: self.key, endpoint, status });
        }
        let mut headers = end_to_end(&parts.headers);
        self.decorate(&mut headers);
        let facts = self.trail.is_recording() || self.shared.reads_usage;
        let observer = Observer::of(&headers, facts);
        // Where nobody reads what passes, its end says how many tokens there were.
        let counts = (200..300).contains(&status) && self.route != Route::Other;
        let tail = (counts && !facts && !headers.contains_key(header::CONTENT_ENCODING)).then(Tail::new);
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
            self.shared.tell(self.shared.clock.now(), Input::FirstChunk { key: self.key, endpoint });
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
        self.shared.routing.set_session_token(headers, &target.labels);
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
        let now = self.shared.clock.now();
        if std::mem::take(&mut self.waits) {
            self.shared.cancel(now, self.key);
            self.shared.metrics.dropped(Rejection::Cancelled);
        }
        self.tell_usage(now);
        if let Some(endpoint) = self.at.take() {
            self.shared.tell(now, self.ending(endpoint, failure));
        }
        self.note_end(now, failure);
        std::mem::take(&mut self.trail).finish(now);
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
                Failure::Timeout | Failure::Connect | Failure::Status(_) | Failure::Cancelled | Failure::Abandoned,
            )
            | None => Input::Finished { key, endpoint },
        }
    }

    fn tell_usage(&self, now: Time) {
        if self.shared.reads_usage
            && let Some(usage) = &self.learnt.usage
        {
            let (prompt_tokens, output_tokens) = (usage.prompt_tokens, usage.completion_tokens);
            self.shared.tell(now, Input::Used { key: self.key, prompt_tokens, output_tokens });
        }
    }

    fn note_end(&mut self, now: Time, failure: Option<Failure>) {
        if !self.trail.is_on() {
            return;
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

/// What a failed send means.
fn failure_of(error: &hyper_util::client::legacy::Error) -> Failure {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(e) = source {
        if e.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::TimedOut) {
            return Failure::Timeout;
        }
        source = e.source();
    }
    if error.is_connect() { Failure::Connect } else { Failure::Reset }
}

/// The body of a response on its way through. Dropped early, it closes the connection to the engine, which aborts.
struct Relay {
    passage: Arc<Mutex<Passage>>,
    /// What ends the passage at the deadline: the server asks for nothing while its caller reads nothing.
    watch: Option<AbortHandle>,
}

/// What is shared with the watch.
struct Passage {
    /// The engine's response; `None` once it was cut off.
    upstream: Option<Incoming>,
    exchange: Exchange,
    observer: Observer,
    /// The end of the response, where the observer does not read it.
    tail: Option<Tail>,
    /// Who waits for the next piece.
    reader: Option<Waker>,
}

/// The total time of a request is over.
#[derive(Debug, thiserror::Error)]
#[error("the request took too long")]
struct TookTooLong;

impl Relay {
    fn new(upstream: Incoming, exchange: Exchange, observer: Observer, tail: Option<Tail>, deadline: Instant) -> Relay {
        let mut passage = Passage { upstream: Some(upstream), exchange, observer, tail, reader: None };
        passage.end_if_over();
        let over = passage.exchange.over;
        let passage = Arc::new(Mutex::new(passage));
        let watch = (!over).then(|| tokio::spawn(watch(Arc::downgrade(&passage), deadline)).abort_handle());
        Relay { passage, watch }
    }

    fn passage(&self) -> MutexGuard<'_, Passage> {
        lock(&self.passage)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        if let Some(watch) = &self.watch {
            watch.abort();
        }
    }
}

fn lock(passage: &Mutex<Passage>) -> MutexGuard<'_, Passage> {
    passage.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Cuts a passage off at the deadline, whether or not somebody reads.
async fn watch(passage: Weak<Mutex<Passage>>, deadline: Instant) {
    tokio::time::sleep_until(deadline).await;
    if let Some(passage) = passage.upgrade() {
        lock(&passage).cut_off();
    }
}

impl Passage {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::BoxError>>> {
        let Some(upstream) = &mut self.upstream else { return Poll::Ready(Some(Err(TookTooLong.into()))) };
        match Pin::new(upstream).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(data) = frame.data_ref() {
                    self.pass(data);
                }
                self.end_if_over();
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => {
                self.broken(Failure::Reset);
                Poll::Ready(Some(Err(error.into())))
            }
            Poll::Ready(None) => {
                self.complete();
                Poll::Ready(None)
            }
            Poll::Pending => {
                match &mut self.reader {
                    Some(reader) => reader.clone_from(cx.waker()),
                    none @ None => *none = Some(cx.waker().clone()),
                }
                Poll::Pending
            }
        }
    }

    fn pass(&mut self, data: &Bytes) {
        let exchange = &mut self.exchange;
        if exchange.bytes == 0 && !data.is_empty() && exchange.shared.reads_first_chunks {
            exchange.first_chunk();
        }
        exchange.bytes += data.len() as u64;
        let before = exchange.learnt.first_token;
        self.observer.data(data, &mut exchange.learnt);
        if let Some(tail) = &mut self.tail {
            tail.push(data);
        }
        if !before && exchange.learnt.first_token {
            let now = exchange.shared.clock.now();
            exchange.trail.annotate(now, || GatewayFact::FirstToken);
            exchange.first_token = Some(now.since(exchange.received));
        }
    }

    fn is_end(&self) -> bool {
        self.upstream.as_ref().is_some_and(Incoming::is_end_stream)
    }

    /// The server asks for no more after the last byte of a body of known length, so its end is noticed here.
    fn end_if_over(&mut self) {
        if self.is_end() {
            self.complete();
        }
    }

    fn complete(&mut self) {
        if !self.exchange.over {
            self.observer.end(&mut self.exchange.learnt);
            if let Some(tail) = &self.tail {
                self.exchange.learnt.usage = tail.usage();
            }
            self.exchange.end(None);
        }
    }

    fn broken(&mut self, failure: Failure) {
        self.exchange.shared.metrics.broken.fetch_add(1, Ordering::Relaxed);
        self.exchange.end(Some(failure));
    }

    fn cut_off(&mut self) {
        if self.exchange.over {
            return;
        }
        self.upstream = None;
        self.broken(Failure::Timeout);
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }
}

impl hyper::body::Body for Relay {
    type Data = Bytes;
    type Error = axum::BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::BoxError>>> {
        self.passage().poll(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.passage().is_end()
    }

    fn size_hint(&self) -> SizeHint {
        self.passage().upstream.as_ref().map_or_else(SizeHint::default, Incoming::size_hint)
    }
}
