//! Configuration of the KV connector, with vLLM's names (`vllm/config/kv_transfer.py` and the keys that NIXL reads from
//! `kv_connector_extra_config`): what `--kv-transfer-config` takes.

use core::net::{IpAddr, Ipv4Addr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use shared::config::ConfigProblem;
use shared::time::Dur;

/// The KV connector of an engine that prefills for others, or decodes what others prefilled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct KvTransferConfig {
    /// Which connector.
    pub kv_connector: KvConnector,
    /// Whether the engine sends its cache, receives others', or both.
    pub kv_role: KvRole,
    /// What becomes of a request whose cache cannot be loaded.
    #[serde(default)]
    pub kv_load_failure_policy: LoadFailurePolicy,
    /// The engine's name among its peers; a random one when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine_id: Option<String>,
    /// What the connector itself is configured with.
    #[serde(default)]
    pub kv_connector_extra_config: KvExtraConfig,
}

/// Connectors that are emulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum KvConnector {
    /// The decoding engine reads the blocks from the prefilling engine's memory.
    NixlConnector,
}

/// What an engine does with its cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum KvRole {
    /// Prefills for others.
    KvProducer,
    /// Decodes what others prefilled.
    KvConsumer,
    /// Both.
    KvBoth,
}

impl KvRole {
    /// Whether others load from this engine.
    pub const fn produces(self) -> bool {
        matches!(self, KvRole::KvProducer | KvRole::KvBoth)
    }

    /// Whether this engine loads from others.
    pub const fn consumes(self) -> bool {
        matches!(self, KvRole::KvConsumer | KvRole::KvBoth)
    }
}

/// What becomes of a request whose cache cannot be loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LoadFailurePolicy {
    /// It ends with an error: HTTP 500.
    #[default]
    Fail,
    /// Its prompt is computed here.
    Recompute,
}

/// Keys of `kv_connector_extra_config`. `kv_lease_duration` is vLLM's; the link stands for the hardware, and vLLM takes the side
/// channel's address from its environment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct KvExtraConfig {
    /// How long a prefilled request's blocks are kept without a heartbeat, in seconds. Heartbeats come every sixth of it and
    /// extend it to two thirds.
    #[schemars(range(min = 6, max = 86400))]
    pub kv_lease_duration: u32,
    /// What lies between the engines: how long a transfer takes.
    pub link: LinkKind,
    /// Live mode: address at which others ask for blocks, and which they are told.
    #[schemars(with = "String", extend("x-expected" = "an address such as 127.0.0.1"))]
    pub side_channel_host: IpAddr,
    /// Live mode: port of the same; 0 takes any free one.
    pub side_channel_port: u16,
}

impl Default for KvExtraConfig {
    fn default() -> KvExtraConfig {
        KvExtraConfig {
            kv_lease_duration: 30,
            link: LinkKind::default(),
            side_channel_host: IpAddr::V4(Ipv4Addr::LOCALHOST),
            side_channel_port: 0,
        }
    }
}

/// What lies between two engines. [`super::Link::of`] has the figures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LinkKind {
    /// GPUs of one machine.
    NvLink,
    /// InfiniBand NDR, 400 Gbit/s a rank.
    #[default]
    InfiniBand,
    /// RoCE, 200 Gbit/s a rank.
    RoCe,
    /// TCP over Ethernet of 100 Gbit/s.
    Tcp,
}

impl LinkKind {
    /// The attribute's value.
    pub const fn as_str(self) -> &'static str {
        match self {
            LinkKind::NvLink => "nvlink",
            LinkKind::InfiniBand => "infiniband",
            LinkKind::RoCe => "roce",
            LinkKind::Tcp => "tcp",
        }
    }
}

impl KvTransferConfig {
    /// The NIXL connector in this role, all else as vLLM has it.
    pub fn nixl(kv_role: KvRole) -> KvTransferConfig {
        KvTransferConfig {
            kv_connector: KvConnector::NixlConnector,
            kv_role,
            kv_load_failure_policy: LoadFailurePolicy::default(),
            engine_id: None,
            kv_connector_extra_config: KvExtraConfig::default(),
        }
    }

    /// Reads the JSON of `--kv-transfer-config`.
    ///
    /// # Errors
    /// On what is no JSON, unknown fields and unknown values, in serde's words.
    pub fn parse(json: &str) -> Result<KvTransferConfig, String> {
        serde_json::from_str(json).map_err(|error| error.to_string())
    }

    /// What is wrong with it, with paths below the engine.
    pub fn validate(&self) -> Vec<ConfigProblem> {
        let mut problems = Vec::new();
        let mut check = |holds: bool, path: &str, found: String, allowed: &str| {
            if !holds {
                problems.push(ConfigProblem { path: format!("kv_transfer.{path}"), found, allowed: allowed.into() });
            }
        };
        let lease = self.kv_connector_extra_config.kv_lease_duration;
        let path = "kv_connector_extra_config.kv_lease_duration";
        check((6..=86_400).contains(&lease), path, lease.to_string(), "seconds in 6..=86400");
        if let Some(id) = &self.engine_id {
            let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
            let ok = (1..=128).contains(&id.len()) && id.bytes().all(plain);
            check(ok, "engine_id", format!("{id:?}"), "1 to 128 of the characters A-Z a-z 0-9 - _ .");
        }
        problems
    }

    /// How long blocks are kept without a heartbeat.
    pub fn lease(&self) -> Dur {
        Dur::from_secs(u64::from(self.kv_connector_extra_config.kv_lease_duration))
    }

    /// Time between heartbeats: `duration // 6` seconds, as vLLM's integers have it.
    pub fn heartbeat_interval(&self) -> Dur {
        Dur::from_secs(u64::from(self.kv_connector_extra_config.kv_lease_duration / 6))
    }

    /// How far ahead a heartbeat moves the expiry: `duration * 2 // 3` seconds.
    pub fn lease_extension(&self) -> Dur {
        Dur::from_secs(u64::from(self.kv_connector_extra_config.kv_lease_duration) * 2 / 3)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vllms_flag_is_read() {
        let json = r#"{"kv_connector":"NixlConnector","kv_role":"kv_both"}"#;
        let config = KvTransferConfig::parse(json).unwrap();
        assert_eq!(config, KvTransferConfig::nixl(KvRole::KvBoth));
        assert_eq!(config.kv_load_failure_policy, LoadFailurePolicy::Fail);
        let json = r#"{"kv_connector":"NixlConnector","kv_role":"kv_consumer","kv_load_failure_policy":"recompute",
            "engine_id":"d-0","kv_connector_extra_config":{"kv_lease_duration":60,"link":"tcp"}}"#;
        let config = KvTransferConfig::parse(json).unwrap();
        assert_eq!((config.lease(), config.heartbeat_interval()), (Dur::from_secs(60), Dur::from_secs(10)));
        assert_eq!(config.lease_extension(), Dur::from_secs(40));
        assert_eq!(config.kv_connector_extra_config.link, LinkKind::Tcp);
    }

    #[test]
    fn unknown_connectors_roles_and_fields_are_refused() {
        let check = |json: &str, expect: &str| {
            let error = KvTransferConfig::parse(json).unwrap_err();
            assert!(error.contains(expect), "{error}");
        };
        check(r#"{"kv_connector":"LMCacheConnectorV1","kv_role":"kv_both"}"#, "NixlConnector");
        check(r#"{"kv_connector":"NixlConnector","kv_role":"both"}"#, "kv_producer");
        check(r#"{"kv_connector":"NixlConnector","kv_role":"kv_both","kv_rank":0}"#, "kv_rank");
    }

    #[test]
    fn problems_name_the_field() {
        let mut config = KvTransferConfig::nixl(KvRole::KvProducer);
        assert_eq!(config.validate(), []);
        config.kv_connector_extra_config.kv_lease_duration = 5;
        config.engine_id = Some("a b".into());
        let found: Vec<String> = config.validate().iter().map(ConfigProblem::to_string).collect();
        assert_eq!(
            found,
            [
                "kv_transfer.kv_connector_extra_config.kv_lease_duration: found 5, expected seconds in 6..=86400",
                "kv_transfer.engine_id: found \"a b\", expected 1 to 128 of the characters A-Z a-z 0-9 - _ ."
            ]
        );
    }
}
