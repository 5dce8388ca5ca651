//! The engines of a scenario and what lies between them and the client.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};

use engine_sim::core::config::{
    CacheConfig, EngineConfig, KvEventsConfig, LoraModule, ObservabilityConfig, SchedulerConfig, Tokenizer,
};
use engine_sim::core::faults::{FaultRule, Faults};
use engine_sim::core::kv_transfer::KvTransferConfig;
use gateway::pd_proxy::core::PdProxyConfig;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use shared::rng::Seed;
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
    /// What they do, as the label llm-d.ai/role. Without it they do both, and get no other engine's prefills.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<Role>,
    /// Labels, as pods have them, for filters and scorers of the gateway.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
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
    /// Latency profile, which is model, GPU and tensor parallelism: the name of one that is built in, or the path of a .yaml file
    /// (`engine-sim calibrate` makes them), relative to the working directory.
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
    /// Whether engines report blocks stored and removed, and where live ones publish that, as vLLM calls it. An endpoint that binds
    /// has the port of the group's first engine; the next ones follow.
    #[serde(default, skip_serializing_if = "is_default")]
    pub kv_events_config: KvEventsConfig,
    /// What engines measure beyond the default, as vLLM calls it.
    #[serde(default, skip_serializing_if = "is_default")]
    pub observability: ObservabilityConfig,
    /// What goes wrong in each of them: at times, by rates, drawn for each engine on its own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub faults: Vec<FaultRule>,
    /// Whether a request may ask for a fault of its own with the header `X-Igsim-Fault` or `X-Return-Error`. Live mode only.
    #[serde(default, skip_serializing_if = "is_false")]
    pub fault_headers: bool,
    /// When they join the gateway's pool; they are there from the start when absent. They run all the time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub joins_at: Option<HumanDur>,
    /// When the gateway stops sending them requests; those that they have go on. Never when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drains_at: Option<HumanDur>,
    /// The KV connector: prefill in one engine, decode in another. None when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_transfer: Option<KvTransferConfig>,
    /// The routing sidecar in front of each of them, which has another engine prefill where the gateway says so. When absent there is
    /// one, with defaults, if the gateway disaggregates and engines of role `decode` read others' caches
    /// (`kv_transfer`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pd_proxy: Option<PdProxyConfig>,
}

/// What an engine does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Prefill and decode.
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
    /// The kv-cache-manager's address: then the index of KV events is a service of its own, and the gateway asks it. In the gateway
    /// when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>", extend("x-expected" = "an address such as 127.0.0.1:8200"))]
    pub kv_cache_manager: Option<SocketAddr>,
    /// A loopback address at which faults of the engines can be asked for while they run; nowhere when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>", extend("x-expected" = "a loopback address such as 127.0.0.1:8099"))]
    pub control: Option<SocketAddr>,
}

/// Delays of a virtual run, one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Network {
    /// Between client and gateway.
    pub client_gateway: HumanDur,
    /// Between gateway and engine.
    pub gateway_engine: HumanDur,
    /// Between engines, for what their KV connectors tell each other, and from a sidecar to the engine that prefills; the cache
    /// itself takes the time of its own link.
    pub engine_engine: HumanDur,
    /// Between a routing sidecar and its own engine.
    pub sidecar_engine: HumanDur,
}

impl Default for Listen {
    fn default() -> Listen {
        let local = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        Listen { gateway: local(8080), engines: local(8100), kv_cache_manager: None, control: None }
    }
}

impl Default for Network {
    /// Machines of one rack, and a sidecar on the machine of its engine: a model, not a measurement.
    fn default() -> Network {
        let one_way = HumanDur(Dur::from_micros(100));
        let local = HumanDur(Dur::from_micros(20));
        Network { client_gateway: one_way, gateway_engine: one_way, engine_engine: one_way, sidecar_engine: local }
    }
}

impl EngineGroup {
    /// `count` engines with this latency profile and defaults otherwise.
    pub fn of(count: u32, profile: &str) -> EngineGroup {
        let defaults = EngineConfig::default();
        EngineGroup {
            count,
            role: None,
            labels: BTreeMap::new(),
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
            kv_events_config: defaults.kv_events_config,
            observability: defaults.observability,
            faults: Vec::new(),
            fault_headers: false,
            joins_at: None,
            drains_at: None,
            kv_transfer: defaults.kv_transfer,
            pd_proxy: None,
        }
    }

    /// What goes wrong in the engine called `engine`; `None` if nothing can. `controlled` says whether more may be asked for.
    pub fn faults(&self, seed: Seed, engine: &str, controlled: bool) -> Option<Faults> {
        let wanted = controlled || self.fault_headers || !self.faults.is_empty();
        wanted.then(|| Faults::new(seed, engine, &self.faults).by_header(self.fault_headers))
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
            kv_events_config: self.kv_events_config.clone(),
            observability: self.observability.clone(),
            kv_transfer: self.kv_transfer.clone(),
        }
    }

    /// The labels of their endpoints: their own, and that of their role.
    pub fn endpoint_labels(&self) -> BTreeMap<String, String> {
        let role = self.role.map(|role| match role {
            Role::Both => "prefill-decode",
            Role::Prefill => "prefill",
            Role::Decode => "decode",
        });
        let mut labels = self.labels.clone();
        labels.extend(role.map(|r| (ROLE_LABEL.to_owned(), r.to_owned())));
        labels
    }

    /// What the `i`-th engine of the group is configured with: each publishes at an endpoint of its own.
    pub fn nth_engine_config(&self, i: u32) -> EngineConfig {
        let mut config = self.engine_config();
        config.kv_events_config = config.kv_events_config.nth(i);
        config
    }

    /// The model these engines serve.
    pub fn model_name(&self) -> Option<String> {
        let own = || {
            self.url
                .is_none()
                .then(|| engine_sim::profiles::find(&self.profile).ok())
                .flatten()
                .map(|p| p.model.clone())
        };
        self.model.clone().or_else(own)
    }

    /// The longest request they take, in tokens.
    pub fn context_limit(&self) -> u32 {
        let own = || engine_sim::profiles::find(&self.profile).ok().map(|p| p.max_model_len);
        self.max_model_len.or_else(own).unwrap_or(UNKNOWN_CONTEXT)
    }
}

/// The label of an endpoint's role.
pub(super) const ROLE_LABEL: &str = gateway::core::pool::Role::LABEL;

/// What a real server of unknown length is taken to accept, in tokens: the context of the Llama 3.1 family.
const UNKNOWN_CONTEXT: u32 = 131_072;

fn is_default<T: Default + PartialEq>(config: &T) -> bool {
    *config == T::default()
}

fn is_false(value: &bool) -> bool {
    !value
}

fn one() -> u32 {
    1
}

fn default_profile() -> String {
    EngineConfig::default().profile
}

fn default_rank() -> u32 {
    EngineConfig::default().max_lora_rank
}
