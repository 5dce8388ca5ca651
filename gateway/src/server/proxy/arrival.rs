//! A request's arrival: its headers are judged, its body is read, and its model decides where it goes.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::body::Body;
use bytes::Bytes;
use http::header::HeaderMap;
use shared::trace::Started;

use super::Exchange;
use crate::core::kv_index::KvPrompt;
use crate::core::request::{Deadlines, Rejection, RequestInfo};
use crate::core::scheduler::explain::EVERY_ENDPOINT;
use crate::server::reply::Refusal;
use crate::server::request::{self, Asked, Caller, MODEL_REWRITE, Parsed};
use crate::spans::{Arrived, GatewayFact, bounded_name};

impl Exchange {
    /// Judges the headers, reads and parses the body.
    pub(super) async fn read(
        &mut self,
        parts: &http::request::Parts,
        body: Body,
        model: &mut Arc<str>,
    ) -> Result<(Box<RequestInfo>, Bytes), Refusal> {
        let headers = &parts.headers;
        // How a request arrived is shown by the finest detail only.
        let fine = self.trail.detail() >= EVERY_ENDPOINT;
        let judged = self.check(headers);
        if fine {
            let (count, metadata) = (u32::try_from(headers.len()).ok(), request::has_metadata(headers));
            self.trail.note(self.shared.clock.now(), || GatewayFact::HeadersRead { count, metadata });
        }
        judged?;
        let mut arrived = Arrived::default();
        let limit = self.shared.config.limits.max_body_bytes;
        let bytes = if fine {
            tokio::time::timeout_at(self.deadline(), request::counted_body(body, headers, limit, &mut arrived)).await
        } else {
            tokio::time::timeout_at(self.deadline(), request::body(body, headers, limit)).await
        };
        let parsed = bytes.unwrap_or(Err(Refusal::SlowBody)).and_then(|bytes| self.parse(parts, bytes, model));
        if fine {
            let parsed = matches!(parsed, Ok(_) | Err(Refusal::Rejected(_)));
            self.trail.note(self.shared.clock.now(), || GatewayFact::BodyRead { arrived, parsed });
        }
        let (parsed, bytes) = parsed?;
        let mut caller = Caller::of(headers, &self.pool().routing);
        if self.pool().queue.is_some() || self.trail.is_recording() {
            caller.deadlines = request::deadlines(headers);
        }
        if self.trail.is_recording() {
            caller.user_id = self.pool().routing.user_id(headers).map(request::clean);
        }
        let bytes = match self.pool().config.priority_of_engines(caller.objective.as_deref()) {
            Some(priority) => request::with_priority(bytes, priority),
            None => bytes,
        };
        self.asks(parsed.prompt_tokens);
        let info = self.info(parsed, caller, model, bytes.len());
        Ok((info, bytes))
    }

    /// Whether a request with these headers may go on.
    fn check(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        if self.shared.is_draining() {
            return Err(Refusal::Rejected(Rejection::ShuttingDown));
        }
        if !request::headers_fit(headers, &self.shared.config.limits) {
            return Err(Refusal::HeadersTooLarge);
        }
        if self.shared.may_call(headers) { Ok(()) } else { Err(Refusal::Unauthorized) }
    }

    /// Finds out which model a body is for, and with that the pool; returns what it says, and itself as it is sent.
    fn parse(
        &mut self,
        parts: &http::request::Parts,
        bytes: Bytes,
        model: &mut Arc<str>,
    ) -> Result<(Parsed, Bytes), Refusal> {
        let headers = &parts.headers;
        let mut rewritten = None;
        let mut asked = Asked::read(self.route, &bytes)?;
        *model = asked.model.take().unwrap_or_else(|| self.shared.default_model());
        if self.started.as_ref().is_some_and(Started::is_pending) {
            self.decide(parts, Some(model));
        }
        if let Some(target) = self.target(headers, model)
            && let Some(body) = request::with_model(&bytes, &target)
        {
            asked = Asked::read(self.route, rewritten.insert(body))?;
            let asked = std::mem::replace(model, target);
            self.trail.annotate(self.received, || GatewayFact::Rewritten { asked: bounded_name(&asked) });
        }
        self.model = Some(Arc::clone(model));
        let Some(pool) = self.shared.table.of_model(model) else {
            self.note_unknown(model, bytes.len());
            self.shared.metrics.rejected(Rejection::UnknownModel);
            return Err(Refusal::Rejected(Rejection::UnknownModel));
        };
        self.pool = pool;
        let pool = self.pool();
        if self.shared.table.is_split() {
            pool.requests.fetch_add(1, Ordering::Relaxed);
        }
        let precise = pool.reads_kv_events.then_some(&pool.config.precise_prefix);
        let parsed = asked.parsed(&pool.config.prefix, precise);
        Ok((parsed, rewritten.unwrap_or(bytes)))
    }

    /// Records a request that no pool has a core for.
    fn note_unknown(&self, model: &Arc<str>, size: usize) {
        self.trail.annotate(self.received, || GatewayFact::Parsed {
            id: self.id.clone(),
            model: bounded_name(model),
            size_bytes: u32::try_from(size).unwrap_or(u32::MAX),
            priority: 0,
            streaming: false,
        });
    }

    /// The model that the request is sent to, if it is not the one it asks for.
    fn target(&self, headers: &HeaderMap, model: &str) -> Option<Arc<str>> {
        let named = headers.get(&MODEL_REWRITE).and_then(|v| v.to_str().ok());
        self.shared.rewrites.target(model, named, &self.id)
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
}
