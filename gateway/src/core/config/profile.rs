//! Scheduling profiles and the plugins in them.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use shared::config::ConfigProblem;

use super::problem;
use crate::core::scheduler::registry::{self, PluginError};

/// Parameters of a plugin, by name.
pub type Parameters = BTreeMap<String, serde_json::Value>;

/// A scheduling profile: filters in order, then scorers, then one picker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ProfileConfig {
    /// Name of the profile.
    pub name: String,
    /// Filters, run in this order; each sees what the one before it kept.
    pub filters: Vec<PluginConfig>,
    /// Scorers; an endpoint's score is the weighted sum of theirs. Without scorers the picker decides alone.
    pub scorers: Vec<ScorerConfig>,
    /// The picker.
    pub picker: PluginConfig,
}

/// A plugin and its parameters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PluginConfig {
    /// Type of the plugin, for example `healthy-filter`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Name in spans; the type if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Parameters of the plugin.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub parameters: Parameters,
}

/// A scorer, its weight and its parameters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ScorerConfig {
    /// Type of the scorer, for example `queue-scorer`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Name in spans; the type if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Factor of this scorer's score in the sum, 0 or more.
    #[serde(default = "one")]
    pub weight: f64,
    /// Parameters of the scorer.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub parameters: Parameters,
}

/// Prefill by an endpoint of its own (llm-d's `disagg-profile-handler`). The engine that decodes is told which one by the header
/// `x-prefiller-host-port`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DisaggregationConfig {
    /// How the prefill endpoint is chosen.
    pub profile: ProfileConfig,
    /// Whether a request is worth it; not asked if prefill comes first.
    #[serde(default = "always")]
    pub decider: PluginConfig,
    /// Which profile runs first.
    #[serde(default)]
    pub stage_order: StageOrder,
}

/// Which profile runs first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum StageOrder {
    /// Decode; then the decider says whether prefill runs.
    #[default]
    DecodeFirst,
    /// Prefill, for every request.
    PrefillFirst,
}

fn one() -> f64 {
    1.0
}

fn always() -> PluginConfig {
    PluginConfig::of("always-disagg-pd-decider")
}

impl PluginConfig {
    /// A plugin without parameters.
    pub fn of(kind: &str) -> PluginConfig {
        PluginConfig { kind: kind.to_owned(), name: None, parameters: Parameters::new() }
    }
}

impl ScorerConfig {
    /// A scorer without parameters.
    pub fn of(kind: &str, weight: f64) -> ScorerConfig {
        ScorerConfig { kind: kind.to_owned(), name: None, weight, parameters: Parameters::new() }
    }
}

impl Default for ProfileConfig {
    /// The weights of llm-d's `optimized-baseline`, with running requests in place of the cold-request scorer.
    fn default() -> ProfileConfig {
        ProfileConfig {
            name: "default".to_owned(),
            filters: vec![PluginConfig::of("healthy-filter"), PluginConfig::of("decode-filter")],
            scorers: vec![
                ScorerConfig::of("queue-scorer", 2.0),
                ScorerConfig::of("kv-cache-utilization-scorer", 2.0),
                ScorerConfig::of("prefix-cache-scorer", 3.0),
                ScorerConfig::of("running-requests-size-scorer", 1.0),
            ],
            picker: PluginConfig::of("max-score-picker"),
        }
    }
}

impl ProfileConfig {
    pub(super) fn validate(&self, path: &str, out: &mut Vec<ConfigProblem>) {
        for (i, f) in self.filters.iter().enumerate() {
            let error = registry::filter(&f.kind, &f.parameters).err();
            plugin(&format!("{path}.filters[{i}]"), &f.kind, error, out);
        }
        for (i, s) in self.scorers.iter().enumerate() {
            let path = format!("{path}.scorers[{i}]");
            if !is_weight(s.weight) {
                problem(&format!("{path}.weight"), s.weight, WEIGHT.to_owned(), out);
            }
            plugin(&path, &s.kind, registry::scorer(&s.kind, &s.parameters).err(), out);
        }
        let picker = registry::picker(&self.picker.kind, &self.picker.parameters);
        plugin(&format!("{path}.picker"), &self.picker.kind, picker.err(), out);
    }
}

impl DisaggregationConfig {
    pub(super) fn validate(&self, path: &str, out: &mut Vec<ConfigProblem>) {
        self.profile.validate(&format!("{path}.profile"), out);
        let decider = registry::decider(&self.decider.kind, &self.decider.parameters);
        plugin(&format!("{path}.decider"), &self.decider.kind, decider.err(), out);
    }
}

/// What a weight may be.
pub(crate) const WEIGHT: &str = "a number of at least 0";

/// Whether a scorer may have this weight.
pub(crate) fn is_weight(weight: f64) -> bool {
    weight.is_finite() && weight >= 0.0
}

fn plugin(path: &str, kind: &str, error: Option<PluginError>, out: &mut Vec<ConfigProblem>) {
    match error {
        None => {}
        Some(PluginError::Unknown { known }) => {
            problem(&format!("{path}.type"), format!("{kind:?}"), format!("one of {}", known.join(", ")), out);
        }
        Some(PluginError::Parameter { name, found, allowed }) => {
            problem(&format!("{path}.parameters.{name}"), found, allowed, out);
        }
    }
}
