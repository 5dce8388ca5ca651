//! The section `flowControl` of a file. It is read and checked whether the gate is on or not.

use serde_json::Value;
use shared::units::HumanDur;

use super::catalogue::{Part, STATIC_USAGE_LIMIT};
use super::file::{Band, File, FlowControl};
use super::map::Mapper;
use super::scalars::{DURATION, QUANTITY, duration, quantity};
use crate::core::config::{BandConfig, FairnessPolicy, FlowControlConfig, OrderingPolicy};
use crate::core::scheduler::parameters::Reader;

const PATH: &str = "flowControl";

/// The section, if there is one that says more than which detector is used.
pub(super) fn flow_control(m: &mut Mapper<'_>, file: &File, gate: bool) -> Option<FlowControlConfig> {
    let none = FlowControl::default();
    let section = file.flow_control.as_ref().filter(|f| says_something(f));
    let section = section.or(gate.then_some(&none))?;
    if !gate {
        m.warn(PATH, "it has no effect: the gate flowControl is off");
    }
    let default = FlowControlConfig::default();
    let default_request_ttl = ttl(m, "defaultRequestTTL", section.default_request_ttl.as_deref());
    let no_endpoint_request_ttl = ttl(m, "noEndpointRequestTTL", section.no_endpoint_request_ttl.as_deref());
    let bands = section.priority_bands.iter().flatten().enumerate();
    let config = FlowControlConfig {
        enabled: gate,
        max_bytes: limit(m, &format!("{PATH}.maxBytes"), section.max_bytes.as_ref()),
        max_requests: limit(m, &format!("{PATH}.maxRequests"), section.max_requests.as_ref()),
        default_request_ttl: default_request_ttl.unwrap_or(default.default_request_ttl),
        // What is not given follows the other.
        no_endpoint_request_ttl: no_endpoint_request_ttl
            .or(default_request_ttl)
            .unwrap_or(default.no_endpoint_request_ttl),
        priority_bands: bands.map(|(i, b)| band(m, &format!("{PATH}.priorityBands[{i}]"), b)).collect(),
        default_band: section
            .default_priority_band
            .as_ref()
            .map(|b| band(m, &format!("{PATH}.defaultPriorityBand"), b))
            .unwrap_or_default(),
        default_negative_band: section
            .default_negative_priority_band
            .as_ref()
            .map(|b| band(m, &format!("{PATH}.defaultNegativePriorityBand"), b)),
        usage_limit: usage_limit(m, section.usage_limit_policy_plugin_ref.as_deref()),
        enable_eviction: section.enable_eviction.unwrap_or(false) && !gate,
    };
    if gate && section.enable_eviction == Some(true) {
        m.unsupported(&format!("{PATH}.enableEviction"), "eviction", "false: nothing that runs is ended to make room");
    }
    for (i, b) in config.priority_bands.iter().enumerate() {
        let twice = config.priority_bands[..i].iter().any(|other| other.priority == b.priority);
        let path = format!("{PATH}.priorityBands[{i}].priority");
        m.problems.check(!twice, &path, format!("{} a second time", b.priority), "each priority once");
    }
    Some(config)
}

fn says_something(f: &FlowControl) -> bool {
    let bounds = f.max_bytes.is_some() || f.max_requests.is_some();
    let times = f.default_request_ttl.is_some() || f.no_endpoint_request_ttl.is_some();
    let templates = f.default_priority_band.is_some() || f.default_negative_priority_band.is_some();
    let policy = f.usage_limit_policy_plugin_ref.as_deref().is_some_and(|r| !r.is_empty());
    let bands = f.priority_bands.as_ref().is_some_and(|b| !b.is_empty());
    bounds || times || templates || bands || policy || f.enable_eviction == Some(true)
}

fn ttl(m: &mut Mapper<'_>, name: &str, given: Option<&str>) -> Option<HumanDur> {
    let text = given?;
    let ttl = duration(text);
    m.problems.check(ttl.is_some(), &format!("{PATH}.{name}"), format!("{text:?}"), DURATION);
    ttl
}

/// A bound; 0 is none.
fn limit(m: &mut Mapper<'_>, path: &str, given: Option<&Value>) -> Option<u64> {
    let value = given.filter(|v| !v.is_null())?;
    let number = quantity(value);
    m.problems.check(number.is_some(), path, value, QUANTITY);
    number.filter(|n| *n > 0)
}

fn band(m: &mut Mapper<'_>, path: &str, given: &Band) -> BandConfig {
    let default = BandConfig::default();
    let fairness = policy(m, &format!("{path}.fairnessPolicyRef"), given.fairness_policy_ref.as_deref());
    let ordering = policy(m, &format!("{path}.orderingPolicyRef"), given.ordering_policy_ref.as_deref());
    BandConfig {
        priority: given.priority,
        max_bytes: limit(m, &format!("{path}.maxBytes"), given.max_bytes.as_ref()).unwrap_or(default.max_bytes),
        max_requests: limit(m, &format!("{path}.maxRequests"), given.max_requests.as_ref())
            .unwrap_or(default.max_requests),
        fairness: named::<FairnessPolicy>(m, &format!("{path}.fairnessPolicyRef"), fairness, FAIRNESS),
        ordering: named::<OrderingPolicy>(m, &format!("{path}.orderingPolicyRef"), ordering, ORDERING),
    }
}

const FAIRNESS: &str = "global-strict-fairness-policy, round-robin-fairness-policy or program-aware-fairness";
const ORDERING: &str = "fcfs-ordering-policy, edf-ordering-policy or slo-deadline-ordering-policy";

/// The type of the policy that is named; a type of llm-d's that is not declared stands for itself.
fn policy(m: &mut Mapper<'_>, path: &str, name: Option<&str>) -> Option<String> {
    let name = name.filter(|n| !n.is_empty())?;
    if !m.declared.iter().any(|d| d.name == name) && super::catalogue::part(name) == Some(Part::Policy) {
        return Some(name.to_owned());
    }
    m.find(path, name).map(|i| m.declared[i].kind.clone())
}

/// The policy of this type, whose names are llm-d's.
fn named<T: Default + serde::de::DeserializeOwned>(
    m: &mut Mapper<'_>,
    path: &str,
    kind: Option<String>,
    allowed: &str,
) -> T {
    let Some(kind) = kind else { return T::default() };
    let policy = serde_json::from_value(Value::from(kind.as_str())).ok();
    m.problems.check(policy.is_some(), path, format!("a plugin of type {kind}"), allowed);
    policy.unwrap_or_default()
}

fn usage_limit(m: &mut Mapper<'_>, name: Option<&str>) -> f64 {
    let path = format!("{PATH}.usageLimitPolicyPluginRef");
    let Some(name) = name.filter(|n| !n.is_empty() && *n != STATIC_USAGE_LIMIT || is_declared(m, n)) else {
        return 1.0;
    };
    let Some(i) = m.find(&path, name) else { return 1.0 };
    if m.declared[i].kind != STATIC_USAGE_LIMIT {
        m.problems.add(&path, format!("a plugin of type {}", m.declared[i].kind), STATIC_USAGE_LIMIT);
        return 1.0;
    }
    let threshold = Reader::all(&m.declared[i].parameters, |p| p.number("threshold", 1.0, 0.0, f64::MAX));
    threshold.unwrap_or_else(|error| {
        let path = m.declared[i].path.clone();
        m.refuse(&path, error);
        1.0
    })
}

fn is_declared(m: &Mapper<'_>, name: &str) -> bool {
    m.declared.iter().any(|d| d.name == name)
}
