//! The same spans over every transport, and collectors that misbehave in every way: nothing is lost without being counted, and
//! nobody waits longer than the flush timeout.

mod support;

use opentelemetry_proto::tonic::trace::v1::TracesData;
use shared::clock::RunClock;
use shared::time::{Anchor, Dur};
use shared::trace::config::{ExporterConfig, OtlpConfig, OtlpEncoding, OtlpProtocol};
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

fn direct(otlp: OtlpConfig) -> OtlpConfig {
    OtlpConfig { encoding: OtlpEncoding::Direct, ..otlp }
}

/// Every transport with every encoding, to `endpoint`.
fn all_kinds(endpoint: &str) -> Vec<OtlpConfig> {
    let kinds = [OtlpProtocol::Grpc, OtlpProtocol::HttpProtobuf].map(|protocol| otlp(protocol, endpoint));
    kinds.iter().cloned().chain(kinds.iter().cloned().map(direct)).collect()
}

/// The same to collectors of their own, which give this answer.
fn all_with(answer: &Answer) -> (Vec<Collector>, Vec<ExporterConfig>) {
    let each = all_kinds("").into_iter().map(|kind| {
        let collector = match kind.protocol {
            OtlpProtocol::Grpc => Collector::grpc(answer.clone()),
            OtlpProtocol::HttpProtobuf => Collector::http(answer.clone()),
        };
        let endpoint = otlp(kind.protocol, &collector.url()).endpoint;
        (collector, ExporterConfig::Otlp(OtlpConfig { endpoint, ..kind }))
    });
    each.unzip()
}

#[test]
fn the_same_spans_over_grpc_http_gzip_and_file() {
    let grpc: [_; 4] = std::array::from_fn(|_| Collector::grpc(Answer::Accept));
    let http: [_; 4] = std::array::from_fn(|_| Collector::http(Answer::Accept));
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
        ExporterConfig::Otlp(direct(with_header(over_grpc(&grpc[2])))),
        ExporterConfig::Otlp(direct(gzip(over_grpc(&grpc[3])))),
        ExporterConfig::Otlp(direct(with_header(over_http(&http[2])))),
        ExporterConfig::Otlp(direct(gzip(over_http(&http[3])))),
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

    // Bytes are counted where they are known, the same by either encoding.
    let bytes: Vec<_> = stats.exporters.iter().map(|e| e.bytes).collect();
    assert_eq!((bytes[0], bytes[1]), (None, None), "the SDK does not tell");
    assert_eq!(bytes[2], bytes[6]);
    // One message of gRPC: a byte for compression and four for the length.
    assert_eq!(bytes[4], bytes[6].map(|n| n + 5));
    assert!(bytes[5] < bytes[4] && bytes[7] < bytes[6], "{bytes:?}");

    // The file is read by OpenTelemetry's own types, not by our reader.
    let text = std::fs::read_to_string(&path).expect("the file");
    let lines = text.lines().map(|l| serde_json::from_str::<TracesData>(l).expect("OTLP JSON"));
    let expect = by_resource(lines.flat_map(|d| d.resource_spans).collect());
    assert_eq!(expect.len(), 2);
    for collector in grpc.iter().chain(&http) {
        assert_eq!(by_resource(collector.spans()), expect);
    }
    for collector in [&grpc[0], &http[0], &grpc[2], &http[2]] {
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
    for closed in all_kinds(&format!("http://{}", closed_port())) {
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
    for encoding in [OtlpEncoding::Sdk, OtlpEncoding::Direct] {
        let collector = Collector::http(Answer::Accept);
        let endpoint = format!("{}/v1/traces?key=secret", collector.url());
        let with_key = OtlpConfig { endpoint, encoding, ..otlp(OtlpProtocol::HttpProtobuf, "") };
        let (stats, _) = run(config(vec![ExporterConfig::Otlp(with_key)]), 1);
        assert_eq!(stats.exporters[0].exported, 3, "{stats:#?}");
        assert_eq!(stats.exporters[0].name, format!("otlp http/protobuf {}/v1/traces", collector.url()));
        assert_eq!(collector.queries(), ["key=secret"]);
    }
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
    let (_listener, url) = silent();
    for kind in all_kinds(&url) {
        let flush_timeout = Dur::from_millis(200);
        let exporters = vec![ExporterConfig::Otlp(kind)];
        let (stats, took) = run(TelemetryConfig { flush_timeout, ..config(exporters) }, 3);
        assert_eq!(stats.exporters[0].dropped.shutdown, 9, "{stats:#?}");
        assert!(took < Dur::from_secs(2), "{took}");
    }
}

#[test]
fn a_silent_collector_is_given_up_after_the_timeout() {
    let (_listener, url) = silent();
    for kind in all_kinds(&url) {
        let silent = OtlpConfig { timeout: Dur::from_millis(100), ..kind };
        let (stats, _) = run(config(vec![ExporterConfig::Otlp(silent)]), 3);
        assert_eq!(stats.exporters[0].dropped.export_failed, 9, "{stats:#?}");
        assert_eq!(stats.exporters[0].last_error.as_deref(), Some("no answer within 100 ms"));
    }
}

#[test]
fn a_slow_collector_costs_only_its_own_spans() {
    let (_listener, url) = silent();
    for kind in all_kinds(&url) {
        let memory = MemorySpans::default();
        let exporters = vec![ExporterConfig::Otlp(kind), ExporterConfig::Memory(memory.clone())];
        let flush_timeout = Dur::from_millis(100);
        let config = TelemetryConfig { max_queue: 60, max_batch: 30, flush_timeout, ..config(exporters) };
        let (stats, _) = run(config, 100);
        let slow = &stats.exporters[0];
        assert_eq!((slow.dropped.shutdown, slow.dropped.queue_full), (60, 240), "{stats:#?}");
        assert_eq!(memory.take().spans.len(), 300);
    }
}

#[test]
fn refusals_are_counted_and_named() {
    let (collectors, exporters) = all_with(&Answer::Refuse(400));
    let (stats, _) = run(config(exporters), 3);
    let texts = ["ResourceExhausted", "the collector answered 400 Bad Request"];
    for ((exporter, collector), text) in stats.exporters.iter().zip(&collectors).zip(texts.iter().cycle()) {
        assert_eq!(exporter.dropped.export_failed, 9, "{stats:#?}");
        assert!(exporter.last_error.as_deref().is_some_and(|e| e.contains(text)), "{stats:#?}");
        assert_eq!(collector.requests(), 1, "not to be retried");
    }
}

#[test]
fn a_collector_that_is_unavailable_for_a_moment_gets_everything() {
    let (collectors, exporters) = all_with(&Answer::RefuseFirst(2));
    let (stats, _) = run(config(exporters), 3);
    assert!(stats.exporters.iter().all(|e| e.exported == 9), "{stats:#?}");
    assert!(collectors.iter().all(|c| c.requests() == 3));
}

#[test]
fn a_partial_success_is_counted_where_it_is_seen() {
    let (_collectors, exporters) = all_with(&Answer::Body(vec![0x0a, 0x02, 0x08, 0x04]));
    let (stats, _) = run(config(exporters), 3);
    let counts: Vec<_> = stats.exporters.iter().map(|e| (e.exported, e.dropped.export_failed)).collect();
    // The SDK does not show it over gRPC.
    assert_eq!(counts, [(9, 0), (5, 4), (5, 4), (5, 4)], "{stats:#?}");
}

#[test]
fn too_many_instances_are_an_error_of_the_exporter() {
    let (http, directly) = (Collector::http(Answer::Accept), Collector::http(Answer::Accept));
    let clock = RunClock::start();
    let to = |c: &Collector| otlp(OtlpProtocol::HttpProtobuf, &c.url());
    let exporters = vec![ExporterConfig::Otlp(to(&http)), ExporterConfig::Otlp(direct(to(&directly)))];
    let telemetry = Telemetry::live(config(exporters), clock).expect("telemetry");
    for i in 0..MAX_INSTANCES + 3 {
        requests(&telemetry.tracer(Resource::new("vllm", format!("{i}"))), clock, 1);
    }
    let stats = telemetry.shutdown(clock.now());
    assert_conserved(&stats);
    assert_eq!(stats.exporters[0].dropped.export_failed, 9, "{stats:#?}");
    assert!(stats.exporters[0].last_error.as_deref().is_some_and(|e| e.contains("file exporter")), "{stats:#?}");
    assert_eq!(stats.exporters[1].exported, stats.spans_created, "direct encoding has no such limit: {stats:#?}");
    assert_eq!(by_resource(directly.spans()).len(), MAX_INSTANCES + 3);
}

/// Batches are cut at `max_batch` in the middle of a record, in every form alike.
#[test]
fn batches_hold_as_many_spans_in_either_encoding() {
    let (collectors, exporters) = all_with(&Answer::Accept);
    let (stats, _) = run(TelemetryConfig { max_batch: 4, ..config(exporters) }, 9);
    assert!(stats.exporters.iter().all(|e| (e.batches, e.exported) == (7, 27)), "{stats:#?}");
    let expect = by_resource(collectors[0].spans());
    assert!(collectors.iter().all(|c| by_resource(c.spans()) == expect));
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
