//! Files of llm-d and what the gateway makes of them.

use insta::assert_snapshot;
use serde_json::json;

use super::*;
use crate::core::config::{BandConfig, FairnessPolicy, OrderingPolicy, StageOrder};
use shared::units::HumanDur;

const HEAD: &str = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n";

fn read(body: &str) -> Result<Epp, ConfigErrors> {
    load_str("epp.yaml", &format!("{HEAD}{body}"), false)
}

fn good(body: &str) -> Epp {
    read(body).unwrap_or_else(|e| panic!("{e}"))
}

fn wrong(body: &str) -> String {
    read(body).expect_err("something is wrong").to_string()
}

fn lenient(body: &str) -> Epp {
    load_str("epp.yaml", &format!("{HEAD}{body}"), true).unwrap_or_else(|e| panic!("{e}"))
}

/// A profile in one line: filters > scorers * weight > picker.
fn gist(profile: &ProfileConfig) -> String {
    let filters: Vec<&str> = profile.filters.iter().map(|f| f.name.as_deref().unwrap_or(&f.kind)).collect();
    let scorer = |s: &crate::core::config::ScorerConfig| {
        format!("{} * {}", s.name.as_deref().unwrap_or(&s.kind), s.weight)
    };
    let scorers: Vec<String> = profile.scorers.iter().map(scorer).collect();
    format!("{}: {} > {} > {}", profile.name, filters.join(", "), scorers.join(", "), profile.picker.kind)
}

/// Every file of the library is read, and the gateway takes what comes of it.
#[test]
fn optimized_baseline_is_what_llm_d_deploys() {
    let epp = load_str("f", include_str!("../../../scenarios/epp/optimized-baseline.epp.yaml"), false).unwrap();
    assert_snapshot!(gist(&epp.profile), @"");
    assert_eq!((epp.prefix.max_prefix_tokens, epp.prefix.auto_tune), (100_000, true));
    assert_eq!((epp.disaggregation.as_ref(), epp.warnings.len()), (None, 0));
    let mut config = GatewayConfig::default();
    epp.apply(&mut config);
    assert_eq!(config.validate(), []);
}

#[test]
fn sim_pd_decodes_and_prefills() {
    let epp = load_str("f", include_str!("../../../scenarios/epp/sim-pd.epp.yaml"), false).unwrap();
    let disaggregation = epp.disaggregation.clone().unwrap();
    assert_snapshot!([gist(&epp.profile), gist(&disaggregation.profile)].join("\n"), @"");
    assert_eq!(disaggregation.decider.parameters["nonCachedTokens"], 16);
    assert_eq!(disaggregation.stage_order, StageOrder::DecodeFirst);
    assert_eq!((epp.prefix.block_tokens, epp.prefix.max_prefix_tokens, epp.prefix.auto_tune), (64, 16_384, false));
    assert_snapshot!(epp.warnings.join("\n"), @"");
    let mut config = GatewayConfig::default();
    epp.apply(&mut config);
    assert_eq!(config.validate(), []);
}

#[test]
fn what_is_left_out_is_what_llm_d_puts_there() {
    let profile = |body: &str| gist(&good(body).profile);
    // One profile of everything, each weight 1, max-score.
    assert_snapshot!(profile("plugins: [{type: queue-scorer}, {type: decode-filter}, {type: load-aware-scorer}]"), @"");
    assert_snapshot!(profile("plugins: [{type: queue-scorer}, {type: random-picker}]"), @"");
    assert_snapshot!(profile("plugins: []"), @"");
    assert_snapshot!(profile(""), @"");
    // A profile without a picker gets the first one of the file.
    assert_snapshot!(profile("plugins: [{type: weighted-random-picker}, {type: queue-scorer}]\nschedulingProfiles: [{name: p, plugins: [{pluginRef: queue-scorer}]}]"), @"");
    // A plugin that is both is both.
    assert_snapshot!(profile("plugins: [{type: context-length-aware, name: length, parameters: {enableFiltering: true}}]"), @"");
}

#[test]
fn names_stand_for_plugins() {
    let epp = good(
        "plugins:
- {name: approx, type: approx-prefix-cache-producer}
- {name: p, type: prefix-cache-scorer, parameters: {prefixMatchInfoProducerName: approx}}
- {name: q, type: queue-scorer}
schedulingProfiles:
- name: default
  plugins: [{pluginRef: p, weight: 2.5}, {pluginRef: q}, {pluginRef: approx}]",
    );
    assert_snapshot!(gist(&epp.profile), @"");
    assert_eq!(epp.profile.scorers[0].parameters["prefixMatchInfoProducerName"], "approx-prefix-cache-producer");
    assert_snapshot!(epp.warnings.join("\n"), @"");
}

#[test]
fn a_problem_names_file_path_found_and_allowed() {
    assert_snapshot!(load_str("epp.yaml", "apiVersion: v1\nkind: Pod\n", false).unwrap_err().to_string(), @"");
    assert_snapshot!(wrong("plugins: [{type: queue-scorer}, {type: queue-scorer}]"), @"");
    assert_snapshot!(wrong("plugins: [{type: load-aware-scorer, parameters: {threshold: 0}}]"), @"");
    assert_snapshot!(wrong("plugins: [{type: load-aware-scorer, parameters: {treshold: 9}}]"), @"");
    assert_snapshot!(wrong("plugins: [{type: queue-scorer}]\nschedulingProfiles: [{name: p, plugins: [{pluginRef: queue-scorrer}]}]"), @"");
    assert_snapshot!(wrong("plugins: [{type: queue-scorer}]\nschedulingProfiles: [{name: p, plugins: [{pluginRef: queue-scorer, weight: -1}]}]"), @"");
    assert_snapshot!(wrong("plugins: [{type: queue-scorer}]\nschedulingProfiles: [{name: a}, {name: b}]"), @"");
    assert_snapshot!(wrong("plugins: [{type: max-score-picker}, {type: random-picker}]"), @"");
    assert_snapshot!(wrong("plugins: [{type: single-profile-handler}, {type: disagg-profile-handler}]\nschedulingProfiles: [{name: decode}]"), @"");
    assert_snapshot!(wrong("pluginz: []"), @"");
    assert_snapshot!(wrong("plugins: [{type: disagg-profile-handler}]\nschedulingProfiles: [{name: p}]"), @"");
}

#[test]
fn what_is_not_supported_lists_what_is() {
    assert_snapshot!(wrong("plugins: [{type: precise-prefix-cache-scorer}]"), @"");
    assert_snapshot!(wrong("plugins: [{type: quue-scorer}]"), @"");
    assert_snapshot!(wrong("featureGates: [flowControl]"), @"");
    assert_snapshot!(wrong("featureGates: [fast, 'flowControl=maybe']"), @"");
    assert_snapshot!(wrong("dataLayer: {discovery: {pluginRef: file}}"), @"");
}

#[test]
fn what_is_not_supported_is_left_out_where_that_is_allowed() {
    let epp = lenient(
        "featureGates: [flowControl]
plugins:
- {type: token-producer, parameters: {modelName: m, vllm: {url: 'http://localhost:8000'}}}
- {type: endpoint-notification-source}
- {type: metrics-data-source}
- {type: core-metrics-extractor}
- {type: precise-prefix-cache-producer, parameters: {tokenProcessorConfig: {blockSize: 64}}}
- {type: prefix-cache-scorer, parameters: {prefixMatchInfoProducerName: precise-prefix-cache-producer}}
- {type: kv-cache-utilization-scorer}
- {type: topology-affinity-scorer}
dataLayer:
  sources:
  - {pluginRef: metrics-data-source, extractors: [{pluginRef: core-metrics-extractor}]}
  - {pluginRef: endpoint-notification-source, extractors: [{pluginRef: precise-prefix-cache-producer}]}
schedulingProfiles:
- name: default
  plugins:
  - {pluginRef: prefix-cache-scorer, weight: 2}
  - {pluginRef: topology-affinity-scorer, weight: 1}
  - {pluginRef: kv-cache-utilization-scorer, weight: 1}",
    );
    assert_snapshot!(gist(&epp.profile), @"");
    assert_snapshot!(epp.warnings.join("\n"), @"");
}

#[test]
fn handlers_are_read_in_both_forms() {
    let file = |handler: &str| {
        format!(
            "plugins: [{{type: prefix-based-pd-decider, name: d}}, {handler}]
schedulingProfiles: [{{name: decode}}, {{name: prefill}}, {{name: first}}, {{name: second}}]"
        )
    };
    let check = |handler: &str, expect: Option<(&str, &str, StageOrder)>| {
        let epp = good(&file(handler));
        let found = epp.disaggregation.map(|d| (d.profile.name, d.decider.kind, d.stage_order));
        let expect = expect.map(|(profile, decider, order)| (profile.to_owned(), decider.to_owned(), order));
        assert_eq!(found, expect, "{handler}");
    };
    let based = "prefix-based-pd-decider";
    let decode_first = StageOrder::DecodeFirst;
    check("{type: disagg-profile-handler}", None);
    check("{type: disagg-profile-handler, parameters: {deciders: {prefill: d}}}", Some(("prefill", based, decode_first)));
    check(
        "{type: disagg-profile-handler, parameters: {profiles: {decode: first, prefill: second}, deciders: {prefill: d}}}",
        Some(("second", based, decode_first)),
    );
    check(
        "{type: disagg-profile-handler, parameters: {stageOrder: prefill-first}}",
        Some(("prefill", "always-disagg-pd-decider", StageOrder::PrefillFirst)),
    );
    check(
        "{type: pd-profile-handler, parameters: {prefillProfile: second, deciderPluginName: d, primaryPort: 8000}}",
        Some(("second", based, decode_first)),
    );
    let both = "{type: disagg-profile-handler, parameters: {stageOrder: prefill-first, deciders: {prefill: d}}}";
    assert_snapshot!(wrong(&file(both)), @"");
}

#[test]
fn producers_and_detector_are_read() {
    let epp = good(
        "plugins:
- {type: approx-prefix-cache-producer, parameters: {blockSizeTokens: 128, maxPrefixTokensToMatch: 0, maxPrefixBlocksToMatch: 10}}
- {type: inflight-load-producer, parameters: {addEstimatedOutputTokens: true, outputRatio: 0.5, maxEstimatedOutputTokens: 100}}
- {type: utilization-detector, name: sat, parameters: {queueDepthThreshold: 9, kvCacheUtilThreshold: 0.5, metricsStalenessThreshold: 1s}}
saturationDetector: {pluginRef: sat}",
    );
    assert_eq!((epp.prefix.block_tokens, epp.prefix.max_prefix_tokens), (128, 1280));
    assert_eq!((epp.in_flight.output_ratio, epp.in_flight.max_estimated_output_tokens), (0.5, Some(100)));
    let s = epp.saturation;
    assert_eq!((s.queue_depth_threshold, s.kv_cache_threshold, s.metrics_staleness), (9, 0.5, HumanDur::secs(1)));
    let whole = good("plugins: [{type: approx-prefix-cache-producer, parameters: {maxPrefixTokensToMatch: 0, maxPrefixBlocksToMatch: 0}}]");
    assert_eq!(whole.prefix.max_prefix_tokens, u32::MAX);
    assert_snapshot!(wrong("plugins: [{type: approx-prefix-cache-producer, parameters: {blockSizeTokens: 512}}]"), @"");
    assert_snapshot!(wrong("plugins: [{type: utilization-detector, parameters: {metricsStalenessThreshold: 5}}]"), @"");
    assert_snapshot!(wrong("saturationDetector: {pluginRef: concurrency}"), @"");
}

#[test]
fn flow_control_is_read_and_has_no_effect() {
    let epp = good(
        "plugins: [{type: static-usage-limit-policy, name: limit, parameters: {threshold: 0.9}}, {type: edf-ordering-policy, name: edf}]
flowControl:
  maxBytes: 1Gi
  maxRequests: 1k
  defaultRequestTTL: 1m30s
  usageLimitPolicyPluginRef: limit
  priorityBands:
  - {priority: 10, maxRequests: '100', fairnessPolicyRef: round-robin-fairness-policy, orderingPolicyRef: edf}
  - {priority: -1, maxBytes: 0}
  defaultNegativePriorityBand: {maxRequests: 1}",
    );
    let flow = epp.flow_control.clone().unwrap();
    assert_eq!((flow.enabled, flow.max_bytes, flow.max_requests), (false, Some(1 << 30), Some(1000)));
    // The one that is not given follows the other.
    assert_eq!(flow.no_endpoint_request_ttl, HumanDur::secs(90));
    assert_eq!(flow.usage_limit, 0.9);
    let band = BandConfig {
        priority: 10,
        max_requests: 100,
        fairness: FairnessPolicy::RoundRobinFairnessPolicy,
        ordering: OrderingPolicy::EdfOrderingPolicy,
        ..BandConfig::default()
    };
    assert_eq!(flow.priority_bands, [band, BandConfig { priority: -1, ..BandConfig::default() }]);
    assert_eq!(flow.default_negative_band, Some(BandConfig { max_requests: 1, ..BandConfig::default() }));
    assert_snapshot!(epp.warnings.join("\n"), @"");
    let mut config = GatewayConfig::default();
    epp.apply(&mut config);
    assert_eq!(config.validate(), []);
}

#[test]
fn flow_control_is_checked() {
    assert_snapshot!(wrong("flowControl: {maxBytes: many}"), @"");
    assert_snapshot!(wrong("flowControl: {defaultRequestTTL: soon}"), @"");
    assert_snapshot!(wrong("flowControl: {priorityBands: [{priority: 1}, {priority: 1}]}"), @"");
    assert_snapshot!(wrong("flowControl: {priorityBands: [{priority: 1, fairnessPolicyRef: fcfs-ordering-policy}]}"), @"");
    assert_snapshot!(wrong("flowControl: {usageLimitPolicyPluginRef: nobody}"), @"");
}

#[test]
fn a_detector_alone_is_no_flow_control() {
    let epp = good("flowControl: {saturationDetector: {pluginRef: utilization-detector}}");
    assert_eq!((epp.flow_control, epp.warnings.len()), (None, 0));
}

#[test]
fn a_file_is_told_by_its_kind_and_found_beside_the_one_that_names_it() {
    let scenarios = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scenarios/epp");
    assert!(is_epp(&scenarios.join("sim-pd.epp.yaml")));
    assert!(!is_epp(&scenarios.join("sim-pd.yaml")));
    assert!(!is_epp(&scenarios.join("nowhere.yaml")));
    let mut config = GatewayConfig { epp_config: Some("sim-pd.epp.yaml".into()), ..GatewayConfig::default() };
    let warnings = resolve(&mut config, Some(&scenarios.join("sim-pd.yaml"))).unwrap();
    assert_eq!((config.epp_config, config.disaggregation.is_some(), warnings.len()), (None, true, 1));
    assert_eq!(config.profile.scorers[0].parameters, serde_json::from_value(json!({})).unwrap());
}
