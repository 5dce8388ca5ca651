//! Sampling at the edge: requests whose rules need their labels, and those that are kept for what became of them.
//!
//! A candidate is recorded like any other request. When it is over the policy judges it; if it is kept, the services that it was sent
//! to are told ([`crate::server::verdicts`]).

use std::sync::Arc;

use bytes::Bytes;
use http::HeaderValue;
use http::header::{HeaderMap, TE};
use http::request::Parts;
use hyper::body::Frame;
use shared::time::Time;
use shared::trace::policy::Outcome;
use shared::trace::{Labels, Reason, Started};

use super::Exchange;
use crate::server::api::method_name;
use crate::server::membership::Target;
use crate::server::reply::PREEMPTIONS;
use crate::server::request::Caller;
use crate::server::trust;
use crate::spans::{Failure, GatewayFact, bounded_path};

/// What has to be known of a candidate at its end.
#[derive(Default)]
pub(super) struct Candidate {
    /// The services that it was sent to.
    called: Vec<Arc<Target>>,
    attempts: u32,
    preempted: bool,
    /// Tokens of the prompt, as the gateway estimates them.
    prompt_tokens: u32,
}

impl Exchange {
    /// What is noted first: once the request is recorded, with the time at which it came.
    pub(super) fn note_received(&mut self, parts: &Parts) {
        let (at, route) = (self.received, self.route.template());
        self.trail.annotate(at, || GatewayFact::Received {
            method: method_name(&parts.method),
            path: bounded_path(parts.uri.path(), route),
            route: Some(route),
        });
        if self.trail.is_recording() && self.tracer.tells_langfuse() {
            self.trail.annotate(at, || GatewayFact::Langfuse);
        }
        let Some(started) = &self.started else { return };
        if let Some(reason) = started.reason {
            self.trail.note(at, || GatewayFact::Kept(reason));
        }
        if started.is_candidate() {
            self.candidate = Some(Box::default());
        }
    }

    /// Decides on a request that was pending, now that its labels are known, or that it has none.
    pub(super) fn decide(&mut self, parts: &Parts, model: Option<&str>) {
        if !self.started.as_ref().is_some_and(Started::is_pending) {
            return;
        }
        let caller = Caller::of(&parts.headers, &self.pool().routing);
        let Some(started) = &mut self.started else { return };
        let labels = Labels {
            model,
            tenant: caller.fairness_id.as_deref(),
            route: Some(self.route.template()),
            objective: caller.objective.as_deref(),
        };
        self.trail = self.tracer.decide(started, &labels, self.received);
        trust::link(self.shared.trust, &self.tracer, &parts.headers, &self.trail, self.received);
        self.note_received(parts);
    }

    /// A candidate goes to an endpoint, and to one that prefills.
    pub(super) fn calls(&mut self, prefill: Option<&Arc<Target>>) {
        if let Some(candidate) = &mut self.candidate {
            candidate.attempts += 1;
            for target in self.target.iter().chain(prefill) {
                if !candidate.called.iter().any(|known| Arc::ptr_eq(known, target)) {
                    candidate.called.push(Arc::clone(target));
                }
            }
        }
    }

    /// A candidate is sent to another endpoint beside the first one.
    pub(super) fn calls_too(&mut self, target: &Arc<Target>) {
        if let Some(candidate) = &mut self.candidate {
            candidate.attempts += 1;
            candidate.called.push(Arc::clone(target));
        }
    }

    /// How long the prompt of a candidate is, as far as the gateway knows.
    pub(super) fn asks(&mut self, prompt_tokens: u32) {
        if let Some(candidate) = &mut self.candidate {
            candidate.prompt_tokens = prompt_tokens;
        }
    }

    /// Asks the engine to say at the end of its answer whether it preempted a candidate.
    pub(super) fn wants_trailers(&self, headers: &mut HeaderMap) {
        if self.candidate.is_some() {
            headers.insert(TE, HeaderValue::from_static("trailers"));
        }
    }

    /// Reads from the head of an answer, or from its trailers, what an engine says of a candidate; it is not passed on.
    pub(super) fn hear(&mut self, headers: &mut HeaderMap) {
        if let Some(candidate) = &mut self.candidate
            && let Some(count) = headers.remove(&PREEMPTIONS)
        {
            candidate.preempted |= count.as_bytes() != b"0";
        }
    }

    /// A piece of a candidate's answer as it is passed on: nothing of trailers that were meant for the gateway.
    pub(super) fn hear_frame(&mut self, frame: Frame<Bytes>) -> Option<Frame<Bytes>> {
        if self.candidate.is_none() || !frame.is_trailers() {
            return Some(frame);
        }
        let mut trailers = frame.into_trailers().unwrap_or_default();
        self.hear(&mut trailers);
        (!trailers.is_empty()).then(|| Frame::trailers(trailers))
    }

    /// Why a candidate that ends now is kept, if it is.
    pub(super) fn judge(&self, now: Time, failure: Option<Failure>) -> Option<Reason> {
        let candidate = self.candidate.as_ref()?;
        let broke = failure.is_some_and(|f| f != Failure::Cancelled);
        let usage = self.learnt.usage.map(|u| u64::from(u.prompt_tokens) + u64::from(u.completion_tokens));
        // An engine that was not asked for usage sends a chunk for a token, or for a few.
        let counted = u64::from(candidate.prompt_tokens) + u64::from(self.learnt.chunks);
        self.tracer.keeps()?.judge(&Outcome {
            error: broke || self.learnt.failed || self.status.is_some_and(Outcome::is_failure),
            took: now.since(self.received),
            tokens: usage.unwrap_or(counted),
            preempted: candidate.preempted,
            retried: candidate.attempts > 1,
        })
    }

    /// Tells the services that a candidate was sent to that its trace is kept.
    pub(super) fn spread(&mut self) {
        if let (Some(candidate), Some(started), Some(verdicts)) =
            (self.candidate.take(), &self.started, &self.shared.verdicts)
        {
            verdicts.keep(started.context.trace_id, candidate.called);
        }
    }
}
