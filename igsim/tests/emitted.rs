//! The registry against what is emitted: everything that is registered comes out of some scenario of the library.

mod common;

use std::collections::BTreeSet;

use common::{Place, findings, library, names, scenario};
use shared::trace::TraceSet;
use shared::trace::registry::{Registry, is_named};
use shared::trace::span::Attr;

/// Registered, and emitted by no scenario in virtual time: a line each, after lines that say why.
const ELSEWHERE: &str = include_str!("emitted_elsewhere.txt");

const AZURE: &str = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:15:46.6805900,374,44\r\n";
const MOONCAKE: &str = "{\"timestamp\": 0, \"input_length\": 1300, \"output_length\": 52, \"hash_ids\": [0, 1, 2]}\n";
const PRICES: &str = "prices:\n  '*': { input: 1, output: 3, cached_input: 0.5 }\n";

/// Every option on that makes more spans or attributes.
const ALL_FEATURES: [&str; 20] = [
    "--mode",
    "virtual",
    "--sampling",
    "1",
    "--detail",
    "3",
    "--engine-steps",
    "0.2",
    "--scrapes",
    "1",
    "--set",
    "tracing.kv_events=1",
    "--set",
    "tracing.langfuse=true",
    "--set",
    "tracing.prices=prices.yaml",
    "--set",
    "expectations={}",
    "--out",
    "out",
];

/// How a scenario is shortened.
fn shorter(name: &str) -> &'static str {
    match name {
        "bursty" => "duration=20s",
        "load" | "multi-turn" | "overload" => "duration=10s",
        "quickstart" | "overhead" | "shared-prefix" => "requests=100",
        "replay-azure" => "trace.path=azure.csv",
        "replay-mooncake" => "trace.path=mooncake.jsonl",
        // The index is the gateway's own in virtual time.
        "pd-precise" => "listen.kv_cache_manager=null",
        _ => "seed=42",
    }
}

/// Names of spans and events and keys of attributes.
fn emitted(set: &TraceSet) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut keys = |attrs: &[Attr]| found.extend(attrs.iter().map(|(key, _)| key.to_string()));
    for span in &set.spans {
        keys(&span.attrs);
        span.events.iter().for_each(|e| keys(&e.attrs));
    }
    found.extend(set.spans.iter().map(|s| s.name.to_string()));
    found.extend(set.spans.iter().flat_map(|s| &s.events).map(|e| e.name.to_string()));
    found
}

#[test]
fn everything_registered_is_emitted_by_a_scenario() {
    let mut found = BTreeSet::new();
    let library = library();
    let plain = names(&library).into_iter();
    let epp = names(&library.join("epp")).into_iter().filter(|n| !n.ends_with(".epp.yaml")).map(|n| format!("epp/{n}"));
    for file in plain.chain(epp).filter(|n| n.ends_with(".yaml")) {
        let place = Place::new();
        place.write("azure.csv", AZURE);
        place.write("mooncake.jsonl", MOONCAKE);
        place.write("prices.yaml", PRICES);
        let name = file.trim_end_matches(".yaml");
        place.good(&[["run", &scenario(name), "--set", shorter(name)].as_slice(), &ALL_FEATURES].concat());
        let set = place.traces("out");
        // Those break their traces on purpose.
        if !name.starts_with("propagation-") {
            assert_eq!(findings(&set).first(), None, "{name}");
        }
        found.extend(emitted(&set));
    }
    for (name, change) in
        [("quickstart", "requests=100"), ("pd-precise", "listen.kv_cache_manager=null"), ("overload", "duration=10s")]
    {
        let place = Place::new();
        place.write("prices.yaml", PRICES);
        let llm_d = ["--naming", "llm-d"];
        place.good(&[&["run", &scenario(name), "--set", change][..], &ALL_FEATURES, &llm_d].concat());
        found.extend(emitted(&place.traces("out")));
    }
    let registry = Registry::builtin().expect("the registry is sound");
    // Metrics have attributes of their own.
    let attributes = registry.spans.values().flat_map(|s| s.attributes.keys());
    let attributes = attributes.chain(registry.events.values().flat_map(|e| e.attributes.keys()));
    let registered: BTreeSet<&str> =
        registry.spans.keys().chain(registry.events.keys()).chain(attributes).map(String::as_str).collect();
    let elsewhere: BTreeSet<&str> = ELSEWHERE.lines().filter(|l| !l.starts_with('#') && !l.is_empty()).collect();
    let is_found = |name: &str| found.contains(name) || found.iter().any(|f| is_named(name, f));
    let silent: Vec<&&str> = registered.iter().filter(|n| !is_found(n) && !elsewhere.contains(**n)).collect();
    assert!(silent.is_empty(), "registered, emitted by no scenario, and not in emitted_elsewhere.txt: {silent:#?}");
    let stale: Vec<&&str> = elsewhere.iter().filter(|n| is_found(n) || !registered.contains(**n)).collect();
    assert!(stale.is_empty(), "in emitted_elsewhere.txt, and emitted or not registered: {stale:#?}");
}
