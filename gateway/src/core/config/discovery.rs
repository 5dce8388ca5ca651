//! Where endpoints come from while the gateway runs, besides those that it is started with.

use std::collections::BTreeMap;
use std::path::PathBuf;

use ::core::net::SocketAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use shared::config::ConfigProblem;
use shared::units::HumanDur;

use super::{at_least, problem};

/// A source of endpoints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DiscoveryConfig {
    /// A file that is read again and again.
    File(FileDiscovery),
    /// A DNS name that is looked up again and again; that of a headless service of Kubernetes, for example.
    Dns(DnsDiscovery),
}

/// A YAML file with a list `endpoints` of `name`, `url` and `labels`. Replace it in one go (write another file and rename it).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FileDiscovery {
    /// The file.
    pub path: PathBuf,
    /// How often it is read.
    #[serde(default = "one_second")]
    pub interval: HumanDur,
}

/// The addresses of a name. Endpoints are called by address and port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DnsDiscovery {
    /// The name, for example `vllm.default.svc.cluster.local`, or `_http._tcp.vllm.default.svc.cluster.local` for SRV records.
    pub name: String,
    /// Which records are read.
    #[serde(default)]
    pub record: DnsRecord,
    /// The port of the endpoints; SRV records bring their own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub port: Option<u16>,
    /// How often the name is looked up. How long an answer may be kept is not looked at.
    #[serde(default = "five_seconds")]
    pub interval: HumanDur,
    /// `http` or `https`.
    #[serde(default)]
    pub scheme: EndpointScheme,
    /// Labels of the endpoints.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Name servers, for example `[10.96.0.10:53]`; those of the system when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(with = "Vec<String>")]
    pub servers: Vec<SocketAddr>,
}

/// Records of DNS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DnsRecord {
    /// A and AAAA.
    #[default]
    Address,
    /// SRV, and A and AAAA of the hosts in them; of several priorities the first one.
    Srv,
}

/// How endpoints are spoken to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum EndpointScheme {
    /// In the clear.
    #[default]
    Http,
    /// With TLS.
    Https,
}

impl EndpointScheme {
    /// As it stands in a URL.
    pub const fn as_str(self) -> &'static str {
        match self {
            EndpointScheme::Http => "http",
            EndpointScheme::Https => "https",
        }
    }
}

impl DiscoveryConfig {
    /// How often it is looked at.
    pub const fn interval(&self) -> HumanDur {
        match self {
            DiscoveryConfig::File(file) => file.interval,
            DiscoveryConfig::Dns(dns) => dns.interval,
        }
    }

    pub(super) fn validate(&self, path: &str, out: &mut Vec<ConfigProblem>) {
        let kind = match self {
            DiscoveryConfig::File(_) => "file",
            DiscoveryConfig::Dns(dns) => {
                dns.validate(path, out);
                "dns"
            }
        };
        at_least(&format!("{path}.{kind}.interval"), self.interval(), HumanDur::millis(10), out);
    }
}

impl DnsDiscovery {
    fn validate(&self, path: &str, out: &mut Vec<ConfigProblem>) {
        if self.name.is_empty() {
            problem(&format!("{path}.dns.name"), "no name", "a name such as vllm.default.svc".to_owned(), out);
        }
        let port = format!("{path}.dns.port");
        match (self.record, self.port) {
            (DnsRecord::Address, None) => problem(&port, "no port", "the port of the endpoints".to_owned(), out),
            (DnsRecord::Srv, Some(given)) => problem(&port, given, "none: SRV records bring it".to_owned(), out),
            (DnsRecord::Address, Some(_)) | (DnsRecord::Srv, None) => {}
        }
    }
}

const fn one_second() -> HumanDur {
    HumanDur::secs(1)
}

const fn five_seconds() -> HumanDur {
    HumanDur::secs(5)
}
