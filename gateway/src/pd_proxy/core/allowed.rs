//! Where prefills may be sent: a header must not turn the proxy into a way to reach anything else (server-side request forgery).

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// Longer texts name no host.
const MAX_TARGET: usize = 256;

/// An engine that prefills, as `x-prefiller-host-port` names it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Target {
    /// Its host in lower case; an IPv6 address stands in brackets.
    pub host: Arc<str>,
    /// Its port.
    pub port: u16,
}

/// A text that is no target. It is not repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected HOST:PORT, for example 10.0.0.5:8000")]
pub struct BadTarget;

impl Target {
    /// Reads the value of the header. Of several candidates, between commas, the first one is meant.
    ///
    /// # Errors
    /// If that is not `host:port`.
    pub fn of_header(value: &str) -> Result<Target, BadTarget> {
        value.split(',').next().unwrap_or_default().trim().parse()
    }
}

impl FromStr for Target {
    type Err = BadTarget;

    fn from_str(text: &str) -> Result<Target, BadTarget> {
        let (host, port) = text.rsplit_once(':').ok_or(BadTarget)?;
        let digits = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
        let port = port.parse().ok().filter(|port| digits && *port > 0).ok_or(BadTarget)?;
        Ok(Target { host: host_of(host)?, port })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

/// A name, an IPv4 address, or an IPv6 address in brackets.
fn host_of(text: &str) -> Result<Arc<str>, BadTarget> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    let good = match text.strip_prefix('[') {
        Some(address) => address.strip_suffix(']').is_some_and(|a| a.parse::<core::net::Ipv6Addr>().is_ok()),
        None => !text.is_empty() && text.bytes().all(plain),
    };
    if good && text.len() <= MAX_TARGET { Ok(text.to_ascii_lowercase().into()) } else { Err(BadTarget) }
}

/// The pool of engines that may be asked to prefill.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Allowed {
    /// Whoever the header names: only where nobody else can send it.
    Any,
    /// These hosts, each at one port or at all of them.
    These(BTreeSet<(Arc<str>, Option<u16>)>),
}

impl Allowed {
    /// The pool of these hosts: `HOST` at any port, as in llm-d, or `HOST:PORT`.
    ///
    /// # Errors
    /// On the first that is neither.
    pub fn these<'a>(entries: impl IntoIterator<Item = &'a str>) -> Result<Allowed, BadTarget> {
        let entry = |text: &str| match text.parse::<Target>() {
            Ok(target) => Ok((target.host, Some(target.port))),
            Err(_) => host_of(text).map(|host| (host, None)),
        };
        entries.into_iter().map(entry).collect::<Result<_, _>>().map(Allowed::These)
    }

    /// Whether `target` belongs to the pool.
    pub fn permits(&self, target: &Target) -> bool {
        match self {
            Allowed::Any => true,
            Allowed::These(pool) => {
                let at = |port| pool.contains(&(Arc::clone(&target.host), port));
                at(None) || at(Some(target.port))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_hosts_with_ports() {
        let check = |text: &str, expect: Option<&str>| {
            assert_eq!(Target::of_header(text).ok().map(|t| t.to_string()).as_deref(), expect, "{text}");
        };
        check("10.0.0.5:8000", Some("10.0.0.5:8000"));
        check(" Prefill-0.pool.svc:8000 , other:1", Some("prefill-0.pool.svc:8000"));
        check("[::1]:8000", Some("[::1]:8000"));
        for bad in ["", "host", "host:", ":80", "host:0", "host:65536", "host:+80", "http://host:80", "user@host:80"] {
            check(bad, None);
        }
        for bad in ["::1:80", "[::1:80", "[x]:80", "host/path:80", "host?q:80", "a b:80", "a\r\nb:80"] {
            check(bad, None);
        }
        check(&format!("{}:80", "a".repeat(MAX_TARGET + 1)), None);
    }

    #[test]
    fn only_the_pool_is_allowed() {
        let pool = Allowed::these(["10.0.0.5", "Prefill-0:8000", "[::1]"]).unwrap();
        let check = |text: &str, expect: bool| assert_eq!(pool.permits(&text.parse().unwrap()), expect, "{text}");
        check("10.0.0.5:1", true);
        check("PREFILL-0:8000", true);
        check("prefill-0:8001", false);
        check("[::1]:9", true);
        check("169.254.169.254:80", false);
        check("10.0.0.50:80", false);
        assert!(Allowed::Any.permits(&"anything:1".parse().unwrap()));
        assert!(Allowed::these(["http://x"]).is_err());
        assert!(!Allowed::these([]).unwrap().permits(&"a:1".parse().unwrap()), "nobody is in an empty pool");
    }
}
