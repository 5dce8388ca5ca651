//! How full the pool is, and who says so.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use shared::config::ConfigProblem;
use shared::units::HumanDur;

use super::{at_least, problem};

/// The saturation detector. The pool is full at 1: then requests of negative priority are refused, or with flow control all
/// requests wait.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SaturationConfig {
    /// Which detector.
    pub detector: Detector,
    /// Utilization: waiting requests at which one endpoint counts as full.
    pub queue_depth_threshold: u32,
    /// Utilization: KV-cache usage (0 to 1) at which one endpoint counts as full.
    pub kv_cache_threshold: f64,
    /// Utilization: an endpoint whose metrics are older than this counts as full: the detector fails closed.
    pub metrics_staleness: HumanDur,
    /// Concurrency: what fills an endpoint.
    pub concurrency: ConcurrencyConfig,
}

/// A saturation detector, by the names of llm-d's plugins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Detector {
    /// By what engines report: the mean over the endpoints of max(waiting / queue_depth_threshold,
    /// kv usage / kv_cache_threshold).
    #[default]
    UtilizationDetector,
    /// By what the gateway has sent and is not finished: no scrape needed.
    ConcurrencyDetector,
}

/// The concurrency detector's measure of a full endpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ConcurrencyConfig {
    /// What counts.
    pub mode: ConcurrencyMode,
    /// Requests in flight that fill one endpoint.
    pub max_requests: u32,
    /// Tokens in flight that fill one endpoint.
    pub max_tokens: u64,
}

/// What the concurrency detector counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ConcurrencyMode {
    /// Requests of all endpoints by the requests that fill them all.
    #[default]
    Requests,
    /// Tokens of all endpoints by the tokens that fill them all.
    Tokens,
    /// The greater of both at each endpoint, and the mean of that.
    Hybrid,
}

impl Default for SaturationConfig {
    /// llm-d's `utilization-detector`.
    fn default() -> SaturationConfig {
        SaturationConfig {
            detector: Detector::default(),
            queue_depth_threshold: 5,
            kv_cache_threshold: 0.8,
            metrics_staleness: HumanDur::millis(200),
            concurrency: ConcurrencyConfig::default(),
        }
    }
}

impl Default for ConcurrencyConfig {
    /// llm-d's `concurrency-detector`.
    fn default() -> ConcurrencyConfig {
        ConcurrencyConfig { mode: ConcurrencyMode::default(), max_requests: 100, max_tokens: 1_000_000 }
    }
}

impl SaturationConfig {
    pub(super) fn validate(&self, out: &mut Vec<ConfigProblem>) {
        at_least("saturation.queue_depth_threshold", self.queue_depth_threshold, 1, out);
        let kv = self.kv_cache_threshold;
        if !(kv > 0.0 && kv <= 1.0) {
            problem("saturation.kv_cache_threshold", kv, "a number above 0 and at most 1".to_owned(), out);
        }
        at_least("saturation.concurrency.max_requests", self.concurrency.max_requests, 1, out);
        at_least("saturation.concurrency.max_tokens", self.concurrency.max_tokens, 1, out);
    }

    /// Whether it looks at tokens in flight.
    pub(crate) fn reads_tokens(&self) -> bool {
        self.detector == Detector::ConcurrencyDetector
            && match self.concurrency.mode {
                ConcurrencyMode::Requests => false,
                ConcurrencyMode::Tokens | ConcurrencyMode::Hybrid => true,
            }
    }
}
