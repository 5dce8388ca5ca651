//! Files of llm-d and what the gateway makes of them.

use insta::assert_snapshot;
use serde_json::json;

use super::*;
use crate::core::config::{
    BandConfig, ConcurrencyConfig, ConcurrencyMode, Detector, FairnessPolicy, OrderingPolicy, PreciseConfig, StageOrder,
};
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
    let scorer =
        |s: &crate::core::config::ScorerConfig| format!("{} * {}", s.name.as_deref().unwrap_or(&s.kind), s.weight);
    let scorers: Vec<String> = profile.scorers.iter().map(scorer).collect();
    format!("{}: {} > {} > {}", profile.name, filters.join(", "), scorers.join(", "), profile.picker.kind)
}

/// Every file of the library is read, and the gateway takes what comes of it.
#[test]
fn optimized_baseline_is_what_llm_d_deploys() {
    let epp = load_str("f", include_str!("../../../scenarios/epp/optimized-baseline.epp.yaml"), false).unwrap();
    assert_snapshot!(gist(&epp.profile), @"default: healthy-filter > queue-scorer * 2, kv-cache-utilization-scorer * 2, prefix-cache-scorer * 3, no-hit-lru-scorer * 2 > max-score-picker");
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
    assert_snapshot!([gist(&epp.profile), gist(&disaggregation.profile)].join("\n"), @"
    decode: healthy-filter, decode-filter > prefix-cache-scorer * 2, queue-scorer * 1 > max-score-picker
    prefill: healthy-filter, prefill-filter > prefix-cache-scorer * 2, queue-scorer * 1 > max-score-picker
    ");
    assert_eq!(disaggregation.decider.parameters["nonCachedTokens"], 16);
    assert_eq!(disaggregation.stage_order, StageOrder::DecodeFirst);
    assert_eq!((epp.prefix.block_tokens, epp.prefix.max_prefix_tokens, epp.prefix.auto_tune), (64, 16_384, false));
    assert_snapshot!(epp.warnings.join("\n"), @"plugins[0].parameters.blockSizeTokens: blocks have 64 tokens, as in llm-d");
    let mut config = GatewayConfig::default();
    epp.apply(&mut config);
    assert_eq!(config.validate(), []);
}

#[test]
fn what_is_left_out_is_what_llm_d_puts_there() {
    let profile = |body: &str| gist(&good(body).profile);
    // One profile of everything, each weight 1, max-score.
    assert_snapshot!(profile("plugins: [{type: queue-scorer}, {type: decode-filter}, {type: load-aware-scorer}]"), @"default: healthy-filter, decode-filter > queue-scorer * 1, load-aware-scorer * 1 > max-score-picker");
    assert_snapshot!(profile("plugins: [{type: queue-scorer}, {type: random-picker}]"), @"default: healthy-filter > queue-scorer * 1 > random-picker");
    assert_snapshot!(profile("plugins: []"), @"default: healthy-filter >  > max-score-picker");
    assert_snapshot!(profile(""), @"default: healthy-filter >  > max-score-picker");
    // A profile without a picker gets the first one of the file.
    assert_snapshot!(profile("plugins: [{type: weighted-random-picker}, {type: queue-scorer}]\nschedulingProfiles: [{name: p, plugins: [{pluginRef: queue-scorer}]}]"), @"p: healthy-filter > queue-scorer * 1 > weighted-random-picker");
    // A plugin that is both is both.
    assert_snapshot!(profile("plugins: [{type: context-length-aware, name: length, parameters: {enableFiltering: true}}]"), @"default: healthy-filter, length > length * 1 > max-score-picker");
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
    assert_snapshot!(gist(&epp.profile), @"default: healthy-filter > p * 2.5, q * 1 > max-score-picker");
    assert_eq!(epp.profile.scorers[0].parameters["prefixMatchInfoProducerName"], "approx-prefix-cache-producer");
    assert_snapshot!(epp.warnings.join("\n"), @"schedulingProfiles[0].plugins[2]: it has no effect in a profile");
}

#[test]
fn a_problem_names_file_path_found_and_allowed() {
    assert_snapshot!(load_str("epp.yaml", "apiVersion: v1\nkind: Pod\n", false).unwrap_err().to_string(), @r#"
    error: epp.yaml: apiVersion: found "v1", expected llm-d.ai/v1alpha1
       1 | apiVersion: v1
         |             ^^
    error: epp.yaml: kind: found "Pod", expected EndpointPickerConfig
       2 | kind: Pod
         |       ^^^
    "#);
    assert_snapshot!(wrong("plugins: [{type: queue-scorer}, {type: queue-scorer}]"), @r#"
    error: epp.yaml: plugins[1].name: found "queue-scorer" a second time, expected each name once
       3 | plugins: [{type: queue-scorer}, {type: queue-scorer}]
         |                                 ^^^^^^^^^^^^^^^^^^^
    "#);
    assert_snapshot!(wrong("plugins: [{type: load-aware-scorer, parameters: {threshold: 0}}]"), @"
    error: epp.yaml: plugins[0].parameters.threshold: found 0, expected a whole number of at least 1
       3 | plugins: [{type: load-aware-scorer, parameters: {threshold: 0}}]
         |                                                             ^
    ");
    assert_snapshot!(wrong("plugins: [{type: load-aware-scorer, parameters: {treshold: 9}}]"), @"
    error: epp.yaml: plugins[0].parameters.treshold: found 9, expected one of the parameters threshold
       3 | plugins: [{type: load-aware-scorer, parameters: {treshold: 9}}]
         |                                                            ^
    ");
    assert_snapshot!(wrong("plugins: [{type: queue-scorer}]\nschedulingProfiles: [{name: p, plugins: [{pluginRef: queue-scorrer}]}]"), @r#"
    error: epp.yaml: schedulingProfiles[0].plugins[0].pluginRef: found "queue-scorrer", expected the name of a plugin: queue-scorer
       4 | schedulingProfiles: [{name: p, plugins: [{pluginRef: queue-scorrer}]}]
         |                                                      ^^^^^^^^^^^^^
    help: did you mean queue-scorer?
    "#);
    assert_snapshot!(wrong("plugins: [{type: queue-scorer}]\nschedulingProfiles: [{name: p, plugins: [{pluginRef: queue-scorer, weight: -1}]}]"), @"
    error: epp.yaml: schedulingProfiles[0].plugins[0].weight: found -1, expected a number of at least 0
       4 | schedulingProfiles: [{name: p, plugins: [{pluginRef: queue-scorer, weight: -1}]}]
         |                                                                            ^^
    ");
    assert_snapshot!(wrong("plugins: [{type: queue-scorer}]\nschedulingProfiles: [{name: a}, {name: b}]"), @"
    error: epp.yaml: schedulingProfiles: found 2 profiles, expected one profile, or disagg-profile-handler among the plugins
       4 | schedulingProfiles: [{name: a}, {name: b}]
         |                     ^^^^^^^^^^^^^^^^^^^^^
    ");
    assert_snapshot!(wrong("plugins: [{type: max-score-picker}, {type: random-picker}]"), @"
    error: epp.yaml: plugins[1]: found a second picker, expected one picker in a profile
       3 | plugins: [{type: max-score-picker}, {type: random-picker}]
         |                                     ^^^^^^^^^^^^^^^^^^^^
    ");
    assert_snapshot!(wrong("plugins: [{type: single-profile-handler}, {type: disagg-profile-handler}]\nschedulingProfiles: [{name: decode}]"), @"
    error: epp.yaml: plugins[1].type: found a second profile handler, expected one profile handler
       3 | plugins: [{type: single-profile-handler}, {type: disagg-profile-handler}]
         |                                                  ^^^^^^^^^^^^^^^^^^^^^^
    ");
    assert_snapshot!(wrong("pluginz: []"), @"
    error: epp.yaml: pluginz: found an unknown key, expected one of apiVersion, dataLayer, featureGates, flowControl, kind, parser, plugins, requestHandler, saturationDetector, schedulingProfiles
       3 | pluginz: []
         | ^^^^^^^
    help: did you mean plugins?
    ");
    assert_snapshot!(wrong("plugins: [{type: disagg-profile-handler}]\nschedulingProfiles: [{name: p}]"), @r#"
    error: epp.yaml: schedulingProfiles: found the profiles p, expected a profile "decode", which decodes
       4 | schedulingProfiles: [{name: p}]
         |                     ^^^^^^^^^^
    "#);
}

#[test]
fn what_is_not_supported_lists_what_is() {
    assert_snapshot!(wrong("plugins: [{type: topology-affinity-scorer}]"), @r#"
    error: epp.yaml: plugins[0].type: found "topology-affinity-scorer" (endpoints have no topology), expected one of active-request-scorer, always-disagg-pd-decider, approx-prefix-cache-producer, by-label, by-label-selector, concurrency-detector, context-length-aware, core-metrics-extractor, decode-filter, disagg-headers-handler, disagg-profile-handler, edf-ordering-policy, encode-filter, endpoint-notification-source, fcfs-ordering-policy, global-strict-fairness-policy, header-based-testing-filter, healthy-filter, inflight-load-producer, kv-cache-utilization-scorer, label-selector-filter, latency-scorer, load-aware-scorer, lora-affinity-scorer, lora-residency-filter, max-score-picker, metrics-data-source, models-data-extractor, models-data-source, no-hit-lru-scorer, openai-parser, passthrough-parser, pd-profile-handler, precise-prefix-cache-producer, precise-prefix-cache-scorer, prefill-filter, prefill-header-handler, prefix-based-pd-decider, prefix-cache-affinity-filter, prefix-cache-scorer, program-aware-fairness, queue-scorer, random-picker, round-robin-fairness-policy, round-robin-picker, running-requests-size-scorer, session-affinity-scorer, single-profile-handler, slo-deadline-ordering-policy, slo-headroom-tier-filter, static-usage-limit-policy, token-load-scorer, token-producer, utilization-detector, utilization-filter, weighted-random-picker; --allow-unsupported (gateway.allow_unsupported) leaves it out
       3 | plugins: [{type: topology-affinity-scorer}]
         |                  ^^^^^^^^^^^^^^^^^^^^^^^^
    "#);
    assert_snapshot!(wrong("plugins: [{type: quue-scorer}]"), @r#"
    error: epp.yaml: plugins[0].type: found "quue-scorer", expected one of active-request-scorer, always-disagg-pd-decider, approx-prefix-cache-producer, by-label, by-label-selector, concurrency-detector, context-length-aware, core-metrics-extractor, decode-filter, disagg-headers-handler, disagg-profile-handler, edf-ordering-policy, encode-filter, endpoint-notification-source, fcfs-ordering-policy, global-strict-fairness-policy, header-based-testing-filter, healthy-filter, inflight-load-producer, kv-cache-utilization-scorer, label-selector-filter, latency-scorer, load-aware-scorer, lora-affinity-scorer, lora-residency-filter, max-score-picker, metrics-data-source, models-data-extractor, models-data-source, no-hit-lru-scorer, openai-parser, passthrough-parser, pd-profile-handler, precise-prefix-cache-producer, precise-prefix-cache-scorer, prefill-filter, prefill-header-handler, prefix-based-pd-decider, prefix-cache-affinity-filter, prefix-cache-scorer, program-aware-fairness, queue-scorer, random-picker, round-robin-fairness-policy, round-robin-picker, running-requests-size-scorer, session-affinity-scorer, single-profile-handler, slo-deadline-ordering-policy, slo-headroom-tier-filter, static-usage-limit-policy, token-load-scorer, token-producer, utilization-detector, utilization-filter, weighted-random-picker; --allow-unsupported (gateway.allow_unsupported) leaves it out
       3 | plugins: [{type: quue-scorer}]
         |                  ^^^^^^^^^^^
    "#);
    assert_snapshot!(wrong("featureGates: [flowControl]\nflowControl: {enableEviction: true}"), @"
    error: epp.yaml: flowControl.enableEviction: found eviction, expected false: nothing that runs is ended to make room; --allow-unsupported (gateway.allow_unsupported) leaves it out
       4 | flowControl: {enableEviction: true}
         |                               ^^^^
    ");
    assert_snapshot!(wrong("featureGates: [fast, 'flowControl=maybe']"), @r#"
    error: epp.yaml: featureGates[0]: found the gate "fast", expected flowControl or haPopulateNonLeaderDatastore; --allow-unsupported (gateway.allow_unsupported) leaves it out
       3 | featureGates: [fast, 'flowControl=maybe']
         |                ^^^^
    error: epp.yaml: featureGates[1]: found "flowControl=maybe", expected the name of a gate, or with =true or =false
       3 | featureGates: [fast, 'flowControl=maybe']
         |                      ^^^^^^^^^^^^^^^^^^^
    "#);
    assert_snapshot!(wrong("dataLayer: {discovery: {pluginRef: file}}"), @"
    error: epp.yaml: dataLayer.discovery: found a plugin, expected endpoints of the scenario or the command line; --allow-unsupported (gateway.allow_unsupported) leaves it out
       3 | dataLayer: {discovery: {pluginRef: file}}
         |                        ^^^^^^^^^^^^^^^^
    ");
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
    assert_snapshot!(gist(&epp.profile), @"default: healthy-filter > prefix-cache-scorer * 2, kv-cache-utilization-scorer * 1 > max-score-picker");
    assert_snapshot!(epp.warnings.join("\n"), @r#"
    plugins[7].type: "topology-affinity-scorer" (endpoints have no topology) is left out: not supported
    plugins[0].parameters.vllm: no tokenizer is asked: a token is four bytes of the prompt
    "#);
    assert_eq!(epp.precise_prefix, PreciseConfig { block_tokens: 64, ..PreciseConfig::default() });
    let mut config = GatewayConfig::default();
    epp.apply(&mut config);
    assert!(config.reads_kv_events());
}

#[test]
fn the_index_of_kv_events_is_read_from_its_producer_or_its_scorer() {
    let parameters = "{
  tokenProcessorConfig: {blockSize: 32, hashSeed: '42'},
  indexerConfig: {
    kvBlockIndexConfig: {enableMetrics: true, inMemoryConfig: {size: 1000, podCacheSize: 3}},
    kvCacheBackendConfigs: [{name: gpu, weight: 0.9}, {name: CPU, weight: 0.5}]},
  kvEventsConfig: {topicFilter: kv, concurrency: 4, discoverPods: true, podDiscoveryConfig: {socketPort: 6000}},
  speculativeIndexing: true, speculativeTTL: 500ms}";
    let expect = PreciseConfig {
        block_tokens: 32,
        max_blocks: 1000,
        max_endpoints_per_block: 3,
        gpu_weight: 0.9,
        cpu_weight: 0.5,
        speculative: true,
        speculative_ttl: HumanDur::millis(500),
        events_port: 6000,
        topic_filter: "kv".to_owned(),
        ..PreciseConfig::default()
    };
    for kind in ["precise-prefix-cache-producer", "precise-prefix-cache-scorer"] {
        let epp = good(&format!("plugins: [{{type: {kind}, parameters: {parameters}}}]"));
        assert_eq!(epp.precise_prefix, expect, "{kind}");
    }
    let both = format!(
        "plugins: [{{type: precise-prefix-cache-producer, parameters: {parameters}}}, {{type: precise-prefix-cache-scorer}}]"
    );
    assert_eq!(good(&both).precise_prefix, expect);
    assert_eq!(good("plugins: [{type: precise-prefix-cache-scorer}]").precise_prefix, PreciseConfig::default());
}

#[test]
fn an_index_elsewhere_and_other_engines_are_refused() {
    let check = |parameters: &str, path: &str| {
        let file = format!("plugins: [{{type: precise-prefix-cache-producer, parameters: {parameters}}}]");
        let told = wrong(&file);
        assert!(told.contains(&format!("plugins[0].parameters.{path}: found")), "{told}");
    };
    let redis = "{indexerConfig: {kvBlockIndexConfig: {redisConfig: {address: r}}}}";
    check(redis, "indexerConfig.kvBlockIndexConfig.redisConfig");
    check("{kvEventsConfig: {zmqEndpoint: 'tcp://*:5557'}}", "kvEventsConfig.zmqEndpoint");
    check("{kvEventsConfig: {engineType: sglang}}", "kvEventsConfig.engineType");
    check("{sessionManager: sessions}", "sessionManager");
    check("{tokenProcessorConfig: {blocksize: 16}}", "tokenProcessorConfig.blocksize");
    check("{indexerConfig: {kvCacheBackendConfigs: [{name: disk, weight: 1}]}}", "indexerConfig.kvCacheBackendConfigs");
    check("{speculativeTTL: soon}", "speculativeTTL");
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
    check(
        "{type: disagg-profile-handler, parameters: {deciders: {prefill: d}}}",
        Some(("prefill", based, decode_first)),
    );
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
    assert_snapshot!(wrong(&file(both)), @r#"
    error: epp.yaml: plugins[1].parameters.deciders.prefill: found "d", expected no decider where prefill comes first
       3 | plugins: [{type: prefix-based-pd-decider, name: d}, {type: disagg-profile-handler, parameters: {stageOrder: prefill-first, deciders: {prefill: d}}}]
         |                                                                                                                                                ^
    "#);
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
    let whole = good(
        "plugins: [{type: approx-prefix-cache-producer, parameters: {maxPrefixTokensToMatch: 0, maxPrefixBlocksToMatch: 0}}]",
    );
    assert_eq!(whole.prefix.max_prefix_tokens, u32::MAX);
    assert_snapshot!(wrong("plugins: [{type: approx-prefix-cache-producer, parameters: {blockSizeTokens: 512}}]"), @"
    error: epp.yaml: plugins[0].parameters.blockSizeTokens: found 512, expected at most 256
       3 | plugins: [{type: approx-prefix-cache-producer, parameters: {blockSizeTokens: 512}}]
         |                                                                              ^^^
    ");
    assert_snapshot!(wrong("plugins: [{type: utilization-detector, parameters: {metricsStalenessThreshold: 5}}]"), @"
    error: epp.yaml: plugins[0].parameters.metricsStalenessThreshold: found 5, expected text
       3 | plugins: [{type: utilization-detector, parameters: {metricsStalenessThreshold: 5}}]
         |                                                                                ^
    ");
    assert_snapshot!(wrong("saturationDetector: {pluginRef: concurrency}"), @r#"
    error: epp.yaml: saturationDetector.pluginRef: found "concurrency", expected the name of a plugin: nothing
       3 | saturationDetector: {pluginRef: concurrency}
         |                                 ^^^^^^^^^^^
    "#);
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
    assert_snapshot!(epp.warnings.join("\n"), @"flowControl: it has no effect: the gate flowControl is off");
    let mut config = GatewayConfig::default();
    epp.apply(&mut config);
    assert_eq!(config.validate(), []);
}

#[test]
fn the_gate_turns_flow_control_on() {
    let epp = good("featureGates: [flowControl]");
    assert_eq!(epp.flow_control, Some(FlowControlConfig { enabled: true, ..FlowControlConfig::default() }));
    let epp = good("featureGates: ['flowControl=true']\nflowControl: {maxRequests: 9}");
    assert_eq!(epp.flow_control.map(|f| (f.enabled, f.max_requests)), Some((true, Some(9))));
    assert!(epp.warnings.is_empty(), "{:?}", epp.warnings);
}

#[test]
fn either_detector_is_read() {
    let file = |parameters: &str| {
        format!(
            "plugins: [{{type: concurrency-detector, parameters: {parameters}}}]
flowControl: {{saturationDetector: {{pluginRef: concurrency-detector}}}}"
        )
    };
    let of = |parameters: &str| {
        let saturation = good(&file(parameters)).saturation;
        assert_eq!(saturation.detector, Detector::ConcurrencyDetector);
        saturation.concurrency
    };
    assert_eq!(of("{}"), ConcurrencyConfig::default());
    let given = "{concurrencyMode: hybrid, maxConcurrency: 64, maxTokenConcurrency: 80000, headroom: 0.1}";
    let expect = ConcurrencyConfig { mode: ConcurrencyMode::Hybrid, max_requests: 64, max_tokens: 80_000 };
    assert_eq!(of(given), expect);
    assert_snapshot!(wrong(&file("{concurrencyMode: bytes}")), @r#"
    error: epp.yaml: plugins[0].parameters.concurrencyMode: found "bytes", expected requests, tokens or hybrid
       3 | plugins: [{type: concurrency-detector, parameters: {concurrencyMode: bytes}}]
         |                                                                      ^^^^^
    "#);
    assert_snapshot!(wrong("plugins: [{type: max-score-picker}]\nsaturationDetector: {pluginRef: max-score-picker}"), @r#"
    error: epp.yaml: saturationDetector.pluginRef: found "max-score-picker", expected the name of a utilization-detector or a concurrency-detector
       4 | saturationDetector: {pluginRef: max-score-picker}
         |                                 ^^^^^^^^^^^^^^^^
    "#);
}

#[test]
fn flow_control_is_checked() {
    assert_snapshot!(wrong("flowControl: {maxBytes: many}"), @r#"
    error: epp.yaml: flowControl.maxBytes: found "many", expected a quantity of at least 0 such as 5000, 1k, 500M or 1Gi
       3 | flowControl: {maxBytes: many}
         |                         ^^^^
    "#);
    assert_snapshot!(wrong("flowControl: {defaultRequestTTL: soon}"), @r#"
    error: epp.yaml: flowControl.defaultRequestTTL: found "soon", expected a duration such as 60s, 1m30s or 200ms
       3 | flowControl: {defaultRequestTTL: soon}
         |                                  ^^^^
    "#);
    assert_snapshot!(wrong("flowControl: {priorityBands: [{priority: 1}, {priority: 1}]}"), @"
    error: epp.yaml: flowControl.priorityBands[1].priority: found 1 a second time, expected each priority once
       3 | flowControl: {priorityBands: [{priority: 1}, {priority: 1}]}
         |                                                         ^
    ");
    assert_snapshot!(wrong("flowControl: {priorityBands: [{priority: 1, fairnessPolicyRef: fcfs-ordering-policy}]}"), @"
    error: epp.yaml: flowControl.priorityBands[0].fairnessPolicyRef: found a plugin of type fcfs-ordering-policy, expected global-strict-fairness-policy, round-robin-fairness-policy or program-aware-fairness
       3 | flowControl: {priorityBands: [{priority: 1, fairnessPolicyRef: fcfs-ordering-policy}]}
         |                                                                ^^^^^^^^^^^^^^^^^^^^
    ");
    assert_snapshot!(wrong("flowControl: {usageLimitPolicyPluginRef: nobody}"), @r#"
    error: epp.yaml: flowControl.usageLimitPolicyPluginRef: found "nobody", expected the name of a plugin: nothing
       3 | flowControl: {usageLimitPolicyPluginRef: nobody}
         |                                          ^^^^^^
    "#);
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
