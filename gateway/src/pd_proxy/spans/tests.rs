//! Trees of whole requests, driven through the core as a driver does it.

use std::sync::Arc;

use shared::ids::{InstanceId, SpanId, TraceId};
use shared::trace::check::{CheckOptions, check_spans};
use shared::trace::record::Folded;
use shared::trace::registry::Registry;
use shared::trace::tree::outline;
use shared::trace::{Head, Naming, Sink, Span, Trail};

use super::*;
use crate::pd_proxy::core::{Allowed, Asked, Dance, PdProxyConfig, PrefillEnd, Step};

/// One request, and its clock.
struct Run {
    dance: Dance,
    now: Time,
    folded: Arc<Folded>,
}

impl Run {
    fn new(retries: u32) -> Run {
        Run::named(Naming::Proposal, retries)
    }

    fn named(naming: Naming, retries: u32) -> Run {
        let folded = Arc::new(Folded::default());
        let sink: Arc<dyn Sink> = folded.clone();
        let now = Time::ZERO + Dur::from_millis(50);
        let head = Head {
            trace_id: TraceId::new(1).unwrap(),
            span_id: SpanId::new(2).unwrap(),
            parent: SpanId::new(3),
            tracestate: None,
            instance: InstanceId(0),
            opened: now,
            detail: 1,
            naming,
        };
        let trail = Trail::open(head, &sink);
        let path = "/v1/completions";
        let connector = Connector::NixlV2;
        trail.note(now, || PdFact::Received { method: "POST", path: path.into(), route: path, connector });
        let config = PdProxyConfig { prefill_max_retries: retries, ..PdProxyConfig::default() };
        Run { dance: Dance::arrived(now, &config, trail), now, folded }
    }

    fn later(&mut self) -> Time {
        self.now += Dur::from_millis(1);
        self.now
    }

    fn ask(&mut self, prefiller: Option<&str>) -> Step {
        let asked = Asked { id: RequestId::sanitise("req-1"), size_bytes: 70, prefiller, readable: true };
        let pool = Allowed::these(["10.0.0.5:8000"]).unwrap();
        let now = self.later();
        self.dance.asked(now, &asked, &pool)
    }

    /// A call that ends with `end` after an answer of this status.
    fn call(&mut self, leg: Leg, attempt: u32, status: Option<u16>, failure: Option<Failure>) {
        let address: Arc<str> = if leg == Leg::Prefill { "10.0.0.5" } else { "127.0.0.1" }.into();
        let now = self.later();
        self.dance.call_started(now, leg, attempt, &address, 8000);
        if let Some(status) = status {
            let now = self.later();
            self.dance.call_head(now, status);
        }
        if leg == Leg::Prefill {
            let now = self.later();
            self.dance.call_ended(now, failure);
        }
    }

    fn prefilled(&mut self, end: PrefillEnd) -> Step {
        let now = self.later();
        self.dance.prefill_ended(now, end)
    }

    fn end(mut self, status: Option<u16>, failure: Option<Failure>) -> Vec<Span> {
        let now = self.later();
        self.dance.ended(now, status, failure);
        nested(self.folded.take())
    }

    /// Whatever the checks say.
    fn end_as_llm_d(mut self, status: Option<u16>) -> String {
        let now = self.later();
        self.dance.ended(now, status, None);
        let mut spans = self.folded.take();
        spans.rotate_right(1);
        outline(&spans)
    }
}

/// Invariant: children lie inside their parents, and every span is as the registry says. The outermost span ends last.
fn nested(mut spans: Vec<Span>) -> Vec<Span> {
    spans.rotate_right(1);
    let registry = Registry::builtin().expect("the registry is sound");
    let found = check_spans(&spans, &CheckOptions { registry: Some(&registry), clock_tolerance: Dur::ZERO });
    assert!(found.is_empty(), "{found:#?}\n{}", outline(&spans));
    spans
}

#[test]
fn prefill_and_decode_are_siblings() {
    let mut run = Run::new(0);
    assert!(matches!(run.ask(Some("10.0.0.5:8000")), Step::Prefill { .. }));
    run.call(Leg::Prefill, 0, Some(200), None);
    assert_eq!(run.prefilled(PrefillEnd::Answered { params: true }), Step::Decode { transferred: true });
    run.call(Leg::Decode, 0, Some(200), None);
    let now = run.later();
    run.dance.first_byte(now);
    insta::assert_snapshot!(outline(&run.end(Some(200), None)));
}

#[test]
fn a_request_that_is_not_prefilled_elsewhere_has_a_decode_only() {
    let mut run = Run::new(0);
    assert_eq!(run.ask(None), Step::Decode { transferred: false });
    run.call(Leg::Decode, 0, Some(200), None);
    insta::assert_snapshot!(outline(&run.end(Some(200), None)));
}

#[test]
fn every_attempt_at_a_prefill_is_a_call() {
    let mut run = Run::new(1);
    run.ask(Some("10.0.0.5:8000"));
    run.call(Leg::Prefill, 0, Some(503), None);
    assert!(matches!(run.prefilled(PrefillEnd::Status(503)), Step::BackOff(_)));
    run.dance.waited();
    run.call(Leg::Prefill, 1, None, Some(Failure::Connect));
    assert!(matches!(run.prefilled(PrefillEnd::Failed(Failure::Connect)), Step::Refuse(_)));
    insta::assert_snapshot!(outline(&run.end(Some(502), None)));
}

#[test]
fn a_refused_target_is_no_error_of_the_proxy() {
    let mut run = Run::new(0);
    assert!(matches!(run.ask(Some("169.254.169.254:80")), Step::Refuse(_)));
    insta::assert_snapshot!(outline(&run.end(Some(403), None)));
}

#[test]
fn a_caller_that_went_away_is_no_error() {
    let mut run = Run::new(0);
    run.ask(Some("10.0.0.5:8000"));
    let address: Arc<str> = "10.0.0.5".into();
    let now = run.later();
    run.dance.call_started(now, Leg::Prefill, 0, &address, 8000);
    let now = run.later();
    let done = run.dance.disconnected(now, None).unwrap();
    assert_eq!((done.failure, done.prefill_failed), (Some(Failure::Cancelled), false));
    insta::assert_snapshot!(outline(&nested(run.folded.take())));
}

#[test]
fn a_decode_that_breaks_off_fails_all_the_way_up() {
    let mut run = Run::new(0);
    run.ask(None);
    run.call(Leg::Decode, 0, Some(200), None);
    let spans = run.end(Some(200), Some(Failure::Reset));
    let failed: Vec<_> = spans.iter().filter(|s| s.failed()).map(|s| s.name.as_ref()).collect();
    assert_eq!(failed, ["pd_proxy.request", "pd_proxy.backend", "pd_proxy.decode"]);
}

#[test]
fn a_record_that_nobody_finished_is_folded_as_far_as_it_got() {
    let mut run = Run::new(0);
    run.ask(Some("10.0.0.5:8000"));
    let address: Arc<str> = "10.0.0.5".into();
    let now = run.later();
    run.dance.call_started(now, Leg::Prefill, 0, &address, 8000);
    drop(run.dance);
    let spans = nested(run.folded.take());
    assert_eq!(spans.len(), 3);
    assert!(spans.iter().all(|s| s.get("error.type").and_then(|v| v.as_str()) == Some("abandoned")));
}

#[test]
fn calls_have_ids_of_their_own() {
    let own = SpanId::new(7).unwrap();
    let mut ids: Vec<SpanId> = [Leg::Prefill, Leg::Decode]
        .into_iter()
        .flat_map(|leg| (0..9).map(move |attempt| call_span_id(own, leg, attempt)))
        .chain((0..9).map(|n| own.derive(n)))
        .collect();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 27);
}

#[test]
fn with_llm_ds_names_the_decode_hangs_on_the_prefill() {
    let mut run = Run::named(Naming::LlmD, 0);
    assert!(matches!(run.ask(Some("10.0.0.5:8000")), Step::Prefill { .. }));
    run.call(Leg::Prefill, 0, Some(200), None);
    assert_eq!(run.prefilled(PrefillEnd::Answered { params: true }), Step::Decode { transferred: true });
    run.call(Leg::Decode, 0, Some(200), None);
    insta::assert_snapshot!(run.end_as_llm_d(Some(200)));
}

#[test]
fn with_llm_ds_names_a_request_that_is_passed_on_has_one_call() {
    let mut run = Run::named(Naming::LlmD, 0);
    assert_eq!(run.ask(None), Step::Decode { transferred: false });
    run.call(Leg::Decode, 0, Some(200), None);
    insta::assert_snapshot!(run.end_as_llm_d(Some(200)));
}
