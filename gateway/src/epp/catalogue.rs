//! llm-d's plugins: what each type is here, and why some are nothing.

use crate::core::scheduler::registry;

pub(super) use crate::core::scheduler::registry::PRECISE_PREFIX as PRECISE_SCORER;

/// What a type of plugin is in the gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// A filter, a scorer, or both.
    Plugin {
        /// Whether it is a filter.
        filter: bool,
        /// Whether it is a scorer.
        scorer: bool,
    },
    Picker,
    Decider,
    SingleHandler,
    DisaggregatedHandler,
    PrefixProducer,
    PreciseProducer,
    InFlightProducer,
    TokenProducer,
    UtilizationDetector,
    ConcurrencyDetector,
    /// A policy of flow control.
    Policy,
    /// Built into the gateway: there is nothing to configure.
    BuiltIn,
}

pub(super) const PREFIX_PRODUCER: &str = "approx-prefix-cache-producer";
pub(super) const IN_FLIGHT_PRODUCER: &str = "inflight-load-producer";
pub(super) const TOKEN_PRODUCER: &str = "token-producer";
pub(super) const LATENCY_PRODUCER: &str = "predicted-latency-producer";
pub(super) const UTILIZATION_DETECTOR: &str = "utilization-detector";
pub(super) const CONCURRENCY_DETECTOR: &str = "concurrency-detector";
pub(super) const STATIC_USAGE_LIMIT: &str = "static-usage-limit-policy";

/// What is not a filter, scorer, picker or decider.
const OTHERS: &[(&str, Part)] = &[
    ("single-profile-handler", Part::SingleHandler),
    ("disagg-profile-handler", Part::DisaggregatedHandler),
    ("pd-profile-handler", Part::DisaggregatedHandler),
    (PREFIX_PRODUCER, Part::PrefixProducer),
    ("precise-prefix-cache-producer", Part::PreciseProducer),
    (IN_FLIGHT_PRODUCER, Part::InFlightProducer),
    (TOKEN_PRODUCER, Part::TokenProducer),
    (UTILIZATION_DETECTOR, Part::UtilizationDetector),
    (CONCURRENCY_DETECTOR, Part::ConcurrencyDetector),
    ("fcfs-ordering-policy", Part::Policy),
    ("edf-ordering-policy", Part::Policy),
    ("slo-deadline-ordering-policy", Part::Policy),
    ("global-strict-fairness-policy", Part::Policy),
    ("round-robin-fairness-policy", Part::Policy),
    ("program-aware-fairness", Part::Policy),
    (STATIC_USAGE_LIMIT, Part::Policy),
    ("metrics-data-source", Part::BuiltIn),
    ("core-metrics-extractor", Part::BuiltIn),
    ("models-data-source", Part::BuiltIn),
    ("models-data-extractor", Part::BuiltIn),
    ("endpoint-notification-source", Part::BuiltIn),
    ("openai-parser", Part::BuiltIn),
    ("passthrough-parser", Part::BuiltIn),
    ("disagg-headers-handler", Part::BuiltIn),
    ("prefill-header-handler", Part::BuiltIn),
];

const PREDICTOR: &str = "no latency predictor is built; latency-scorer then rates by cache, queue and prefix";
const CLUSTERS: &str = "there is one cluster";
const ENCODE: &str = "nothing is encoded by an endpoint of its own";
const KUBERNETES: &str = "there is no Kubernetes";
const TOPOLOGY: &str = "endpoints have no topology";
const CEILING: &str = "the ceiling is the same for every priority: static-usage-limit-policy is here";
const EVICTION: &str = "nothing that runs is ended to make room";
const PARSER: &str = "only OpenAI's requests are understood; others pass through";

/// Types of llm-d that are nothing here, and why.
const NOT_HERE: &[(&str, &str)] = &[
    (LATENCY_PRODUCER, PREDICTOR),
    ("latency-slo-admitter", PREDICTOR),
    ("tokenizer", "the prompt's tokens are estimated from its bytes"),
    ("session-id-producer", "session-affinity-scorer reads the header itself (strategy: session_id)"),
    ("burst-prefix-cache-producer", "requests are scheduled one by one"),
    ("p2p-source-producer", "engines do not fetch blocks from each other by the gateway's word"),
    ("session-affinity-filter", "session-affinity-scorer is here"),
    ("header-label-affinity-scorer", "label-selector-filter is here"),
    ("endpoint-attribute-filter", "utilization-filter is here"),
    ("endpoint-attribute-scorer", "attributes of endpoints are the ones that the other scorers read"),
    ("topology-affinity-filter", TOPOLOGY),
    ("topology-affinity-scorer", TOPOLOGY),
    ("topology-extractor", TOPOLOGY),
    ("mm-embeddings-cache-scorer", ENCODE),
    ("mm-embeddings-cache-producer", ENCODE),
    ("always-disagg-multimodal-decider", ENCODE),
    ("data-parallel-profile-handler", "ranks of an engine are not endpoints"),
    ("header-profile-handler", "single-profile-handler and disagg-profile-handler are here"),
    ("probabilistic-admitter", "requests of negative priority are refused when the pool is saturated"),
    ("priority-holdback-policy", CEILING),
    ("soft-reflective-ceiling-policy", CEILING),
    ("sheddable-eviction-filter", EVICTION),
    ("priority-then-time-eviction-order-policy", EVICTION),
    ("multicluster-session-affinity-filter", CLUSTERS),
    ("multicluster-queue-scorer", CLUSTERS),
    ("multicluster-kv-cache-utilization-scorer", CLUSTERS),
    ("multicluster-prefix-cache-scorer", CLUSTERS),
    ("multicluster-approx-prefix-cache-producer", CLUSTERS),
    ("multicluster-metrics-data-source", CLUSTERS),
    ("multicluster-metrics-extractor", CLUSTERS),
    ("multicluster-file-discovery", CLUSTERS),
    ("file-discovery", "endpoints come from the scenario or the command line"),
    ("dcgm-data-source", "engines report their own metrics only"),
    ("dcgm-extractor", "engines report their own metrics only"),
    ("k8s-notification-source", KUBERNETES),
    ("disaggregatedset-rollout-screener", KUBERNETES),
    ("disaggregatedset-rollout-pod-extractor", KUBERNETES),
    ("agent-identity", "a flow is named by x-llm-d-inference-fairness-id"),
    ("request-attribute-reporter", "what a request used is in its trace"),
    ("destination-endpoint-served-verifier", "every response names its endpoint"),
    ("local-syncer", "there is one gateway"),
    ("anthropic-parser", PARSER),
    ("vllmhttp-parser", PARSER),
    ("vllmgrpc-parser", PARSER),
    ("sglanghttp-parser", PARSER),
    ("vertexai-parser", PARSER),
];

/// What `kind` is here, if anything.
pub(super) fn part(kind: &str) -> Option<Part> {
    let filter = registry::filters().any(|k| k == kind);
    let scorer = registry::scorers().any(|k| k == kind);
    if filter || scorer {
        return Some(Part::Plugin { filter, scorer });
    }
    if registry::pickers().any(|k| k == kind) {
        return Some(Part::Picker);
    }
    if registry::deciders().any(|k| k == kind) {
        return Some(Part::Decider);
    }
    OTHERS.iter().find(|(k, _)| *k == kind).map(|(_, part)| *part)
}

/// Why a type of llm-d is nothing here; `None` for one that llm-d does not have either.
pub(super) fn why_not(kind: &str) -> Option<&'static str> {
    NOT_HERE.iter().find(|(k, _)| *k == kind).map(|(_, why)| *why)
}

/// The types there are.
pub(super) fn supported() -> Vec<&'static str> {
    let plugins = registry::filters().chain(registry::scorers()).chain(registry::pickers()).chain(registry::deciders());
    let mut all: Vec<&'static str> = plugins.chain(OTHERS.iter().map(|(k, _)| *k)).collect();
    all.sort_unstable();
    all.dedup();
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_type_is_here_and_not_here() {
        for (kind, _) in NOT_HERE {
            assert_eq!(part(kind), None, "{kind}");
        }
        for (kind, expect) in OTHERS {
            assert_eq!(part(kind), Some(*expect), "a plugin is registered under the name {kind}");
        }
    }
}
