//! Flow control: queues in the gateway, by priority and flow.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use shared::config::ConfigProblem;
use shared::units::HumanDur;

use super::{at_least, problem};

/// Queues in the gateway, with llm-d's defaults (`flowControl` of an EndpointPickerConfig).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct FlowControlConfig {
    /// Whether requests wait in the gateway while the pool is full. If not, this section has no effect.
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
    /// Whether requests of negative priority may be ended to make room. Not built: true is refused with `enabled`.
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
    /// The best request of all flows: flows do not matter.
    #[default]
    GlobalStrictFairnessPolicy,
    /// The flows in turn.
    RoundRobinFairnessPolicy,
    /// The flow that got the least service in tokens, and a little the one that waits longest.
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

impl FairnessPolicy {
    /// The name of llm-d's plugin.
    pub const fn name(self) -> &'static str {
        match self {
            FairnessPolicy::GlobalStrictFairnessPolicy => "global-strict-fairness-policy",
            FairnessPolicy::RoundRobinFairnessPolicy => "round-robin-fairness-policy",
            FairnessPolicy::ProgramAwareFairness => "program-aware-fairness",
        }
    }
}

impl OrderingPolicy {
    /// The name of llm-d's plugin.
    pub const fn name(self) -> &'static str {
        match self {
            OrderingPolicy::FcfsOrderingPolicy => "fcfs-ordering-policy",
            OrderingPolicy::EdfOrderingPolicy => "edf-ordering-policy",
            OrderingPolicy::SloDeadlineOrderingPolicy => "slo-deadline-ordering-policy",
        }
    }
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
        if self.enabled && self.enable_eviction {
            let allowed = "false: nothing that runs is ended to make room";
            problem(&format!("{path}.enable_eviction"), true, allowed.to_owned(), out);
        }
        for (name, bound) in [("max_bytes", self.max_bytes), ("max_requests", self.max_requests)] {
            at_least(&format!("{path}.{name}"), bound.unwrap_or(1), 1, out);
        }
        self.default_band.validate(&format!("{path}.default_band"), out);
        if let Some(band) = &self.default_negative_band {
            band.validate(&format!("{path}.default_negative_band"), out);
        }
        if !(self.usage_limit.is_finite() && self.usage_limit >= 0.0) {
            problem(&format!("{path}.usage_limit"), self.usage_limit, "a number of at least 0".to_owned(), out);
        }
        for (i, band) in self.priority_bands.iter().enumerate() {
            band.validate(&format!("{path}.priority_bands[{i}]"), out);
            let twice = self.priority_bands[..i].iter().any(|b| b.priority == band.priority);
            if twice {
                let found = format!("{} a second time", band.priority);
                problem(&format!("{path}.priority_bands[{i}].priority"), found, "each priority once".to_owned(), out);
            }
        }
    }
}

impl BandConfig {
    fn validate(&self, path: &str, out: &mut Vec<ConfigProblem>) {
        at_least(&format!("{path}.max_bytes"), self.max_bytes, 1, out);
        at_least(&format!("{path}.max_requests"), self.max_requests, 1, out);
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
    fn what_makes_no_sense_is_refused() {
        assert_eq!(problems(|c| c.enabled = true), "");
        assert_eq!(problems(|c| c.enable_eviction = true), "");
        insta::assert_snapshot!(problems(|c| (c.enabled, c.enable_eviction) = (true, true)), @"flow_control.enable_eviction: found true, expected false: nothing that runs is ended to make room");
        insta::assert_snapshot!(problems(|c| c.max_requests = Some(0)), @"flow_control.max_requests: found 0, expected at least 1");
        insta::assert_snapshot!(problems(|c| c.default_band.max_bytes = 0), @"flow_control.default_band.max_bytes: found 0, expected at least 1");
        insta::assert_snapshot!(problems(|c| c.usage_limit = f64::NAN), @"flow_control.usage_limit: found NaN, expected a number of at least 0");
        insta::assert_snapshot!(problems(|c| c.priority_bands = vec![BandConfig::default(), BandConfig::default()]), @"flow_control.priority_bands[1].priority: found 0 a second time, expected each priority once");
    }

    #[test]
    fn policies_have_the_names_that_they_are_configured_by() {
        use {FairnessPolicy as F, OrderingPolicy as O};
        for f in [F::GlobalStrictFairnessPolicy, F::RoundRobinFairnessPolicy, F::ProgramAwareFairness] {
            assert_eq!(serde_json::to_value(f).unwrap(), f.name());
        }
        for o in [O::FcfsOrderingPolicy, O::EdfOrderingPolicy, O::SloDeadlineOrderingPolicy] {
            assert_eq!(serde_json::to_value(o).unwrap(), o.name());
        }
    }
}
