//! Several models in pools of one gateway, live and in virtual time: requests go where their model is, and each pool decides for itself.

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::{Place, Ran, assert_whole, by_trace, findings, scenario};
use shared::trace::Span;

const ANY: &str = "listen={gateway: '127.0.0.1:0', engines: '127.0.0.1:0'}";

fn run(place: &Place, mode: &str, set: &[&str]) -> Ran {
    let file = scenario("two-pools");
    let mut args = vec!["run", &file, "--mode", mode, "--out", mode, "--set", ANY];
    set.iter().for_each(|s| args.extend(["--set", s]));
    place.ran(&args)
}

fn text<'s>(span: &'s Span, key: &str) -> &'s str {
    span.get(key).and_then(|v| v.as_str()).unwrap_or_default()
}

fn named<'s>(spans: &[&'s Span], name: &str) -> Vec<&'s Span> {
    spans.iter().copied().filter(|s| s.name == name).collect()
}

#[test]
fn each_request_goes_to_the_pool_of_its_model() {
    for mode in ["virtual", "live"] {
        let place = Place::new();
        // The client writes the priority that it knows; the pool's own is another one.
        let own = "gateway.pools[1].objectives={code: 9}";
        let ran = run(&place, mode, &["requests=120", "workload.arrivals.rate=40", own]);
        assert_eq!(ran.code, 0, "{mode}: {ran:#?}");
        let set = place.traces(mode);
        assert_eq!(findings(&set), []);
        let mut ways: BTreeMap<(String, String, String), BTreeSet<String>> = BTreeMap::new();
        for spans in by_trace(&set).values() {
            assert_whole(spans);
            let root = named(spans, "gateway.request")[0];
            let model = text(root, "gen_ai.request.model").to_owned();
            let way =
                (model, text(root, "gateway.target_model").to_owned(), text(root, "gateway.pool.name").to_owned());
            let engines = ways.entry(way).or_default();
            for engine in named(spans, "vllm.engine.request") {
                let place = set.resource(engine.instance).expect("a resource").instance_id.to_string();
                engines.insert(place);
            }
            // Only the second pool has queues, and only there an objective is an engine's priority.
            let waits = !named(spans, "gateway.flowcontrol.enqueue").is_empty();
            let pool = text(root, "gateway.pool.name");
            assert_eq!(waits, pool == "large", "{mode}: {pool}");
            let asked =
                named(spans, "vllm.engine.request").first().and_then(|s| s.get("vllm.request.priority")?.as_int());
            let coder = text(root, "gateway.objective") == "code";
            assert_eq!(asked, coder.then_some(-9), "{mode}");
            let scorers = named(spans, "gateway.scheduler.score").len();
            assert_eq!(
                scorers,
                match pool {
                    "small" => 4,
                    "large" => 2,
                    _ => 0,
                },
                "{mode}: {pool}"
            );
        }
        let (small, large) = ("meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen3-32B");
        let way = |asked: &str, target: &str, pool: &str| (asked.to_owned(), target.to_owned(), pool.to_owned());
        let engines = |names: [&str; 2]| BTreeSet::from(names.map(ToOwned::to_owned));
        let expect = BTreeMap::from([
            (way("assistant", small, "small"), engines(["engine-0", "engine-1"])),
            (way("assistant", large, "large"), engines(["engine-2", "engine-3"])),
            (way(large, large, "large"), engines(["engine-2", "engine-3"])),
            (way("Qwen/Qwen3-23B", "Qwen/Qwen3-23B", ""), BTreeSet::new()),
        ]);
        assert_eq!(ways, expect, "{mode}");
        let report = place.report(mode);
        assert_eq!(report.errors_by_kind.get("http_404"), Some(&report.tenants["typo"].sent), "{mode}");
    }
}

#[test]
fn virtual_runs_repeat_to_the_byte() {
    let bytes = || {
        let place = Place::new();
        assert_eq!(run(&place, "virtual", &[]).code, 0);
        std::fs::read(place.path("virtual/traces.otlp.jsonl")).expect("the file of traces")
    };
    assert_eq!(bytes(), bytes(), "the same seed, the same bytes (I6)");
}

/// A default pool takes what no pool lists, and its engines say that they do not have it.
#[test]
fn a_default_pool_answers_for_the_rest() {
    for mode in ["virtual", "live"] {
        let place = Place::new();
        let ran = run(&place, mode, &["requests=60", "gateway.pools[0].default=true"]);
        assert_eq!(ran.code, 0, "{mode}: {ran:#?}");
        let set = place.traces(mode);
        let roots: Vec<_> = set.spans.iter().filter(|s| s.name == "gateway.request").collect();
        let unknown: Vec<_> = roots.iter().filter(|s| text(s, "gen_ai.request.model") == "Qwen/Qwen3-23B").collect();
        assert!(!unknown.is_empty() && unknown.iter().all(|s| text(s, "gateway.pool.name") == "small"), "{mode}");
        assert_eq!(place.report(mode).errors_by_kind.get("http_404"), Some(&(unknown.len() as u64)), "{mode}");
    }
}

#[test]
fn what_does_not_fit_together_is_refused() {
    let check = |set: &str, expect: &str| {
        let place = Place::new();
        let ran = place.ran(&["validate", &scenario("two-pools"), "--set", set]);
        assert_eq!(ran.code, 2, "{set}: {ran:#?}");
        assert!(ran.err.contains(expect), "{set}: {}", ran.err);
    };
    check("engines[0].labels={}", "engines[0].labels: found {}, expected labels that a pool of gateway.pools selects");
    check("engines[1].labels={pool: small}", "gateway.pools[1].selector: found");
    check("engines[1].labels={pool: small}", "engines[1].model: found \"Qwen/Qwen3-32B\"");
    check("gateway.pools[0].models=[]", "gateway.pools[0].models: found no model, expected a model, or default: true");
    check("gateway.pools[1].profile.picker.type=best", "gateway.pools[1].profile.picker.type: found \"best\"");
    check("gateway.pool.name=x", "gateway.pool: found a section beside pools");
}

/// A pool with an EndpointPickerConfig of its own.
#[test]
fn a_pool_may_have_a_file_of_llm_ds() {
    let place = Place::new();
    let file = common::library().join("epp/optimized-baseline.epp.yaml");
    let pool = format!(
        "gateway.pools[0]={{name: small, models: [meta-llama/Llama-3.1-8B-Instruct], selector: {{pool: small}}, epp_config: '{}'}}",
        file.display()
    );
    let ran = run(&place, "virtual", &["requests=60", &pool]);
    assert_eq!(ran.code, 0, "{ran:#?}");
    let set = place.traces("virtual");
    assert_eq!(findings(&set), []);
    let scorers: BTreeSet<_> = set.spans.iter().map(|s| text(s, "gateway.scheduler.scorer.type").to_owned()).collect();
    assert!(scorers.contains("no-hit-lru-scorer") && scorers.contains("active-request-scorer"), "{scorers:?}");
    let resolved = std::fs::read_to_string(place.path("virtual/scenario.yaml")).unwrap();
    assert!(resolved.contains("no-hit-lru-scorer") && !resolved.contains("epp_config"), "{resolved}");
}
