//! Who emitted a span: an OpenTelemetry Resource, one per service instance.

use crate::trace::span::{Attr, Value};

/// Identity of a service instance.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Resource {
    /// `service.name`
    pub service_name: String,
    /// `service.instance.id`; empty if unknown.
    pub instance_id: String,
    /// `service.version`
    pub version: Option<String>,
    /// `service.namespace`
    pub namespace: Option<String>,
    /// `deployment.environment.name`
    pub environment: Option<String>,
    /// `host.name`; absent in virtual runs, whose files are reproducible.
    pub host_name: Option<String>,
    /// Further attributes.
    pub extra: Vec<Attr>,
    /// How far the instance's clock is ahead of the others', in nanoseconds: no attribute, but in every time that is exported of it.
    pub clock_skew_ns: i64,
}

impl Resource {
    /// A service instance with this crate's version and nothing else.
    pub fn new(service_name: impl Into<String>, instance_id: impl Into<String>) -> Resource {
        let version = Some(env!("CARGO_PKG_VERSION").to_owned());
        Resource { service_name: service_name.into(), instance_id: instance_id.into(), version, ..Resource::default() }
    }

    /// The same instance on this host: for live processes.
    #[must_use]
    pub fn here(mut self) -> Resource {
        let node = rustix::system::uname();
        self.host_name = node.nodename().to_str().ok().filter(|n| !n.is_empty()).map(str::to_owned);
        self
    }

    /// All attributes, in a fixed order.
    pub fn attributes(&self) -> Vec<Attr> {
        let named = [
            ("service.name", Some(&self.service_name)),
            ("service.instance.id", Some(&self.instance_id).filter(|id| !id.is_empty())),
            ("service.version", self.version.as_ref()),
            ("service.namespace", self.namespace.as_ref()),
            ("deployment.environment.name", self.environment.as_ref()),
            ("host.name", self.host_name.as_ref()),
        ];
        let named = named.into_iter().filter_map(|(k, v)| Some((k.into(), Value::from(v?.clone()))));
        named.chain(self.extra.iter().cloned()).collect()
    }

    /// The resource that has these attributes.
    pub fn from_attributes(attributes: Vec<Attr>) -> Resource {
        let mut resource = Resource::default();
        for (key, value) in attributes {
            resource.insert(key.into_owned(), value);
        }
        resource
    }

    /// Adds attributes that are not set yet: what the environment says about every resource of the process.
    pub fn add_missing(&mut self, attributes: &[(String, String)]) {
        let present: Vec<_> = self.attributes().into_iter().map(|(k, _)| k).collect();
        for (key, value) in attributes {
            if !present.iter().any(|k| k == key) {
                self.insert(key.clone(), Value::from(value.clone()));
            }
        }
    }

    fn insert(&mut self, key: String, value: Value) {
        let slot = match key.as_str() {
            "service.name" | "service.instance.id" => {
                let text = value.as_str().unwrap_or_default().to_owned();
                let slot = if key == "service.name" { &mut self.service_name } else { &mut self.instance_id };
                *slot = text;
                return;
            }
            "service.version" => &mut self.version,
            "service.namespace" => &mut self.namespace,
            "deployment.environment.name" => &mut self.environment,
            "host.name" => &mut self.host_name,
            _ => {
                self.extra.push((key.into(), value));
                return;
            }
        };
        *slot = value.as_str().map(str::to_owned);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_make_the_resource_again() {
        let mut resource = Resource::new("vllm", "engine-0");
        resource.host_name = Some("h".into());
        resource.extra.push(("gpu.count".into(), Value::Int(4)));
        assert_eq!(Resource::from_attributes(resource.attributes()), resource);
    }

    #[test]
    fn the_environment_only_fills_gaps() {
        let mut resource = Resource::new("vllm", "engine-0");
        let pair = |k: &str, v: &str| (k.to_owned(), v.to_owned());
        resource.add_missing(&[pair("service.version", "9"), pair("service.namespace", "ns"), pair("team", "x")]);
        assert_eq!(resource.version.as_deref(), Some(env!("CARGO_PKG_VERSION")));
        assert_eq!(resource.namespace.as_deref(), Some("ns"));
        assert_eq!(resource.extra, [("team".into(), Value::from("x"))]);
    }
}
