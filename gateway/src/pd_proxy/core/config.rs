//! What can be configured in a routing sidecar, with llm-d's defaults where it has some.
//!
//! The doc comments of the fields become the descriptions of the published JSON Schema. Where the engine is and who may prefill is
//! the driver's configuration.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use shared::config::ConfigProblem;
use shared::units::HumanDur;

/// A routing sidecar in front of an engine that decodes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PdProxyConfig {
    /// How the two engines find each other's cache.
    pub connector: Connector,
    /// Further attempts at a prefill that could not be reached or was answered with 502, 503 or 504.
    #[schemars(range(max = 8))]
    pub prefill_max_retries: u32,
    /// Pause before each of them.
    pub prefill_retry_backoff: HumanDur,
    /// How long the proxy waits.
    pub timeouts: PdProxyTimeouts,
    /// Bounds of requests, answers and connections.
    pub limits: PdProxyLimits,
    /// Whether a line at level info is logged for every request that is over: ids, status and times.
    pub access_log: bool,
    /// Whether the span of the decode hangs below that of the prefill, which has ended, as llm-d's sidecar has it: a fault that a
    /// scenario asks for.
    #[serde(skip)]
    pub decode_under_prefill: bool,
}

/// How prefill and decode are connected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Connector {
    /// Prefill first; its answer says where the cache is; then decode, which reads it (vLLM's NIXL connector in pull mode).
    #[default]
    NixlV2,
}

impl Connector {
    /// The attribute's value.
    pub const fn as_str(self) -> &'static str {
        match self {
            Connector::NixlV2 => "nixlv2",
        }
    }
}

/// How long a sidecar waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PdProxyTimeouts {
    /// For a connection to an engine.
    pub connect: HumanDur,
    /// For the whole answer to a prefill, per attempt.
    pub prefill: HumanDur,
    /// For the head of the answer to a decode.
    pub response_head: HumanDur,
    /// For a request, from its head to the end of its answer.
    pub total: HumanDur,
    /// For open requests once the proxy is told to stop.
    pub drain: HumanDur,
}

/// Bounds of a sidecar.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PdProxyLimits {
    /// Size of a request's body in bytes.
    pub max_body_bytes: u32,
    /// Size of the answer to a prefill in bytes; it has one token, and the numbers of the prompt's blocks.
    pub max_prefill_answer_bytes: u32,
    /// Connections open at once.
    pub max_connections: u32,
}

impl Default for PdProxyConfig {
    /// llm-d's `PrefillMaxRetries` and pause.
    fn default() -> PdProxyConfig {
        PdProxyConfig {
            connector: Connector::default(),
            prefill_max_retries: 0,
            prefill_retry_backoff: HumanDur::millis(200),
            timeouts: PdProxyTimeouts::default(),
            limits: PdProxyLimits::default(),
            access_log: false,
            decode_under_prefill: false,
        }
    }
}

impl Default for PdProxyTimeouts {
    /// Those of the gateway, so that none runs out before its own.
    fn default() -> PdProxyTimeouts {
        PdProxyTimeouts {
            connect: HumanDur::secs(5),
            prefill: HumanDur::secs(300),
            response_head: HumanDur::secs(300),
            total: HumanDur::secs(600),
            drain: HumanDur::secs(30),
        }
    }
}

impl Default for PdProxyLimits {
    fn default() -> PdProxyLimits {
        PdProxyLimits { max_body_bytes: 16 << 20, max_prefill_answer_bytes: 4 << 20, max_connections: 65_536 }
    }
}

/// More attempts than this turn an outage into a storm.
const MAX_RETRIES: u32 = 8;

impl PdProxyConfig {
    /// Everything that is not allowed, in the order of the fields.
    pub fn validate(&self) -> Vec<ConfigProblem> {
        let mut problems = Vec::new();
        let mut add = |bad: bool, path: &str, found: String, allowed: String| {
            if bad {
                problems.push(ConfigProblem { path: path.to_owned(), found, allowed });
            }
        };
        let (retries, least) = (self.prefill_max_retries, HumanDur::millis(1));
        add(retries > MAX_RETRIES, "prefill_max_retries", retries.to_string(), format!("at most {MAX_RETRIES}"));
        let t = &self.timeouts;
        for (path, found) in [
            ("timeouts.connect", t.connect),
            ("timeouts.prefill", t.prefill),
            ("timeouts.response_head", t.response_head),
            ("timeouts.total", t.total),
        ] {
            add(found < least, path, found.to_string(), format!("at least {least}"));
        }
        let l = &self.limits;
        for (path, found, least) in [
            ("limits.max_body_bytes", l.max_body_bytes, 1024),
            ("limits.max_prefill_answer_bytes", l.max_prefill_answer_bytes, 1024),
            ("limits.max_connections", l.max_connections, 1),
        ] {
            add(found < least, path, found.to_string(), format!("at least {least}"));
        }
        problems
    }
}

impl shared::config::Validate for PdProxyConfig {
    fn validate(&self, problems: &mut shared::config::Problems) {
        for p in PdProxyConfig::validate(self) {
            problems.add(&p.path, p.found, p.allowed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_names_path_found_and_allowed() {
        assert!(PdProxyConfig::default().validate().is_empty());
        let mut config = PdProxyConfig { prefill_max_retries: 9, ..PdProxyConfig::default() };
        config.timeouts.prefill = HumanDur::millis(0);
        config.limits.max_body_bytes = 1;
        let all: Vec<String> = config.validate().iter().map(ToString::to_string).collect();
        insta::assert_snapshot!(all.join("\n"), @r"
        prefill_max_retries: found 9, expected at most 8
        timeouts.prefill: found 0s, expected at least 1ms
        limits.max_body_bytes: found 1, expected at least 1024
        ");
    }

    #[test]
    fn what_is_left_out_is_llm_ds() {
        let config: PdProxyConfig = serde_json::from_str("{}").unwrap();
        assert_eq!((config.prefill_max_retries, config.prefill_retry_backoff), (0, HumanDur::millis(200)));
        assert_eq!(config.connector.as_str(), "nixlv2");
        let again: PdProxyConfig = serde_json::from_value(serde_json::to_value(&config).unwrap()).unwrap();
        assert_eq!(again, config);
        assert!(serde_json::from_str::<PdProxyConfig>(r#"{"retries":1}"#).is_err());
    }
}
