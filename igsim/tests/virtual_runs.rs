//! Virtual runs from end to end: traces are complete, requests are conserved, the same seed gives the same bytes.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use common::{Place, SPANS_PER_TRACE, assert_whole, by_trace, findings, names, rows, scenario};
use igsim::report::Report;
use shared::trace::{Span, Status, TraceSet};

/// A thousand requests of the quickstart, without sockets.
fn quickstart(place: &Place, out: &str, sampling: &str) -> (Report, TraceSet) {
    let file = scenario("quickstart");
    let options = ["--mode", "virtual", "--set", "requests=1000", "--sampling", sampling, "--out", out];
    place.good(&[["run", &file].as_slice(), options.as_slice()].concat());
    (place.report(out), place.traces(out))
}

/// Every kept trace is there and whole; a request has the spans of the catalogue.
fn assert_complete(report: &Report, set: &TraceSet) {
    let traces = by_trace(set);
    assert_eq!(traces.len() as u64, report.traces.kept);
    for spans in traces.values() {
        assert_eq!(spans.len(), SPANS_PER_TRACE);
        assert_whole(spans);
    }
    assert_eq!(findings(set).first(), None);
    let figures = &report.traces;
    assert_eq!((figures.checked, figures.incomplete, figures.orphans, figures.findings), (figures.kept, 0, 0, 0));
    assert_eq!(figures.spans_created, set.spans.len() as u64);
    assert_spans_conserved(report);
}

/// I9, as the report has it.
fn assert_spans_conserved(report: &Report) {
    for exporter in &report.traces.exporters {
        assert_eq!(report.traces.spans_created, exporter.exported + exporter.dropped_total(), "{exporter:?}");
    }
}

/// I1: what was sent is answered or failed, once, and rows, figures and traces agree about it.
fn assert_conserved(run: &Path) {
    let (report, rows) = (common::report(run), rows(run));
    assert_eq!(report.sent, report.ok + report.errors);
    assert_eq!(report.errors, report.errors_by_kind.values().sum::<u64>());
    assert_eq!(report.sent, rows.len() as u64);
    let indices: BTreeSet<u64> = rows.iter().map(|r| r["index"].parse().unwrap()).collect();
    assert_eq!(indices.len(), rows.len(), "an index twice");
    assert_eq!(indices.last().copied(), report.sent.checked_sub(1), "an index left out");
    let count = |column: &str, value: &str| rows.iter().filter(|r| r[column] == value).count() as u64;
    assert_eq!(count("outcome", "ok"), report.ok);
    for (kind, &n) in &report.errors_by_kind {
        assert_eq!(count("outcome", kind), n, "{kind}");
    }
    assert_eq!((report.traces.decided, report.traces.kept), (report.sent, count("sampled", "true")));
    let sum = |column: &str| rows.iter().map(|r| r[column].parse::<u64>().unwrap()).sum::<u64>();
    let tokens = (report.tokens.prompt, report.tokens.cached, report.tokens.output);
    assert_eq!(tokens, (sum("prompt_tokens"), sum("cached_tokens"), sum("output_tokens")));
    for row in rows.iter().filter(|r| r["outcome"] == "ok") {
        let at = |column: &str| row[column].parse::<f64>().unwrap();
        assert!(at("intended_s") <= at("sent_s") && at("sent_s") <= at("first_token_s"), "{row:?} (I3)");
        assert!(at("first_token_s") <= at("done_s"), "{row:?} (I3)");
    }
    let set = common::traces(run);
    let kept: BTreeSet<String> = by_trace(&set).into_keys().collect();
    let sampled: BTreeSet<String> =
        rows.iter().filter(|r| r["sampled"] == "true").map(|r| r["trace_id"].clone()).collect();
    assert_eq!(kept, sampled, "the traces of the file are those of the rows");
    assert_spans_conserved(&report);
}

#[test]
fn a_tenth_of_the_traces_is_kept_and_each_is_whole() {
    let place = Place::new();
    let (report, set) = quickstart(&place, "out", "0.1");
    assert_eq!((report.sent, report.traces.decided), (1000, 1000));
    // 0.5 % and 99.5 % quantiles of the binomial distribution of 1,000 draws at 0.1.
    assert_eq!((report.traces.expected_low, report.traces.expected_high), (76, 125));
    assert!((76..=125).contains(&report.traces.kept), "{} kept", report.traces.kept);
    assert_complete(&report, &set);
    assert_conserved(&place.path("out"));
}

#[test]
fn all_traces_are_kept_and_each_is_whole() {
    let place = Place::new();
    let (report, set) = quickstart(&place, "out", "1.0");
    assert_eq!((report.traces.kept, report.traces.expected_low, report.traces.expected_high), (1000, 1000, 1000));
    assert_complete(&report, &set);
    assert_conserved(&place.path("out"));
}

#[test]
fn no_trace_is_kept_at_ratio_zero() {
    let place = Place::new();
    let (report, set) = quickstart(&place, "out", "0");
    assert_eq!((report.sent, report.traces.kept, set.spans.len()), (1000, 0, 0));
}

#[test]
fn the_detail_level_decides_which_spans_there_are() {
    let place = Place::new();
    for (detail, expect) in [("1", 10), ("2", SPANS_PER_TRACE), ("3", SPANS_PER_TRACE + 10)] {
        let file = scenario("quickstart");
        let options = ["--mode", "virtual", "--set", "requests=20", "--sampling", "1", "--detail", detail];
        place.good(&[["run", &file, "--out", detail].as_slice(), options.as_slice()].concat());
        let set = place.traces(detail);
        let counts: BTreeSet<usize> = by_trace(&set).values().map(Vec::len).collect();
        assert_eq!(counts, BTreeSet::from([expect]), "detail {detail}");
        assert_eq!(findings(&set).first(), None, "detail {detail}");
    }
}

/// Steps are roots beside the traces of requests: they link to those, change nothing about them, and repeat with the seed.
#[test]
fn steps_of_engines_are_traces_beside_those_of_requests() {
    let place = Place::new();
    let run = |out: &str, steps: &str| {
        let file = scenario("quickstart");
        let options = ["--mode", "virtual", "--set", "requests=150", "--sampling", "0.2", "--engine-steps", steps];
        place.good(&[["run", &file, "--out", out].as_slice(), options.as_slice()].concat());
        (place.report(out), place.traces(out))
    };
    let (_, without) = run("without", "0");
    let (report, with) = run("with", "0.05");
    assert_eq!(findings(&with).first(), None);
    let (steps, requests): (Vec<_>, Vec<_>) =
        by_trace(&with).into_values().partition(|spans| spans.iter().any(|s| s.name == "vllm.engine.step"));
    assert_eq!(requests.len(), by_trace(&without).len());
    for (found, expect) in requests.iter().zip(by_trace(&without).into_values()) {
        assert_eq!(told(found), told(&expect), "the trace of a request is what it is without");
    }
    assert_eq!((report.traces.kept, report.traces.checked), (requests.len() as u64, requests.len() as u64));
    assert_eq!(report.traces.engine_steps, steps.len() as u64);
    assert!(steps.len() > 20, "{} steps", steps.len());
    let links: Vec<_> = steps.iter().flatten().flat_map(|s| &s.links).collect();
    assert!(!links.is_empty(), "a fifth of the requests is recorded");
    for link in links {
        let target = with.spans.iter().find(|s| (s.trace_id, s.span_id) == (link.trace_id, link.span_id));
        assert_eq!(target.map(|s| &*s.name), Some("vllm.engine.request"));
    }
    run("again", "0.05");
    let read = |run: &str| std::fs::read(place.path(run).join("traces.otlp.jsonl")).unwrap();
    assert!(read("with") == read("again"), "the same seed gives the same bytes (I6)");
    let linking = steps.iter().flatten().find(|s| !s.links.is_empty()).expect("a step with links");
    let (step, request) = (linking.trace_id.to_string(), linking.links[0].trace_id.to_string());
    let shown = place.good(&["inspect", "with", "--trace", &step]).out;
    assert!(shown.contains(&format!("links to     trace {request}")), "{shown}");
    let shown = place.good(&["inspect", "with", "--trace", &request]).out;
    assert!(shown.contains("linked from  trace ") && shown.contains("vllm.engine.step"), "{shown}");
}

/// What a file says of spans, but for the order of its resources and the time of its first span.
fn told(spans: &[&Span]) -> String {
    let one = |s: &&Span| {
        let (ids, length) = ((s.trace_id, s.span_id, s.parent), s.end - s.start);
        format!("{ids:?} {} {length} {:?} {} {:?}\n", s.name, s.attrs, s.events.len(), s.status)
    };
    spans.iter().map(one).collect()
}

/// I6.
#[test]
fn the_same_seed_gives_the_same_bytes_and_another_one_does_not() {
    let place = Place::new();
    for name in ["quickstart", "multi-turn", "overload"] {
        let file = scenario(name);
        let run = |out: &str, seed: &str| {
            let extent = if name == "quickstart" { "requests=300" } else { "duration=15s" };
            let options = ["--mode", "virtual", "--seed", seed, "--set", extent, "--sampling", "0.2"];
            let ran = place.ran(&[["run", &file, "--out", out].as_slice(), options.as_slice()].concat());
            assert_eq!(ran.code, 0, "{ran:#?}");
        };
        let [first, again, other] = ["1", "2", "3"].map(|n| format!("{name}-{n}"));
        run(&first, "7");
        run(&again, "7");
        run(&other, "8");
        let read = |run: &str, file: &str| std::fs::read(place.path(run).join(file)).unwrap();
        let files = names(&place.path(&first));
        assert_eq!(files, ["report.json", "requests.csv", "scenario.yaml", "traces.otlp.jsonl"]);
        assert_eq!(names(&place.path(&again)), files);
        for file in &files {
            assert!(read(&first, file) == read(&again, file), "{name}: {file} differs between equal runs");
            assert!(read(&first, file) != read(&other, file), "{name}: {file} does not depend on the seed");
        }
    }
}

const AZURE: &str = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n\
    2023-11-16 18:15:46.6805900,374,44\r\n\
    2023-11-16 18:15:50.9951690,396,109\r\n\
    2023-11-16 18:15:51.2224670,879,55\r\n";
const MOONCAKE: &str = "{\"timestamp\": 0, \"input_length\": 1300, \"output_length\": 52, \"hash_ids\": [0, 1, 2]}\n\
    {\"timestamp\": 0, \"input_length\": 1500, \"output_length\": 26, \"hash_ids\": [0, 1, 3]}\n\
    {\"timestamp\": 3000, \"input_length\": 700, \"output_length\": 9, \"hash_ids\": [0, 4]}\n";

/// Every scenario of the library, shortened, in virtual time: whole trees, nothing lost, expectations kept.
#[test]
fn every_scenario_runs_in_virtual_time_without_findings() {
    let place = Place::new();
    place.write("azure.csv", AZURE);
    place.write("mooncake.jsonl", MOONCAKE);
    let shorter = |name: &str| match name {
        "bursty" | "multi-turn" => "duration=30s",
        "load" | "overload" => "duration=10s",
        "keep-on-outcome" => "duration=30s",
        "faults-crash" | "faults-rates" | "faults-stale-metrics" | "flow-control" | "pd" | "resilience" => "seed=42",
        "pd-precise" => "listen.kv_cache_manager=null",
        "two-pools" => "seed=42",
        "parity" => "requests=40",
        "small-cache" => "seed=42",
        "quickstart" | "overhead" => "requests=200",
        "shared-prefix" => "requests=150",
        "replay-azure" => "trace.path=azure.csv",
        "replay-mooncake" => "trace.path=mooncake.jsonl",
        _ => panic!("{name}: say here how to make it short"),
    };
    // Those whose traces are broken on purpose are in tests/check.rs.
    let sound = |n: &&String| n.ends_with(".yaml") && !n.starts_with("propagation-");
    for file in names(&common::library()).iter().filter(sound) {
        let name = file.trim_end_matches(".yaml");
        let path = scenario(name);
        let options = ["--mode", "virtual", "--sampling", "1", "--set", shorter(name), "--out", name];
        let ran = place.ran(&[["run", &path].as_slice(), options.as_slice()].concat());
        assert_eq!(ran.code, 0, "{name}: {ran:#?}");
        let (report, set) = (place.report(name), place.traces(name));
        assert!(report.sent > 0 && report.traces.checked == report.sent, "{name}: {report:#?}");
        assert_eq!(findings(&set).first(), None, "{name}");
        place.good(&["check", name, "--clock-tolerance", "0ms"]);
        by_trace(&set).values().for_each(|spans| assert_whole(spans));
        assert_conserved(&place.path(name));
    }
}

/// Runs the overload scenario; each refusal of `kind` has to leave a row and a trace that says so.
fn refusals(set: &[&str], kind: &str) -> Vec<BTreeMap<String, String>> {
    let place = Place::new();
    let file = scenario("overload");
    let mut args = vec!["run", &file, "--out", "out", "--sampling", "1", "--set", "expectations={}"];
    set.iter().for_each(|s| args.extend(["--set", s]));
    place.good(&args);
    let (report, set, rows) = (place.report("out"), place.traces("out"), rows(&place.path("out")));
    assert_conserved(&place.path("out"));
    assert_eq!(findings(&set).first(), None);
    let kinds: Vec<&str> = report.errors_by_kind.keys().map(String::as_str).collect();
    assert_eq!(kinds, [kind]);
    let traces = by_trace(&set);
    for row in &rows {
        let spans = &traces[&row["trace_id"]];
        let root = spans.iter().find(|s| s.parent.is_none()).unwrap();
        let status = root.get("http.response.status_code").and_then(|v| v.as_int());
        let engine = spans.iter().find(|s| s.name == "vllm.engine.request");
        let failed = |status: &Status| matches!(status, Status::Error(_));
        let seen = (status, failed(&root.status), engine.map(|s| failed(&s.status)));
        let expect = match row["outcome"].as_str() {
            "ok" => (Some(200), false, Some(false)),
            // A refusal for the caller's sake is no error of the server; the engine never hears of it.
            "http_429" => (Some(429), false, None),
            "http_503" => (Some(503), true, Some(true)),
            other => panic!("{other}"),
        };
        assert_eq!(seen, expect, "{row:?}");
    }
    rows
}

#[test]
fn the_gateway_sheds_batch_requests_with_429() {
    let rows = refusals(&["duration=10s"], "http_429");
    // Interactive requests are tenant 0, batch requests tenant 1.
    assert!(rows.iter().all(|r| r["outcome"] != "http_429" || r["tenant"] == "1"), "only batch requests are shed");
}

#[test]
fn a_full_engine_refuses_with_503() {
    let small = "{count: 2, profile: llama-3.1-8b-h100, max_num_queued_reqs: 2, scheduler: {max_num_seqs: 16}}";
    for streaming in ["workload.streaming=1", "workload.streaming=0"] {
        refusals(&["duration=4s", &format!("engines=[{small}]"), streaming], "http_503");
    }
}

/// Conversations find what was said before in the cache, because the gateway sends them back to where it is.
#[test]
fn routing_by_prefix_finds_more_in_the_cache() {
    let place = Place::new();
    let file = scenario("multi-turn");
    let hits = |out: &str, scorers: &str| {
        let set = format!("gateway.profile.scorers={scorers}");
        let options = ["--set", "duration=60s", "--set", &set, "--set", "expectations={}", "--out", out];
        place.good(&[["run", &file].as_slice(), options.as_slice()].concat());
        place.report(out).routing.prefix_hit_ratio
    };
    let with = hits("with", "[{type: prefix-cache-scorer, weight: 3}, {type: queue-scorer, weight: 2}]");
    let without = hits("without", "[{type: queue-scorer}]");
    assert!(with > 0.7 && with > without + 0.2, "{with} with, {without} without");
}

/// Weighted targets for one name: adapters that the engines serve, in proportion, with spans that say both names.
#[test]
fn a_model_is_rewritten_to_weighted_targets() {
    let place = Place::new();
    let yaml = "name: rewrite\nmode: virtual\nrequests: 400\nengines:\n  - { profile: llama-3.1-8b-h100, max_loras: 2, \
                lora_modules: [{ name: v1, path: v1 }, { name: v2, path: v2 }] }\n\
                gateway: { model_rewrites: { support: [{ model: v1, weight: 3 }, { model: v2 }] } }\n\
                workload: { model: support, arrivals: { process: constant, rate: 50 }, prompt_tokens: 64, output_tokens: 4 }\n\
                tracing: { ratio: 1.0, exporters: [file] }\n";
    place.write("rewrite.yaml", yaml);
    place.good(&["run", "rewrite.yaml", "--out", "out"]);
    let set = place.traces("out");
    let of = |name: &str, key: &str, value: &str| {
        set.spans.iter().filter(|s| s.name == name && s.get(key).and_then(|v| v.as_str()) == Some(value)).count()
    };
    assert_eq!(of("gateway.request", "gen_ai.request.model", "support"), 400);
    let (v1, v2) =
        (of("gateway.request", "gateway.target_model", "v1"), of("gateway.request", "gateway.target_model", "v2"));
    assert_eq!(v1 + v2, 400);
    assert!((60..140).contains(&v2), "{v2}");
    assert_eq!(of("vllm.engine.request", "gen_ai.request.model", "v2"), v2);
    assert_eq!(findings(&set).first(), None);
}
