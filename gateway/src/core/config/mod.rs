//! What can be configured in a gateway, with llm-d's defaults; validated before anything starts.
//!
//! The doc comments of the fields become the descriptions of the published JSON Schema. Where endpoints are and where spans
//! go is the driver's configuration, not the gateway's.

mod discovery;
mod edge;
mod flow_control;
mod pools;
mod precise;
mod profile;
mod resilience;
mod saturation;

use std::collections::BTreeMap;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
pub use shared::config::ConfigProblem;
use shared::units::HumanDur;

pub use discovery::{DiscoveryConfig, DnsDiscovery, DnsRecord, EndpointScheme, FileDiscovery};
pub use edge::{AuthConfig, TlsConfig, TrustInbound, UpstreamConfig, UpstreamHttp};
pub use flow_control::{BandConfig, FairnessPolicy, FlowControlConfig, OrderingPolicy};
pub use pools::PoolEntry;
pub use precise::PreciseConfig;
pub use profile::{DisaggregationConfig, Parameters, PluginConfig, ProfileConfig, ScorerConfig, StageOrder};
pub(crate) use profile::{WEIGHT, is_weight};
pub use resilience::{HedgeAfter, HedgeConfig, OutlierConfig, RetryConfig};
pub use saturation::{ConcurrencyConfig, ConcurrencyMode, Detector, SaturationConfig};

use crate::core::prefix_index::{BLOCK_TOKENS, MAX_BLOCK_TOKENS};
use crate::core::scheduler::parameters::Reader;
use crate::core::scheduler::precise::asked as precise_asked;
use crate::core::scheduler::registry::{NO_HIT_LRU, PRECISE_PREFIX, SESSION_AFFINITY};
use crate::core::scheduler::scorers::{NoHitLru, SessionAffinity, SessionStrategy};

/// One gateway.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct GatewayConfig {
    /// The pool of engines, as spans name it.
    pub pool: PoolConfig,
    /// Several pools in place of that one: each request goes to the pool of its model, after it is rewritten. Every pool has queues,
    /// indexes and counts of its own.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub pools: Vec<PoolEntry>,
    /// An EndpointPickerConfig of llm-d (YAML), in place of profile, disaggregation, prefix, precise_prefix, in_flight,
    /// saturation and flow_control. A relative path starts at the folder of the file that names it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epp_config: Option<PathBuf>,
    /// Whether what is not supported of that file is left out, with a warning, instead of refused.
    pub allow_unsupported: bool,
    /// How an endpoint is chosen; with disaggregation, the one that decodes.
    pub profile: ProfileConfig,
    /// Prefill by an endpoint of its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disaggregation: Option<DisaggregationConfig>,
    /// When the pool is full: sheddable requests are refused, or with flow control all requests wait.
    pub saturation: SaturationConfig,
    /// Queues in the gateway.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flow_control: Option<FlowControlConfig>,
    /// The approximate index of prompt prefixes.
    pub prefix: PrefixConfig,
    /// The index of the blocks that engines say they hold.
    pub precise_prefix: PreciseConfig,
    /// What counts as in flight at an endpoint.
    pub in_flight: InFlightConfig,
    /// What engines report, and how often it is read.
    pub metrics: MetricsConfig,
    /// How long the gateway waits for an engine.
    pub timeouts: TimeoutConfig,
    /// Bounds of requests and connections.
    pub limits: LimitConfig,
    /// When another endpoint is asked.
    pub retry: RetryConfig,
    /// Endpoints that fail several times in a row get no requests for a while.
    pub outlier_ejection: OutlierConfig,
    /// Where endpoints come from while the gateway runs, besides those that it is started with.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub discovery: Vec<DiscoveryConfig>,
    /// How engines are spoken to.
    pub upstream: UpstreamConfig,
    /// What is made of the trace context that callers send: always where the gateway listens on a loopback address, else link, when
    /// absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trust_inbound: Option<TrustInbound>,
    /// Who may call; everybody when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auth: Option<AuthConfig>,
    /// TLS towards callers; none when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsConfig>,
    /// Priorities of the objectives that requests name in `x-llm-d-inference-objective`; negative means sheddable. An unknown
    /// objective has priority 0 (InferenceObjective of the Gateway API inference extension).
    pub objectives: BTreeMap<String, i32>,
    /// Whether the priority of a request's objective is written into its body as `priority`, with the opposite sign, for engines with
    /// `--scheduling-policy priority` (vLLM runs the lowest first; with another policy it refuses any but 0). llm-d does not.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub engine_priority: bool,
    /// Models that requests are sent to instead of the one they ask for, by that one's name (InferenceModelRewrite of the Gateway API
    /// inference extension). A name without a rule may be rewritten by the header `x-llm-d-model-name-rewrite`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub model_rewrites: BTreeMap<String, Vec<ModelTarget>>,
    /// Whether spans name sessions as callers do (`session.id`).
    pub identity_in_spans: bool,
    /// The header whose value spans have as `user.id`, for example x-user-id; no span names a user when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_header: Option<String>,
    /// Whether a line at level info is logged for every request that is over: ids, status, endpoint and times.
    pub access_log: bool,
}

/// A model that requests for another name are sent to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ModelTarget {
    /// The model, or LoRA adapter.
    pub model: String,
    /// Its part of the requests, relative to the other targets' weights.
    #[serde(default = "one")]
    pub weight: u32,
}

const fn one() -> u32 {
    1
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

/// The approximate prefix index: which endpoint was sent which prompt prefix (llm-d's `approx-prefix-cache-producer`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PrefixConfig {
    /// Tokens in a block; llm-d raises smaller blocks to 64.
    #[schemars(range(min = 64, max = 256))]
    pub block_tokens: u32,
    /// Blocks remembered for each endpoint, least recently used first out.
    pub lru_blocks_per_endpoint: u32,
    /// Whether an endpoint's own number of KV blocks replaces that bound where it is reported.
    pub auto_tune: bool,
    /// Longest part of a prompt that is matched, in tokens.
    pub max_prefix_tokens: u32,
}

/// The tokens that an endpoint still has to compute (llm-d's `inflight-load-producer`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct InFlightConfig {
    /// Whether output tokens count too, from an estimate.
    pub add_estimated_output_tokens: bool,
    /// Expected output tokens for each token of the prompt.
    pub output_ratio: f64,
    /// The most output tokens that one request counts for; no bound when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_estimated_output_tokens: Option<u32>,
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
    /// How long a caller may take to send the first bytes of a connection, and the head of a request.
    pub request_head: HumanDur,
    /// How long a caller may take nothing of what is written to it before its connection is closed.
    pub idle_write: HumanDur,
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
    /// Most headers of a request; more are answered with 431.
    pub max_headers: u32,
    /// Most bytes of a request's headers, names and values; more are answered with 431.
    pub max_header_bytes: u32,
    /// Requests that one endpoint may have before it is left out of a choice (circuit breaking); no bound when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub max_active_per_endpoint: Option<u32>,
}

impl Default for PoolConfig {
    fn default() -> PoolConfig {
        PoolConfig { name: "default-pool".to_owned(), namespace: "default".to_owned() }
    }
}

impl Default for PrefixConfig {
    /// llm-d's `approx-prefix-cache-producer`.
    fn default() -> PrefixConfig {
        PrefixConfig {
            block_tokens: BLOCK_TOKENS as u32,
            lru_blocks_per_endpoint: 31_250,
            auto_tune: true,
            max_prefix_tokens: 131_072,
        }
    }
}

impl Default for InFlightConfig {
    /// llm-d's `inflight-load-producer`.
    fn default() -> InFlightConfig {
        InFlightConfig { add_estimated_output_tokens: false, output_ratio: 1.5, max_estimated_output_tokens: None }
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
            request_head: HumanDur::secs(30),
            idle_write: HumanDur::secs(60),
        }
    }
}

impl Default for LimitConfig {
    fn default() -> LimitConfig {
        LimitConfig {
            max_body_bytes: 16 * 1024 * 1024,
            max_connections: 65_536,
            retries: 1,
            max_headers: 100,
            max_header_bytes: 64 * 1024,
            max_active_per_endpoint: None,
        }
    }
}

impl GatewayConfig {
    /// Everything that is not allowed, in the order of the fields. A gateway is only made from a configuration without problems.
    pub fn validate(&self) -> Vec<ConfigProblem> {
        let mut problems = Vec::new();
        let p = &mut problems;
        self.profile.validate("profile", p);
        if let Some(disaggregation) = &self.disaggregation {
            disaggregation.validate("disaggregation", p);
        }
        self.check_epp_config(p);
        self.check_producers(p);
        self.saturation.validate(p);
        if let Some(flow_control) = &self.flow_control {
            flow_control.validate("flow_control", p);
        }
        self.precise_prefix.validate(p);
        self.in_flight.validate(p);
        self.check_rewrites(p);
        self.check_pools(p);
        if !(BLOCK_TOKENS..=MAX_BLOCK_TOKENS).contains(&(self.prefix.block_tokens as usize)) {
            let allowed = format!("a number from {BLOCK_TOKENS} to {MAX_BLOCK_TOKENS}");
            problem("prefix.block_tokens", self.prefix.block_tokens, allowed, p);
        }
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
        if let Some(header) = &self.user_header {
            let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
            if header.is_empty() || !header.bytes().all(plain) {
                problem(
                    "user_header",
                    format!("{header:?}"),
                    "the name of a header, for example x-user-id".to_owned(),
                    p,
                );
            }
        }
        self.check_edge(p);
        problems
    }

    /// Whether some plugin reads the index of KV events.
    pub fn reads_kv_events(&self) -> bool {
        let filters = self.profiles().flat_map(|p| &p.filters).map(|f| &f.parameters);
        let deciders = self.disaggregation.iter().map(|d| &d.decider.parameters);
        let scorers = self.profiles().flat_map(|p| &p.scorers).map(|s| &s.parameters);
        let named = self.scorers(PRECISE_PREFIX).next().is_some();
        named || filters.chain(deciders).chain(scorers).any(precise_asked)
    }

    /// What callers, engines and endpoints may do.
    fn check_edge(&self, p: &mut Vec<ConfigProblem>) {
        at_least("timeouts.request_head", self.timeouts.request_head, HumanDur::millis(1), p);
        at_least("timeouts.idle_write", self.timeouts.idle_write, HumanDur::millis(1), p);
        at_least("limits.max_headers", self.limits.max_headers, 1, p);
        at_least("limits.max_header_bytes", self.limits.max_header_bytes, 256, p);
        at_least("limits.max_active_per_endpoint", self.limits.max_active_per_endpoint.unwrap_or(1), 1, p);
        self.retry.validate(p);
        if self.retry.hedge.is_some() && self.disaggregation.is_some() {
            let allowed = "none: a prompt would be prefilled twice".to_owned();
            problem("retry.hedge", "hedging with disaggregated prefill", allowed, p);
        }
        self.outlier_ejection.validate(p);
        for (i, source) in self.discovery.iter().enumerate() {
            source.validate(&format!("discovery[{i}]"), p);
        }
        if let Some(auth) = &self.auth {
            auth.validate(p);
        }
    }

    /// How sessions are bound, if a scorer asks for that.
    pub fn sessions(&self) -> Option<SessionStrategy> {
        let scorer = self.scorers(SESSION_AFFINITY).next()?;
        Reader::all(&scorer.parameters, SessionAffinity::strategy).ok()
    }

    /// How many endpoints are remembered as having got requests that nobody had cached.
    pub(crate) fn cold_requests(&self) -> u32 {
        let scorer = self.scorers(NO_HIT_LRU).next();
        scorer.and_then(|s| Reader::all(&s.parameters, NoHitLru::size).ok()).unwrap_or(0)
    }

    /// Every profile.
    pub fn profiles(&self) -> impl Iterator<Item = &ProfileConfig> {
        std::iter::once(&self.profile).chain(self.disaggregation.as_ref().map(|d| &d.profile))
    }

    fn scorers(&self, kind: &'static str) -> impl Iterator<Item = &ScorerConfig> {
        self.profiles().flat_map(|p| &p.scorers).filter(move |s| s.kind == kind)
    }

    /// The file says it all: what stands beside it would be overwritten.
    fn check_epp_config(&self, p: &mut Vec<ConfigProblem>) {
        if self.epp_config.is_none() {
            return;
        }
        let d = GatewayConfig::default();
        let beside = [
            ("profile", self.profile != d.profile),
            ("disaggregation", self.disaggregation.is_some()),
            ("prefix", self.prefix != d.prefix),
            ("precise_prefix", !self.precise_prefix.is_where_only(&d.precise_prefix)),
            ("in_flight", self.in_flight != d.in_flight),
            ("saturation", self.saturation != d.saturation),
            ("flow_control", self.flow_control.is_some()),
        ];
        for (path, _) in beside.iter().filter(|(_, given)| *given) {
            problem(path, "a section beside epp_config", "nothing: the file says it".to_owned(), p);
        }
    }

    fn check_rewrites(&self, p: &mut Vec<ConfigProblem>) {
        for (model, targets) in &self.model_rewrites {
            let path = format!("model_rewrites.{model}");
            if targets.iter().all(|t| t.weight == 0) {
                problem(&path, "no target with a weight", "a target with a weight above 0".to_owned(), p);
            }
            for (i, _) in targets.iter().enumerate().filter(|(_, t)| t.model.is_empty()) {
                problem(&format!("{path}[{i}].model"), "no name", "the name of a model".to_owned(), p);
            }
        }
    }

    /// Scorers of one type share what they remember, so they cannot differ in it.
    fn check_producers(&self, p: &mut Vec<ConfigProblem>) {
        for kind in [SESSION_AFFINITY, NO_HIT_LRU] {
            let first = self.scorers(kind).next().map(|s| &s.parameters);
            if self.scorers(kind).any(|s| Some(&s.parameters) != first) {
                problem("profile.scorers", format!("{kind} with two sets of parameters"), "one set".to_owned(), p);
            }
        }
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

impl InFlightConfig {
    fn validate(&self, out: &mut Vec<ConfigProblem>) {
        if !(self.output_ratio.is_finite() && self.output_ratio >= 0.0) {
            problem("in_flight.output_ratio", self.output_ratio, "a number of at least 0".to_owned(), out);
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
        insta::assert_snapshot!(problems(|c| c.profile.scorers[2].kind = "prefix".into()), @r#"profile.scorers[2].type: found "prefix", expected one of queue-scorer, running-requests-size-scorer, kv-cache-utilization-scorer, load-aware-scorer, lora-affinity-scorer, active-request-scorer, token-load-scorer, prefix-cache-scorer, precise-prefix-cache-scorer, no-hit-lru-scorer, session-affinity-scorer, context-length-aware, latency-scorer"#);
        insta::assert_snapshot!(problems(|c| c.profile.picker.kind = "best".into()), @r#"profile.picker.type: found "best", expected one of max-score-picker, random-picker, weighted-random-picker, round-robin-picker"#);
        insta::assert_snapshot!(problems(|c| c.saturation.kv_cache_threshold = 1.5), @"saturation.kv_cache_threshold: found 1.5, expected a number above 0 and at most 1");
        insta::assert_snapshot!(problems(|c| c.metrics.scrape_interval = HumanDur::default()), @"metrics.scrape_interval: found 0s, expected at least 1ms");
        insta::assert_snapshot!(problems(|c| c.limits.retries = 99), @"limits.retries: found 99, expected at most 8");
        insta::assert_snapshot!(problems(|c| c.retry.on_status = vec![503, 200]), @"retry.on_status[1]: found 200, expected a status from 400 to 599");
        insta::assert_snapshot!(problems(|c| c.outlier_ejection.max_time = HumanDur::secs(1)), @"outlier_ejection.max_time: found 1s, expected at least 30s");
        insta::assert_snapshot!(problems(|c| c.auth = Some(AuthConfig::default())), @"auth: found neither file nor variable, expected bearer_tokens_file or bearer_tokens_env");
        insta::assert_snapshot!(problems(|c| {
            let dns = serde_json::json!({"dns": {"name": "", "interval": "1ms"}});
            c.discovery.push(serde_json::from_value(dns).unwrap());
        }), @r"
        discovery[0].dns.name: found no name, expected a name such as vllm.default.svc
        discovery[0].dns.port: found no port, expected the port of the endpoints
        discovery[0].dns.interval: found 1ms, expected at least 10ms
        ");
        insta::assert_snapshot!(problems(|c| {
            c.profile.filters[0].parameters.insert("x".into(), serde_json::json!(1));
        }), @"profile.filters[0].parameters.x: found 1, expected no parameter");
    }

    #[test]
    fn a_rewrite_needs_a_target() {
        let rewrite = |targets: &[(&str, u32)]| {
            let targets = targets.iter().map(|(m, weight)| ModelTarget { model: (*m).into(), weight: *weight });
            let rules = BTreeMap::from([("chat".to_owned(), targets.collect())]);
            problems(|c| c.model_rewrites = rules)
        };
        assert_eq!(rewrite(&[("a", 0), ("b", 1)]), "");
        insta::assert_snapshot!(rewrite(&[]), @"model_rewrites.chat: found no target with a weight, expected a target with a weight above 0");
        insta::assert_snapshot!(rewrite(&[("a", 0)]), @"model_rewrites.chat: found no target with a weight, expected a target with a weight above 0");
        insta::assert_snapshot!(rewrite(&[("", 1)]), @"model_rewrites.chat[0].model: found no name, expected the name of a model");
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
