//! The engines of a scenario and what lies between them and the client.

use std::net::{Ipv4Addr, SocketAddr};

use engine_sim::core::config::{CacheConfig, EngineConfig, LoraModule, SchedulerConfig, Tokenizer};
use engine_sim::core::latency::LatencyProfile;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use shared::time::Dur;
use shared::units::HumanDur;

/// Engines that are all alike: simulated ones, or a real server at `url`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EngineGroup {
    /// How many.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 100000))]
    pub count: u32,
    /// What they do.
    #[serde(default)]
    pub role: Role,
    /// The model they serve; that of the profile when absent. A real server must be given its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// A real OpenAI-compatible server instead of a simulated engine, for example `http://10.0.0.5:8000`. Live mode only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// Live mode: port of the first engine of the group; the next ones follow. After the previous group's when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub port: Option<u16>,
    /// Latency profile: model, GPU and tensor parallelism.
    #[serde(default = "default_profile")]
    pub profile: String,
    /// Longest request, prompt and output together, in tokens; the profile's own when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub max_model_len: Option<u32>,
    /// The scheduler's knobs, as vLLM calls them.
    #[serde(default)]
    pub scheduler: SchedulerConfig,
    /// The KV cache's knobs, as vLLM calls them.
    #[serde(default)]
    pub cache: CacheConfig,
    /// Requests that may be open, waiting or running, before further ones are refused; no limit when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_num_queued_reqs: Option<u32>,
    /// Prompt tokens not computed yet from which on requests are refused; no limit when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_num_queued_tokens: Option<u32>,
    /// LoRA adapters that may be in one batch; when absent 1 if there are adapters, else no LoRA support.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_loras: Option<u32>,
    /// LoRA adapters that may be in the host's memory; as many as in one batch when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_cpu_loras: Option<u32>,
    /// Largest rank of an adapter.
    #[serde(default = "default_rank")]
    pub max_lora_rank: u32,
    /// LoRA adapters; requests choose one by its name as their model.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lora_modules: Vec<LoraModule>,
    /// Live mode: how the server makes tokens of text. Prompts of virtual runs are tokens.
    #[serde(default)]
    pub tokenizer: Tokenizer,
    /// Whether engines report blocks stored and removed.
    #[serde(default)]
    pub enable_kv_cache_events: bool,
}

/// What an engine does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Prefill and decode.
    #[default]
    Both,
    /// Prefill only.
    Prefill,
    /// Decode only.
    Decode,
}

/// Where a live run listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Listen {
    /// The gateway's address; port 0 takes any free one.
    #[schemars(with = "String", extend("x-expected" = "an address such as 127.0.0.1:8080"))]
    pub gateway: SocketAddr,
    /// The first engine's address; the others take the ports after it. Port 0 takes any free ones.
    #[schemars(with = "String", extend("x-expected" = "an address such as 127.0.0.1:8100"))]
    pub engines: SocketAddr,
}

/// Delays of a virtual run, one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Network {
    /// Between client and gateway.
    pub client_gateway: HumanDur,
    /// Between gateway and engine.
    pub gateway_engine: HumanDur,
}

impl Default for Listen {
    fn default() -> Listen {
        let local = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        Listen { gateway: local(8080), engines: local(8100) }
    }
}

impl Default for Network {
    /// Two machines in one rack: a model, not a measurement.
    fn default() -> Network {
        Network { client_gateway: HumanDur(Dur::from_micros(100)), gateway_engine: HumanDur(Dur::from_micros(100)) }
    }
}

impl EngineGroup {
    /// `count` engines with this latency profile and defaults otherwise.
    pub fn of(count: u32, profile: &str) -> EngineGroup {
        let defaults = EngineConfig::default();
        EngineGroup {
            count,
            role: Role::default(),
            model: None,
            url: None,
            port: None,
            profile: profile.to_owned(),
            max_model_len: None,
            scheduler: defaults.scheduler,
            cache: defaults.cache,
            max_num_queued_reqs: defaults.max_num_queued_reqs,
            max_num_queued_tokens: defaults.max_num_queued_tokens,
            max_loras: defaults.max_loras,
            max_cpu_loras: defaults.max_cpu_loras,
            max_lora_rank: defaults.max_lora_rank,
            lora_modules: defaults.lora_modules,
            tokenizer: defaults.tokenizer,
            enable_kv_cache_events: defaults.enable_kv_cache_events,
        }
    }

    /// What each engine of the group is configured with.
    pub fn engine_config(&self) -> EngineConfig {
        EngineConfig {
            profile: self.profile.clone(),
            max_model_len: self.max_model_len,
            scheduler: self.scheduler.clone(),
            cache: self.cache.clone(),
            max_num_queued_reqs: self.max_num_queued_reqs,
            max_num_queued_tokens: self.max_num_queued_tokens,
            max_loras: self.max_loras,
            max_cpu_loras: self.max_cpu_loras,
            max_lora_rank: self.max_lora_rank,
            lora_modules: self.lora_modules.clone(),
            tokenizer: self.tokenizer,
            enable_kv_cache_events: self.enable_kv_cache_events,
        }
    }

    /// The model these engines serve.
    pub fn model_name(&self) -> Option<String> {
        let own = || Some(LatencyProfile::named(&self.profile).filter(|_| self.url.is_none())?.model.to_owned());
        self.model.clone().or_else(own)
    }

    /// The longest request they take, in tokens.
    pub fn context_limit(&self) -> u32 {
        let own = || LatencyProfile::named(&self.profile).map(|p| p.max_model_len);
        self.max_model_len.or_else(own).unwrap_or(UNKNOWN_CONTEXT)
    }
}

/// What a real server of unknown length is taken to accept, in tokens: the context of the Llama 3.1 family.
const UNKNOWN_CONTEXT: u32 = 131_072;

fn one() -> u32 {
    1
}

fn default_profile() -> String {
    EngineConfig::default().profile
}

fn default_rank() -> u32 {
    EngineConfig::default().max_lora_rank
}
