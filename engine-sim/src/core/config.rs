//! Configuration of one engine, with vLLM's knob names and its defaults on an H100 (`vllm serve`, 0.33).
//!
//! Parsed once, checked by [`EngineConfig::validate`], immutable afterwards. Knows nothing of files or of the command line: a
//! problem names the field by its path below the engine, and whoever read the file adds where that is.

mod kv_events;
mod observability;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use shared::block_hash::ExtraKeys;
pub use shared::config::ConfigProblem;

use crate::core::latency::LatencyProfile;
pub use crate::core::tokenizer::Tokenizer;
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
    /// Requests that may be open, waiting or running, before further ones are refused with 503; no limit when absent.
    pub max_num_queued_reqs: Option<u32>,
    /// Prompt tokens of requests without a first token from which on further requests are refused with 503; no limit when absent.
    pub max_num_queued_tokens: Option<u32>,
    /// LoRA adapters that may be in one batch; when absent, 1 if there are adapters, else no LoRA support.
    pub max_loras: Option<u32>,
    /// LoRA adapters that may be in the host's memory, at least `max_loras`; that when absent.
    pub max_cpu_loras: Option<u32>,
    /// Largest rank of an adapter.
    pub max_lora_rank: u32,
    /// LoRA adapters that are there from the start.
    pub lora_modules: Vec<LoraModule>,
    /// How the server makes tokens of text. Live only: prompts of virtual runs are tokens.
    pub tokenizer: Tokenizer,
    /// Whether the engine reports blocks stored and removed, and where a live one publishes that (`--kv-events-config`).
    pub kv_events_config: KvEventsConfig,
    /// What is measured beyond the default.
    pub observability: ObservabilityConfig,
}

/// A LoRA adapter. Nothing is read from its path: that is a part of its name in the prefix cache.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LoraModule {
    /// Model name by which requests choose it.
    pub name: String,
    /// Where it is said to be.
    pub path: String,
    /// The model it was made for; the served one when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_model_name: Option<String>,
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
            max_num_queued_tokens: None,
            max_loras: None,
            max_cpu_loras: None,
            max_lora_rank: 16,
            lora_modules: Vec::new(),
            tokenizer: Tokenizer::default(),
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
        self.validate_loras(&mut check);
        self.kv_events_config.check(&mut check);
        self.observability.check(&mut check);
        check.0
    }

    fn validate_loras(&self, check: &mut Check) {
        if let Some(loras) = self.max_loras {
            check.range("max_loras", loras, 1, MAX_LORAS);
        }
        let slots = self.lora_slots().unwrap_or(1).min(MAX_LORAS);
        if let Some(loras) = self.max_cpu_loras {
            check.range("max_cpu_loras", loras, slots, u32::MAX);
        }
        let ranks = LORA_RANKS.map(|r| r.to_string()).join(", ");
        let known = LORA_RANKS.contains(&self.max_lora_rank);
        check.that(known, "max_lora_rank", self.max_lora_rank, &format!("one of {ranks}"));
        for (i, module) in self.lora_modules.iter().enumerate() {
            let named = !module.name.is_empty() && !module.path.is_empty();
            check.that(named, &format!("lora_modules[{i}]"), "an empty text", "a name and a path");
            let new = self.lora_modules[..i].iter().all(|m| m.name != module.name);
            check.that(new, &format!("lora_modules[{i}].name"), &module.name, "a name that no other adapter has");
        }
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

    /// LoRA adapters that may be in one batch; `None` without LoRA support.
    pub fn lora_slots(&self) -> Option<u32> {
        self.max_loras.or((!self.lora_modules.is_empty()).then_some(1))
    }

    /// The adapter that a model name chooses among those from the start: its number and what it adds to the names of blocks.
    pub fn adapter(&self, model: &str) -> Option<(u32, ExtraKeys)> {
        let at = self.lora_modules.iter().position(|m| m.name == model)?;
        let LoraModule { name, path, .. } = &self.lora_modules[at];
        Some((at as u32 + 1, ExtraKeys { lora: Some((name.clone(), path.clone())), ..ExtraKeys::default() }))
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

/// More adapters than any batch holds.
const MAX_LORAS: u32 = 4096;
/// Ranks that vLLM has kernels for (`vllm/config/lora.py`).
const LORA_RANKS: [u32; 9] = [1, 8, 16, 32, 64, 128, 256, 320, 512];

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
            |c| {
                c.max_loras = Some(4);
                c.max_cpu_loras = Some(2);
                c.max_lora_rank = 7;
            },
            &[
                "max_cpu_loras: found 2, expected an integer in 4..=4294967295",
                "max_lora_rank: found 7, expected one of 1, 8, 16, 32, 64, 128, 256, 320, 512",
            ],
        );
        let module = |name: &str| LoraModule { name: name.into(), path: "p".into(), base_model_name: None };
        check(
            |c| c.lora_modules = vec![module("a"), module(""), module("a")],
            &[
                "lora_modules[1]: found an empty text, expected a name and a path",
                "lora_modules[2].name: found a, expected a name that no other adapter has",
            ],
        );
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
