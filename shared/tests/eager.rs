//! The eager recorder: the same spans as the deferred one, decided, propagated, exported and counted by the SDK's means.

mod support;

use http::{HeaderMap, HeaderValue};
use shared::clock::RunClock;
use shared::rng::Seed;
use shared::time::{Anchor, Dur, Time};
use shared::trace::config::{ExporterConfig, OtlpConfig, OtlpEncoding, OtlpProtocol, RecorderKind};
use shared::trace::context::{TRACEPARENT, TRACESTATE};
use shared::trace::exporter::memory::MemorySpans;
use shared::trace::sampler::Root;
use shared::trace::tree::outline;
use shared::trace::{
    Cx, Draft, Ending, Fact, Fold, Form, Inner, Kind, Ratio, Resource, Sampler, SamplerKind, Span, Started, Stats,
    Telemetry, TelemetryConfig, TelemetryError, Trail,
};
use support::collector::{Answer, Collector, by_resource, closed_port, silent};
use support::{Everything, Step, assert_conserved, caller, config, otlp, requests, wait_until};

const BOTH: [RecorderKind; 2] = [RecorderKind::Deferred, RecorderKind::Eager];

fn eager(exporters: Vec<ExporterConfig>) -> TelemetryConfig {
    TelemetryConfig { recorder: RecorderKind::Eager, ..config(exporters) }
}

/// Headers as [`caller`] sends them.
fn from_caller(sampled: bool) -> HeaderMap {
    let mut headers = HeaderMap::new();
    shared::trace::context::inject(&shared::trace::TraceContext { sampled, ..caller() }, &mut headers);
    headers
}

/// What a recorder makes of `work`: what the request was started as, what it injects, its spans and the counts.
struct Ran {
    started: Started,
    injected: HeaderMap,
    spans: Vec<Span>,
    stats: Stats,
}

fn run<F: Fact>(config: TelemetryConfig, headers: &HeaderMap, work: impl FnOnce(Trail<F>, RunClock)) -> Ran {
    let (memory, clock) = (MemorySpans::default(), RunClock::start());
    let config = TelemetryConfig { exporters: vec![ExporterConfig::Memory(memory.clone())], ..config };
    let telemetry = Telemetry::live(config, clock).expect("telemetry");
    let tracer = telemetry.tracer(Resource::new("test", "one"));
    let (started, trail) = tracer.start::<F>(headers, clock.now());
    let started = started.expect("telemetry is on");
    let mut injected = HeaderMap::new();
    tracer.inject(&started.context, &mut injected);
    work(trail, clock);
    let stats = telemetry.shutdown(clock.now());
    assert_conserved(&stats);
    Ran { started, injected, spans: memory.take().spans, stats }
}

/// Runs `work` under both recorders, compares all but ids and times, and returns the common outline.
fn same<F: Fact>(headers: &HeaderMap, work: impl Fn(Trail<F>, RunClock)) -> String {
    let [deferred, eager] = BOTH.map(|recorder| {
        let ran = run(TelemetryConfig { recorder, ..config(Vec::new()) }, headers, &work);
        assert_eq!(ran.stats.spans_created, ran.spans.len() as u64);
        outline(&ran.spans)
    });
    assert_eq!(deferred, eager);
    eager
}

#[test]
fn both_recorders_make_the_same_spans() {
    let steps = |trail: Trail<Step>, clock: RunClock| {
        trail.note(clock.now(), || Step(1));
        trail.note(clock.now(), || Step(2));
        trail.finish(clock.now());
    };
    insta::assert_snapshot!(same(&HeaderMap::new(), steps), @r"
    test.request (server) test.cut=0
      test.step (internal) test.step.number=1
      test.step (internal) test.step.number=2
    ");
    insta::assert_snapshot!(same(&from_caller(true), |t: Trail<Everything>, clock| t.finish(clock.now())), @r#"
    test.server (server) test.str=static test.owned=owned "quoted" 🚀 test.shared=shared text test.int=-7 test.max=9223372036854775807 test.double=0.1 test.bool=true test.texts=[a,b] test.names=[shared text] test.doubles=[1.5,2]
      * test.first test.index=1
      * test.last
      test.client (client) error.type=timeout !error: the backend did not answer
        ~ link test.link=why
        test.inner (internal)
    "#);
    insta::assert_snapshot!(same(&HeaderMap::new(), |t: Trail<Step>, clock| t.note(clock.now(), || Step(7))), @r"
    test.request (server) error.type=abandoned test.cut=0 !error: nobody finished it
      test.step (internal) test.step.number=7
    ");
}

#[test]
fn a_finished_request_takes_no_more_notes() {
    for recorder in BOTH {
        let ran =
            run(TelemetryConfig { recorder, ..config(Vec::new()) }, &HeaderMap::new(), |t: Trail<Step>, clock| {
                let other = t.clone();
                t.finish(clock.now());
                other.note(clock.now(), || Step(1));
                other.finish(clock.now());
            });
        assert_eq!(ran.spans.len(), 1);
    }
}

/// A count that later notes amend until a mark settles it.
enum Tally {
    Count(u32),
    Note,
    Mark,
}

impl Fact for Tally {
    type Fold<S: Form> = Tallied<S::Draft>;
    fn is_amendable(&self) -> bool {
        matches!(self, Tally::Count(_))
    }
    fn settles(&self) -> bool {
        matches!(self, Tally::Mark)
    }
}

struct Tallied<D> {
    root: D,
    inner: Vec<D>,
}

impl<S: Form> Fold<Tally, S> for Tallied<S::Draft> {
    fn begin(cx: &mut Cx<'_, S>) -> Self {
        Tallied { root: cx.outermost("root", Kind::Server), inner: Vec::new() }
    }
    fn fact(&mut self, cx: &mut Cx<'_, S>, at: Time, fact: &Tally) {
        match fact {
            Tally::Count(n) => {
                let (id, parent) = (cx.head.inner_id(self.inner.len()), self.root.id());
                let inner = Inner { name: "count", kind: Kind::Internal, parent, id, start: at, end: at };
                let mut span = cx.inner(inner);
                span.set("n", *n);
                self.inner.push(span);
            }
            Tally::Note => {}
            Tally::Mark => {
                self.root.event("mark", at, &[]);
            }
        }
    }
    fn end(mut self, cx: &mut Cx<'_, S>, ending: &Ending) {
        self.root.set_end(ending.closed);
        cx.emit(self.root);
        self.inner.into_iter().for_each(|span| cx.emit(span));
    }
}

#[test]
fn facts_are_amended_until_they_settle() {
    let outline = same(&HeaderMap::new(), |trail: Trail<Tally>, clock: RunClock| {
        for (i, step) in "cc.c!cc".chars().enumerate() {
            match step {
                'c' => {
                    let mut settled = false;
                    let add = |fact: &mut Tally| match fact {
                        Tally::Count(n) if !settled => {
                            *n += 1;
                            Some(())
                        }
                        Tally::Mark => {
                            settled = true;
                            None
                        }
                        Tally::Count(_) | Tally::Note => None,
                    };
                    trail.amend(Time::from_nanos(i as u64), add, || Tally::Count(1));
                }
                '!' => trail.note(clock.now(), || Tally::Mark),
                _ => trail.note(clock.now(), || Tally::Note),
            }
        }
        trail.finish(clock.now());
    });
    insta::assert_snapshot!(outline, @r"
    root (server)
      * mark
      count (internal) n=3
      count (internal) n=2
    ");
}

#[test]
fn the_decision_and_the_context_are_handed_on() {
    let check = |sampler: Sampler, headers: &HeaderMap, sampled: bool| {
        let ran = run(TelemetryConfig { sampler, ..eager(Vec::new()) }, headers, |t: Trail<Step>, clock| {
            assert!(t.is_on(), "spans exist whether or not they are recorded");
            assert_eq!(t.is_recording(), sampled);
            t.note(clock.now(), || Step(1));
            t.annotate(clock.now(), || {
                assert!(sampled);
                Step(2)
            });
            t.finish(clock.now());
        });
        assert_eq!(ran.started.context.sampled, sampled);
        assert_eq!(ran.injected[TRACEPARENT], ran.started.context.traceparent());
        assert_eq!(ran.spans.len(), if sampled { 3 } else { 0 });
        assert_eq!((ran.stats.spans_created, ran.stats.records_opened), if sampled { (3, 1) } else { (0, 0) });
        if let Some(root) = ran.spans.iter().find(|s| s.name == "test.request") {
            let context = &ran.started.context;
            assert_eq!((root.trace_id, root.span_id), (context.trace_id, context.span_id));
            assert_eq!((root.parent, &root.tracestate), (ran.started.parent, &context.tracestate));
        }
        ran
    };
    let (all, none) = (Sampler { parent_based: true, root: Root::On }, Sampler { parent_based: true, root: Root::Off });
    for (sampler, parent, expect) in [(&all, false, false), (&all, true, true), (&none, true, true)] {
        let ran = check(sampler.clone(), &from_caller(parent), expect);
        assert_eq!((ran.started.context.trace_id, ran.started.parent), (caller().trace_id, Some(caller().span_id)));
        assert_eq!(ran.injected[TRACESTATE], "ot=th:8,vendor=x");
        assert_eq!(ran.stats.traces_started, 0);
    }
    for (sampler, expect) in [(&all, true), (&none, false)] {
        let ran = check(sampler.clone(), &HeaderMap::new(), expect);
        assert_eq!((ran.stats.traces_started, ran.stats.traces_sampled), (1, u64::from(expect)));
    }
    let mut broken = HeaderMap::new();
    broken.insert(TRACEPARENT, HeaderValue::from_static("00-0-0-01"));
    assert_eq!(check(all.clone(), &broken, true).started.parent, None);
    // Not parent-based: the caller's decision is not asked for.
    check(SamplerKind::AlwaysOn.with(Ratio::ALL), &from_caller(false), true);
    check(SamplerKind::AlwaysOff.with(Ratio::ALL), &from_caller(true), false);
    // Without the propagator nothing is read or written.
    let config = TelemetryConfig { trace_context: false, ..eager(Vec::new()) };
    let ran = run(config, &from_caller(true), |t: Trail<Step>, clock| t.finish(clock.now()));
    assert_eq!((ran.started.parent, ran.injected.len(), ran.spans.len()), (None, 0, 1));
}

#[test]
fn a_tenth_of_the_traces_is_recorded_and_the_share_can_be_switched() {
    for recorder in BOTH {
        let (memory, clock) = (MemorySpans::default(), RunClock::start());
        let ratio = |p: f64| Sampler::parent_based_ratio(Ratio::new(p).unwrap());
        let exporters = vec![ExporterConfig::Memory(memory.clone())];
        let config = TelemetryConfig { recorder, sampler: ratio(0.1), ..config(exporters) };
        let telemetry = Telemetry::live(config, clock).expect("telemetry");
        let tracer = telemetry.tracer(Resource::new("test", "one"));
        let count = |p: Option<f64>| {
            if let Some(p) = p {
                telemetry.set_sampler(ratio(p));
            }
            requests(&tracer, clock, 2_000);
            assert!(telemetry.flush(Dur::from_secs(10)));
            memory.take().spans.len() / 3
        };
        // Ids are random: eight standard deviations around 200 of 2,000.
        let first = count(None);
        assert!((93..307).contains(&first), "{recorder:?}: {first} of 2,000");
        assert_eq!([count(Some(0.0)), count(Some(1.0)), count(Some(0.0))], [0, 2_000, 0], "{recorder:?}");
        // A request that is under way keeps its decision.
        telemetry.set_sampler(ratio(1.0));
        let (_, trail) = tracer.start::<Step>(&HeaderMap::new(), clock.now());
        telemetry.set_sampler(SamplerKind::AlwaysOff.with(Ratio::ALL));
        trail.note(clock.now(), || Step(1));
        trail.finish(clock.now());
        assert_conserved(&telemetry.shutdown(clock.now()));
        assert_eq!(memory.take().spans.len(), 2, "{recorder:?}");
    }
}

#[test]
fn the_same_spans_over_grpc_http_and_file() {
    let (grpc, http) = (Collector::grpc(Answer::Accept), Collector::http(Answer::Accept));
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("traces.jsonl");
    let gzip = OtlpConfig { gzip: true, ..otlp(OtlpProtocol::HttpProtobuf, &http.url()) };
    let exporters = vec![
        ExporterConfig::Otlp(otlp(OtlpProtocol::Grpc, &grpc.url())),
        ExporterConfig::Otlp(gzip),
        ExporterConfig::File(path.clone()),
    ];
    let clock = RunClock::start();
    let telemetry = Telemetry::live(eager(exporters), clock).expect("telemetry");
    for (service, headers) in [("gateway", from_caller(true)), ("vllm", HeaderMap::new())] {
        let tracer = telemetry.tracer(Resource { host_name: Some("h".into()), ..Resource::new(service, "0") });
        tracer.start::<Everything>(&headers, clock.now()).1.finish(clock.now());
    }
    assert!(telemetry.flush(Dur::from_secs(10)));
    let stats = telemetry.stats();
    assert!(stats.exporters.iter().all(|e| e.exported == 6 && e.batches == 2), "{stats:#?}");
    assert!(stats.exporters[1].bytes.is_some_and(|b| b > 0), "{stats:#?}");
    assert_conserved(&telemetry.shutdown(clock.now()));
    let text = std::fs::read_to_string(&path).expect("the file");
    let lines = text.lines().map(|l| serde_json::from_str(l).expect("OTLP JSON"));
    let lines = lines.flat_map(|d: opentelemetry_proto::tonic::trace::v1::TracesData| d.resource_spans);
    let expect = by_resource(lines.collect());
    assert_eq!(expect.len(), 2);
    assert_eq!(by_resource(grpc.spans()), expect);
    assert_eq!(by_resource(http.spans()), expect);
}

/// Runs `n` requests of three spans each and shuts down; how long that took, too.
fn flood(config: TelemetryConfig, n: u32) -> (Stats, Dur) {
    let clock = RunClock::start();
    let telemetry = Telemetry::live(config, clock).expect("telemetry");
    requests(&telemetry.tracer(Resource::new("test", "one")), clock, n);
    let before = clock.now();
    let stats = telemetry.shutdown(before);
    assert_conserved(&stats);
    (stats, clock.now() - before)
}

#[test]
fn nothing_is_lost_without_being_counted() {
    for protocol in [OtlpProtocol::Grpc, OtlpProtocol::HttpProtobuf] {
        let closed =
            OtlpConfig { timeout: Dur::from_millis(300), ..otlp(protocol, &format!("http://{}", closed_port())) };
        let (stats, _) = flood(eager(vec![ExporterConfig::Otlp(closed)]), 3);
        assert_eq!(stats.exporters[0].dropped.export_failed, 9, "{stats:#?}");
        let error = stats.exporters[0].last_error.as_deref().unwrap_or_default();
        assert!(error.to_lowercase().contains("connection refused"), "{error}");

        let (_listener, url) = silent();
        let flush_timeout = Dur::from_millis(200);
        let exporters = vec![ExporterConfig::Otlp(otlp(protocol, &url))];
        let (stats, took) = flood(TelemetryConfig { flush_timeout, ..eager(exporters) }, 3);
        assert_eq!(stats.exporters[0].dropped.shutdown, 9, "{stats:#?}");
        assert!(took < Dur::from_secs(3), "{took}");
    }
    // The SDK's queue drops what does not fit, without a word.
    let (_listener, url) = silent();
    let dead = OtlpConfig { timeout: Dur::from_millis(300), ..otlp(OtlpProtocol::HttpProtobuf, &url) };
    let small = TelemetryConfig { max_queue: 8, max_batch: 8, ..eager(vec![ExporterConfig::Otlp(dead)]) };
    let (stats, _) = flood(TelemetryConfig { flush_timeout: Dur::from_secs(10), ..small }, 100);
    let dropped = stats.exporters[0].dropped;
    assert!(dropped.queue_full >= 200 && dropped.export_failed > 0 && dropped.shutdown == 0, "{stats:#?}");
}

#[test]
fn an_unfinished_request_is_abandoned_at_its_deadline_and_at_the_end() {
    let clock = RunClock::start();
    let memory = MemorySpans::default();
    let max_open = Dur::from_millis(20);
    let config = TelemetryConfig { max_open, ..eager(vec![ExporterConfig::Memory(memory.clone())]) };
    let telemetry = Telemetry::live(config, clock).expect("telemetry");
    let tracer = telemetry.tracer(Resource::new("test", "one"));
    let (_, stale) = tracer.start::<Step>(&HeaderMap::new(), clock.now());
    wait_until(clock, &telemetry, |stats| stats.records_abandoned == 1);
    stale.finish(clock.now());
    let (_, open) = tracer.start::<Step>(&HeaderMap::new(), clock.now());
    let stats = telemetry.shutdown(clock.now());
    assert_conserved(&stats);
    assert_eq!((stats.records_abandoned, stats.spans_created), (2, 2));
    open.finish(clock.now());
    assert_eq!(memory.take().spans.len(), 2);
    // After the end nothing is recorded any more.
    let (started, late) = tracer.start::<Step>(&HeaderMap::new(), clock.now());
    assert!(!late.is_recording() && started.is_some_and(|s| !s.context.sampled));
}

#[test]
fn what_the_eager_recorder_cannot_do_is_said() {
    let error = Telemetry::inline(eager(Vec::new()), Anchor::VIRTUAL, Seed(1)).expect_err("virtual time");
    assert!(matches!(error, TelemetryError::VirtualEager), "{error}");
    let direct =
        OtlpConfig { encoding: OtlpEncoding::Direct, ..otlp(OtlpProtocol::HttpProtobuf, "http://127.0.0.1:1") };
    let error = Telemetry::live(eager(vec![ExporterConfig::Otlp(direct)]), RunClock::start()).expect_err("direct");
    assert!(matches!(error, TelemetryError::EagerDirect), "{error}");
}
