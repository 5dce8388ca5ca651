//! A decision as spans: the schedule and its stages, who prefills, and how the director ends.

use std::sync::Arc;

use shared::time::{Dur, Time};
use shared::trace::{Cx, Draft, Form, Inner, Kind, Val};

use super::{GatewayFold, Hindsight, PluginName, close};
use crate::core::request::Rejection;
use crate::core::scheduler::Verdict;
use crate::core::scheduler::explain::{Given, Known};

/// The endpoint that an event is about.
pub(super) const ENDPOINT: &str = "gateway.backend.endpoint.name";

pub(super) fn candidate<D: Draft>(schedule: &mut D, at: Time, known: &Known) {
    let mut attrs = vec![
        (ENDPOINT, (&known.endpoint).into()),
        ("gateway.scheduler.candidate.waiting", known.waiting.into()),
        ("gateway.scheduler.candidate.running", known.running.into()),
        ("gateway.scheduler.candidate.kv_usage", known.kv_usage.into()),
        ("gateway.scheduler.candidate.matched_blocks", known.matched_blocks.into()),
        ("gateway.scheduler.candidate.in_flight", known.in_flight.into()),
    ];
    let age = known.metrics_age.map(Dur::as_millis_f64);
    attrs.extend(age.map(|age| ("gateway.scheduler.candidate.metrics_age_ms", age.into())));
    schedule.event("gateway.scheduler.candidate", at, &attrs);
}

pub(super) fn endpoint_score<D: Draft>(score: &mut D, at: Time, given: &Given) {
    let endpoint = (ENDPOINT, (&given.endpoint).into());
    let (raw, weighted) = (given.raw.into(), given.weighted.into());
    let attrs =
        [endpoint, ("gateway.scheduler.endpoint.score", raw), ("gateway.scheduler.endpoint.weighted", weighted)];
    score.event("gateway.scheduler.endpoint_score", at, &attrs);
}

impl<D: Draft> GatewayFold<D> {
    pub(super) fn scheduling<S: Form<Draft = D>>(
        &mut self,
        cx: &mut Cx<'_, S>,
        at: Time,
        profile: &Arc<str>,
        candidates: u32,
    ) {
        let parent = self.director.as_ref().map_or(self.root.id(), D::id);
        let mut span = self.inner(cx, "gateway.scheduler.schedule", parent, at);
        span.set("gateway.scheduler.profile", profile).set("gateway.scheduler.policy", "filter-score-pick");
        span.set("gateway.scheduler.candidates.initial", candidates);
        self.schedule = Some(span);
        self.stage = at;
        self.top_names.clear();
        self.top_scores.clear();
    }

    pub(super) fn filtered<S: Form<Draft = D>>(
        &mut self,
        cx: &mut Cx<'_, S>,
        at: Time,
        plugin: &PluginName,
        before: u32,
        after: u32,
    ) {
        let removed = std::mem::take(&mut self.removed);
        self.staged(cx, "gateway.scheduler.filter", at, |s| {
            for endpoint in &removed {
                s.event("gateway.scheduler.rejected", at, &[(ENDPOINT, endpoint.into())]);
            }
            s.set("gateway.scheduler.filter.name", &plugin.name).set("gateway.scheduler.filter.type", plugin.kind);
            s.set("gateway.scheduler.filter.candidates_in", before);
            s.set("gateway.scheduler.filter.candidates_out", after);
            s.set("gateway.scheduler.filter.rejected_count", before - after);
        });
    }

    pub(super) fn picked<S: Form<Draft = D>>(
        &mut self,
        cx: &mut Cx<'_, S>,
        at: Time,
        plugin: &PluginName,
        index: u32,
        ties: u32,
    ) {
        let (names, scores) = (std::mem::take(&mut self.top_names), std::mem::take(&mut self.top_scores));
        self.staged(cx, "gateway.scheduler.pick", at, |s| {
            s.set("gateway.scheduler.picker.type", plugin.kind).set("gateway.scheduler.selected_index", index);
            s.set("gateway.scheduler.picker.ties", ties);
            s.set("gateway.scheduler.picker.top_endpoints", Val::Names(&names));
            s.set("gateway.scheduler.picker.top_scores", Val::F64s(&scores));
        });
    }

    pub(super) fn hindsight(&mut self, at: Time, all: &[Hindsight]) {
        for Hindsight { endpoint, ttft, chosen } in all {
            let mut attrs = vec![(ENDPOINT, endpoint.into()), ("gateway.hindsight.chosen", (*chosen).into())];
            attrs.extend(ttft.map(|t| ("gateway.hindsight.time_to_first_token_ms", t.as_millis_f64().into())));
            self.root.event("gateway.hindsight", at, &attrs);
        }
        self.root.set_some("gateway.hindsight.regret_ms", Hindsight::regret(all).map(Dur::as_millis_f64));
    }

    /// The span of a decision: it is known later which endpoint prefills.
    pub(super) fn decided<S: Form<Draft = D>>(
        &mut self,
        cx: &mut Cx<'_, S>,
        started: Time,
        at: Time,
        verdict: &Verdict,
    ) {
        self.drawn += 1;
        self.stage = self.stage.max(at);
        if cx.head.detail < 2 {
            return;
        }
        let parent = self.director.as_ref().map_or(self.root.id(), D::id);
        let id = cx.head.inner_id(self.drawn - 1);
        let kind = Kind::Internal;
        let mut s = cx.inner(Inner { name: "gateway.pd.decide", kind, parent, id, start: started.min(at), end: at });
        s.set("gateway.pd.decision", if verdict.disaggregate { "disaggregate" } else { "decode_only" });
        s.set("gateway.pd.reason", verdict.reason);
        s.set_some("gateway.pd.uncached_tokens", verdict.uncached_tokens);
        s.set_some("gateway.pd.threshold_tokens", verdict.threshold_tokens);
        self.decide = Some(s);
    }

    pub(super) fn directed<S: Form<Draft = D>>(
        &mut self,
        cx: &mut Cx<'_, S>,
        at: Time,
        endpoint: &Arc<str>,
        address: &Arc<str>,
        prefill: Option<&Arc<str>>,
    ) {
        if let Some(mut s) = self.decide.take() {
            s.set_some("gateway.pd.prefill_endpoint.name", prefill);
            cx.emit(s);
        }
        if let Some(mut d) = self.director.take() {
            let result = if self.waited > Dur::ZERO { "queued" } else { "admitted" };
            d.set("gateway.admission.result", result).set("gateway.flow_control.enabled", self.flow_control);
            d.set("gateway.target_endpoint.name", endpoint);
            d.set("gateway.target_endpoint.address", address);
            close(cx, d, at);
        }
    }

    pub(super) fn refused<S: Form<Draft = D>>(&mut self, cx: &mut Cx<'_, S>, at: Time, rejection: Rejection) {
        if let Some(decide) = self.decide.take() {
            cx.emit(decide);
        }
        if let Some(mut d) = self.director.take() {
            d.set("gateway.admission.result", "rejected").set("gateway.admission.reason", rejection.reason());
            d.set("gateway.flow_control.enabled", self.flow_control);
            // It is no error that a caller went away.
            if rejection.status() >= 500 && rejection != Rejection::Cancelled {
                d.fail(rejection.reason(), "no endpoint to send the request to");
            }
            close(cx, d, at);
        }
    }

    /// A stage of the schedule, from the end of the stage before it until `at`; of level 2.
    pub(super) fn staged<S: Form<Draft = D>>(
        &mut self,
        cx: &mut Cx<'_, S>,
        name: &'static str,
        at: Time,
        fill: impl FnOnce(&mut D),
    ) {
        let start = self.stage;
        self.stage = at.max(start);
        self.drawn += 1;
        if cx.head.detail < 2 {
            return;
        }
        let parent = self.schedule.as_ref().map_or(self.root.id(), D::id);
        let id = cx.head.inner_id(self.drawn - 1);
        let mut span = cx.inner(Inner { name, kind: Kind::Internal, parent, id, start, end: self.stage });
        fill(&mut span);
        cx.emit(span);
    }
}
