//! Sampling strategies from end to end: every service agrees on every trace, whatever decided on it, and what is kept later is whole.

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::{Place, assert_whole, by_trace, findings, rows, scenario};
use shared::trace::{Span, TraceSet};

/// What a span says, but for what sampling itself adds to it. Times of a file count from its first span.
fn told(set: &TraceSet, span: &Span) -> String {
    let attrs: Vec<_> = span.attrs.iter().filter(|(k, _)| k != "sampling.reason").collect();
    let at = |time| set.anchor.unix_nanos(time);
    let ids = (span.span_id, span.parent, at(span.start), at(span.end));
    let events: Vec<_> = span.events.iter().map(|e| (&e.name, at(e.at), &e.attrs)).collect();
    format!("{} {ids:?} {attrs:?} {events:?} {:?} {:?}", span.name, span.links, span.status)
}

fn all(set: &TraceSet) -> BTreeMap<String, BTreeSet<String>> {
    by_trace(set).into_iter().map(|(id, spans)| (id, spans.into_iter().map(|s| told(set, s)).collect())).collect()
}

fn reason(spans: &[&Span]) -> Option<String> {
    let root = spans.iter().find(|s| s.parent.is_none()).expect("a root");
    root.get("sampling.reason").and_then(|v| v.as_str()).map(str::to_owned)
}

/// Names and policies.
const POLICIES: [(&str, &str); 6] = [
    ("ratio", "{ ratio: 0.2 }"),
    ("rules", "{ ratio: 0.1, rules: [{ tenant: chat, ratio: 0.5 }, { tenant: 'night*', ratio: 0.02 }] }"),
    ("rate", "{ rate_limit: 2 }"),
    ("outcome", "{ ratio: 0, keep: { slower_than: 3s, more_tokens_than: 1200 } }"),
    ("both", "{ ratio: 0.05, keep: { slower_than: 3s } }"),
    ("none", "{ ratio: 0 }"),
];

const TENANTS: &str = "workload.tenants=[{ name: chat, weight: 1 }, { name: nightly, weight: 3 }]";

/// Runs a scenario in virtual time with `tracing`, and returns its traces.
fn virtual_run(place: &Place, name: &str, out: &str, tracing: &str, more: &[&str]) -> TraceSet {
    let file = scenario(name);
    let tracing = format!("tracing={tracing}");
    let mut args = vec!["run", &file, "--mode", "virtual", "--out", out, "--set", "expectations={}", "--set", &tracing];
    more.iter().for_each(|set| args.extend(["--set", set]));
    place.good(&args);
    place.traces(out)
}

/// The spans that are on one side only.
fn difference<'s>(spans: &'s BTreeSet<String>, whole: Option<&'s BTreeSet<String>>) -> Vec<&'s String> {
    whole.map_or_else(Vec::new, |whole| spans.symmetric_difference(whole).collect())
}

/// No trace is half kept: each is what it is where everything is kept, span by span and attribute by attribute.
fn assert_agreed(place: &Place, name: &str, more: &[&str]) {
    let whole = all(&virtual_run(place, name, "whole", "{ ratio: 1.0 }", more));
    for (policy, tracing) in POLICIES {
        let set = virtual_run(place, name, policy, tracing, more);
        assert_eq!(findings(&set), [], "{name} {policy}");
        let kept = all(&set);
        for (id, spans) in &kept {
            assert!(Some(spans) == whole.get(id), "{name} {policy} {id}: {:#?}", difference(spans, whole.get(id)));
        }
        let figures = place.report(policy).traces;
        assert_eq!(kept.len() as u64, figures.kept + figures.kept_later, "{name} {policy}");
        assert_eq!(figures.let_go.evicted, 0);
        assert_eq!(kept.is_empty(), policy == "none", "{name} {policy}: {}", kept.len());
        for spans in by_trace(&set).values() {
            assert_whole(spans);
            let threshold = spans[0].tracestate.as_deref().is_some_and(|s| s.contains("th:"));
            assert!(spans.iter().all(|s| s.tracestate == spans[0].tracestate), "{name} {policy}");
            let reason = reason(spans);
            assert_eq!(reason.is_none(), threshold, "{name} {policy}: a ratio or a reason");
            match policy {
                "rate" => assert_eq!(reason.as_deref(), Some("rate_limit")),
                "outcome" => assert!(reason.is_some_and(|r| !["rate_limit", "forced"].contains(&r.as_str()))),
                _ => {}
            }
        }
    }
}

#[test]
fn gateway_and_engines_agree_on_every_trace() {
    assert_agreed(&Place::new(), "keep-on-outcome", &["duration=20s", TENANTS]);
}

#[test]
fn sidecars_and_engines_on_both_sides_of_a_transfer_agree_too() {
    let place = Place::new();
    let outcome = ["requests=60", TENANTS];
    assert_agreed_pd(&place, &outcome);
}

/// As [`assert_agreed`], with bounds that fit the scenario.
fn assert_agreed_pd(place: &Place, more: &[&str]) {
    let whole = all(&virtual_run(place, "pd", "whole", "{ ratio: 1.0 }", more));
    let keep = "{ ratio: 0.1, keep: { more_tokens_than: 900 } }";
    let set = virtual_run(place, "pd", "out", keep, more);
    let (kept, figures) = (all(&set), place.report("out").traces);
    for (id, spans) in &kept {
        assert!(Some(spans) == whole.get(id), "{id}: {:#?}", difference(spans, whole.get(id)));
    }
    assert_eq!(findings(&set), []);
    assert_eq!(kept.len() as u64, figures.kept + figures.kept_later);
    let later: Vec<_> = by_trace(&set).into_values().filter(|spans| reason(spans).is_some()).collect();
    assert!(later.len() > 5, "{figures:#?}");
    let transfers = later.iter().flatten().filter(|s| s.name == "vllm.kv_cache.transfer").count();
    assert!(transfers > 4, "both sides of the transfers are kept: {transfers}");
}

/// The share of every strategy is inside the 99 % interval of the binomial distribution; the ids are seeded, so this never flickers.
#[test]
fn every_share_is_what_was_asked_for() {
    let place = Place::new();
    let more = ["requests=3000", "seed=7", TENANTS];
    let plausible = |kept: usize, n: usize, p: f64| {
        let (kept, n) = (kept as f64, n as f64);
        (kept - n * p).abs() <= 2.576 * (n * p * (1.0 - p)).sqrt() + 0.5
    };
    virtual_run(&place, "quickstart", "rules", POLICIES[1].1, &more);
    let rows = rows(&place.path("rules"));
    let tenant = |name: &str| -> Vec<bool> {
        rows.iter().filter(|r| r["tenant"] == name).map(|r| r["sampled"] == "true").collect()
    };
    for (name, p) in [("0", 0.5), ("1", 0.02)] {
        let sampled = tenant(name);
        let kept = sampled.iter().filter(|s| **s).count();
        assert!(sampled.len() > 300 && plausible(kept, sampled.len(), p), "{name}: {kept} of {}", sampled.len());
    }
    for ratio in [0.01, 0.1, 0.5] {
        let out = format!("r{ratio}");
        let set = virtual_run(&place, "quickstart", &out, &format!("{{ ratio: {ratio} }}"), &more);
        assert!(plausible(by_trace(&set).len(), 3000, ratio), "{ratio}");
    }
    let set = virtual_run(&place, "quickstart", "rate", "{ rate_limit: 3 }", &more);
    let seconds = place.report("rate").duration_s;
    let (kept, most) = (by_trace(&set).len() as f64, 3.0 + 3.0 * seconds);
    assert!(kept <= most && kept >= 0.95 * 3.0 * seconds, "{kept} of at most {most}");
}

#[test]
fn the_same_seed_keeps_the_same_bytes() {
    let place = Place::new();
    for out in ["one", "two"] {
        virtual_run(&place, "keep-on-outcome", out, POLICIES[4].1, &["duration=10s"]);
    }
    let read = |run: &str| std::fs::read(place.path(run).join("traces.otlp.jsonl")).unwrap();
    assert!(read("one") == read("two") && !read("one").is_empty(), "I6");
}

#[test]
fn a_small_ring_loses_parts_and_the_report_says_so() {
    let place = Place::new();
    let tracing = "{ ratio: 0, keep: { slower_than: 1ms, hold_bytes: 1048576, hold_for: 1s } }";
    virtual_run(&place, "keep-on-outcome", "out", tracing, &["duration=20s", "workload.output_tokens=400"]);
    let figures = place.report("out").traces;
    assert!(figures.kept_later > 0 && figures.let_go.judged == 0, "{figures:#?}");
    let tracing = tracing.replace("1ms", "60s").replace("1s", "10s");
    virtual_run(&place, "keep-on-outcome", "held", &tracing, &["duration=20s"]);
    let figures = place.report("held").traces;
    assert!(figures.let_go.evicted > 0 || figures.let_go.expired > 0, "{figures:#?}");
    assert!(figures.let_go.judged > 400, "{figures:#?}");
}

const LIVE: &str = "\
name: live
requests: 40
engines:
  - count: 2
    role: prefill
    profile: llama-3.1-8b-h100
    kv_transfer: { kv_connector: NixlConnector, kv_role: kv_producer }
  - count: 2
    role: decode
    profile: llama-3.1-8b-h100
    kv_transfer: { kv_connector: NixlConnector, kv_role: kv_consumer }
    pd_proxy: {}
gateway:
  precise_prefix: { manager_timeout: 60s }
  profile:
    filters: [{ type: healthy-filter }, { type: decode-filter }]
    scorers: [{ type: precise-prefix-cache-scorer }, { type: queue-scorer }]
  disaggregation:
    profile: { name: prefill, filters: [{ type: healthy-filter }, { type: prefill-filter }], scorers: [{ type: queue-scorer }] }
    decider: { type: prefix-based-pd-decider, parameters: { nonCachedTokens: 64 } }
workload:
  arrivals: { process: poisson, rate: 40 }
  prompt_tokens: { distribution: uniform, min: 32, max: 512 }
  output_tokens: 8
listen: { gateway: '127.0.0.1:0', engines: '127.0.0.1:0', kv_cache_manager: '127.0.0.1:0' }
tracing: { ratio: 0, exporters: [file], keep: { more_tokens_than: 300 } }
";

/// Over sockets: marks in headers, verdicts posted to sidecars, engines and the kv-cache-manager, every part of every kept trace in the file.
#[test]
fn live_services_agree_on_what_is_kept_later() {
    let place = Place::new();
    place.write("live.yaml", LIVE);
    place.good(&["run", "live.yaml", "--out", "out"]);
    let (set, figures) = (place.traces("out"), place.report("out").traces);
    assert_eq!(findings(&set), []);
    let traces = by_trace(&set);
    assert_eq!((figures.decided, figures.kept, figures.incomplete), (40, 0, 0));
    assert_eq!(traces.len() as u64, figures.kept_later);
    assert!((5..40).contains(&traces.len()), "{figures:#?}");
    for spans in traces.values() {
        assert_whole(spans);
        assert_eq!(reason(spans).as_deref(), Some("tokens"));
        let count = |name: &str| spans.iter().filter(|s| s.name == name).count();
        assert_eq!(count("kvcache.manager.get_scores"), 1);
        // The same figures as of a trace that was sampled: sidecar, both engines, both sides of the transfer.
        assert_eq!(
            (count("pd_proxy.request"), count("vllm.engine.request"), count("vllm.kv_cache.transfer")),
            (1, 2, 2)
        );
    }
    assert_eq!(figures.let_go.evicted, 0);
    assert!(figures.let_go.judged + figures.let_go.expired > 0);
}

/// An engine with room for half of what it is asked, which says in headers and trailers whom it preempted.
const TIGHT: &str = "\
name: tight
requests: 16
engines:
  - { count: 1, profile: llama-3.1-8b-h100, max_model_len: 512, cache: { num_gpu_blocks: 41 } }
workload:
  arrivals: { process: closed, concurrency: 8 }
  prompt_tokens: 64
  output_tokens: 64
listen: { gateway: '127.0.0.1:0', engines: '127.0.0.1:0' }
tracing: { ratio: 0, exporters: [file], keep: { errors: false, retried: false } }
";

#[test]
fn live_engines_say_whom_they_preempted() {
    let place = Place::new();
    place.write("tight.yaml", TIGHT);
    place.good(&["run", "tight.yaml", "--out", "out"]);
    let (set, report) = (place.traces("out"), place.report("out"));
    assert_eq!((findings(&set), report.errors), (vec![], 0));
    let traces = by_trace(&set);
    assert!(report.engines.preemptions > 0 && !traces.is_empty(), "{report:#?}");
    for spans in traces.values() {
        assert_whole(spans);
        assert_eq!(reason(spans).as_deref(), Some("preempted"));
        let engine = spans.iter().find(|s| s.name == "vllm.engine.request").expect("the engine's part");
        assert!(engine.get("vllm.request.preemptions").and_then(|v| v.as_int()) > Some(0));
    }
}

#[test]
fn the_strategies_are_compared_on_one_run() {
    let place = Place::new();
    let file = scenario("keep-on-outcome");
    let json = |args: &[&str]| -> serde_json::Value {
        let args = [&["sampling", &file, "--format", "json", "--set", "duration=20s"], args].concat();
        serde_json::from_str(&place.good(&args).out).expect("JSON")
    };
    let compared = json(&[]);
    let requests = compared["requests"].as_u64().unwrap();
    let of = |name: &str| {
        let all = compared["strategies"].as_array().unwrap();
        all.iter().find(|s| s["strategy"] == name).unwrap_or_else(|| panic!("{name}: {compared:#}"))
    };
    let (always, outcome, head) = (of("always on"), of("keep on outcome"), of("head 1 %"));
    assert_eq!((always["traces"].as_u64(), always["recorded"].as_u64()), (Some(requests), Some(requests)));
    assert_eq!(always["interesting"], compared["interesting"]);
    // The virtual run itself keeps just these.
    virtual_run(
        &place,
        "keep-on-outcome",
        "run",
        "{ ratio: 0, keep: { slower_than: 3500ms, more_tokens_than: 1600 } }",
        &["duration=20s"],
    );
    let figures = place.report("run").traces;
    assert_eq!(
        (outcome["traces"].as_u64(), outcome["spans"].as_u64()),
        (Some(figures.kept_later), Some(figures.spans_created))
    );
    assert_eq!(outcome["interesting"]["failed"], compared["interesting"]["failed"], "every failure is kept");
    let failed = |s: &serde_json::Value| s["interesting"]["failed"].as_u64().unwrap();
    assert!(failed(head) < failed(outcome) && head["bytes"].as_u64() < outcome["bytes"].as_u64());
    assert!(outcome["bytes"].as_u64() < always["bytes"].as_u64());
    let text = place.good(&["sampling", &file, "--set", "duration=20s"]).out;
    assert!(text.contains("head 1 % + keep on outcome") && text.contains("always on"), "{text}");
    let with_rules = json(&["--set", "tracing.rules=[{ model: '*', ratio: 0.3 }]"]).to_string();
    assert!(with_rules.contains("rules, else 1 %"), "{with_rules}");
}

#[test]
fn what_the_eager_recorder_cannot_do_is_told_before_a_run() {
    let place = Place::with_tiny();
    for (set, part) in [
        ("tracing.keep={}", "tracing.keep"),
        ("tracing.rate_limit=1", "tracing.rate_limit"),
        ("tracing.force={}", "tracing.force"),
        ("tracing.rules=[{ model: m, ratio: 1 }]", "tracing.rules"),
    ] {
        let ran = place.ran(&["run", "tiny.yaml", "--out", "out", "--recorder", "eager", "--set", set]);
        assert_eq!(ran.code, 2, "{ran:#?}");
        assert!(ran.err.contains(&format!("eager with {part}")), "{}", ran.err);
    }
}
