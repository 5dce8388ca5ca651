//! The requests of a scenario: when they come, what they are made of, who sends them.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use shared::units::HumanDur;

use super::length::Length;

/// The requests.
///
/// A prompt is the system prompt, then the prefix of a group, then text of its own; `prompt_tokens` is the length of the last.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Workload {
    /// When requests come. Needed unless a trace is replayed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub arrivals: Option<Arrivals>,
    /// Tokens of a prompt's own text.
    pub prompt_tokens: Length,
    /// Tokens of an answer.
    pub output_tokens: Length,
    /// A prompt that all requests begin with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system_prompt: Option<SystemPrompt>,
    /// Prefixes that some requests share.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefixes: Option<Prefixes>,
    /// Conversations: each arrival is the first turn of one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sessions: Option<Sessions>,
    /// Who sends the requests; one tenant when empty.
    pub tenants: Vec<Tenant>,
    /// The endpoint that is called.
    pub api: Api,
    /// Share of requests that stream their answer, 0 to 1.
    #[schemars(range(min = 0, max = 1))]
    pub streaming: f64,
    /// The model asked for; that of the engines when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
}

/// When requests come.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "process", rename_all = "lowercase", deny_unknown_fields)]
pub enum Arrivals {
    /// Open loop, independent of each other: exponential gaps.
    Poisson {
        /// Arrivals per second.
        #[schemars(range(min = 0))]
        rate: f64,
    },
    /// Open loop, in bursts (cv above 1) or smoother than Poisson (cv below 1): gamma gaps.
    Gamma {
        /// Arrivals per second.
        #[schemars(range(min = 0))]
        rate: f64,
        /// Coefficient of variation of the gaps; 1 is Poisson. ServeGen's clients have a median of 1.2 and a p90 of 5.
        #[schemars(range(min = 0))]
        cv: f64,
    },
    /// Open loop at rates that change: Poisson at one rate after the other.
    Steps {
        /// The rates, in order; nothing comes after the last.
        #[schemars(length(min = 1, max = 1000))]
        steps: Vec<Step>,
    },
    /// Open loop, equal gaps.
    Constant {
        /// Arrivals per second.
        #[schemars(range(min = 0))]
        rate: f64,
    },
    /// Closed loop: so many clients, each of which waits for its answer before it asks again.
    Closed {
        /// How many clients.
        #[schemars(range(min = 1, max = 1000000))]
        concurrency: u32,
        /// How long a client waits between an answer and its next request.
        #[serde(default)]
        think_time: ThinkTime,
    },
    /// As in the trace (section `trace`).
    Replay {},
}

/// A time of equal rate.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// Arrivals per second.
    #[schemars(range(min = 0))]
    pub rate: f64,
    /// For how long.
    pub duration: HumanDur,
    /// How long nothing comes after it.
    #[serde(default)]
    pub pause: HumanDur,
}

/// A pause: a duration such as `150ms`, or its distribution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum ThinkTime {
    /// Always the same.
    Constant(HumanDur),
    /// Exponentially distributed.
    Exponential(Mean),
}

/// The mean of an exponential distribution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Mean {
    /// The mean pause.
    pub mean: HumanDur,
}

/// A prompt that all requests begin with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SystemPrompt {
    /// Its length in tokens.
    #[schemars(range(min = 1))]
    pub tokens: u32,
    /// Whether each tenant has its own.
    #[serde(default)]
    pub per_tenant: bool,
}

/// Prefixes that some requests share.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Prefixes {
    /// How many different prefixes.
    #[schemars(range(min = 1, max = 1000000))]
    pub groups: u32,
    /// Their length, drawn once for each.
    pub tokens: Length,
    /// Share of requests that have one, 0 to 1.
    #[serde(default = "all")]
    #[schemars(range(min = 0, max = 1))]
    pub share: f64,
    /// So many different prompts begin with each prefix, and come again: all of them in turn, in an order that is drawn once. Every
    /// request has text of its own when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10000))]
    pub prompts: Option<u32>,
    /// Popularity: group k is asked for in proportion to k^-skew (Zipf); 0 makes all equal.
    #[serde(default)]
    #[schemars(range(min = 0, max = 10))]
    pub skew: f64,
}

/// Conversations. A turn's prompt is everything said before and new text; it is sent after the previous answer and a pause.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Sessions {
    /// Turns of a conversation.
    pub turns: Length,
    /// Tokens of new text in each turn after the first; as `prompt_tokens` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub turn_tokens: Option<Length>,
    /// Pause between an answer and the next turn.
    #[serde(default)]
    pub think_time: ThinkTime,
}

/// Who sends requests.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tenant {
    /// Name; the fairness id of its requests.
    pub name: String,
    /// Its part of the requests, relative to the other tenants' weights.
    #[serde(default = "all")]
    #[schemars(range(min = 0))]
    pub weight: f64,
    /// The model its requests ask for; that of the workload when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Priority of its requests in llm-d's sense: higher is more important, negative ones are shed. The gateway learns it through
    /// the objective; engines get its negative, as vLLM runs the lowest first. That of its objective when 0.
    #[serde(default)]
    pub priority: i32,
    /// The objective its requests name; must be one of `gateway.objectives`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub objective: Option<String>,
    /// Objective for the time to first token that its requests name (`x-llm-d-slo-ttft-ms`, whole milliseconds).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slo_ttft: Option<HumanDur>,
    /// How long its requests may wait in the gateway's queue, as they say (`x-llm-d-inference-ttl`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_ttl: Option<HumanDur>,
}

/// The endpoint that is called.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Api {
    /// `/v1/chat/completions`.
    #[default]
    Chat,
    /// `/v1/completions`.
    Completions,
}

/// A recorded trace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Trace {
    /// How the file is read.
    pub format: TraceFormat,
    /// The file.
    pub path: PathBuf,
    /// How much faster than recorded it is replayed.
    #[serde(default = "all")]
    #[schemars(range(min = 0))]
    pub speed_up: f64,
    /// Only the first so many requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub limit: Option<u64>,
    /// Mooncake: how the requests of one tick (about 3 s) are spread over it.
    #[serde(default)]
    pub spread: Spread,
}

/// Formats of recorded traces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TraceFormat {
    /// JSON lines with `timestamp` (ms), `input_length`, `output_length`, `hash_ids` (kvcache-ai/Mooncake).
    Mooncake,
    /// CSV with `TIMESTAMP`, `ContextTokens`, `GeneratedTokens` (Azure/AzurePublicDataset).
    Azure,
    /// CSV with `arrival_s`, `prompt_tokens`, `output_tokens` and optionally `prefix_group`, `prefix_tokens`, `priority`,
    /// `tenant`.
    Csv,
}

/// How requests with one timestamp are spread until the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Spread {
    /// Evenly.
    #[default]
    Even,
    /// At random by the seed, as a Poisson process of the tick's rate would be.
    Random,
    /// Not at all: all at once.
    None,
}

impl Tenant {
    /// The objective its requests name: its own, else its name if it has a priority, since the gateway takes priorities from
    /// objectives only.
    pub fn objective_name(&self) -> Option<&str> {
        self.objective.as_deref().or((self.priority != 0).then_some(self.name.as_str()))
    }

    /// The priority of its requests: its own, else that of its objective.
    pub fn priority_by(&self, objectives: &std::collections::BTreeMap<String, i32>) -> i32 {
        let of_objective = || self.objective.as_ref().and_then(|o| objectives.get(o)).copied().unwrap_or(0);
        if self.priority == 0 { of_objective() } else { self.priority }
    }
}

impl Default for Workload {
    fn default() -> Workload {
        Workload {
            arrivals: None,
            prompt_tokens: Length::Fixed(256),
            output_tokens: Length::Fixed(64),
            system_prompt: None,
            prefixes: None,
            sessions: None,
            tenants: Vec::new(),
            api: Api::Chat,
            streaming: 1.0,
            model: None,
        }
    }
}

impl Default for ThinkTime {
    fn default() -> ThinkTime {
        ThinkTime::Constant(HumanDur::default())
    }
}

fn all() -> f64 {
    1.0
}
