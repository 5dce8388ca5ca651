//! Live runs from end to end: the same spans over gRPC, HTTP and file; collectors that fail cost spans, never requests.

mod common;

use common::collector::{Answer, Collector, by_resource, closed_port, silent};
use common::{Place, Ran, SPANS_PER_TRACE, TINY, assert_whole, by_trace, findings, rows};
use igsim::report::{ExporterFigures, Report};
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, TracesData};
use shared::clock::RunClock;
use shared::time::Dur;

/// Runs [`TINY`] with these exporters.
fn with_exporters(place: &Place, env: &[(&str, &str)], exporters: &str) -> Ran {
    let set = format!("tracing.exporters={exporters}");
    let ran = place.ran_with(env, &["run", "tiny.yaml", "--out", "out", "--set", &set]);
    assert_eq!(ran.code, 0, "{ran:#?}");
    ran
}

/// What a file of traces holds, read by OpenTelemetry's own types.
fn of_file(place: &Place) -> Vec<ResourceSpans> {
    let text = std::fs::read_to_string(place.path("out/traces.otlp.jsonl")).expect("the file of traces");
    let lines = text.lines().map(|line| serde_json::from_str::<TracesData>(line).expect("OTLP JSON"));
    lines.flat_map(|data| data.resource_spans).collect()
}

/// Every request was answered, and the file has every trace whole, whatever became of other exporters.
fn assert_untroubled(place: &Place) -> Report {
    let (report, set) = (place.report("out"), place.traces("out"));
    assert_eq!((report.sent, report.ok, report.errors), (12, 12, 0));
    assert_eq!(rows(&place.path("out")).len(), 12);
    let traces = by_trace(&set);
    assert_eq!((traces.len(), report.traces.kept), (12, 12));
    for spans in traces.values() {
        assert_eq!(spans.len(), SPANS_PER_TRACE);
        assert_whole(spans);
    }
    assert_eq!(findings(&set).first(), None);
    // I9.
    for exporter in &report.traces.exporters {
        assert_eq!(report.traces.spans_created, exporter.exported + exporter.dropped_total(), "{exporter:?}");
    }
    report
}

/// The figures of the exporter beside the file.
fn other(report: &Report) -> &ExporterFigures {
    let [file, other] = report.traces.exporters.as_slice() else { panic!("{:#?}", report.traces.exporters) };
    assert_eq!(file.name, "file traces.otlp.jsonl");
    other
}

#[test]
fn the_same_spans_over_grpc_http_and_file() {
    let place = Place::with_tiny();
    let (grpc, http) = (Collector::grpc(Answer::Accept), Collector::http(Answer::Accept));
    let otlp = |c: &Collector, protocol: &str| format!("{{otlp: {{url: '{}', protocol: {protocol}}}}}", c.url());
    with_exporters(&place, &[], &format!("[file, {}, {}]", otlp(&grpc, "grpc"), otlp(&http, "http/protobuf")));
    assert_untroubled(&place);
    let expect = by_resource(of_file(&place));
    assert_eq!(expect.len(), 3, "a gateway and two engines");
    assert_eq!(expect.values().map(Vec::len).sum::<usize>(), 12 * SPANS_PER_TRACE);
    // Ids, names, parents, kinds, times, attributes, events, links, status: all of it.
    assert!(by_resource(grpc.spans()) == expect, "gRPC and the file differ");
    assert!(by_resource(http.spans()) == expect, "HTTP and the file differ");
}

#[test]
fn a_finished_run_is_sent_as_it_was_written() {
    let place = Place::with_tiny();
    place.good(&["run", "tiny.yaml", "--out", "out"]);
    let http = Collector::http(Answer::Accept);
    let ran = place.good(&["send", "out", "--otlp", &http.url()]);
    let spans = 12 * SPANS_PER_TRACE;
    assert!(ran.out.starts_with(&format!("{spans} spans read, {spans} accepted and 0 dropped")), "{}", ran.out);
    assert!(by_resource(http.spans()) == by_resource(of_file(&place)), "what was sent differs from the file");
    let closed = format!("http://{}", closed_port());
    let refused = place.ran_with(&[("OTEL_EXPORTER_OTLP_TIMEOUT", "300")], &["send", "out", "--otlp", &closed]);
    assert_eq!(refused.code, 3, "{refused:#?}");
}

#[test]
fn a_virtual_run_is_sent_when_it_is_over() {
    let place = Place::with_tiny();
    let http = Collector::http(Answer::Accept);
    let run = |out: &str, id: &[&str]| {
        let args = ["run", "tiny.yaml", "--mode", "virtual", "--otlp", &http.url(), "--out", out];
        place.good(&[args.as_slice(), id].concat()).err
    };
    let said = run("out", &["--run-id", "first"]);
    assert!(said.contains(&format!("by otlp http/protobuf {}/v1/traces, run id first", http.url())), "{said}");
    let sent = |of: &Collector| -> Vec<Vec<u8>> {
        let spans = of.spans().into_iter().flat_map(|g| g.scope_spans).flat_map(|s| s.spans);
        let mut ids: Vec<Vec<u8>> = spans.map(|s| s.trace_id).collect();
        ids.sort();
        ids.dedup();
        ids
    };
    let first = sent(&http);
    assert_eq!(first.len(), 12);
    run("again", &["--run-id", "first"]);
    assert_eq!(sent(&http), first, "the same run id repeats the trace ids");
    run("other", &[]);
    assert_eq!(sent(&http).len(), 24, "a run id of its own makes other trace ids");
}

/// I10: nobody listens.
#[test]
fn a_closed_port_costs_spans_and_no_request() {
    for protocol in ["grpc", "http/protobuf"] {
        let place = Place::with_tiny();
        let url = format!("http://{}", closed_port());
        let env = [("OTEL_EXPORTER_OTLP_TIMEOUT", "300")];
        let ran = with_exporters(&place, &env, &format!("[file, {{otlp: {{url: '{url}', protocol: {protocol}}}}}]"));
        let report = assert_untroubled(&place);
        let lost = other(&report);
        assert_eq!((lost.exported, lost.dropped["export_failed"]), (0, report.traces.spans_created), "{lost:?}");
        assert!(
            lost.last_error.as_deref().is_some_and(|e| e.to_lowercase().contains("connection refused")),
            "{lost:?}"
        );
        assert!(ran.out.contains("0 exported + 288 dropped"), "{}", ran.out);
    }
}

/// I10: the connection is accepted and nothing ever comes back. The process ends within the flush timeout of 5 s.
#[test]
fn a_collector_that_never_answers_delays_neither_requests_nor_the_end_for_long() {
    let (_grpc, grpc_url) = silent();
    let (_http, http_url) = silent();
    let place = Place::with_tiny();
    let otlp = |url: &str, protocol: &str| format!("{{otlp: {{url: '{url}', protocol: {protocol}}}}}");
    let clock = RunClock::start();
    let set = format!("[file, {}, {}]", otlp(&grpc_url, "grpc"), otlp(&http_url, "http/protobuf"));
    with_exporters(&place, &[], &set);
    let took = clock.now().since(shared::time::Time::ZERO);
    let report = assert_untroubled(&place);
    // The slack is for a busy machine; without the flush timeout it would be the 10 s of an export.
    assert!(took < Dur::from_secs(9), "{took}");
    assert!(report.e2e_ms.max < 4000.0, "requests did not wait: {:?}", report.e2e_ms);
    let [_, grpc, http] = report.traces.exporters.as_slice() else { panic!("{:#?}", report.traces.exporters) };
    for lost in [grpc, http] {
        assert_eq!((lost.exported, lost.dropped["shutdown"]), (0, report.traces.spans_created), "{lost:?}");
    }
}

/// I10: a queue that is full drops spans and says so.
#[test]
fn a_collector_that_is_behind_costs_only_spans() {
    let (_listener, url) = silent();
    let place = Place::with_tiny();
    let env = [
        ("OTEL_BSP_MAX_QUEUE_SIZE", "48"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "24"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "400"),
    ];
    with_exporters(&place, &env, &format!("[file, {{otlp: {{url: '{url}', protocol: http/protobuf}}}}]"));
    let report = assert_untroubled(&place);
    let lost = other(&report);
    assert_eq!(lost.exported, 0);
    assert!(lost.dropped.get("queue_full").is_some_and(|n| *n > 0), "{lost:?}");
}

/// Ratio sampling is the same decision in every service: a trace is whole or not there at all.
#[test]
fn sampled_traces_are_whole_and_the_others_absent() {
    let place = Place::new();
    place.write("tiny.yaml", &TINY.replace("requests: 12", "requests: 150").replace("rate: 100", "rate: 400"));
    place.good(&["run", "tiny.yaml", "--out", "out", "--sampling", "0.1"]);
    let (report, set, rows) = (place.report("out"), place.traces("out"), rows(&place.path("out")));
    assert_eq!((report.ok, report.traces.decided), (150, 150));
    let expected = report.traces.expected_low..=report.traces.expected_high;
    assert_eq!(expected, 6..=25);
    let traces = by_trace(&set);
    let sampled: Vec<&String> = rows.iter().filter(|r| r["sampled"] == "true").map(|r| &r["trace_id"]).collect();
    assert_eq!((traces.len(), report.traces.kept), (sampled.len(), sampled.len() as u64));
    assert!(sampled.iter().all(|id| traces.contains_key(*id)));
    traces.values().for_each(|spans| assert_whole(spans));
    assert_eq!(findings(&set).first(), None);
    // Live ids are random: this bound is three times wider than the interval, to fail for a wrong ratio and not for bad luck.
    assert!((1..=45).contains(&report.traces.kept), "{} of 150 kept", report.traces.kept);
}
