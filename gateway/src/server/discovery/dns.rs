//! Endpoints behind a DNS name: its addresses, or the hosts and ports of its SRV records.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use hickory_resolver::TokioResolver;
use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolverConfig, ResolverOpts};
use hickory_resolver::lookup::Lookup;
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::proto::rr::{Name, RData};

use super::{MAX_ENDPOINTS, Said};
use crate::core::config::{DnsDiscovery, DnsRecord, EndpointScheme};
use crate::server::backend::Backend;

/// A name that is looked up.
#[derive(Debug)]
pub(crate) struct DnsSource {
    resolver: TokioResolver,
    name: String,
    /// The port of address records; SRV records bring theirs.
    port: Option<u16>,
    record: DnsRecord,
    scheme: EndpointScheme,
    labels: BTreeMap<String, String>,
    /// What it said last.
    said: Option<BTreeSet<SocketAddr>>,
}

impl DnsSource {
    pub(super) fn new(config: &DnsDiscovery) -> Result<DnsSource, String> {
        Name::from_utf8(&config.name).map_err(|e| format!("{:?} is no DNS name: {e}", config.name))?;
        let resolver = resolver(config).map_err(|e| format!("no resolver for {}: {e}", config.name))?;
        let (name, labels) = (config.name.clone(), config.labels.clone());
        let (record, port, scheme) = (config.record, config.port, config.scheme);
        Ok(DnsSource { resolver, name, port, record, scheme, labels, said: None })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Looks it up.
    pub(super) async fn read(&mut self) -> Result<Said, String> {
        let found = match self.record {
            DnsRecord::Address => {
                let port = self.port.unwrap_or_default();
                self.addresses(&self.name).await?.into_iter().map(|ip| SocketAddr::new(ip, port)).collect()
            }
            DnsRecord::Srv => self.services().await?,
        };
        if found.len() > MAX_ENDPOINTS {
            return Err(format!("{} addresses, at most {MAX_ENDPOINTS} are used", found.len()));
        }
        if self.said.as_ref() == Some(&found) {
            return Ok(Said::Nothing);
        }
        let backends = found.iter().map(|at| self.backend(*at)).collect::<Result<_, _>>()?;
        self.said = Some(found);
        Ok(Said::Endpoints(backends))
    }

    fn backend(&self, at: SocketAddr) -> Result<Backend, String> {
        let url = format!("{}://{at}", self.scheme.as_str());
        let mut backend = Backend::new(&at.to_string(), &url).map_err(|e| e.to_string())?;
        backend.config = backend.config.with_labels(self.labels.clone());
        Ok(backend)
    }

    /// Addresses of a host, of both kinds or none: half an answer would take half the pool away.
    async fn addresses(&self, host: &str) -> Result<Vec<IpAddr>, String> {
        let (v4, v6) = tokio::join!(self.resolver.ipv4_lookup(host), self.resolver.ipv6_lookup(host));
        let mut found = data(v4)?;
        found.extend(data(v6)?);
        let ip = |data: &RData| match data {
            RData::A(a) => Some(IpAddr::V4(a.0)),
            RData::AAAA(aaaa) => Some(IpAddr::V6(aaaa.0)),
            _ => None,
        };
        Ok(found.iter().filter_map(ip).collect())
    }

    /// Addresses and ports of the services with the first priority.
    async fn services(&self) -> Result<BTreeSet<SocketAddr>, String> {
        let records = data(self.resolver.srv_lookup(self.name.as_str()).await)?;
        let srv = |data: RData| if let RData::SRV(srv) = data { Some(srv) } else { None };
        let mut services: Vec<_> = records.into_iter().filter_map(srv).collect();
        let first = services.iter().map(|s| s.priority).min();
        services.retain(|s| Some(s.priority) == first);
        let mut found = BTreeSet::new();
        for service in services {
            let addresses = self.addresses(&service.target.to_utf8()).await?;
            found.extend(addresses.into_iter().map(|ip| SocketAddr::new(ip, service.port)));
        }
        Ok(found)
    }
}

/// The data of an answer. A name server that says that there is nothing is believed.
fn data(found: Result<Lookup, NetError>) -> Result<Vec<RData>, String> {
    match found {
        Ok(found) => Ok(found.answers().iter().map(|record| record.data.clone()).collect()),
        Err(error) if error.is_no_records_found() => Ok(Vec::new()),
        Err(error) => Err(error.to_string()),
    }
}

fn resolver(config: &DnsDiscovery) -> Result<TokioResolver, NetError> {
    let mut builder = if config.servers.is_empty() {
        TokioResolver::builder_tokio()?
    } else {
        let servers = config.servers.iter().map(|at| {
            let on = |mut connection: ConnectionConfig| {
                connection.port = at.port();
                connection
            };
            NameServerConfig::new(at.ip(), true, vec![on(ConnectionConfig::udp()), on(ConnectionConfig::tcp())])
        });
        let servers = ResolverConfig::from_name_servers(servers.collect());
        TokioResolver::builder_with_config(servers, TokioRuntimeProvider::default())
    };
    set(builder.options_mut(), config);
    builder.build()
}

/// The interval says how old an answer may be, so none is kept; and a lookup is over before the next one.
fn set(options: &mut ResolverOpts, config: &DnsDiscovery) {
    options.cache_size = 0;
    options.timeout = options.timeout.min(config.interval.get().to_std()).max(LEAST_TIMEOUT);
}

/// Shorter than this no name server answers for certain.
const LEAST_TIMEOUT: std::time::Duration = std::time::Duration::from_millis(250);
