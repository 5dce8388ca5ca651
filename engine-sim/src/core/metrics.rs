//! Counters and histograms of an engine, with vLLM's names and semantics (`vllm/v1/metrics/{stats,loggers,buckets}.py`).
//!
//! Data only: the server writes them in Prometheus' format. Times are integers of nanoseconds here and seconds there.

use shared::time::Dur;

use crate::core::config::{BucketFamily, ObservabilityConfig};
use crate::core::sequence::FinishReason;

/// What a histogram's values are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Nanoseconds here, seconds in the exposition.
    Time,
    /// Whole things: tokens, preemptions.
    Count,
}

/// A histogram with fixed buckets; every figure only grows.
#[derive(Clone, Debug)]
pub struct Histogram {
    /// What the values are.
    pub unit: Unit,
    /// Upper bounds, inclusive; the bucket above the last is implied.
    pub bounds: Vec<u64>,
    /// Values per bucket, one more than there are bounds; not cumulative.
    pub counts: Vec<u64>,
    /// Sum of all values.
    pub sum: u128,
}

impl Histogram {
    fn new(unit: Unit, bounds: Vec<u64>) -> Histogram {
        Histogram { unit, counts: vec![0; bounds.len() + 1], bounds, sum: 0 }
    }

    /// Values observed.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    #[inline]
    pub(crate) fn observe(&mut self, value: u64) {
        let bucket = self.bounds.iter().position(|&b| value <= b).unwrap_or(self.bounds.len());
        self.counts[bucket] += 1;
        self.sum += u128::from(value);
    }

    #[inline]
    pub(crate) fn observe_time(&mut self, time: Dur) {
        self.observe(time.as_nanos());
    }
}

/// Everything an engine counts. A field is vLLM's metric name without the `vllm:` prefix.
#[derive(Clone, Debug)]
pub struct EngineMetrics {
    /// Prompt tokens of requests whose prefill is finished.
    pub prompt_tokens: u64,
    /// Of these, found in the prefix cache.
    pub prompt_tokens_cached: u64,
    /// Output tokens.
    pub generation_tokens: u64,
    /// Tokens looked up in the prefix cache, at first admissions.
    pub prefix_cache_queries: u64,
    /// Of these, found.
    pub prefix_cache_hits: u64,
    /// Preemptions.
    pub num_preemptions: u64,
    /// Requests ended with `stop`; see [`EngineMetrics::request_success`].
    stop: u64,
    length: u64,
    error: u64,
    abort: u64,
    /// Requests refused because too many were open.
    pub admission_rejections_queued_reqs: u64,
    /// Requests refused because too many prompt tokens were not computed yet.
    pub admission_rejections_queued_tokens: u64,
    /// Arrival to first token.
    pub time_to_first_token_seconds: Histogram,
    /// Between tokens of a request.
    pub inter_token_latency_seconds: Histogram,
    /// Mean time per output token after the first, per request.
    pub request_time_per_output_token_seconds: Histogram,
    /// Arrival to last token.
    pub e2e_request_latency_seconds: Histogram,
    /// In the queue until first admission.
    pub request_queue_time_seconds: Histogram,
    /// First admission to last token.
    pub request_inference_time_seconds: Histogram,
    /// First admission to first token.
    pub request_prefill_time_seconds: Histogram,
    /// First to last token.
    pub request_decode_time_seconds: Histogram,
    /// Prompt tokens computed and tokens generated per iteration that returned outputs.
    pub iteration_tokens_total: Histogram,
    /// Prompt length per request.
    pub request_prompt_tokens: Histogram,
    /// Output length per request.
    pub request_generation_tokens: Histogram,
    /// Output limit per request.
    pub request_params_max_tokens: Histogram,
    /// Prompt tokens computed, not found, per request.
    pub request_prefill_kv_computed_tokens: Histogram,
    /// Preemptions per request.
    pub request_num_preemptions: Histogram,
    /// Longest output of the choices of a prompt.
    pub request_max_num_generation_tokens: Histogram,
    /// Choices per prompt.
    pub request_params_n: Histogram,
}

const TTFT: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
const ITL: [f64; 19] =
    [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0];
const E2E: [f64; 21] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];
/// Of [`crate::core::residency`].
pub(crate) const RESIDENCY: [f64; 21] = [
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0,
    1200.0, 1800.0,
];
const ITERATION: [u64; 13] = [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384];
const PREEMPTIONS: [u64; 7] = [1, 2, 3, 4, 5, 10, 20];
const CHOICES: [u64; 5] = [1, 2, 5, 10, 20];

impl EngineMetrics {
    /// All zero. Token histograms have a 1-2-5 series up to `max_model_len`, unless the configuration has others.
    pub fn new(max_model_len: u32, config: &ObservabilityConfig) -> EngineMetrics {
        let tokens = || counts(config, BucketFamily::RequestTokens, &one_two_five(u64::from(max_model_len)));
        let latencies = || times(config, BucketFamily::RequestLatency, &E2E);
        let per_token = || times(config, BucketFamily::InterTokenLatency, &ITL);
        EngineMetrics {
            prompt_tokens: 0,
            prompt_tokens_cached: 0,
            generation_tokens: 0,
            prefix_cache_queries: 0,
            prefix_cache_hits: 0,
            num_preemptions: 0,
            stop: 0,
            length: 0,
            error: 0,
            abort: 0,
            admission_rejections_queued_reqs: 0,
            admission_rejections_queued_tokens: 0,
            time_to_first_token_seconds: times(config, BucketFamily::TimeToFirstToken, &TTFT),
            inter_token_latency_seconds: per_token(),
            request_time_per_output_token_seconds: per_token(),
            e2e_request_latency_seconds: latencies(),
            request_queue_time_seconds: latencies(),
            request_inference_time_seconds: latencies(),
            request_prefill_time_seconds: latencies(),
            request_decode_time_seconds: latencies(),
            iteration_tokens_total: counts(config, BucketFamily::IterationTokens, &ITERATION),
            request_prompt_tokens: tokens(),
            request_generation_tokens: tokens(),
            request_params_max_tokens: tokens(),
            request_prefill_kv_computed_tokens: tokens(),
            request_num_preemptions: counts(config, BucketFamily::RequestNumPreemptions, &PREEMPTIONS),
            request_max_num_generation_tokens: tokens(),
            request_params_n: counts(config, BucketFamily::RequestParamsN, &CHOICES),
        }
    }

    /// Requests ended, by reason. An abort that the caller asked for is not counted, one by the engine is.
    pub fn request_success(&self) -> [(FinishReason, u64); 4] {
        [
            (FinishReason::Stop, self.stop),
            (FinishReason::Length, self.length),
            (FinishReason::Error, self.error),
            (FinishReason::Abort, self.abort),
        ]
    }

    /// All histograms with vLLM's names.
    pub fn histograms(&self) -> [(&'static str, &Histogram); 16] {
        [
            ("time_to_first_token_seconds", &self.time_to_first_token_seconds),
            ("inter_token_latency_seconds", &self.inter_token_latency_seconds),
            ("request_time_per_output_token_seconds", &self.request_time_per_output_token_seconds),
            ("e2e_request_latency_seconds", &self.e2e_request_latency_seconds),
            ("request_queue_time_seconds", &self.request_queue_time_seconds),
            ("request_inference_time_seconds", &self.request_inference_time_seconds),
            ("request_prefill_time_seconds", &self.request_prefill_time_seconds),
            ("request_decode_time_seconds", &self.request_decode_time_seconds),
            ("iteration_tokens_total", &self.iteration_tokens_total),
            ("request_prompt_tokens", &self.request_prompt_tokens),
            ("request_generation_tokens", &self.request_generation_tokens),
            ("request_params_max_tokens", &self.request_params_max_tokens),
            ("request_prefill_kv_computed_tokens", &self.request_prefill_kv_computed_tokens),
            ("request_num_preemptions", &self.request_num_preemptions),
            ("request_max_num_generation_tokens", &self.request_max_num_generation_tokens),
            ("request_params_n", &self.request_params_n),
        ]
    }

    pub(crate) fn count_end(&mut self, reason: FinishReason) {
        match reason {
            FinishReason::Stop => self.stop += 1,
            FinishReason::Length => self.length += 1,
            FinishReason::Error => self.error += 1,
            FinishReason::Abort => self.abort += 1,
        }
    }

    /// All choices of a prompt ended.
    pub(crate) fn count_choices(&mut self, n: u32, longest: u32) {
        self.request_params_n.observe(u64::from(n));
        self.request_max_num_generation_tokens.observe(u64::from(longest));
    }
}

/// A histogram of times with the configured bounds or these, in seconds.
pub(crate) fn times(config: &ObservabilityConfig, family: BucketFamily, seconds: &[f64]) -> Histogram {
    let seconds = config.custom_histogram_buckets.get(&family).map_or(seconds, Vec::as_slice);
    Histogram::new(Unit::Time, seconds.iter().map(|&s| Dur::from_secs_f64(s).as_nanos()).collect())
}

/// A histogram of whole numbers with the configured bounds or these.
pub(crate) fn counts(config: &ObservabilityConfig, family: BucketFamily, bounds: &[u64]) -> Histogram {
    let custom = config.custom_histogram_buckets.get(&family);
    let bounds = custom.map_or_else(|| bounds.to_vec(), |custom| custom.iter().map(|&b| b as u64).collect());
    Histogram::new(Unit::Count, bounds)
}

/// 1, 2, 5, 10, ... up to `max`.
fn one_two_five(max: u64) -> Vec<u64> {
    let decades = std::iter::successors(Some(1u64), |d| d.checked_mul(10));
    decades.flat_map(|d| [1, 2, 5].map(|m| d.saturating_mul(m))).take_while(|&b| b <= max).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_buckets_end_at_the_longest_context() {
        assert_eq!(one_two_five(1000), [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]);
        assert_eq!(one_two_five(131_072).last(), Some(&100_000));
    }

    #[test]
    fn bounds_are_inclusive() {
        let mut h = Histogram::new(Unit::Count, vec![1, 8]);
        for v in [0, 1, 2, 8, 9] {
            h.observe(v);
        }
        assert_eq!((h.counts.as_slice(), h.sum, h.count()), ([2, 2, 1].as_slice(), 20, 5));
    }
}
