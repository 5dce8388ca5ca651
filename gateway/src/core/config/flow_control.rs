//! Flow control: queues in the gateway, by priority and flow. It is read and checked; nothing waits in the gateway yet, so a
//! configuration that turns it on is refused.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use shared::config::ConfigProblem;
use shared::units::HumanDur;

use super::problem;

/// Queues in the gateway, with llm-d's defaults (`flowControl` of an EndpointPickerConfig).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct FlowControlConfig {
    /// Whether requests wait in the gateway. Not built: true is refused.
    pub enabled: bool,
    /// Bytes of all queued requests; no bound when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_bytes: Option<u64>,
    /// Number of all queued requests; no bound when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_requests: Option<u64>,
    /// How long a request waits while the pool has endpoints; 0s is for ever.
    pub default_request_ttl: HumanDur,
    /// How long it waits while the pool has none; 0s is for ever.
    pub no_endpoint_request_ttl: HumanDur,
    /// Bands of their own, each priority once.
    pub priority_bands: Vec<BandConfig>,
    /// What other priorities get.
    pub default_band: BandConfig,
    /// What other negative priorities get; the default band when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default_negative_band: Option<BandConfig>,
    /// Part of the pool's saturation at which every band is held (`static-usage-limit-policy`).
    pub usage_limit: f64,
    /// Whether requests of negative priority may be ended to make room.
    pub enable_eviction: bool,
}

/// The requests of one priority.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BandConfig {
    /// The priority; the higher is served first.
    pub priority: i32,
    /// Bytes that may wait.
    pub max_bytes: u64,
    /// Requests that may wait.
    pub max_requests: u64,
    /// Whose turn it is.
    pub fairness: FairnessPolicy,
    /// Which request of a flow is next.
    pub ordering: OrderingPolicy,
}

/// Whose turn it is, by the names of llm-d's plugins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum FairnessPolicy {
    /// The best request of all flows.
    #[default]
    GlobalStrictFairnessPolicy,
    /// The flows in turn.
    RoundRobinFairnessPolicy,
    /// The flow that got the least service.
    ProgramAwareFairness,
}

/// Which request of a flow is next, by the names of llm-d's plugins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OrderingPolicy {
    /// The one that came first.
    #[default]
    FcfsOrderingPolicy,
    /// The one that expires first.
    EdfOrderingPolicy,
    /// The one whose objective for the time to first token is due first.
    SloDeadlineOrderingPolicy,
}

impl Default for FlowControlConfig {
    fn default() -> FlowControlConfig {
        FlowControlConfig {
            enabled: false,
            max_bytes: None,
            max_requests: None,
            default_request_ttl: HumanDur::secs(60),
            no_endpoint_request_ttl: HumanDur::secs(60),
            priority_bands: Vec::new(),
            default_band: BandConfig::default(),
            default_negative_band: None,
            usage_limit: 1.0,
            enable_eviction: false,
        }
    }
}

impl Default for BandConfig {
    fn default() -> BandConfig {
        BandConfig {
            priority: 0,
            max_bytes: 1_000_000_000,
            max_requests: 5000,
            fairness: FairnessPolicy::default(),
            ordering: OrderingPolicy::default(),
        }
    }
}

impl FlowControlConfig {
    pub(super) fn validate(&self, path: &str, out: &mut Vec<ConfigProblem>) {
        if self.enabled {
            problem(&format!("{path}.enabled"), true, "false: flow control is not built yet".to_owned(), out);
        }
        if !(self.usage_limit.is_finite() && self.usage_limit >= 0.0) {
            problem(&format!("{path}.usage_limit"), self.usage_limit, "a number of at least 0".to_owned(), out);
        }
        for (i, band) in self.priority_bands.iter().enumerate() {
            let twice = self.priority_bands[..i].iter().any(|b| b.priority == band.priority);
            if twice {
                let found = format!("{} a second time", band.priority);
                problem(&format!("{path}.priority_bands[{i}].priority"), found, "each priority once".to_owned(), out);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(change: impl FnOnce(&mut FlowControlConfig)) -> String {
        let mut config = FlowControlConfig::default();
        change(&mut config);
        let mut out = Vec::new();
        config.validate("flow_control", &mut out);
        out.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn what_is_not_built_is_refused() {
        assert_eq!(problems(|_| {}), "");
        insta::assert_snapshot!(problems(|c| c.enabled = true), @"flow_control.enabled: found true, expected false: flow control is not built yet");
        insta::assert_snapshot!(problems(|c| c.priority_bands = vec![BandConfig::default(), BandConfig::default()]), @"flow_control.priority_bands[1].priority: found 0 a second time, expected each priority once");
    }
}
