//! The same spans over every transport, and collectors that misbehave in every way: nothing is lost without being counted, and
//! nobody waits longer than the flush timeout.

mod support;

use opentelemetry_proto::tonic::trace::v1::TracesData;
use shared::clock::RunClock;
use shared::time::{Anchor, Dur};
use shared::trace::config::{ExporterConfig, OtlpConfig, OtlpProtocol};
use shared::trace::exporter::memory::MemorySpans;
use shared::trace::exporter::otlp::{MAX_INSTANCES, send};
use shared::trace::{Resource, Stats, Telemetry, TelemetryConfig, otlp_json};
use support::collector::{Answer, Collector, by_resource, closed_port, silent};
use support::{Everything, assert_conserved, caller, config, otlp, requests};

/// Runs requests of three spans each against `exporters`, shuts down and returns the counts and how long shutdown took.
fn run(config: TelemetryConfig, n: u32) -> (Stats, Dur) {
    let clock = RunClock::start();
    let telemetry = Telemetry::live(config, clock).expect("telemetry");
    requests(&telemetry.tracer(Resource::new("test", "one")), clock, n);
    let before = clock.now();
    let stats = telemetry.shutdown(before);
    assert_conserved(&stats);
    (stats, clock.now() - before)
}

fn gzip(otlp: OtlpConfig) -> OtlpConfig {
    OtlpConfig { gzip: true, ..otlp }
}

#[test]
fn the_same_spans_over_grpc_http_gzip_and_file() {
    let grpc = [Collector::grpc(Answer::Accept), Collector::grpc(Answer::Accept)];
    let http = [Collector::http(Answer::Accept), Collector::http(Answer::Accept)];
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("sub/traces.jsonl");
    let memory = MemorySpans::default();
    let over_grpc = |c: &Collector| otlp(OtlpProtocol::Grpc, &c.url());
    let over_http = |c: &Collector| otlp(OtlpProtocol::HttpProtobuf, &c.url());
    let with_header =
        |c: OtlpConfig| OtlpConfig { headers: vec![("authorization".to_owned(), "Basic x".to_owned())], ..c };
    let exporters = vec![
        ExporterConfig::Otlp(with_header(over_grpc(&grpc[0]))),
        ExporterConfig::Otlp(gzip(over_grpc(&grpc[1]))),
        ExporterConfig::Otlp(with_header(over_http(&http[0]))),
        ExporterConfig::Otlp(gzip(over_http(&http[1]))),
        ExporterConfig::File(path.clone()),
        ExporterConfig::Memory(memory.clone()),
    ];
    let clock = RunClock::start();
    let telemetry = Telemetry::live(config(exporters), clock).expect("telemetry");
    for (service, parent) in [("gateway", Some(caller())), ("vllm", None)] {
        let tracer = telemetry.tracer(Resource { host_name: Some("h".into()), ..Resource::new(service, "0") });
        let started = tracer.begin(parent);
        tracer.open::<Everything>(&started, clock.now()).finish(clock.now());
    }
    assert!(telemetry.flush(Dur::from_secs(10)));
    let stats = telemetry.shutdown(clock.now());
    assert_conserved(&stats);
    assert_eq!(stats.spans_created, 6);
    assert!(stats.exporters.iter().all(|e| e.exported == 6 && e.last_error.is_none()), "{stats:#?}");

    // The file is read by OpenTelemetry's own types, not by our reader.
    let text = std::fs::read_to_string(&path).expect("the file");
    let lines = text.lines().map(|l| serde_json::from_str::<TracesData>(l).expect("OTLP JSON"));
    let expect = by_resource(lines.flat_map(|d| d.resource_spans).collect());
    assert_eq!(expect.len(), 2);
    for collector in grpc.iter().chain(&http) {
        assert_eq!(by_resource(collector.spans()), expect);
    }
    for collector in [&grpc[0], &http[0]] {
        assert!(collector.headers().iter().all(|h| h.get("authorization").is_some_and(|v| v == "Basic x")));
    }

    // Our reader gets back what memory kept, up to the anchor.
    let read = otlp_json::read_file(&path).expect("our own file");
    let kept = memory.take();
    assert_eq!(read.resources, kept.resources);
    let absolute = |set: &shared::trace::TraceSet| {
        let spans = set.spans.iter().map(|s| (s.span_id, set.anchor.unix_nanos(s.start), set.anchor.unix_nanos(s.end)));
        spans.collect::<std::collections::BTreeSet<_>>()
    };
    assert_eq!(absolute(&read), absolute(&kept));

    // Spot checks against what the fold set.
    let server = expect.values().flatten().find(|s| s.name == "test.server" && !s.parent_span_id.is_empty());
    let server = server.expect("the gateway's server span");
    assert_eq!((server.kind, server.flags, server.trace_state.as_str()), (2, 0x301, "ot=th:8,vendor=x"));
    assert_eq!(server.parent_span_id, caller().span_id.get().to_be_bytes());
    assert_eq!((server.attributes.len(), server.events.len()), (10, 2));
    let client = expect.values().flatten().find(|s| s.name == "test.client").expect("a client span");
    assert_eq!((client.links.len(), client.status.as_ref().map(|s| s.code)), (1, Some(2)));
}

#[test]
fn a_closed_port_costs_spans_and_says_so() {
    for protocol in [OtlpProtocol::Grpc, OtlpProtocol::HttpProtobuf] {
        let closed = otlp(protocol, &format!("http://{}", closed_port()));
        let closed = OtlpConfig { timeout: Dur::from_millis(300), ..closed };
        let (stats, _) = run(config(vec![ExporterConfig::Otlp(closed)]), 3);
        let exporter = &stats.exporters[0];
        assert_eq!((exporter.exported, exporter.dropped.export_failed), (0, 9), "{stats:#?}");
        let error = exporter.last_error.as_deref().unwrap_or_default();
        assert!(error.to_lowercase().contains("connection refused"), "{error}");
    }
}

#[test]
fn a_key_in_the_query_is_sent_and_never_shown() {
    let collector = Collector::http(Answer::Accept);
    let url = format!("{}/v1/traces?key=secret", collector.url());
    let with_key = OtlpConfig { endpoint: url, ..otlp(OtlpProtocol::HttpProtobuf, "") };
    let (stats, _) = run(config(vec![ExporterConfig::Otlp(with_key)]), 1);
    assert_eq!(stats.exporters[0].exported, 3, "{stats:#?}");
    assert_eq!(stats.exporters[0].name, format!("otlp http/protobuf {}/v1/traces", collector.url()));
    assert_eq!(collector.queries(), ["key=secret"]);
}

#[test]
fn credentials_before_the_host_are_refused_without_showing_them() {
    for protocol in [OtlpProtocol::Grpc, OtlpProtocol::HttpProtobuf] {
        let endpoint = "http://user:secret@h:4318".to_owned();
        let exporters = vec![ExporterConfig::Otlp(OtlpConfig { endpoint, ..otlp(protocol, "") })];
        let error = Telemetry::live(config(exporters), RunClock::start()).expect_err("an error").to_string();
        assert!(error.contains("http://***@h:4318: a URL without user name"), "{error}");
        assert!(!error.contains("secret"), "{error}");
    }
}

#[test]
fn a_silent_collector_does_not_delay_the_end() {
    for protocol in [OtlpProtocol::Grpc, OtlpProtocol::HttpProtobuf] {
        let (_listener, url) = silent();
        let flush_timeout = Dur::from_millis(200);
        let exporters = vec![ExporterConfig::Otlp(otlp(protocol, &url))];
        let (stats, took) = run(TelemetryConfig { flush_timeout, ..config(exporters) }, 3);
        assert_eq!(stats.exporters[0].dropped.shutdown, 9, "{stats:#?}");
        assert!(took < Dur::from_secs(2), "{took}");
    }
}

#[test]
fn a_silent_collector_is_given_up_after_the_timeout() {
    let (_listener, url) = silent();
    let silent = OtlpConfig { timeout: Dur::from_millis(100), ..otlp(OtlpProtocol::HttpProtobuf, &url) };
    let (stats, _) = run(config(vec![ExporterConfig::Otlp(silent)]), 3);
    assert_eq!(stats.exporters[0].dropped.export_failed, 9, "{stats:#?}");
    assert_eq!(stats.exporters[0].last_error.as_deref(), Some("no answer within 100 ms"));
}

#[test]
fn a_slow_collector_costs_only_its_own_spans() {
    let (_listener, url) = silent();
    let memory = MemorySpans::default();
    let exporters = vec![ExporterConfig::Otlp(otlp(OtlpProtocol::Grpc, &url)), ExporterConfig::Memory(memory.clone())];
    let config =
        TelemetryConfig { max_queue: 60, max_batch: 30, flush_timeout: Dur::from_millis(100), ..config(exporters) };
    let (stats, _) = run(config, 100);
    let slow = &stats.exporters[0];
    assert_eq!((slow.dropped.shutdown, slow.dropped.queue_full), (60, 240), "{stats:#?}");
    assert_eq!(memory.take().spans.len(), 300);
}

#[test]
fn refusals_are_counted_and_named() {
    let http = Collector::http(Answer::Refuse(400));
    let grpc = Collector::grpc(Answer::Refuse(0));
    let exporters = vec![
        ExporterConfig::Otlp(otlp(OtlpProtocol::HttpProtobuf, &http.url())),
        ExporterConfig::Otlp(otlp(OtlpProtocol::Grpc, &grpc.url())),
    ];
    let (stats, _) = run(config(exporters), 3);
    for (exporter, text) in stats.exporters.iter().zip(["the collector answered 400 Bad Request", "ResourceExhausted"])
    {
        assert_eq!(exporter.dropped.export_failed, 9, "{stats:#?}");
        assert!(exporter.last_error.as_deref().is_some_and(|e| e.contains(text)), "{stats:#?}");
    }
    assert_eq!((http.requests(), grpc.requests()), (1, 1), "not to be retried");
}

#[test]
fn a_collector_that_is_unavailable_for_a_moment_gets_everything() {
    let http = Collector::http(Answer::RefuseFirst(2));
    let grpc = Collector::grpc(Answer::RefuseFirst(2));
    let exporters = vec![
        ExporterConfig::Otlp(otlp(OtlpProtocol::HttpProtobuf, &http.url())),
        ExporterConfig::Otlp(otlp(OtlpProtocol::Grpc, &grpc.url())),
    ];
    let (stats, _) = run(config(exporters), 3);
    assert!(stats.exporters.iter().all(|e| e.exported == 9), "{stats:#?}");
    assert_eq!((http.requests(), grpc.requests()), (3, 3));
}

#[test]
fn a_partial_success_over_http_is_counted() {
    let http = Collector::http(Answer::Body(vec![0x0a, 0x02, 0x08, 0x04]));
    let (stats, _) = run(config(vec![ExporterConfig::Otlp(otlp(OtlpProtocol::HttpProtobuf, &http.url()))]), 3);
    let exporter = &stats.exporters[0];
    assert_eq!((exporter.exported, exporter.dropped.export_failed), (5, 4), "{stats:#?}");
}

#[test]
fn too_many_instances_are_an_error_of_the_exporter() {
    let http = Collector::http(Answer::Accept);
    let clock = RunClock::start();
    let exporters = vec![ExporterConfig::Otlp(otlp(OtlpProtocol::HttpProtobuf, &http.url()))];
    let telemetry = Telemetry::live(config(exporters), clock).expect("telemetry");
    for i in 0..MAX_INSTANCES + 3 {
        requests(&telemetry.tracer(Resource::new("vllm", format!("{i}"))), clock, 1);
    }
    let stats = telemetry.shutdown(clock.now());
    assert_conserved(&stats);
    assert_eq!(stats.exporters[0].dropped.export_failed, 9, "{stats:#?}");
    assert!(stats.exporters[0].last_error.as_deref().is_some_and(|e| e.contains("file exporter")), "{stats:#?}");
}

#[test]
fn a_finished_run_is_sent_with_its_time_shifted() {
    let memory = MemorySpans::default();
    run(config(vec![ExporterConfig::Memory(memory.clone())]), 1_000);
    let set = memory.take();
    let http = Collector::http(Answer::Accept);
    let anchor = Anchor::from_unix_nanos(1_000_000);
    let sent = send(&set, &otlp(OtlpProtocol::HttpProtobuf, &http.url()), anchor).expect("a sender");
    assert_eq!((sent.exported, sent.dropped.total(), sent.batches), (3_000, 0, 2));
    let starts = http.spans().into_iter().flat_map(|g| g.scope_spans).flat_map(|s| s.spans);
    let first = starts.map(|s| s.start_time_unix_nano).min();
    assert_eq!(first, set.spans.iter().map(|s| anchor.unix_nanos(s.start)).min());
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_costs_spans_and_says_so() {
    let (stats, _) = run(config(vec![ExporterConfig::File("/dev/full".into())]), 3);
    let exporter = &stats.exporters[0];
    assert_eq!((exporter.exported, exporter.dropped.export_failed), (0, 9), "{stats:#?}");
    assert!(exporter.last_error.as_deref().is_some_and(|e| e.contains("No space left")), "{stats:#?}");
}

#[test]
fn a_trace_file_that_cannot_be_created_is_an_error_at_the_start() {
    let folder = tempfile::tempdir().expect("a folder");
    let exporters = vec![ExporterConfig::File(folder.path().to_owned())];
    let error = Telemetry::live(config(exporters), RunClock::start()).expect_err("a folder is no file");
    assert!(error.to_string().starts_with("cannot create the trace file"), "{error}");
}
