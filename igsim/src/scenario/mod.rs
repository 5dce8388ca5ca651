//! Scenarios: what runs, against what, for how long, and what must come out.
//!
//! One YAML file, read by [`shared::config`]. The doc comments of these types are the descriptions of the published JSON
//! schema. Nothing here starts anything: drivers take a [`Scenario`] that is known to be valid.

mod check;
mod fleet;
mod length;
mod load;
mod outputs;
mod pd;
mod pools;
mod propagation;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use gateway::core::config::GatewayConfig;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use shared::config::{ConfigErrors, Loaded};
use shared::trace::policy::{Force, Keep, Policy, Rule};
use shared::units::HumanDur;

pub use fleet::{EngineGroup, Listen, Network, Role};
pub use length::{Builtin, Length, Shape};
pub use load::{
    Api, Arrivals, Prefixes, Sessions, Spread, Step, SystemPrompt, Tenant, ThinkTime, Trace, TraceFormat, Workload,
};
pub use outputs::{Compression, Metrics, Otlp, OtlpEncoding, OtlpProtocol, RotatingFile};

pub use propagation::{Callers, Hop, PropagationFault};

use crate::report::Bound;

/// A scenario.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// Short name: the run's directory and the report are called by it.
    pub name: String,
    /// What the scenario shows, for people.
    #[serde(default)]
    pub description: String,
    /// Seed of everything that is drawn. The same scenario and seed give the same plan, and in virtual mode the same bytes.
    #[serde(default = "default_seed")]
    pub seed: u64,
    /// Sockets and real time, or one thread and simulated time.
    #[serde(default)]
    pub mode: Mode,
    /// For how long new requests are sent; those in flight are finished.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration: Option<HumanDur>,
    /// How many requests are sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub requests: Option<u64>,
    /// The gateway.
    #[serde(default)]
    pub gateway: GatewayConfig,
    /// The engines, in groups of equals.
    #[schemars(length(min = 1))]
    pub engines: Vec<EngineGroup>,
    /// The requests.
    #[serde(default)]
    pub workload: Workload,
    /// A recorded trace to replay: it decides when requests arrive and how long they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace: Option<Trace>,
    /// What is traced and where spans go.
    #[serde(default)]
    pub tracing: Tracing,
    /// Live mode: where metrics are pushed to; they can be read at the gateway's /metrics in any case.
    #[serde(default)]
    pub metrics: Metrics,
    /// What goes wrong in how traces are handed from service to service.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub propagation_faults: Vec<PropagationFault>,
    /// Live mode: addresses to listen on.
    #[serde(default)]
    pub listen: Listen,
    /// Virtual mode: delays between client, gateway and engines.
    #[serde(default)]
    pub network: Network,
    /// Bounds on figures of the report, by their path in it, for example `ttft_ms.p99: {max: 500}`. A run whose
    /// expectations do not hold fails.
    #[serde(default)]
    pub expectations: BTreeMap<String, Bound>,
    /// What the user should know of the gateway's configuration.
    #[serde(skip)]
    pub warnings: Vec<String>,
}

/// How a scenario is run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Real sockets, real HTTP, real time.
    #[default]
    Live,
    /// One thread and a simulated clock: deterministic, and as fast as the machine allows.
    Virtual,
}

/// What is traced. What is left out is taken from the environment (`OTEL_*`), then from the defaults.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Tracing {
    /// Which traces are kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sampler: Option<Sampler>,
    /// Share of traces that the ratio samplers keep, 0 to 1; 0.1 when nothing says otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1))]
    pub ratio: Option<f64>,
    /// Ratios for some of the requests, by model, tenant, route or objective: the first rule that matches decides in place of `ratio`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<Rule>,
    /// Lets trusted callers ask for a trace by a header; nobody can when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub force: Option<Force>,
    /// The most traces that are kept from the start in a second. Without `ratio` all of them are wanted.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub rate_limit: Option<f64>,
    /// Keeps traces that were not sampled for what became of their requests: every request is recorded until that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep: Option<Keep>,
    /// How much is recorded: 1 lifecycle, 2 decisions, 3 fine; 2 when nothing says otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 3))]
    pub detail: Option<u8>,
    /// Whose names spans have; proposal when nothing says otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub naming: Option<Naming>,
    /// Share of engine steps that get a trace of their own, 0 to 1, with links to the requests in them; none when nothing says
    /// otherwise. 0.01 shows what engines do at little cost. From detail 2 on.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1))]
    pub engine_steps: Option<f64>,
    /// Share of batches of KV events that get a trace of their own where they are taken into the index, 0 to 1; none when nothing
    /// says otherwise. From detail 2 on.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1))]
    pub kv_events: Option<f64>,
    /// Share of the gateway's scrapes of its endpoints that get a trace of their own, 0 to 1; none when nothing says otherwise. 0.01
    /// shows how old metrics are at little cost. From detail 2 on.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1))]
    pub scrapes: Option<f64>,
    /// How facts become spans; deferred when nothing says otherwise. Both make the same spans.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recorder: Option<Recorder>,
    /// Where spans go, for example `[file]` or `[{otlp: {url: "http://localhost:4317"}}]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exporters: Option<Vec<Exporter>>,
    /// Whether spans say what Langfuse wants to know of generations: docs/langfuse.md.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub langfuse: Option<bool>,
    /// A table of prices, for the cost of generations in Langfuse. A relative path starts at the folder of the scenario.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prices: Option<PathBuf>,
    /// How long a record may stay open before it is closed as abandoned.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_open: Option<HumanDur>,
}

impl Tracing {
    /// What the gateway does beyond its sampler.
    pub fn policy(&self) -> Policy {
        let Tracing { rules, force, rate_limit, keep, .. } = self.clone();
        Policy { rules, force, rate_limit, keep }
    }

    /// Whether more than a ratio decides which traces are kept from the start.
    pub fn decides_by_policy(&self) -> bool {
        !self.rules.is_empty() || self.force.is_some() || self.rate_limit.is_some()
    }

    /// The bounds of the trace files, if they have some.
    pub fn rotating_file(&self) -> Option<&RotatingFile> {
        self.exporters.iter().flatten().find_map(|exporter| match exporter {
            Exporter::RotatingFile(rotating) => Some(rotating),
            Exporter::File | Exporter::Otlp(_) | Exporter::Console | Exporter::None => None,
        })
    }
}

/// Whose names, kinds and topology spans have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Naming {
    /// Those of llm-d's tracing proposal: `gateway.request`, `vllm.engine.request`, ... and all that docs/spans.md lists.
    Proposal,
    /// Those of llm-d's own components since September 2026: `request`, `run_scheduler_profile`, `llm_request`, ... and no others.
    LlmD,
}

impl From<Naming> for shared::trace::Naming {
    fn from(naming: Naming) -> shared::trace::Naming {
        match naming {
            Naming::Proposal => shared::trace::Naming::Proposal,
            Naming::LlmD => shared::trace::Naming::LlmD,
        }
    }
}

/// How facts become spans.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Recorder {
    /// Kept until the request ends, folded in the background.
    Deferred,
    /// At once, by the OpenTelemetry SDK and its batch processor, as most instrumented programs do it; live mode only.
    Eager,
}

/// The samplers of OpenTelemetry, by the names of `OTEL_TRACES_SAMPLER`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Sampler {
    /// Keep every trace.
    AlwaysOn,
    /// Keep none.
    AlwaysOff,
    /// Keep a share of all traces.
    #[serde(rename = "traceidratio")]
    TraceIdRatio,
    /// Do as the caller does; keep traces that start here.
    #[serde(rename = "parentbased_always_on")]
    ParentBasedAlwaysOn,
    /// Do as the caller does; keep no traces that start here.
    #[serde(rename = "parentbased_always_off")]
    ParentBasedAlwaysOff,
    /// Do as the caller does; keep a share of the traces that start here.
    #[serde(rename = "parentbased_traceidratio")]
    ParentBasedTraceIdRatio,
}

/// Where spans go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Exporter {
    /// `traces.otlp.jsonl` in the run's directory, as OTLP JSON.
    File,
    /// The same in files of bounded size, of which the newest are kept: for what serves for days. Live mode only.
    #[serde(rename = "rotating_file")]
    RotatingFile(RotatingFile),
    /// An OpenTelemetry collector or a backend that takes OTLP.
    Otlp(Otlp),
    /// Trees of spans on standard error.
    Console,
    /// Nowhere.
    None,
}

fn default_seed() -> u64 {
    42
}

/// Reads a scenario and applies `--set` overrides. A file of llm-d's that it names is read too, and what it says stands in its place.
///
/// # Errors
/// Everything that is wrong with it.
pub fn load(path: &Path, overrides: &[(String, String)]) -> Result<Loaded<Scenario>, ConfigErrors> {
    let mut loaded = shared::config::load::<Scenario>(path, overrides)?;
    // What is set on the command line is meant from where that is.
    let set = overrides.iter().any(|(field, _)| field == "gateway.epp_config");
    let scenario = &mut loaded.config;
    scenario.warnings = gateway::epp::resolve(&mut scenario.gateway, (!set).then_some(path))?;
    scenario.warnings.extend(scenario.unheard_kv_events());
    let prices_set = overrides.iter().any(|(field, _)| field == "tracing.prices");
    if let (Some(prices), Some(folder), false) = (&mut scenario.tracing.prices, path.parent(), prices_set) {
        *prices = folder.join(&prices);
    }
    Ok(loaded)
}

/// The JSON schema of scenarios, as published.
pub fn json_schema() -> serde_json::Value {
    schemars::schema_for!(Scenario).to_value()
}

impl Scenario {
    /// The scenario as resolved: every default filled in, as YAML that reads back as the same scenario.
    pub fn to_yaml(&self) -> String {
        shared::config::to_yaml(&self.to_json())
    }

    /// The scenario as resolved, as JSON.
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::to_value(self).unwrap_or_default()
    }

    /// The gateway's configuration, with an objective for every tenant that has a priority and names none.
    pub fn gateway_config(&self) -> GatewayConfig {
        let mut config = self.gateway.clone();
        for tenant in self.workload.tenants.iter().filter(|t| t.objective.is_none() && t.priority != 0) {
            let own = config.pools.iter_mut().filter_map(|pool| pool.objectives.as_mut());
            own.chain([&mut config.objectives]).for_each(|o| _ = o.insert(tenant.name.clone(), tenant.priority));
        }
        config
    }

    /// What to say where the gateway reads KV events and no engine publishes any.
    fn unheard_kv_events(&self) -> Option<String> {
        let published = self.engines.iter().any(|g| g.url.is_some() || g.kv_events_config.enable_kv_cache_events);
        let read = self.gateway.pool_configs().iter().any(GatewayConfig::reads_kv_events);
        (read && !published).then(|| {
            "gateway: its plugins read KV events, which no engine publishes (engines[].kv_events_config.\
             enable_kv_cache_events)"
                .to_owned()
        })
    }

    /// Every tenant's name and priority.
    pub fn tenants(&self) -> Vec<(String, i32)> {
        let objectives = &self.gateway.objectives;
        self.workload.tenants.iter().map(|t| (t.name.clone(), t.priority_by(objectives))).collect()
    }

    /// The first port of each group of simulated engines, by the group's index: its own, else the one after the previous group's
    /// last. 0 is any free port. Not bounded to 16 bits; validation sees to that.
    pub fn first_ports(&self) -> Vec<(usize, u32)> {
        let mut next = u32::from(self.listen.engines.port());
        let own = self.engines.iter().enumerate().filter(|(_, g)| g.url.is_none());
        own.map(|(i, group)| {
            let first = group.port.map_or(next, u32::from);
            if first != 0 {
                next = first + group.count;
            }
            (i, first)
        })
        .collect()
    }

    /// How many engines there are, in all groups.
    pub fn engine_count(&self) -> u32 {
        self.engines.iter().map(|g| g.count).sum()
    }

    /// The model that requests ask for: the workload's, else that of the first group.
    pub fn model(&self) -> String {
        let first = || self.engines.first().and_then(EngineGroup::model_name).unwrap_or_default();
        self.workload.model.clone().unwrap_or_else(first)
    }

    /// The longest prompt and output together that every engine takes, in tokens.
    pub fn context_limit(&self) -> u32 {
        self.engines.iter().map(EngineGroup::context_limit).min().unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests;
