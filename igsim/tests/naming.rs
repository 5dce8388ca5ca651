//! The names of llm-d's own components: the same runs, folded into what an endpoint picker, a routing sidecar and vLLM emit.

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::{Place, by_trace, scenario};
use shared::trace::registry::Registry;
use shared::trace::{Span, TraceSet, Value};

const SAMPLED: [&str; 4] = ["--sampling", "1", "--naming", "llm-d"];

fn services(set: &TraceSet) -> BTreeSet<&str> {
    set.spans.iter().map(|s| &*set.resource(s.instance).expect("a resource").service_name).collect()
}

/// How often each name stands in a trace.
fn counted<'s>(spans: &[&'s Span]) -> BTreeMap<&'s str, usize> {
    let mut counts = BTreeMap::new();
    spans.iter().for_each(|s| *counts.entry(&*s.name).or_default() += 1);
    counts
}

/// The rules that `igsim check` finds broken.
fn broken(place: &Place, run: &str) -> BTreeSet<String> {
    let ran = place.ran(&["check", run, "--format", "json"]);
    let checked: serde_json::Value = serde_json::from_str(&ran.out).unwrap_or_else(|e| panic!("{e}: {ran:#?}"));
    let findings = checked["findings"].as_array().expect("findings");
    findings.iter().map(|f| f["rule"].as_str().expect("a rule").to_owned()).collect()
}

#[test]
fn a_disaggregated_request_looks_as_llm_d_published_it() {
    let place = Place::new();
    let file = scenario("pd-precise");
    let run = ["run", &file, "--mode", "virtual", "--out", "out", "--set", "listen.kv_cache_manager=null"];
    // With every kind of trace that the catalogue has on top.
    let more = ["--set", "requests=40", "--engine-steps", "1", "--scrapes", "1"];
    place.good(&[&run[..], &more, &SAMPLED].concat());
    let set = place.traces("out");
    assert_eq!(services(&set), ["llm-d-disagg-sidecar", "llm-d-epp", "vllm"].into());
    let traces = by_trace(&set);
    assert_eq!(traces.len(), 40);
    let disaggregated = traces.values().find(|spans| counted(spans).contains_key("prefill")).expect("one is");
    // The blog's capture of August 2026 has two handlers that prepare, one scorer a profile, and no index.
    let expect = [
        ("request", 1),
        ("request_orchestration", 1),
        ("produce_precise_prefix_cache", 1),
        ("match_block_keys", 1),
        ("index_walk", 1),
        ("pick_disagg_profile", 3),
        ("run_scheduler_profile", 2),
        ("filter_endpoints", 2),
        ("scoring", 2),
        ("scorer.prefix-cache-scorer", 2),
        ("scorer.queue-scorer", 2),
        ("scorer.kv-cache-utilization-scorer", 1),
        ("pick_endpoints", 2),
        ("prepare_disaggregation", 1),
        ("POST /v1/chat/completions", 1),
        ("forward_request", 1),
        ("prefill", 1),
        ("decode", 1),
        ("HTTP POST", 2),
        ("llm_request", 2),
    ];
    assert_eq!(counted(disaggregated), expect.into());
    // What its traces are known for is found in these, and nothing else; the folder says which names they have.
    assert_eq!(broken(&place, "out"), ["ended-parent", "local-server"].map(str::to_owned).into());
}

#[test]
fn both_recorders_hang_the_engine_below_the_request() {
    let mut seen = Vec::new();
    for recorder in ["deferred", "eager"] {
        let place = Place::with_tiny();
        let run = ["run", "tiny.yaml", "--out", "out", "--recorder", recorder, "--engine-steps", "1"];
        let ran = place.good(&[&run[..], &SAMPLED].concat());
        assert!(!ran.out.contains("finding:"), "{}", ran.out);
        let set = place.traces("out");
        assert_eq!(services(&set), ["llm-d-epp", "vllm"].into());
        let traces = by_trace(&set);
        assert_eq!(traces.len(), 12);
        for spans in traces.values() {
            let one = |name: &str| *spans.iter().find(|s| s.name == name).unwrap_or_else(|| panic!("no {name}"));
            let (request, engine) = (one("request"), one("llm_request"));
            assert_eq!((engine.parent, engine.parent_is_remote), (Some(request.span_id), true));
            assert_eq!(engine.get("gen_ai.usage.completion_tokens"), Some(&Value::Int(4)));
        }
        seen.push(set.spans.iter().map(|s| s.name.to_string()).collect::<BTreeSet<_>>());
        assert_eq!(broken(&place, "out"), ["local-server".to_owned()].into());
        let registry = Registry::builtin().expect("the registry is sound");
        let strange: Vec<_> = set.spans.iter().filter(|s| registry.span(&s.name).is_none()).collect();
        assert!(strange.is_empty(), "{strange:?}");
    }
    assert_eq!(seen[0], seen[1]);
}

/// The index as a service of its own.
#[test]
fn a_kv_cache_manager_is_llm_ds_indexer() {
    let place = Place::new();
    let file = scenario("pd-precise");
    let any = "listen={gateway: '127.0.0.1:0', engines: '127.0.0.1:0', kv_cache_manager: '127.0.0.1:0'}";
    let run = ["run", &file, "--out", "out", "--set", any, "--set", "requests=10", "--set", "expectations={}"];
    place.good(&[&run[..], &["--set", "workload.arrivals.rate=30"], &SAMPLED].concat());
    let set = place.traces("out");
    for spans in by_trace(&set).values() {
        let one = |name: &str| *spans.iter().find(|s| s.name == name).unwrap_or_else(|| panic!("no {name}"));
        let above = |span: &Span| spans.iter().find(|s| Some(s.span_id) == span.parent).map(|s| s.name.to_string());
        assert_eq!(above(one("score_tokens")).as_deref(), Some("produce_precise_prefix_cache"));
        assert_eq!(above(one("match_block_keys")).as_deref(), Some("score_tokens"));
    }
}

#[test]
fn other_names_are_refused() {
    let place = Place::with_tiny();
    let ran = place.ran(&["run", "tiny.yaml", "--set", "tracing.naming=llmd"]);
    assert_eq!(ran.code, 2, "{ran:#?}");
    assert!(ran.err.contains("tracing.naming") && ran.err.contains("llm-d"), "{}", ran.err);
}
