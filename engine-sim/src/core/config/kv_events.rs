//! Where KV events are published, with the names and defaults of vLLM's `--kv-events-config` (`vllm/config/kv_events.py`).

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Check;

/// Publishing of KV events. The last two fields are not vLLM's own: there they are its version and an environment variable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct KvEventsConfig {
    /// Whether blocks stored and removed are reported.
    pub enable_kv_cache_events: bool,
    /// Who gets them; `zmq` when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub publisher: Option<Publisher>,
    /// Where they are published. `tcp://*:PORT` binds the interface that the server listens on (loopback unless it is told otherwise), a
    /// literal IPv6 address with `::` binds that address, anything else is connected to.
    #[schemars(extend("x-expected" = "an endpoint such as tcp://*:5557"))]
    pub endpoint: String,
    /// Where lost batches can be asked for; always bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replay_endpoint: Option<String>,
    /// Batches kept for that.
    #[schemars(range(min = 1))]
    pub buffer_steps: u32,
    /// Batches that wait for the socket before further ones are dropped.
    #[schemars(range(min = 1))]
    pub hwm: u32,
    /// Batches that wait for encoding before further ones are dropped.
    #[schemars(range(min = 1))]
    pub max_queue_size: u32,
    /// Topic of every message. `{pod}` stands for the server's address and port and `{model}` for the served model, so that llm-d's
    /// convention is `kv@{pod}@{model}`.
    pub topic: String,
    /// How an event is encoded.
    pub event_format: EventFormat,
    /// Whether a block's hash is an integer of the digest's low 64 bits, else the digest's bytes (`VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES`).
    pub use_int_block_hashes: bool,
}

/// Who gets KV events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Publisher {
    /// Nobody: they are reported to the driver only.
    Null,
    /// Subscribers over ZeroMQ.
    Zmq,
}

/// How an event is encoded in MessagePack.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum EventFormat {
    /// A map with a `type`, as from vLLM 0.26 on.
    #[default]
    Map,
    /// An array whose first element is the type, as before.
    Array,
}

impl Default for KvEventsConfig {
    fn default() -> KvEventsConfig {
        KvEventsConfig {
            enable_kv_cache_events: false,
            publisher: None,
            endpoint: "tcp://*:5557".into(),
            replay_endpoint: None,
            buffer_steps: 10_000,
            hwm: 100_000,
            max_queue_size: 100_000,
            topic: String::new(),
            event_format: EventFormat::Map,
            use_int_block_hashes: true,
        }
    }
}

/// Where a socket is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// Bound at the server's own interface.
    Wildcard {
        /// Port, 0 for any free one.
        port: u16,
    },
    /// An address to bind, or to connect to.
    Address {
        /// Whether it is bound.
        bind: bool,
        /// Host name or address; IPv6 in brackets.
        host: String,
        /// Port.
        port: u16,
    },
}

impl Endpoint {
    /// Reads `tcp://HOST:PORT`; `None` if it is anything else.
    pub fn parse(text: &str) -> Option<Endpoint> {
        let (host, port) = text.strip_prefix("tcp://")?.rsplit_once(':')?;
        let port = port.parse().ok()?;
        match host {
            "" => None,
            "*" => Some(Endpoint::Wildcard { port }),
            _ if host.contains("::") || !host.contains(':') => {
                Some(Endpoint::Address { bind: host.contains("::"), host: host.into(), port })
            }
            _ => (host.starts_with('[') && host.ends_with(']')).then(|| Endpoint::Address {
                bind: false,
                host: host.into(),
                port,
            }),
        }
    }

    const fn is_bound(&self) -> bool {
        !matches!(self, Endpoint::Address { bind: false, .. })
    }

    const fn port(&self) -> u16 {
        match self {
            Endpoint::Wildcard { port } | Endpoint::Address { port, .. } => *port,
        }
    }
}

impl KvEventsConfig {
    /// Whether events go to subscribers.
    pub fn publishes(&self) -> bool {
        self.enable_kv_cache_events && self.publisher != Some(Publisher::Null)
    }

    /// The configuration of the `i`-th of several engines alike: what is bound has a port of its own, as vLLM does it for the ranks of
    /// data parallelism.
    pub fn nth(&self, i: u32) -> KvEventsConfig {
        let mut own = self.clone();
        if Endpoint::parse(&self.endpoint).is_some_and(|e| e.is_bound()) {
            own.endpoint = moved(&self.endpoint, i);
        }
        own.replay_endpoint = self.replay_endpoint.as_ref().map(|e| moved(e, i));
        own
    }

    /// Ports that a live engine binds, with the field that says so; 0 is any free one.
    pub fn bound_ports(&self) -> Vec<(&'static str, u16)> {
        if !self.publishes() {
            return Vec::new();
        }
        let events = Endpoint::parse(&self.endpoint).filter(Endpoint::is_bound).map(|e| ("endpoint", e.port()));
        let replay = self.replay_endpoint.as_deref().and_then(Endpoint::parse).map(|e| ("replay_endpoint", e.port()));
        events.into_iter().chain(replay).collect()
    }

    pub(super) fn check(&self, check: &mut Check) {
        let expected = "tcp://HOST:PORT, or tcp://*:PORT to bind";
        let ok = |e: &str| Endpoint::parse(e).is_some();
        check.that(ok(&self.endpoint), "kv_events_config.endpoint", &self.endpoint, expected);
        if let Some(replay) = &self.replay_endpoint {
            check.that(ok(replay), "kv_events_config.replay_endpoint", replay, expected);
            let ports: Vec<u16> = self.bound_ports().iter().map(|(_, port)| *port).collect();
            let apart = !matches!(ports.as_slice(), [a, b] if a == b && *a > 0);
            check.that(apart, "kv_events_config.replay_endpoint", replay, "another port than that of `endpoint`");
        }
        for (name, n) in
            [("buffer_steps", self.buffer_steps), ("hwm", self.hwm), ("max_queue_size", self.max_queue_size)]
        {
            check.range(&format!("kv_events_config.{name}"), n, 1, MAX_STEPS);
        }
        let topic = self.topic.len();
        check.that(topic <= 1024, "kv_events_config.topic", format!("{topic} bytes"), "at most 1024 bytes");
    }
}

/// Ten million batches are more than a machine has memory for; the bound keeps typing errors out.
const MAX_STEPS: u32 = 10_000_000;

/// The endpoint `i` ports further; port 0 stays.
fn moved(endpoint: &str, i: u32) -> String {
    let Some((host, port)) = endpoint.rsplit_once(':') else { return endpoint.into() };
    match port.parse::<u32>() {
        Ok(port) if port > 0 => format!("{host}:{}", port.saturating_add(i)),
        Ok(_) | Err(_) => endpoint.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wildcards_are_bound_and_addresses_connected_to() {
        let address = |bind, host: &str, port| Some(Endpoint::Address { bind, host: host.into(), port });
        for (text, expect) in [
            ("tcp://*:5557", Some(Endpoint::Wildcard { port: 5557 })),
            ("tcp://*:0", Some(Endpoint::Wildcard { port: 0 })),
            ("tcp://[::]:5557", address(true, "[::]", 5557)),
            ("tcp://127.0.0.1:5557", address(false, "127.0.0.1", 5557)),
            ("tcp://router.llm-d:5557", address(false, "router.llm-d", 5557)),
            ("tcp://[fe80:1:2:3:4:5:6:7]:1", address(false, "[fe80:1:2:3:4:5:6:7]", 1)),
            ("tcp://*", None),
            ("tcp://:5557", None),
            ("tcp://a:b:1", None),
            ("tcp://a:70000", None),
            ("ipc:///tmp/x", None),
        ] {
            assert_eq!(Endpoint::parse(text), expect, "{text}");
        }
    }

    #[test]
    fn each_engine_binds_a_port_of_its_own_and_all_connect_to_the_same() {
        let check = |endpoint: &str, third: &str| {
            let replay_endpoint = Some("tcp://127.0.0.1:6000".to_owned());
            let config = KvEventsConfig { endpoint: endpoint.into(), replay_endpoint, ..KvEventsConfig::default() };
            assert_eq!(config.nth(0), config);
            let nth = config.nth(2);
            assert_eq!((nth.endpoint.as_str(), nth.replay_endpoint.as_deref()), (third, Some("tcp://127.0.0.1:6002")));
        };
        check("tcp://*:5557", "tcp://*:5559");
        check("tcp://*:0", "tcp://*:0");
        check("tcp://router:5557", "tcp://router:5557");
    }

    #[test]
    fn problems_are_named() {
        let config = |change: fn(&mut KvEventsConfig)| {
            let mut config = KvEventsConfig::default();
            change(&mut config);
            let mut check = Check(Vec::new());
            config.check(&mut check);
            check.0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
        };
        assert_eq!(config(|_| ()), "");
        assert_eq!(
            config(|c| c.endpoint = "5557".into()),
            "kv_events_config.endpoint: found 5557, expected tcp://HOST:PORT, or tcp://*:PORT to bind"
        );
        assert_eq!(
            config(|c| {
                c.enable_kv_cache_events = true;
                c.replay_endpoint = Some("tcp://127.0.0.1:5557".into());
            }),
            "kv_events_config.replay_endpoint: found tcp://127.0.0.1:5557, expected another port than that of `endpoint`"
        );
        assert_eq!(config(|c| c.hwm = 0), "kv_events_config.hwm: found 0, expected an integer in 1..=10000000");
    }
}
