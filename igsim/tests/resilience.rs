//! Engines that join, drain, crash and hang under load, in virtual time and over real sockets.

mod common;

use std::collections::BTreeMap;

use common::{Place, by_trace, findings, rows, scenario};
use shared::trace::{Kind, Span};

/// Three engines: one stays, one joins late, one is drained.
const ROLLOUT: &str = "\
name: rollout
requests: 120
engines:
  - { profile: llama-3.1-8b-h100 }
  - { profile: llama-3.1-8b-h100, joins_at: 600ms }
  - { profile: llama-3.1-8b-h100, drains_at: 800ms }
workload: { arrivals: { process: constant, rate: 80 }, prompt_tokens: 64, output_tokens: 20, streaming: 0.5 }
listen: { gateway: '127.0.0.1:0', engines: '127.0.0.1:0' }
tracing: { ratio: 1.0, exporters: [file] }
";

/// When requests were sent to each engine: the start of its first and its last attempt, in seconds.
fn attempts(rows: &[BTreeMap<String, String>]) -> BTreeMap<String, (f64, f64)> {
    let mut times: BTreeMap<String, (f64, f64)> = BTreeMap::new();
    for row in rows {
        let sent: f64 = row["sent_s"].parse().expect("a time");
        let (first, last) = times.entry(row["endpoint"].clone()).or_insert((sent, sent));
        (*first, *last) = (first.min(sent), last.max(sent));
    }
    times
}

fn rollout(place: &Place, mode: &str) -> BTreeMap<String, (f64, f64)> {
    place.write("rollout.yaml", ROLLOUT);
    place.good(&["run", "rollout.yaml", "--out", mode, "--mode", mode, "--overwrite"]);
    let report = place.report(mode);
    assert_eq!((report.sent, report.ok, report.errors), (120, 120, 0), "{mode}: {:?}", report.errors_by_kind);
    assert_eq!(findings(&place.traces(mode)).first(), None, "{mode}");
    attempts(&rows(&place.path(mode)))
}

#[test]
fn engines_get_requests_between_joining_and_draining() {
    let place = Place::new();
    let times = rollout(&place, "virtual");
    let of = |engine: &str| times[engine];
    assert!(of("engine-0").0 < 0.1 && of("engine-0").1 > 1.2, "{times:?}");
    assert!((0.6..0.8).contains(&of("engine-1").0) && of("engine-1").1 > 1.2, "{times:?}");
    assert!(of("engine-2").0 < 0.1 && (0.7..0.8).contains(&of("engine-2").1), "{times:?}");
}

/// I6.
#[test]
fn a_rollout_repeats_with_its_seed() {
    let place = Place::new();
    let files = || {
        rollout(&place, "virtual");
        let read = |f: &str| std::fs::read(place.path("virtual").join(f)).expect("it is there");
        [read("requests.csv"), read("traces.otlp.jsonl")]
    };
    assert!(files() == files(), "equal runs differ");
}

/// Times are those of a busy machine: what joins late and what is drained is seen, when exactly is not.
#[test]
fn a_rollout_over_real_sockets_loses_nothing() {
    let place = Place::new();
    let times = rollout(&place, "live");
    assert!(times["engine-1"].0 > 0.5, "{times:?}");
    assert!(times["engine-2"].1 < times["engine-0"].1, "{times:?}");
}

#[test]
fn an_engine_cannot_drain_before_it_joins() {
    let place = Place::new();
    place.write("bad.yaml", &ROLLOUT.replace("joins_at: 600ms", "joins_at: 2s, drains_at: 1s"));
    let ran = place.ran(&["validate", "bad.yaml"]);
    assert_eq!(ran.code, 2);
    let told = ran.out + &ran.err;
    assert!(told.contains("engines[1].drains_at: found 1s, expected a time after joins_at"), "{told}");
    place
        .write("bad.yaml", &format!("{ROLLOUT}mode: virtual\ngateway: {{ discovery: [{{ file: {{ path: x }} }}] }}\n"));
    let ran = place.ran(&["validate", "bad.yaml"]);
    let told = ran.out + &ran.err;
    assert!(told.contains("gateway.discovery") && told.contains("joins_at"), "{told}");
}

/// I1. The library's scenario holds what it promises; what was asked for elsewhere is visible as several attempts, and no stream
/// that has begun was asked for again.
#[test]
fn under_everything_at_once_no_request_is_lost() {
    let place = Place::new();
    place.good(&["run", &scenario("resilience"), "--out", "out"]);
    let report = place.report("out");
    assert_eq!(report.sent, report.ok + report.errors);
    let (set, rows) = (place.traces("out"), rows(&place.path("out")));
    assert_eq!(rows.len() as u64, report.sent);
    let traces = by_trace(&set);
    let mut retried = 0;
    for row in &rows {
        let spans = &traces[&row["trace_id"]];
        let named = |name: &str| spans.iter().filter(|s| s.name == name).copied().collect::<Vec<&Span>>();
        let attempts = named("gateway.backend.proxy");
        assert_eq!(attempts.len().to_string(), row["attempts"], "{row:?}");
        assert!(attempts.iter().all(|s| s.kind == Kind::Client), "{row:?}");
        retried += u32::from(attempts.len() > 1);
        assert!(named("gateway.response.process").len() <= 1, "{row:?}: one answer is passed on");
        if row["outcome"] == "disconnected" {
            assert_eq!(
                attempts.last().and_then(|s| s.get("error.type")?.as_str()),
                Some("connection_reset"),
                "{row:?}"
            );
        }
    }
    assert!(retried >= 3, "{retried} requests were asked for elsewhere");
}

/// Scrapes are traces beside those of requests, and change nothing about them.
#[test]
fn scrapes_are_traces_of_their_own() {
    let place = Place::new();
    place.write("rollout.yaml", ROLLOUT);
    let run = |out: &str, share: &str| {
        place.good(&["run", "rollout.yaml", "--out", out, "--mode", "virtual", "--scrapes", share]);
        (place.report(out), place.traces(out))
    };
    let ((_, without), (report, with)) = (run("without", "0"), run("with", "0.5"));
    assert_eq!(findings(&with).first(), None);
    let (scrapes, requests): (Vec<_>, Vec<_>) =
        by_trace(&with).into_values().partition(|spans| spans.iter().all(|s| s.name == "gateway.metrics.collect"));
    assert_eq!((requests.len(), report.traces.kept), (by_trace(&without).len(), 120));
    assert_eq!((report.traces.scrapes, report.traces.engine_steps), (scrapes.len() as u64, 0));
    assert!(scrapes.len() > 10, "{}", scrapes.len());
    for spans in scrapes {
        let [span] = spans[..] else { panic!("{spans:?}") };
        let ms = span.get("gateway.metrics.scrape_duration_ms").and_then(|v| v.as_f64());
        assert_eq!((span.parent, ms), (None, Some(0.2)), "two one-way delays");
    }
}
