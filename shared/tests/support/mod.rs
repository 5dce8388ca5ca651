//! What the telemetry tests share: records to export, and collectors to export them to.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part")]

pub mod collector;

use std::sync::Arc;

use shared::clock::RunClock;
use shared::ids::{SpanId, TraceId};
use shared::time::Dur;
use shared::trace::config::{ExporterConfig, OtlpConfig, OtlpEncoding, OtlpProtocol};
use shared::trace::sampler::Root;
use shared::trace::{
    Fact, Kind, Link, Record, Sampler, Span, Stats, Telemetry, TelemetryConfig, TraceContext, Tracer, Value,
};

/// A fact that becomes one inner span.
pub struct Step(pub u32);

impl Fact for Step {
    fn fold(record: &Record<Step>, out: &mut Vec<Span>) {
        let mut root = record.outermost("test.request", Kind::Server, record.closed);
        if record.abandoned {
            root.fail("abandoned", "nobody finished it");
        }
        let root_id = root.span_id;
        root.set("test.cut", record.cut);
        out.push(root);
        for (n, (at, step)) in record.facts.iter().enumerate() {
            let mut span = record.span("test.step", Kind::Internal, Some(root_id), record.inner_id(n), *at, *at);
            span.set("test.step.number", step.0);
            out.push(span);
        }
    }
}

/// A fact that folds into spans with everything a span can have.
pub struct Everything;

impl Fact for Everything {
    fn fold(record: &Record<Everything>, out: &mut Vec<Span>) {
        let mut server = record.outermost("test.server", Kind::Server, record.closed);
        let shared: Arc<str> = "shared text".into();
        server.set("test.str", "static").set("test.owned", "owned \"quoted\" \u{1F680}".to_owned());
        server.set("test.shared", shared).set("test.int", -7i64).set("test.max", i64::MAX);
        server.set("test.double", 0.1).set("test.bool", true);
        server.set("test.texts", Value::StrList(vec!["a".into(), "b".into()]));
        server.set("test.doubles", Value::F64List(vec![1.5, 2.0]));
        server.event("test.first", record.head.opened, vec![("test.index".into(), Value::Int(1))]);
        server.event("test.last", record.closed, Vec::new());
        let mut client = record.span(
            "test.client",
            Kind::Client,
            Some(server.span_id),
            record.inner_id(0),
            server.start,
            server.end,
        );
        client.links.push(Link {
            trace_id: TraceId::new(0xabc).expect("not zero"),
            span_id: SpanId::new(0xdef).expect("not zero"),
            attrs: vec![("test.link".into(), Value::from("why"))],
        });
        client.fail("timeout", "the backend did not answer");
        let inner = record.span(
            "test.inner",
            Kind::Internal,
            Some(client.span_id),
            record.inner_id(1),
            server.start,
            server.start,
        );
        out.extend([server, client, inner]);
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
    }
}

/// Runs `n` requests of three spans each (two steps).
pub fn requests(tracer: &Tracer, clock: RunClock, n: u32) {
    for i in 0..n {
        let started = tracer.begin(None);
        let trail = tracer.open::<Step>(&started, clock.now());
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
        stats.records_folded + stats.records_dropped + stats.records_failed,
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
