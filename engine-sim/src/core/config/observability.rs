//! What an engine measures of itself beyond the default, with vLLM's names (`vllm/config/observability.py`).

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Check;

/// Options of the metrics page.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ObservabilityConfig {
    /// Other bucket bounds for families of histograms: seconds or whole numbers, increasing.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub custom_histogram_buckets: BTreeMap<BucketFamily, Vec<f64>>,
    /// Whether the life of KV blocks is measured (`kv_block_*_seconds`).
    pub kv_cache_metrics: bool,
    /// Fraction of the blocks that is followed for that, above 0 and at most 1.
    pub kv_cache_metrics_sample: f64,
}

/// Histograms that share their buckets (`vllm/v1/metrics/buckets.py`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum BucketFamily {
    /// `e2e_request_latency_seconds`, `request_{queue,inference,prefill,decode}_time_seconds`.
    RequestLatency,
    /// `time_to_first_token_seconds`.
    TimeToFirstToken,
    /// `inter_token_latency_seconds`, `request_time_per_output_token_seconds`.
    InterTokenLatency,
    /// `iteration_tokens_total`.
    IterationTokens,
    /// `request_params_n`.
    RequestParamsN,
    /// `request_num_preemptions`.
    RequestNumPreemptions,
    /// Lengths of prompts and outputs.
    RequestTokens,
    /// `kv_block_*_seconds`.
    KvCacheResidency,
}

impl BucketFamily {
    /// Whether its values are times; else they are whole numbers.
    pub const fn is_time(self) -> bool {
        match self {
            BucketFamily::RequestLatency
            | BucketFamily::TimeToFirstToken
            | BucketFamily::InterTokenLatency
            | BucketFamily::KvCacheResidency => true,
            BucketFamily::IterationTokens
            | BucketFamily::RequestParamsN
            | BucketFamily::RequestNumPreemptions
            | BucketFamily::RequestTokens => false,
        }
    }
}

impl Default for ObservabilityConfig {
    fn default() -> ObservabilityConfig {
        ObservabilityConfig {
            custom_histogram_buckets: BTreeMap::new(),
            kv_cache_metrics: false,
            kv_cache_metrics_sample: 0.01,
        }
    }
}

/// More buckets than this serve nobody, and each costs a line of the page.
const MAX_BUCKETS: usize = 200;

impl ObservabilityConfig {
    pub(super) fn check(&self, check: &mut Check) {
        for (family, bounds) in &self.custom_histogram_buckets {
            // The family's name as it is written.
            let name =
                serde_json::to_value(family).map_or_else(|_| String::new(), |n| n.as_str().unwrap_or_default().into());
            let path = format!("observability.custom_histogram_buckets.{name}");
            let right = |b: &f64| b.is_finite() && *b > 0.0 && (family.is_time() || b.fract() == 0.0);
            let ok = (1..=MAX_BUCKETS).contains(&bounds.len())
                && bounds.iter().all(right)
                && bounds.windows(2).all(|pair| pair[0] < pair[1]);
            let unit = if family.is_time() { "seconds" } else { "whole numbers" };
            let allowed = format!("1 to {MAX_BUCKETS} {unit} above 0, each larger than the one before");
            check.that(ok, &path, format!("{bounds:?}"), &allowed);
        }
        let sample = self.kv_cache_metrics_sample;
        check.that(
            sample > 0.0 && sample <= 1.0,
            "observability.kv_cache_metrics_sample",
            sample,
            "a fraction in 0..=1, above 0",
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_checked_as_vllm_checks_them() {
        let check = |json: &str, expect: &str| {
            let config: ObservabilityConfig = serde_json::from_str(json).unwrap();
            let mut check = Check(Vec::new());
            config.check(&mut check);
            let found: Vec<String> = check.0.iter().map(ToString::to_string).collect();
            assert_eq!(found.join("; "), expect);
        };
        check(r#"{"custom_histogram_buckets": {"request_latency": [0.01, 0.05, 1], "request_tokens": [10, 100]}}"#, "");
        let allowed = "expected 1 to 200 seconds above 0, each larger than the one before";
        for bounds in ["[]", "[1.0, 1.0]", "[0.0, 1.0]", "[-1.0]"] {
            check(
                &format!(r#"{{"custom_histogram_buckets": {{"time_to_first_token": {bounds}}}}}"#),
                &format!("observability.custom_histogram_buckets.time_to_first_token: found {bounds}, {allowed}"),
            );
        }
        check(
            r#"{"custom_histogram_buckets": {"request_params_n": [1.5]}, "kv_cache_metrics_sample": 0}"#,
            "observability.custom_histogram_buckets.request_params_n: found [1.5], expected 1 to 200 whole numbers above 0, each larger \
             than the one before; observability.kv_cache_metrics_sample: found 0, expected a fraction in 0..=1, above 0",
        );
        assert!(
            serde_json::from_str::<ObservabilityConfig>(r#"{"custom_histogram_buckets": {"latency": [1]}}"#).is_err()
        );
    }
}
