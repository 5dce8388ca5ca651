//! Configuration of one engine, with vLLM's knob names and its defaults on an H100 (`vllm serve`, 0.33).
//!
//! Parsed once, checked by [`EngineConfig::validate`], immutable afterwards. Knows nothing of files or of the command line: a
//! problem names the field by its path below the engine, and whoever read the file adds where that is.

mod kv_events;
mod observability;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
pub use shared::config::ConfigProblem;

use crate::core::latency::LatencyProfile;
pub use kv_events::{Endpoint, EventFormat, KvEventsConfig, Publisher};
pub use observability::{BucketFamily, ObservabilityConfig};

/// One engine: its scheduler, its KV cache and the model whose latency it imitates.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EngineConfig {
    /// Latency profile, which is model, GPU and tensor parallelism: the name of one that is built in, or the path of a .yaml file.
    pub profile: String,
    /// Longest request, prompt and output together, in tokens; what the profile's model allows when absent.
    pub max_model_len: Option<u32>,
    /// The scheduler's knobs.
    pub scheduler: SchedulerConfig,
    /// The KV cache's knobs.
    pub cache: CacheConfig,
    /// Requests that may wait before further ones are refused with 503; no limit when absent.
    pub max_num_queued_reqs: Option<u32>,
    /// LoRA adapters that may be in one batch; when absent the engine has no LoRA support and never defers for it.
    pub max_loras: Option<u32>,
    /// Whether the engine reports blocks stored and removed, and where a live one publishes that (`--kv-events-config`).
    pub kv_events_config: KvEventsConfig,
    /// What is measured beyond the default.
    pub observability: ObservabilityConfig,
}

/// The scheduler's knobs (`vllm/config/scheduler.py`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SchedulerConfig {
    /// Most tokens in one step. 8192 on GPUs of 70 GiB or more, 2048 on smaller ones.
    #[schemars(range(min = 1))]
    pub max_num_batched_tokens: u32,
    /// Most requests in one step. 1024 on GPUs of 70 GiB or more, 256 on smaller ones.
    #[schemars(range(min = 1))]
    pub max_num_seqs: u32,
    /// Whether a prompt may be split over several steps.
    pub enable_chunked_prefill: bool,
    /// Most prompt tokens of one request in one step while others are there; 0 for no limit.
    pub long_prefill_token_threshold: u32,
    /// Order of the waiting queue.
    pub policy: Policy,
    /// Whether a request is admitted only if its whole prompt fits into the cache now.
    pub scheduler_reserve_full_isl: bool,
    /// Fraction of the blocks, in 0..1, kept free when a request is admitted while others run.
    pub watermark: f64,
    /// Whether the next step is scheduled while the current one executes (two batches in flight).
    pub async_scheduling: bool,
}

/// Order in which requests are admitted and preempted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// In order of arrival; the newest admitted is preempted first.
    #[default]
    Fcfs,
    /// Lowest `priority` first, then by arrival; the worst of these is preempted first.
    Priority,
}

/// The KV cache's knobs (`vllm/config/cache.py`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CacheConfig {
    /// Tokens in a block.
    pub block_size: u32,
    /// Blocks of the cache, the null block included; the profile's own figure when absent.
    pub num_gpu_blocks: Option<u32>,
    /// Whether blocks are found again by their content.
    pub enable_prefix_caching: bool,
    /// How blocks are named.
    pub prefix_caching_hash_algo: HashAlgo,
}

/// How the identity of a block is computed; see [`shared::block_hash`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum HashAlgo {
    /// A cheap chain of xxh3-128, for simulations. Not vLLM's.
    #[default]
    Chain,
    /// vLLM's `sha256_cbor`: the same digests as a real engine.
    Sha256Cbor,
}

impl Default for EngineConfig {
    fn default() -> Self {
        EngineConfig {
            profile: LatencyProfile::DEFAULT_NAME.into(),
            max_model_len: None,
            scheduler: SchedulerConfig::default(),
            cache: CacheConfig::default(),
            max_num_queued_reqs: None,
            max_loras: None,
            kv_events_config: KvEventsConfig::default(),
            observability: ObservabilityConfig::default(),
        }
    }
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        SchedulerConfig {
            max_num_batched_tokens: 8192,
            max_num_seqs: 1024,
            enable_chunked_prefill: true,
            long_prefill_token_threshold: 0,
            policy: Policy::Fcfs,
            scheduler_reserve_full_isl: true,
            watermark: 0.0,
            async_scheduling: true,
        }
    }
}

impl Default for CacheConfig {
    fn default() -> Self {
        CacheConfig {
            block_size: 16,
            num_gpu_blocks: None,
            enable_prefix_caching: true,
            prefix_caching_hash_algo: HashAlgo::Chain,
        }
    }
}

impl EngineConfig {
    /// Everything that is wrong with this configuration on `profile`, in the order of its fields; empty when the engine can run.
    pub fn validate(&self, profile: &LatencyProfile) -> Vec<ConfigProblem> {
        let mut check = Check(Vec::new());
        let s = &self.scheduler;
        let model_len = self.model_len(profile);
        check.range("max_model_len", model_len, 1, MAX_MODEL_LEN);
        check.range("scheduler.max_num_batched_tokens", s.max_num_batched_tokens, 1, MAX_BATCHED_TOKENS);
        check.range("scheduler.max_num_seqs", s.max_num_seqs, 1, s.max_num_batched_tokens);
        let whole = s.enable_chunked_prefill || s.max_num_batched_tokens >= model_len;
        check.that(
            whole,
            "scheduler.max_num_batched_tokens",
            s.max_num_batched_tokens,
            &format!("at least max_model_len ({model_len}) when enable_chunked_prefill is false"),
        );
        let threshold = s.long_prefill_token_threshold;
        check.range("scheduler.long_prefill_token_threshold", threshold, 0, model_len);
        check.that((0.0..1.0).contains(&s.watermark), "scheduler.watermark", s.watermark, "a fraction in 0.0..1.0");
        check.range("cache.block_size", self.cache.block_size, 1, 1024);
        // One block is the null block, and the longest request has to fit alone.
        let least = model_len.div_ceil(self.cache.block_size.max(1)).saturating_add(1);
        check.range("cache.num_gpu_blocks", self.num_gpu_blocks(profile), least, MAX_BLOCKS);
        if let Some(loras) = self.max_loras {
            check.range("max_loras", loras, 1, 4096);
        }
        self.kv_events_config.check(&mut check);
        self.observability.check(&mut check);
        check.0
    }

    /// Longest request in tokens, prompt and output together.
    pub fn model_len(&self, profile: &LatencyProfile) -> u32 {
        self.max_model_len.unwrap_or(profile.max_model_len)
    }

    /// Blocks of the KV cache, the null block included.
    pub fn num_gpu_blocks(&self, profile: &LatencyProfile) -> u32 {
        let tokens = profile.kv_cache_tokens / u64::from(self.cache.block_size.max(1));
        self.cache.num_gpu_blocks.unwrap_or(u32::try_from(tokens).unwrap_or(u32::MAX))
    }

    /// Batches that may be in flight: 2 with asynchronous scheduling, else 1.
    pub fn inflight(&self) -> usize {
        1 + usize::from(self.scheduler.async_scheduling)
    }
}

/// Ten million tokens: no model has a longer context, and positions stay far inside 32 bits.
const MAX_MODEL_LEN: u32 = 10_000_000;
/// A step of a million tokens lasts minutes on any GPU.
const MAX_BATCHED_TOKENS: u32 = 1 << 20;
/// A block costs the simulator some 40 bytes: this bounds one engine at about 1.3 GB.
const MAX_BLOCKS: u32 = 1 << 25;

struct Check(Vec<ConfigProblem>);

impl Check {
    fn that(&mut self, holds: bool, path: &str, found: impl std::fmt::Display, allowed: &str) {
        if !holds {
            let problem = ConfigProblem { path: path.into(), found: found.to_string(), allowed: allowed.into() };
            self.0.push(problem);
        }
    }

    fn range(&mut self, path: &str, found: u32, least: u32, most: u32) {
        let allowed = format!("an integer in {least}..={most}");
        self.that((least..=most).contains(&found), path, found, &allowed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(change: impl FnOnce(&mut EngineConfig), expect: &[&str]) {
        let mut config = EngineConfig::default();
        change(&mut config);
        let profile = LatencyProfile::named(&config.profile).unwrap();
        let found: Vec<String> = config.validate(&profile).iter().map(ConfigProblem::to_string).collect();
        assert_eq!(found, expect);
    }

    #[test]
    fn problems_name_the_field_what_was_found_and_what_is_allowed() {
        check(|_| (), &[]);
        check(|c| c.scheduler.max_num_seqs = 0, &["scheduler.max_num_seqs: found 0, expected an integer in 1..=8192"]);
        check(
            |c| c.scheduler.max_num_seqs = 9000,
            &["scheduler.max_num_seqs: found 9000, expected an integer in 1..=8192"],
        );
        check(|c| c.scheduler.watermark = 1.0, &["scheduler.watermark: found 1, expected a fraction in 0.0..1.0"]);
        check(
            |c| c.scheduler.watermark = f64::NAN,
            &["scheduler.watermark: found NaN, expected a fraction in 0.0..1.0"],
        );
        check(
            |c| c.cache.num_gpu_blocks = Some(8192),
            &["cache.num_gpu_blocks: found 8192, expected an integer in 8193..=33554432"],
        );
        check(|c| c.max_loras = Some(0), &["max_loras: found 0, expected an integer in 1..=4096"]);
        check(
            |c| c.scheduler.enable_chunked_prefill = false,
            &["scheduler.max_num_batched_tokens: found 8192, expected at least max_model_len (131072) when \
               enable_chunked_prefill is false"],
        );
    }

    #[test]
    fn unknown_fields_are_refused_and_defaults_fill_the_rest() {
        let parse = serde_json::from_str::<EngineConfig>;
        assert_eq!(parse("{}").unwrap(), EngineConfig::default());
        let some =
            parse(r#"{"scheduler": {"policy": "priority"}, "cache": {"prefix_caching_hash_algo": "sha256_cbor"}}"#);
        let some = some.unwrap();
        assert_eq!(some.scheduler.policy, Policy::Priority);
        assert_eq!(some.cache.prefix_caching_hash_algo, HashAlgo::Sha256Cbor);
        assert!(parse(r#"{"scheduler": {"max_seqs": 1}}"#).is_err());
    }
}
