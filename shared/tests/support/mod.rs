//! What the telemetry tests share: records to export, and collectors to export them to.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part")]

pub mod collector;

use std::sync::Arc;

use http::HeaderMap;
use shared::clock::RunClock;
use shared::ids::{SpanId, TraceId};
use shared::time::{Dur, Time};
use shared::trace::config::{ExporterConfig, OtlpConfig, OtlpEncoding, OtlpProtocol};
use shared::trace::sampler::Root;
use shared::trace::{
    Cx, Draft, Ending, Fact, Fold, Form, Inner, Kind, LinkTo, Sampler, Stats, Telemetry, TelemetryConfig, TraceContext,
    Tracer, Val,
};

/// A fact that becomes one inner span.
pub struct Step(pub u32);

impl Fact for Step {
    type Fold<S: Form> = Steps<S::Draft>;
}

/// One inner span for every step.
pub struct Steps<D> {
    root: D,
    inner: Vec<D>,
}

impl<S: Form> Fold<Step, S> for Steps<S::Draft> {
    fn begin(cx: &mut Cx<'_, S>) -> Self {
        Steps { root: cx.outermost("test.request", Kind::Server), inner: Vec::new() }
    }
    fn fact(&mut self, cx: &mut Cx<'_, S>, at: Time, step: &Step) {
        let id = cx.head.inner_id(self.inner.len());
        let (kind, parent) = (Kind::Internal, self.root.id());
        let mut span = cx.inner(Inner { name: "test.step", kind, parent, id, start: at, end: at });
        span.set("test.step.number", step.0);
        self.inner.push(span);
    }
    fn end(mut self, cx: &mut Cx<'_, S>, ending: &Ending) {
        self.root.set_end(ending.closed);
        if ending.abandoned {
            self.root.fail("abandoned", "nobody finished it");
        }
        self.root.set("test.cut", ending.cut);
        cx.emit(self.root);
        self.inner.into_iter().for_each(|span| cx.emit(span));
    }
}

/// A fact that folds into spans with everything a span can have.
pub struct Everything;

impl Fact for Everything {
    type Fold<S: Form> = All<S::Draft>;
}

/// Makes every kind of span, all but the outermost one at the end.
pub struct All<D> {
    server: D,
}

impl<S: Form> Fold<Everything, S> for All<S::Draft> {
    fn begin(cx: &mut Cx<'_, S>) -> Self {
        All { server: cx.outermost("test.server", Kind::Server) }
    }
    fn fact(&mut self, _: &mut Cx<'_, S>, _: Time, _: &Everything) {}
    fn end(self, cx: &mut Cx<'_, S>, ending: &Ending) {
        let (start, end) = (cx.head.opened, ending.closed);
        let mut server = self.server;
        let (shared, owned): (Arc<str>, String) = ("shared text".into(), "owned \"quoted\" \u{1F680}".to_owned());
        server.set_end(end);
        server.set("test.str", "static").set("test.owned", Val::Text(&owned));
        server.set("test.shared", &shared).set("test.int", -7i64).set("test.max", i64::MAX);
        server.set("test.double", 0.1).set("test.bool", true);
        server
            .set("test.texts", Val::Statics(&["a", "b"]))
            .set("test.names", Val::Names(std::slice::from_ref(&shared)));
        server.set("test.doubles", Val::F64s(&[1.5, 2.0]));
        server.event("test.first", start, &[("test.index", Val::Int(1))]).event("test.last", end, &[]);
        let inner = |name, kind, parent, n, end| Inner { name, kind, parent, id: cx.head.inner_id(n), start, end };
        let client = inner("test.client", Kind::Client, server.id(), 0, end);
        let internal = inner("test.inner", Kind::Internal, client.id, 1, start);
        let mut client = cx.inner(client);
        let ids = (TraceId::new(0xabc).expect("not zero"), SpanId::new(0xdef).expect("not zero"));
        client.link(&LinkTo { trace_id: ids.0, span_id: ids.1 }, &[("test.link", Val::Static("why"))]);
        client.fail("timeout", "the backend did not answer");
        let internal = cx.inner(internal);
        cx.emit(server);
        cx.emit(client);
        cx.emit(internal);
    }
}

/// Everything sampled; batches go out when they are full, flushed or at the end, so that counts of requests repeat.
pub fn config(exporters: Vec<ExporterConfig>) -> TelemetryConfig {
    TelemetryConfig {
        sampler: Sampler { parent_based: true, root: Root::On },
        exporters,
        schedule_delay: Dur::from_secs(3_600),
        ..TelemetryConfig::default()
    }
}

pub fn otlp(protocol: OtlpProtocol, base: &str) -> OtlpConfig {
    let endpoint = match protocol {
        OtlpProtocol::Grpc => base.to_owned(),
        OtlpProtocol::HttpProtobuf => format!("{base}/v1/traces"),
    };
    OtlpConfig {
        endpoint,
        protocol,
        headers: Vec::new(),
        timeout: Dur::from_secs(10),
        gzip: false,
        encoding: OtlpEncoding::Sdk,
        ca_file: None,
    }
}

/// Runs `n` requests of three spans each (two steps).
pub fn requests(tracer: &Tracer, clock: RunClock, n: u32) {
    for i in 0..n {
        let (_, trail) = tracer.start::<Step>(&HeaderMap::new(), clock.now());
        trail.note(clock.now(), || Step(i));
        trail.note(clock.now(), || Step(i + 1));
        trail.finish(clock.now());
    }
}

/// The invariants of [`Stats`] after shutdown.
pub fn assert_conserved(stats: &Stats) {
    assert_eq!(stats.records_opened, stats.records_closed, "every record is closed: {stats:#?}");
    assert_eq!(
        stats.records_closed,
        stats.records_folded
            + stats.records_dropped
            + stats.records_failed
            + stats.records_discarded
            + stats.records_expired
            + stats.records_evicted,
        "every closed record is accounted for: {stats:#?}"
    );
    for exporter in &stats.exporters {
        assert_eq!(stats.spans_created, exporter.exported + exporter.dropped.total(), "{stats:#?}");
    }
}

/// A caller's context with a trace state.
pub fn caller() -> TraceContext {
    TraceContext {
        trace_id: TraceId::new(0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c).expect("not zero"),
        span_id: SpanId::new(0xb7ad_6b71_6920_3331).expect("not zero"),
        sampled: true,
        random: true,
        tracestate: Some("ot=th:8,vendor=x".into()),
    }
}

/// Waits until `done`, which the telemetry threads bring about; fails after ten seconds.
pub fn wait_until(clock: RunClock, telemetry: &Telemetry, done: impl Fn(&Stats) -> bool) {
    let limit = clock.now() + Dur::from_secs(10);
    while !done(&telemetry.stats()) {
        assert!(clock.now() < limit, "gave up waiting: {:#?}", telemetry.stats());
        std::thread::yield_now();
    }
}
