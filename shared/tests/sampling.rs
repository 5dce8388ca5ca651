//! Sampling beyond a ratio through the whole pipeline: candidates are held, kept, or let go, and counted; switched off nothing changes.

mod support;

use http::HeaderMap;
use shared::clock::RunClock;
use shared::ids::TraceId;
use shared::rng::Seed;
use shared::time::{Anchor, Dur, Time};
use shared::trace::config::{ExporterConfig, RecorderKind};
use shared::trace::context::inject;
use shared::trace::exporter::memory::MemorySpans;
use shared::trace::policy::{Force, Hold, Rule};
use shared::trace::sampler::Root;
use shared::trace::{
    Keep, Labels, Policy, Reason, Resource, Sampler, Started, Stats, Telemetry, TelemetryConfig, TelemetryError,
    Tracer, Trail,
};
use support::{Step, assert_conserved, config};

fn at(seconds: u64) -> Time {
    Time::ZERO + Dur::from_secs(seconds)
}

/// Telemetry of an edge and a service behind it, in one process, where nothing is sampled.
struct System {
    telemetry: Telemetry,
    edge: Tracer,
    service: Tracer,
    spans: MemorySpans,
}

impl System {
    fn with(policy: Policy, hold: Option<Hold>) -> System {
        let spans = MemorySpans::default();
        let config = TelemetryConfig {
            sampler: Sampler { parent_based: true, root: Root::Off },
            policy,
            hold,
            ..config(vec![ExporterConfig::Memory(spans.clone())])
        };
        let telemetry = Telemetry::inline(config, Anchor::VIRTUAL, Seed(7)).expect("telemetry");
        let (edge, service) = (telemetry.tracer(Resource::new("e", "e")), telemetry.tracer(Resource::new("s", "s")));
        System { telemetry, edge, service, spans }
    }

    fn keeping() -> System {
        let keep = Keep::default();
        let hold = Some(keep.hold());
        System::with(Policy { keep: Some(keep), ..Policy::default() }, hold)
    }

    /// A request that comes and goes at `now`; the service's part ends first. Returns its trace.
    fn request(&self, now: Time, kept: bool) -> TraceId {
        let started = self.edge.begin_at_edge(&Labels::default(), now);
        let trail: Trail<Step> = self.edge.open(&started, now);
        assert!(started.is_candidate() && trail.is_candidate() && trail.is_recording());
        self.behind(&started, now).finish(now);
        trail.note(now, || Step(1));
        trail.judged(now, kept);
        started.context.trace_id
    }

    /// The service's record of it, which comes over the wire.
    fn behind(&self, started: &Started, now: Time) -> Trail<Step> {
        let mut headers = HeaderMap::new();
        inject(&started.context, &mut headers);
        self.service.start::<Step>(&headers, now).1
    }

    /// How many spans each trace has at the end.
    fn done(self, now: Time) -> (Vec<(TraceId, usize)>, Stats) {
        let stats = self.telemetry.shutdown(now);
        assert_conserved(&stats);
        let mut spans: Vec<TraceId> = self.spans.take().spans.iter().map(|s| s.trace_id).collect();
        spans.sort_by_key(|t| t.get());
        (spans.chunk_by(|a, b| a == b).map(|c| (c[0], c.len())).collect(), stats)
    }
}

#[test]
fn what_is_kept_is_whole_and_nothing_else_is_there() {
    let system = System::keeping();
    let traces: Vec<TraceId> = (0..40).map(|i| system.request(at(i), i % 8 == 0)).collect();
    let kept: Vec<TraceId> = traces.iter().copied().step_by(8).collect();
    system.service.keep(kept.clone());
    let (found, stats) = system.done(at(41));
    let mut expect: Vec<_> = kept.iter().map(|t| (*t, 3)).collect();
    expect.sort_by_key(|(t, _)| t.get());
    assert_eq!(found, expect, "two spans of the edge and one of the service");
    assert_eq!((stats.traces_started, stats.traces_sampled, stats.traces_kept), (40, 0, 5));
    assert_eq!((stats.records_discarded, stats.records_expired, stats.records_evicted), (35, 35, 0));
}

#[test]
fn a_service_may_end_after_the_verdict() {
    let system = System::keeping();
    let started = system.edge.begin_at_edge(&Labels::default(), at(0));
    let behind = system.behind(&started, at(0));
    system.edge.open::<Step>(&started, at(0)).judged(at(1), true);
    system.service.keep(vec![started.context.trace_id]);
    behind.finish(at(2));
    assert_eq!(system.done(at(3)).0, [(started.context.trace_id, 2)]);
}

#[test]
fn records_expire_and_late_verdicts_find_nothing() {
    let system = System::keeping();
    let early = system.request(at(0), true);
    let late = system.request(at(61), true);
    system.service.keep(vec![early, late]);
    let (found, stats) = system.done(at(62));
    let mut expect = vec![(early, 2), (late, 3)];
    expect.sort_by_key(|(t, _)| t.get());
    assert_eq!((found, stats.records_expired), (expect, 1));
}

#[test]
fn a_small_ring_evicts_and_says_so() {
    let hold = Hold { bytes: 20_000, time: Dur::from_secs(60) };
    let system = System::with(Policy { keep: Some(Keep::default()), ..Policy::default() }, Some(hold));
    let traces: Vec<TraceId> = (0..100).map(|_| system.request(at(1), true)).collect();
    system.service.keep(traces);
    let (found, stats) = system.done(at(2));
    let whole = found.iter().filter(|(_, spans)| *spans == 3).count() as u64;
    assert!(stats.records_evicted > 50 && whole > 0, "{stats:#?}");
    assert_eq!((found.len(), whole + stats.records_evicted), (100, 100));
}

#[test]
fn a_mark_is_believed_only_where_records_are_held() {
    for (hold, expect) in [(None, false), (Some(Hold::default()), true)] {
        let edge = System::keeping();
        let started = edge.edge.begin_at_edge(&Labels::default(), at(0));
        assert_eq!(started.context.tracestate.as_deref(), Some("igsim=c"));
        assert!(!started.context.sampled, "foreign services do not record it");
        let service = System::with(Policy::default(), hold);
        assert_eq!(service.behind(&started, at(0)).is_on(), expect);
        assert_eq!(service.service.holds(), expect);
    }
}

#[test]
fn the_edge_believes_nobody() {
    let system = System::keeping();
    let mut headers = HeaderMap::new();
    headers.insert("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00".parse().unwrap());
    headers.insert("tracestate", "igsim=c,vendor=x".parse().unwrap());
    let (started, trail) = system.edge.arrive::<Step>(&headers, true, at(0));
    let started = started.expect("telemetry is on");
    assert_eq!(started.context.tracestate.as_deref(), Some("vendor=x"));
    assert!(!trail.is_on(), "a trusted caller's decision is final");
    let (started, trail) = system.edge.arrive::<Step>(&headers, false, at(0));
    assert_eq!(started.expect("telemetry is on").parent, None);
    assert!(trail.is_candidate(), "a trace of its own, on which its own edge decides");
}

#[test]
fn a_pending_request_is_decided_once_and_counted_once() {
    let rule = Rule { model: Some("m".to_owned()), ratio: 1.0, ..Rule::default() };
    let system = System::with(Policy { rules: vec![rule], ..Policy::default() }, None);
    for model in ["m", "other"] {
        let (started, trail) = system.edge.arrive::<Step>(&HeaderMap::new(), true, at(1));
        let mut started = started.expect("telemetry is on");
        assert!(started.is_pending() && !trail.is_on());
        let labels = Labels { model: Some(model), ..Labels::default() };
        let trail = system.edge.decide::<Step>(&mut started, &labels, at(1));
        assert_eq!((trail.is_on(), started.context.sampled, started.is_pending()), (model == "m", model == "m", false));
        trail.finish(at(2));
    }
    let (found, stats) = system.done(at(3));
    assert_eq!((found.len(), stats.traces_started, stats.traces_sampled), (1, 2, 1));
}

#[test]
fn a_forced_request_says_so_and_only_a_trusted_caller_can_ask() {
    let system = System::with(Policy { force: Some(Force::default()), ..Policy::default() }, None);
    let headers = HeaderMap::from_iter([("x-igsim-trace".parse().unwrap(), "1".parse().unwrap())]);
    let reason = |trusted: bool| system.edge.arrive::<Step>(&headers, trusted, at(0)).0.and_then(|s| s.reason);
    assert_eq!((reason(true), reason(false)), (Some(Reason::Forced), None));
}

#[test]
fn live_verdicts_reach_the_ring_before_the_end() {
    let (clock, spans) = (RunClock::start(), MemorySpans::default());
    let keep = Keep::default();
    let config = TelemetryConfig {
        sampler: Sampler { parent_based: true, root: Root::Off },
        hold: Some(keep.hold()),
        policy: Policy { keep: Some(keep), ..Policy::default() },
        ..config(vec![ExporterConfig::Memory(spans.clone())])
    };
    let telemetry = Telemetry::live(config, clock).expect("telemetry");
    let tracer = telemetry.tracer(Resource::new("s", "s"));
    let mut kept = Vec::new();
    for i in 0..200 {
        let started = tracer.begin_at_edge(&Labels::default(), clock.now());
        tracer.open::<Step>(&started, clock.now()).finish(clock.now());
        if i % 4 == 0 {
            kept.push(started.context.trace_id);
        }
    }
    tracer.keep(kept.clone());
    let stats = telemetry.shutdown(clock.now());
    assert_conserved(&stats);
    assert_eq!((stats.records_folded, stats.records_expired), (50, 150));
    assert!(spans.take().spans.iter().all(|s| kept.contains(&s.trace_id)));
}

#[test]
fn the_eager_recorder_refuses_what_it_cannot_do() {
    let keep = Policy { keep: Some(Keep::default()), ..Policy::default() };
    let config = TelemetryConfig { recorder: RecorderKind::Eager, policy: keep, ..TelemetryConfig::default() };
    let refused = Telemetry::live(config, RunClock::start()).expect_err("no records");
    assert!(matches!(refused, TelemetryError::EagerPolicy("tracing.keep")), "{refused}");
}

#[test]
fn without_a_policy_the_edge_decides_as_before() {
    let run = |at_edge: bool| {
        let config = config(Vec::new());
        let telemetry = Telemetry::inline(config, Anchor::VIRTUAL, Seed(7)).expect("telemetry");
        let tracer = telemetry.tracer(Resource::new("e", "e"));
        let one = || match at_edge {
            true => tracer.arrive::<Step>(&HeaderMap::new(), true, at(0)).0,
            false => tracer.start::<Step>(&HeaderMap::new(), at(0)).0,
        };
        (one(), one())
    };
    assert_eq!(run(true), run(false), "the same ids, the same decisions");
}
