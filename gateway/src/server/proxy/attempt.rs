//! The attempts of a request: where the core sends it, what it is sent with, and what comes of that until an engine answers.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use http::header::{self, HeaderMap};
use http::uri::PathAndQuery;
use http_body_util::Full;
use hyper::body::Incoming;
use shared::time::Dur;
use tokio::sync::oneshot;

use super::Exchange;
use super::hedge::Sending;
use crate::core::gateway::Input;
use crate::core::pool::EndpointId;
use crate::core::request::{Output, Rejection, RequestInfo};
use crate::server::connect::timed_out;
use crate::server::membership::Target;
use crate::server::queue::Answer;
use crate::server::reply::{REQUEST_ID, Refusal, end_to_end};
use crate::server::routing::Routing;
use crate::server::trust;
use crate::spans::{Failure, GatewayFact, lookup_span_id, sent_span_id};

/// Where a request goes next.
struct Place {
    endpoint: EndpointId,
    /// Who prefills.
    prefill: Option<EndpointId>,
    attempt: u32,
    /// When a second attempt may be made.
    hedge_after: Option<Dur>,
    target: Arc<Target>,
}

impl Exchange {
    /// Asks a kv-cache-manager who holds the prompt, where there is one; returns the blocks that it is to expect where the request
    /// goes. Without an answer the request is scheduled without.
    pub(super) async fn look_up(&self, info: &mut RequestInfo) -> Vec<u64> {
        let Some(manager) = self.pool().kv_manager.as_ref().filter(|_| !info.kv.keys.is_empty()) else {
            return Vec::new();
        };
        let (mut headers, started) = (self.named(), self.shared.clock.now());
        if let Some(own) = self.started.as_ref().map(|s| &s.context) {
            self.tracer.inject(&own.child(lookup_span_id(own.span_id)), &mut headers);
        }
        let asked = manager.ask(&info.model, &info.kv.keys, headers, &self.pool().membership.backends()).await;
        info.kv.answer = asked.answer;
        let (address, port, status, failure) = (&manager.address, manager.port, asked.status, asked.failure);
        self.trail.note(self.shared.clock.now(), || GatewayFact::KvAsked {
            started,
            address: Arc::clone(address),
            port,
            status,
            failure,
        });
        if self.pool().config.precise_prefix.speculative { info.kv.keys.clone() } else { Vec::new() }
    }

    /// Tells the kv-cache-manager where the request goes.
    pub(super) fn expect(&self, endpoints: [Option<EndpointId>; 2], keys: &[u64]) {
        if let Some(manager) = self.pool().kv_manager.as_ref().filter(|_| !keys.is_empty()) {
            for endpoint in endpoints.into_iter().flatten() {
                let name = &self.pool().membership.get(endpoint).backend.config.name;
                manager.tell(name, keys.to_vec(), self.named());
            }
        }
    }

    /// Headers that say which request a call to a kv-cache-manager is about.
    fn named(&self) -> HeaderMap {
        HeaderMap::from_iter([(REQUEST_ID, self.id_header.clone())])
    }

    /// Sends the request where the core says, until an endpoint answers.
    pub(super) async fn forward(
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
            let place = match (self.ask(input, last).await, held.take()) {
                (Ok(next), _) => next,
                // Nobody else can be asked: the engine's own answer is better than none.
                (Err(_), Some(response)) => return Ok(response),
                (Err(refusal), None) => return Err(refusal),
            };
            self.expect([Some(place.endpoint), place.prefill], expected);
            self.attempt = Some(place.attempt);
            self.note_started(place.attempt, &place.target);
            let prefill = place.prefill.map(|id| self.pool().membership.get(id));
            self.calls(prefill.as_ref());
            Routing::set_prefiller(&mut headers, prefill.as_ref().map(|p| &p.labels));
            let request = self.outgoing(parts, &mut headers, body.clone(), place.attempt, &place.target)?;
            let head = match place.hedge_after {
                None => tokio::time::timeout_at(deadline, self.head(request)).await,
                Some(after) => {
                    let sending = Sending { parts, headers: &mut headers, body: &body, expected };
                    // On the heap: requests that are not hedged shall not carry it along.
                    let hedged = Box::pin(self.hedged(request, after, sending));
                    tokio::time::timeout_at(deadline, hedged).await
                }
            };
            let failure = match head {
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
            // Of two attempts it is the one that was left.
            let endpoint = self.at.unwrap_or(place.endpoint);
            input = Input::AttemptFailed { key: self.key, endpoint, failure };
        }
    }

    /// Whether an answer with this status is asked for elsewhere.
    pub(super) fn is_retried(&self, status: http::StatusCode) -> bool {
        self.shared.config.retry.on_status.contains(&status.as_u16())
    }

    /// Where the request goes next, who prefills, and the attempt; `last` is what went wrong before.
    async fn ask(&mut self, input: Input, last: Option<Failure>) -> Result<Place, Refusal> {
        let now = self.shared.clock.now();
        let output = match self.pool().ask(now, self.key, input, self.trail.is_recording()) {
            Answer::Now(output) => output,
            Answer::Later(answer) => self.wait(answer).await?,
        };
        if self.pool().queue.is_some() && last.is_none() {
            self.waited(self.shared.clock.now().since(now));
        }
        match output {
            Output::Dispatch { endpoint, prefill, attempt, hedge_after, .. } => {
                self.at = Some(endpoint);
                let target = self.pool().membership.get(endpoint);
                self.target = Some(Arc::clone(&target));
                if attempt > 0 {
                    self.shared.metrics.retries.fetch_add(1, Ordering::Relaxed);
                }
                Ok(Place { endpoint, prefill, attempt, hedge_after, target })
            }
            Output::Stay { .. } => unreachable!("a request that is nowhere cannot stay there"),
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
        (self.waits, self.has_waited) = (false, true);
        output.map_err(|_| Refusal::Rejected(Rejection::Cancelled))
    }

    fn waited(&mut self, time: Dur) {
        self.queued = Some(time);
        self.shared.metrics.queue_duration(time);
    }

    /// Sends an attempt and waits for the head of its response.
    pub(super) fn head(
        &self,
        request: http::Request<Full<Bytes>>,
    ) -> impl Future<Output = Result<http::Response<Incoming>, Failure>> + Send + use<> {
        let limit = self.shared.config.timeouts.response_head.get().to_std();
        let sent = tokio::time::timeout(limit, self.shared.client.request(request));
        async move { sent.await.map_err(|_| Failure::Timeout)?.map_err(|e| failure_of(&e)) }
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

    pub(super) fn outgoing(
        &self,
        parts: &http::request::Parts,
        headers: &mut HeaderMap,
        body: Bytes,
        attempt: u32,
        target: &Target,
    ) -> Result<http::Request<Full<Bytes>>, Refusal> {
        if let Some(started) = &self.started {
            let span = sent_span_id(self.tracer.naming(), started.context.span_id, attempt);
            // Into the headers of every attempt, which have room for it: those of one attempt have none to spare.
            self.tracer.inject_after(&started.context.child(span), headers, self.has_waited);
        }
        self.wants_trailers(headers);
        let root = PathAndQuery::from_static("/");
        let path = parts.uri.path_and_query().unwrap_or(&root);
        let mut request = http::Request::new(Full::new(body));
        *request.method_mut() = parts.method.clone();
        *request.uri_mut() = target.backend.uri(path).ok_or(Refusal::NoRoute)?;
        request.headers_mut().clone_from(headers);
        Ok(request)
    }

    pub(super) fn note_started(&self, attempt: u32, target: &Target) {
        if self.trail.is_on() {
            let config = &target.backend.config;
            let (name, address, port) = (config.name.clone(), config.address.clone(), config.port);
            let now = self.shared.clock.now();
            self.trail.note(now, || GatewayFact::AttemptStarted { attempt, endpoint: name, address, port });
        }
    }

    pub(super) fn attempt_ended(&mut self, failure: Option<Failure>) {
        if let Some(attempt) = self.attempt.take()
            && self.trail.is_on()
        {
            self.trail.note(self.shared.clock.now(), || GatewayFact::AttemptEnded { attempt, failure });
        }
    }
}

/// What a failed send means.
fn failure_of(error: &hyper_util::client::legacy::Error) -> Failure {
    if timed_out(error) {
        return Failure::Timeout;
    }
    if error.is_connect() { Failure::Connect } else { Failure::Reset }
}
