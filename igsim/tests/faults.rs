//! Faults from end to end: every kind in virtual time, the same seed gives the same faults, and a crash over real sockets.

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::{Place, by_trace, findings, rows, scenario};
use igsim::report::Report;
use shared::trace::{Span, Status};

/// Forty requests to two engines, of which the second one has faults.
fn small(faults: &str, more: &str) -> String {
    format!(
        "name: small\nmode: virtual\nrequests: 40\n\
         engines:\n  - {{ profile: llama-3.1-8b-h100 }}\n  - {{ profile: llama-3.1-8b-h100, faults: {faults} }}\n\
         workload:\n  arrivals: {{ process: constant, rate: 50 }}\n  prompt_tokens: 64\n  output_tokens: 20\n  streaming: 0.5\n\
         tracing: {{ ratio: 1.0, exporters: [file] }}\n{more}"
    )
}

/// Runs it; every request ends, and rows, figures and traces agree about how.
fn run(place: &Place, faults: &str, more: &str) -> Report {
    place.write("small.yaml", &small(faults, more));
    place.good(&["run", "small.yaml", "--out", "out", "--overwrite"]);
    let (report, set, rows) = (place.report("out"), place.traces("out"), rows(&place.path("out")));
    assert_eq!((report.sent, report.ok + report.errors, rows.len()), (40, 40, 40));
    assert_eq!(findings(&set).first(), None, "{faults}");
    let traces = by_trace(&set);
    for row in &rows {
        agree(row, &traces[&row["trace_id"]]);
    }
    report
}

/// What the row says of its end is what the trace shows.
fn agree(row: &BTreeMap<String, String>, spans: &[&Span]) {
    let root = spans.iter().find(|s| s.parent.is_none()).expect("a root");
    let failed = matches!(root.status, Status::Error(_));
    let expect = match row["outcome"].as_str() {
        "ok" => false,
        // The caller's mistake; and an error event in a stream, which a gateway passes on unread.
        "http_429" | "protocol" => false,
        _ => true,
    };
    assert_eq!(failed, expect, "{row:?}: {root:?}");
    let attempts = spans.iter().filter(|s| s.name == "gateway.backend.proxy").count();
    assert_eq!(attempts.to_string(), row["attempts"], "{row:?}");
}

/// Error kinds, retries and the named figure of a run with these faults.
fn check(faults: &str, more: &str, figure: &str, kinds: &[&str], retries: bool) {
    let place = Place::new();
    let report = run(&place, faults, more);
    let found: Vec<&str> = report.errors_by_kind.keys().map(String::as_str).collect();
    assert_eq!(found, kinds, "{faults}: {report:#?}");
    assert_eq!(report.routing.retries > 0, retries, "{faults}: {}", report.routing.retries);
    let figures = serde_json::to_value(&report.engines.faults).unwrap();
    assert!(figures[figure].as_u64() > Some(0), "{faults}: {figures}");
}

#[test]
fn every_kind_of_fault_ends_in_an_answer_or_a_clear_error() {
    let short = "gateway: { timeouts: { response_head: 2s, total: 3s } }\n";
    check("[{kind: crash, at: 300ms}]", "", "crash", &["disconnected"], true);
    check("[{kind: crash, at: 300ms, for: 100ms}]", "", "requests_lost", &["disconnected"], true);
    // A stream ends with an error event, a whole answer with 500; later requests find nobody and go elsewhere.
    check("[{kind: engine_dead, at: 300ms}]", "", "engine_dead", &["http_500", "protocol"], true);
    check("[{kind: hang, at: 300ms, for: 200ms}]", "", "hang", &[], false);
    // Without an end the gateway's time limits are what ends it.
    check("[{kind: hang, at: 300ms}]", short, "hang", &["disconnected", "http_504"], false);
    check("[{kind: slow, at: 100ms, factor: 4}]", "", "slow", &[], false);
    check("[{kind: http_error, rate: 0.5, status: 503}]", "", "http_error", &["http_503"], false);
    check("[{kind: http_error, rate: 0.5, status: 429}]", "", "http_error", &["http_429"], false);
    check("[{kind: cut_stream, after_tokens: 5}]", "", "cut_stream", &["disconnected"], true);
    check("[{kind: cut_stream, rate: 0.5, after_tokens: 0}]", "", "cut_stream", &[], true);
    check("[{kind: metrics_stale}]", "", "metrics_stale", &[], false);
    check("[{kind: metrics_error}]", "", "metrics_error", &[], false);
    check("[{kind: metrics_timeout}]", "", "metrics_timeout", &[], false);
}

/// Every engine is gone: each request is refused with the gateway's own error.
#[test]
fn with_no_engine_left_the_gateway_says_so() {
    let place = Place::new();
    place.write("small.yaml", &small("[{kind: crash}]", ""));
    let both = "engines=[{profile: llama-3.1-8b-h100, count: 2, faults: [{kind: crash, at: 10ms}]}]";
    place.good(&["run", "small.yaml", "--out", "out", "--set", both, "--set", "workload.arrivals.rate=5"]);
    let report = place.report("out");
    let kinds: BTreeSet<&str> = report.errors_by_kind.keys().map(String::as_str).collect();
    assert!(kinds.is_subset(&BTreeSet::from(["http_502", "http_503", "disconnected"])), "{kinds:?}");
    assert!(report.errors > 30, "{}", report.errors);
    assert_eq!(findings(&place.traces("out")).first(), None);
}

/// I6.
#[test]
fn the_same_seed_gives_the_same_faults() {
    let place = Place::new();
    let faults = "[{kind: http_error, rate: 0.3, status: 503}, {kind: crash, mean_between: 200ms, for: 50ms}, \
                  {kind: cut_stream, rate: 0.3, after_tokens: {min: 1, max: 9}}]";
    place.write("small.yaml", &small(faults, ""));
    let files = |out: &str, seed: &str| {
        place.good(&["run", "small.yaml", "--out", out, "--seed", seed]);
        ["requests.csv", "report.json", "traces.otlp.jsonl"].map(|f| std::fs::read(place.path(out).join(f)).unwrap())
    };
    let first = files("a", "3");
    assert!(first == files("b", "3"), "equal runs differ");
    assert_ne!(first[0], files("c", "4")[0]);
}

/// A recorded request that was in the engine says what struck it; a stale page is no one request's affair.
#[test]
fn a_struck_request_says_so_in_its_trace() {
    let place = Place::new();
    run(&place, "[{kind: crash, at: 300ms}]", "");
    let set = place.traces("out");
    let lost: Vec<&Span> =
        set.spans.iter().filter(|s| s.events.iter().any(|e| e.name == "vllm.fault_injected")).collect();
    assert_eq!(lost.len() as u64, place.report("out").engines.faults.requests_lost);
    for span in lost {
        assert_eq!(span.get("error.type").and_then(|v| v.as_str()), Some("engine_crashed"));
        assert!(matches!(span.status, Status::Error(_)));
    }
}

#[test]
fn a_rule_that_makes_no_sense_is_told_with_its_path() {
    let place = Place::new();
    let said = |faults: &str| {
        place.write("bad.yaml", &small(faults, ""));
        let ran = place.ran(&["run", "bad.yaml", "--out", "out"]);
        assert_eq!(ran.code, 2, "{ran:#?}");
        ran.err
    };
    let found = said("[{kind: slow, factor: 3, at: 1s, mean_between: 1s, for: 1s}]");
    assert!(found.contains("engines[1].faults[0].mean_between: found both at and mean_between"), "{found}");
    let found = said("[{kind: http_error, status: 200}]");
    assert!(found.contains("engines[1].faults[0].status"), "{found}");
    let found = said("[{kind: meteor}]");
    assert!(found.contains("engines[1].faults[0]") && found.contains("crash"), "{found}");
}

/// The library's crash over real sockets, shortened: what can be is answered by the other engines, nothing hangs.
#[test]
fn a_crash_over_real_sockets_is_survived() {
    let place = Place::new();
    let file = scenario("faults-crash");
    let crash = "engines[1].faults=[{kind: crash, at: 700ms, for: 500ms}]";
    let ports = ["--set", "listen.gateway=127.0.0.1:0", "--set", "listen.engines=127.0.0.1:0"];
    let options = ["run", &file, "--out", "out", "--set", "duration=2s", "--set", crash];
    // A busy machine may be late; that is no matter here.
    place.good(&[options.as_slice(), ports.as_slice()].concat());
    let report = place.report("out");
    assert_eq!(report.sent, report.ok + report.errors);
    assert!(report.ok > report.sent / 2, "{report:#?}");
}
