//! The pipeline without a network: nothing is lost without being counted, nothing stays open, the same seed gives the same
//! bytes, and switched off it does nothing.

mod support;

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use http::HeaderMap;
use shared::clock::RunClock;
use shared::rng::Seed;
use shared::time::{Anchor, Dur, Time};
use shared::trace::config::ExporterConfig;
use shared::trace::exporter::console::ConsoleTarget;
use shared::trace::exporter::memory::MemorySpans;
use shared::trace::sampler::{Ratio, Root};
use shared::trace::{
    Cx, Ending, Fact, Fold, Form, Resource, Sampler, Status, Telemetry, TelemetryConfig, Tracer, Trail, Value,
};
use support::{Step, assert_conserved, caller, config, requests, wait_until};

fn memory() -> (MemorySpans, Vec<ExporterConfig>) {
    let spans = MemorySpans::default();
    (spans.clone(), vec![ExporterConfig::Memory(spans)])
}

fn inline(exporters: Vec<ExporterConfig>) -> (Telemetry, Tracer) {
    let telemetry = Telemetry::inline(config(exporters), Anchor::VIRTUAL, Seed(7)).expect("telemetry");
    let tracer = telemetry.tracer(Resource::new("test", "one"));
    (telemetry, tracer)
}

fn at(ms: u64) -> Time {
    Time::ZERO + Dur::from_millis(ms)
}

#[test]
fn a_flood_is_counted_to_the_last_record() {
    let clock = RunClock::start();
    let (spans, exporters) = memory();
    let config = TelemetryConfig { channel_capacity: 10, ..config(exporters) };
    let telemetry = Telemetry::live(config, clock).expect("telemetry");
    let tracer = telemetry.tracer(Resource::new("test", "one"));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| requests(&tracer, clock, 25_000));
        }
    });
    let stats = telemetry.shutdown(clock.now());
    assert_conserved(&stats);
    assert_eq!((stats.records_opened, stats.traces_started), (100_000, 100_000));
    assert_eq!(stats.spans_created, 3 * stats.records_folded);
    assert_eq!(spans.take().spans.len() as u64, stats.spans_created);
}

#[test]
fn requests_that_go_on_during_shutdown_are_counted_too() {
    let clock = RunClock::start();
    let telemetry = Telemetry::live(config(Vec::new()), clock).expect("telemetry");
    let tracer = telemetry.tracer(Resource::new("test", "one"));
    let late = tracer.open::<Step>(&tracer.begin(None), clock.now());
    let stats = std::thread::scope(|scope| {
        scope.spawn(|| requests(&tracer, clock, 5_000));
        telemetry.shutdown(clock.now())
    });
    // The thread may still have been closing records when the counts were taken; what is taken is never more than closed.
    assert!(stats.records_folded + stats.records_dropped <= stats.records_opened, "{stats:#?}");
    // Abandoned at shutdown: finishing later does nothing.
    late.finish(clock.now());
}

#[test]
fn a_record_left_open_is_abandoned_at_its_deadline() {
    let clock = RunClock::start();
    let (spans, exporters) = memory();
    let config = TelemetryConfig { max_open: Dur::from_millis(20), ..config(exporters) };
    let telemetry = Telemetry::live(config, clock).expect("telemetry");
    let tracer = telemetry.tracer(Resource::new("test", "one"));
    let trail = tracer.open::<Step>(&tracer.begin(None), clock.now());
    trail.note(clock.now(), || Step(1));
    wait_until(clock, &telemetry, |stats| stats.records_abandoned == 1);
    trail.finish(clock.now());
    let stats = telemetry.shutdown(clock.now());
    assert_conserved(&stats);
    let spans = spans.take().spans;
    assert_eq!(spans.len(), 2);
    assert_eq!(spans[0].get("error.type"), Some(&Value::from("abandoned")));
    assert!(matches!(spans[0].status, Status::Error(_)));
    assert!(spans[0].end - spans[0].start >= Dur::from_millis(20));
}

#[test]
fn in_a_virtual_run_deadlines_follow_virtual_time() {
    let (spans, exporters) = memory();
    let config = TelemetryConfig { max_open: Dur::from_secs(10), ..config(exporters) };
    let telemetry = Telemetry::inline(config, Anchor::VIRTUAL, Seed(1)).expect("telemetry");
    let tracer = telemetry.tracer(Resource::new("test", "one"));
    let stale = tracer.open::<Step>(&tracer.begin(None), at(0));
    let quick = |now| tracer.open::<Step>(&tracer.begin(None), now).finish(now);
    quick(at(9_999));
    assert_eq!(telemetry.stats().records_abandoned, 0);
    quick(at(11_000));
    assert_eq!(telemetry.stats().records_abandoned, 1);
    drop(stale);
    let open = tracer.open::<Step>(&tracer.begin(None), at(12_000));
    let stats = telemetry.shutdown(at(13_000));
    assert_conserved(&stats);
    assert_eq!((stats.records_folded, stats.records_abandoned), (4, 2));
    assert_eq!(spans.take().spans.last().map(|s| s.end), Some(at(13_000)));
    open.finish(at(14_000));
}

#[test]
fn dropping_the_telemetry_folds_what_is_open() {
    let (spans, exporters) = memory();
    let (telemetry, tracer) = inline(exporters);
    let _open = tracer.open::<Step>(&tracer.begin(None), at(1));
    drop(telemetry);
    assert_eq!(spans.take().spans.len(), 1);
}

#[test]
fn the_panic_hook_folds_what_is_open() {
    let clock = RunClock::start();
    let (spans, exporters) = memory();
    let telemetry = Telemetry::live(config(exporters), clock).expect("telemetry");
    let tracer = telemetry.tracer(Resource::new("test", "one"));
    let _open = tracer.open::<Step>(&tracer.begin(None), clock.now());
    telemetry.on_panic()();
    assert_eq!(spans.take().spans.len(), 1);
    assert_conserved(&telemetry.shutdown(clock.now()));
}

struct Broken;
impl Fact for Broken {
    type Fold<S: Form> = Breaks;
}
struct Breaks;
impl<S: Form> Fold<Broken, S> for Breaks {
    fn begin(_: &mut Cx<'_, S>) -> Breaks {
        Breaks
    }
    fn fact(&mut self, _: &mut Cx<'_, S>, _: Time, _: &Broken) {}
    fn end(self, cx: &mut Cx<'_, S>, _: &Ending) {
        let half = cx.outermost("half", shared::trace::Kind::Server);
        cx.emit(half);
        panic!("a bug in a fold");
    }
}

#[test]
fn a_fold_that_panics_costs_its_own_record_only() {
    let (spans, exporters) = memory();
    let (telemetry, tracer) = inline(exporters);
    tracer.open::<Broken>(&tracer.begin(None), at(1)).finish(at(2));
    tracer.open::<Step>(&tracer.begin(None), at(3)).finish(at(4));
    let stats = telemetry.shutdown(at(5));
    assert_conserved(&stats);
    assert_eq!((stats.records_failed, stats.records_folded), (1, 1));
    assert_eq!(spans.take().spans.len(), 1);
}

#[test]
fn the_same_seed_gives_the_same_bytes() {
    let folder = tempfile::tempdir().expect("a folder");
    let bytes = |name: &str, seed: u64| {
        let path = folder.path().join(name);
        let config = TelemetryConfig {
            max_batch: 7,
            sampler: Sampler::parent_based_ratio(Ratio::new(0.5).expect("a ratio")),
            ..config(vec![ExporterConfig::File(path.clone())])
        };
        let telemetry = Telemetry::inline(config, Anchor::VIRTUAL, Seed(seed)).expect("telemetry");
        let tracers: Vec<_> = (0..3).map(|i| telemetry.tracer(Resource::new("vllm", format!("{i}")))).collect();
        for i in 0..100u32 {
            let tracer = &tracers[i as usize % 3];
            let now = at(u64::from(i));
            let trail = tracer.open::<Step>(&tracer.begin(None), now);
            trail.note(now, || Step(i));
            trail.finish(now + Dur::from_millis(5));
        }
        let stats = telemetry.shutdown(at(1_000));
        assert_conserved(&stats);
        assert!((30..70).contains(&stats.traces_sampled), "{stats:#?}");
        std::fs::read(path).expect("the file")
    };
    let first = bytes("a", 1);
    assert_eq!(first, bytes("b", 1));
    assert_ne!(first, bytes("c", 2));
}

#[test]
fn switched_off_nothing_is_read_written_or_recorded() {
    let config = TelemetryConfig { disabled: true, ..config(Vec::new()) };
    let telemetry = Telemetry::live(config, RunClock::start()).expect("telemetry");
    let tracer = telemetry.tracer(Resource::new("test", "one"));
    assert!(tracer.disabled());
    let mut headers = HeaderMap::new();
    headers.insert("traceparent", "rubbish".parse().expect("a header"));
    assert_eq!(tracer.extract(&headers), None);
    let started = tracer.begin(Some(caller()));
    assert_eq!((started.context.sampled, started.parent), (false, Some(caller().span_id)));
    tracer.inject(&started.context, &mut headers);
    assert_eq!(headers["traceparent"], "rubbish");
    assert!(!tracer.open::<Step>(&started, at(0)).is_on());
    assert_eq!(telemetry.shutdown(at(1)), shared::trace::Stats::default());
}

#[test]
fn a_request_continues_its_callers_trace() {
    let (_telemetry, tracer) = inline(Vec::new());
    let mut headers = HeaderMap::new();
    tracer.inject(&caller(), &mut headers);
    let started = tracer.begin(tracer.extract(&headers));
    assert_eq!((started.context.trace_id, started.parent), (caller().trace_id, Some(caller().span_id)));
    assert_ne!(started.context.span_id, caller().span_id);
    assert!(started.context.sampled && started.context.random && !tracer.begin(None).context.random);
    assert_eq!(started.context.tracestate, caller().tracestate);
}

#[test]
fn an_unsampled_request_still_has_a_context_but_no_record() {
    let config = TelemetryConfig { sampler: Sampler { parent_based: true, root: Root::Off }, ..config(Vec::new()) };
    let telemetry = Telemetry::inline(config, Anchor::VIRTUAL, Seed(7)).expect("telemetry");
    let tracer = telemetry.tracer(Resource::new("test", "one"));
    let started = tracer.begin(None);
    let trail: Trail<Step> = tracer.open(&started, at(0));
    assert!(!trail.is_on());
    let mut headers = HeaderMap::new();
    tracer.inject(&started.context, &mut headers);
    assert!(headers["traceparent"].to_str().expect("text").ends_with("-00"));
    // A sampler of its own, as scrapes and engine steps have.
    assert!(tracer.begin_with(None, &Sampler { parent_based: false, root: Root::On }).context.sampled);
    let stats = telemetry.shutdown(at(1));
    assert_eq!((stats.traces_started, stats.traces_sampled, stats.records_opened), (2, 1, 0));
}

#[test]
fn malformed_contexts_are_counted() {
    let (telemetry, tracer) = inline(Vec::new());
    let mut headers = HeaderMap::new();
    headers.insert("traceparent", "00-rubbish".parse().expect("a header"));
    assert_eq!(tracer.extract(&headers), None);
    assert_eq!(telemetry.stats().malformed_contexts, 1);
}

#[test]
fn ids_of_many_threads_differ() {
    let clock = RunClock::start();
    let telemetry = Telemetry::live(config(Vec::new()), clock).expect("telemetry");
    let tracer = telemetry.tracer(Resource::new("test", "one"));
    let all = Mutex::new(HashSet::new());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mine: Vec<_> = (0..5_000).map(|_| tracer.begin(None).context).collect();
                let mut all = all.lock().expect("no panic");
                for context in mine {
                    assert!(all.insert(context.trace_id.get()) && all.insert(u128::from(context.span_id.get())));
                }
            });
        }
    });
    drop(telemetry);
}

#[test]
fn the_environments_attributes_reach_every_resource() {
    let (spans, exporters) = memory();
    let attributes = vec![("team".to_owned(), "x".to_owned()), ("service.version".to_owned(), "9".to_owned())];
    let config = TelemetryConfig { resource_attributes: attributes, ..config(exporters) };
    let telemetry = Telemetry::inline(config, Anchor::VIRTUAL, Seed(1)).expect("telemetry");
    let tracer = telemetry.tracer(Resource::new("test", "one"));
    tracer.open::<Step>(&tracer.begin(None), at(0)).finish(at(1));
    drop(telemetry);
    let set = spans.take();
    assert_eq!(set.resources[0].extra, [("team".into(), Value::from("x"))]);
    assert_eq!(set.resources[0].version.as_deref(), Some(env!("CARGO_PKG_VERSION")));
}

#[test]
fn the_console_shows_trees() {
    let shown: Arc<Mutex<Vec<u8>>> = Arc::default();
    let (telemetry, tracer) = inline(vec![ExporterConfig::Console(ConsoleTarget::Writer(shown.clone()))]);
    let trail = tracer.open::<Step>(&tracer.begin(None), at(10));
    trail.note(at(12), || Step(4));
    trail.finish(at(15));
    // Under a caller of another process: printed at the end, when no root can come any more.
    tracer.open::<Step>(&tracer.begin(Some(caller())), at(20)).finish(at(21));
    assert_conserved(&telemetry.shutdown(at(30)));
    let text = String::from_utf8(shown.lock().expect("no panic").clone()).expect("text");
    let lines: Vec<_> = text.lines().filter(|l| !l.starts_with("trace ")).collect();
    insta::assert_snapshot!(lines.join("\n"), @r"
    test.request (server) [test/one] +0 ns 5.00 ms test.cut=0
      test.step (internal) [test/one] +2.00 ms 0 ns test.step.number=4

    test.request (server) [test/one] +0 ns 1.00 ms test.cut=0
    ");
}

#[test]
fn a_network_exporter_is_refused_in_a_virtual_run() {
    let otlp = support::otlp(shared::trace::config::OtlpProtocol::Grpc, "http://127.0.0.1:4317");
    let config = config(vec![ExporterConfig::Otlp(otlp)]);
    let error = Telemetry::inline(config, Anchor::VIRTUAL, Seed(1)).expect_err("no network in virtual time");
    assert!(error.to_string().contains("write a trace file"), "{error}");
}
