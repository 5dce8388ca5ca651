//! What can be configured in a gateway, with llm-d's defaults; validated before anything starts.
//!
//! The doc comments of the fields become the descriptions of the published JSON Schema. Where endpoints are and where spans
//! go is the driver's configuration, not the gateway's.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
pub use shared::config::ConfigProblem;
use shared::units::HumanDur;

use crate::core::scheduler::registry;

/// Parameters of a plugin, by name.
pub type Parameters = BTreeMap<String, serde_json::Value>;

/// One gateway.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct GatewayConfig {
    /// The pool of engines, as spans name it.
    pub pool: PoolConfig,
    /// How an endpoint is chosen.
    pub profile: ProfileConfig,
    /// When sheddable requests are refused.
    pub saturation: SaturationConfig,
    /// The approximate index of prompt prefixes.
    pub prefix: PrefixConfig,
    /// What engines report, and how often it is read.
    pub metrics: MetricsConfig,
    /// How long the gateway waits for an engine.
    pub timeouts: TimeoutConfig,
    /// Bounds of requests and connections.
    pub limits: LimitConfig,
    /// Priorities of the objectives that requests name in `x-llm-d-inference-objective`; negative means sheddable. An unknown
    /// objective has priority 0 (InferenceObjective of the Gateway API inference extension).
    pub objectives: BTreeMap<String, i32>,
    /// Whether spans name users and sessions as callers do (`user.id`, `session.id`).
    pub identity_in_spans: bool,
}

/// The pool of engines.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PoolConfig {
    /// Name of the pool.
    pub name: String,
    /// Namespace of the pool.
    pub namespace: String,
}

/// A scheduling profile: filters in order, then scorers, then one picker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ProfileConfig {
    /// Name of the profile.
    pub name: String,
    /// Filters, run in this order; each sees what the one before it kept.
    pub filters: Vec<PluginConfig>,
    /// Scorers; an endpoint's score is the weighted sum of theirs. Without scorers the picker decides alone.
    pub scorers: Vec<ScorerConfig>,
    /// The picker.
    pub picker: PluginConfig,
}

/// A plugin and its parameters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PluginConfig {
    /// Type of the plugin, for example `healthy-filter`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Name in spans; the type if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Parameters of the plugin.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub parameters: Parameters,
}

/// A scorer, its weight and its parameters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ScorerConfig {
    /// Type of the scorer, for example `queue-scorer`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Name in spans; the type if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Factor of this scorer's score in the sum, 0 or more.
    #[serde(default = "one")]
    pub weight: f64,
    /// Parameters of the scorer.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub parameters: Parameters,
}

/// The utilization detector: the pool is saturated when the mean over its endpoints of
/// max(waiting / queue_depth_threshold, kv_usage / kv_cache_threshold) reaches 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SaturationConfig {
    /// Waiting requests at which one endpoint counts as full.
    pub queue_depth_threshold: u32,
    /// KV-cache usage (0 to 1) at which one endpoint counts as full.
    pub kv_cache_threshold: f64,
    /// An endpoint whose metrics are older than this counts as full: the detector fails closed.
    pub metrics_staleness: HumanDur,
}

/// The approximate prefix index: which endpoint was sent which prompt prefix. Blocks are 64 tokens, llm-d's floor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PrefixConfig {
    /// Blocks remembered for each endpoint, least recently used first out.
    pub lru_blocks_per_endpoint: u32,
    /// Longest part of a prompt that is matched, in tokens.
    pub max_prefix_tokens: u32,
}

/// Reading the engines' metrics.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MetricsConfig {
    /// How often each endpoint is asked; llm-d neither goes below 50ms nor defaults to more.
    pub scrape_interval: HumanDur,
    /// How long one scrape may take.
    pub scrape_timeout: HumanDur,
}

/// Waiting for an engine. A request that runs out of time is answered with 504.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TimeoutConfig {
    /// Until a connection is made, with name lookup and TLS, per attempt.
    pub connect: HumanDur,
    /// From sending a request to the head of its response, per attempt. Without streaming the head comes with the whole answer.
    pub response_head: HumanDur,
    /// From receiving a request to the last byte of its response, all attempts together.
    pub total: HumanDur,
    /// At shutdown: how long requests in flight may take to finish.
    pub drain: HumanDur,
}

/// Bounds of requests and connections.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LimitConfig {
    /// Largest request body, in bytes; larger ones are answered with 413.
    pub max_body_bytes: u32,
    /// Most connections of callers at a time; more wait until one is closed.
    pub max_connections: u32,
    /// How many further endpoints are tried when one cannot be reached.
    pub retries: u32,
}

fn one() -> f64 {
    1.0
}

impl PluginConfig {
    /// A plugin without parameters.
    pub fn of(kind: &str) -> PluginConfig {
        PluginConfig { kind: kind.to_owned(), name: None, parameters: Parameters::new() }
    }
}

impl ScorerConfig {
    /// A scorer without parameters.
    pub fn of(kind: &str, weight: f64) -> ScorerConfig {
        ScorerConfig { kind: kind.to_owned(), name: None, weight, parameters: Parameters::new() }
    }
}

impl Default for PoolConfig {
    fn default() -> PoolConfig {
        PoolConfig { name: "default-pool".to_owned(), namespace: "default".to_owned() }
    }
}

impl Default for ProfileConfig {
    /// The weights of llm-d's `optimized-baseline`, with running requests in place of the cold-request scorer.
    fn default() -> ProfileConfig {
        ProfileConfig {
            name: "default".to_owned(),
            filters: vec![PluginConfig::of("healthy-filter"), PluginConfig::of("decode-filter")],
            scorers: vec![
                ScorerConfig::of("queue-scorer", 2.0),
                ScorerConfig::of("kv-cache-utilization-scorer", 2.0),
                ScorerConfig::of("prefix-cache-scorer", 3.0),
                ScorerConfig::of("running-requests-size-scorer", 1.0),
            ],
            picker: PluginConfig::of("max-score-picker"),
        }
    }
}

impl Default for SaturationConfig {
    /// llm-d's `utilization-detector`.
    fn default() -> SaturationConfig {
        SaturationConfig { queue_depth_threshold: 5, kv_cache_threshold: 0.8, metrics_staleness: HumanDur::millis(200) }
    }
}

impl Default for PrefixConfig {
    /// llm-d's `approx-prefix-cache-producer`.
    fn default() -> PrefixConfig {
        PrefixConfig { lru_blocks_per_endpoint: 31_250, max_prefix_tokens: 131_072 }
    }
}

impl Default for MetricsConfig {
    /// llm-d's `--refresh-metrics-interval` and its time limit.
    fn default() -> MetricsConfig {
        MetricsConfig { scrape_interval: HumanDur::millis(50), scrape_timeout: HumanDur::secs(1) }
    }
}

impl Default for TimeoutConfig {
    fn default() -> TimeoutConfig {
        TimeoutConfig {
            connect: HumanDur::secs(5),
            response_head: HumanDur::secs(300),
            total: HumanDur::secs(600),
            drain: HumanDur::secs(30),
        }
    }
}

impl Default for LimitConfig {
    fn default() -> LimitConfig {
        LimitConfig { max_body_bytes: 16 * 1024 * 1024, max_connections: 65_536, retries: 1 }
    }
}

impl GatewayConfig {
    /// Everything that is not allowed, in the order of the fields. A gateway is only made from a configuration without problems.
    pub fn validate(&self) -> Vec<ConfigProblem> {
        let mut problems = Vec::new();
        self.profile.validate(&mut problems);
        self.saturation.validate(&mut problems);
        let p = &mut problems;
        at_least("prefix.lru_blocks_per_endpoint", self.prefix.lru_blocks_per_endpoint, 1, p);
        at_least("prefix.max_prefix_tokens", self.prefix.max_prefix_tokens, 64, p);
        at_least("metrics.scrape_interval", self.metrics.scrape_interval, HumanDur::millis(1), p);
        at_least("metrics.scrape_timeout", self.metrics.scrape_timeout, HumanDur::millis(1), p);
        at_least("timeouts.connect", self.timeouts.connect, HumanDur::millis(1), p);
        at_least("timeouts.response_head", self.timeouts.response_head, HumanDur::millis(1), p);
        at_least("timeouts.total", self.timeouts.total, HumanDur::millis(1), p);
        at_least("limits.max_body_bytes", self.limits.max_body_bytes, 1024, p);
        at_least("limits.max_connections", self.limits.max_connections, 1, p);
        if self.limits.retries > MAX_RETRIES {
            problem("limits.retries", self.limits.retries, format!("at most {MAX_RETRIES}"), p);
        }
        problems
    }
}

impl shared::config::Validate for GatewayConfig {
    fn validate(&self, problems: &mut shared::config::Problems) {
        for p in GatewayConfig::validate(self) {
            problems.add(&p.path, p.found, p.allowed);
        }
    }
}

/// More attempts than this turn an outage into a storm.
const MAX_RETRIES: u32 = 8;

impl ProfileConfig {
    fn validate(&self, out: &mut Vec<ConfigProblem>) {
        for (i, f) in self.filters.iter().enumerate() {
            plugin(&format!("profile.filters[{i}]"), &f.kind, registry::filter(&f.kind, &f.parameters).err(), out);
        }
        for (i, s) in self.scorers.iter().enumerate() {
            let path = format!("profile.scorers[{i}]");
            if !(s.weight.is_finite() && s.weight >= 0.0) {
                problem(&format!("{path}.weight"), s.weight, "a number of at least 0".to_owned(), out);
            }
            plugin(&path, &s.kind, registry::scorer(&s.kind, &s.parameters).err(), out);
        }
        let picker = registry::picker(&self.picker.kind, &self.picker.parameters);
        plugin("profile.picker", &self.picker.kind, picker.err(), out);
    }
}

impl SaturationConfig {
    fn validate(&self, out: &mut Vec<ConfigProblem>) {
        at_least("saturation.queue_depth_threshold", self.queue_depth_threshold, 1, out);
        let kv = self.kv_cache_threshold;
        if !(kv > 0.0 && kv <= 1.0) {
            problem("saturation.kv_cache_threshold", kv, "a number above 0 and at most 1".to_owned(), out);
        }
    }
}

fn at_least<T: PartialOrd + std::fmt::Display>(path: &str, found: T, least: T, out: &mut Vec<ConfigProblem>) {
    if found < least {
        problem(path, found, format!("at least {least}"), out);
    }
}

fn problem(path: &str, found: impl std::fmt::Display, allowed: String, out: &mut Vec<ConfigProblem>) {
    out.push(ConfigProblem { path: path.to_owned(), found: found.to_string(), allowed });
}

fn plugin(path: &str, kind: &str, error: Option<registry::PluginError>, out: &mut Vec<ConfigProblem>) {
    match error {
        None => {}
        Some(registry::PluginError::Unknown { known }) => {
            problem(&format!("{path}.type"), format!("{kind:?}"), format!("one of {}", known.join(", ")), out);
        }
        Some(registry::PluginError::Parameter { name, found, allowed }) => {
            problem(&format!("{path}.parameters.{name}"), found, allowed, out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(change: impl FnOnce(&mut GatewayConfig)) -> String {
        let mut config = GatewayConfig::default();
        change(&mut config);
        config.validate().iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn the_default_is_valid_and_has_two_filters_and_four_scorers() {
        assert_eq!(problems(|_| {}), "");
        let profile = ProfileConfig::default();
        assert_eq!((profile.filters.len(), profile.scorers.len()), (2, 4));
    }

    #[test]
    fn a_problem_names_path_found_and_allowed() {
        insta::assert_snapshot!(problems(|c| c.profile.scorers[1].weight = f64::NAN), @"profile.scorers[1].weight: found NaN, expected a number of at least 0");
        insta::assert_snapshot!(problems(|c| c.profile.scorers[0].weight = -1.0), @"profile.scorers[0].weight: found -1, expected a number of at least 0");
        insta::assert_snapshot!(problems(|c| c.profile.scorers[2].kind = "prefix".into()), @r#"profile.scorers[2].type: found "prefix", expected one of queue-scorer, running-requests-size-scorer, kv-cache-utilization-scorer, load-aware-scorer, prefix-cache-scorer, session-affinity-scorer"#);
        insta::assert_snapshot!(problems(|c| c.profile.picker.kind = "best".into()), @r#"profile.picker.type: found "best", expected one of max-score-picker, random-picker, weighted-random-picker"#);
        insta::assert_snapshot!(problems(|c| c.saturation.kv_cache_threshold = 1.5), @"saturation.kv_cache_threshold: found 1.5, expected a number above 0 and at most 1");
        insta::assert_snapshot!(problems(|c| c.metrics.scrape_interval = HumanDur::default()), @"metrics.scrape_interval: found 0s, expected at least 1ms");
        insta::assert_snapshot!(problems(|c| c.limits.retries = 99), @"limits.retries: found 99, expected at most 8");
        insta::assert_snapshot!(problems(|c| {
            c.profile.filters[0].parameters.insert("x".into(), serde_json::json!(1));
        }), @"profile.filters[0].parameters.x: found 1, expected no parameter");
    }

    #[test]
    fn a_configuration_survives_json_and_refuses_unknown_fields() {
        let config = GatewayConfig::default();
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<GatewayConfig>(&json).unwrap(), config);
        let error = serde_json::from_str::<GatewayConfig>(r#"{"metrics":{"scrape_intervall":"1s"}}"#).unwrap_err();
        assert!(error.to_string().contains("unknown field `scrape_intervall`"), "{error}");
        let error = serde_json::from_str::<GatewayConfig>(r#"{"metrics":{"scrape_interval":"50"}}"#).unwrap_err();
        assert!(error.to_string().contains("expected a number and a unit"), "{error}");
    }
}
