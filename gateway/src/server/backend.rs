//! Where endpoints are: any OpenAI-compatible server by its base URL.

use std::collections::BTreeMap;
use std::str::FromStr;

use http::Uri;
use http::uri::{Authority, PathAndQuery, Scheme};

use crate::core::pool::EndpointConfig;

/// An endpoint and its base URL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// What the core knows of it.
    pub config: EndpointConfig,
    scheme: Scheme,
    authority: Authority,
    /// Path before `/v1/...`, without a slash at its end; mostly empty.
    prefix: String,
}

/// Why a text names no endpoint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{found:?} is not an endpoint: expected {allowed}")]
pub struct BadBackend {
    found: String,
    allowed: &'static str,
}

impl Backend {
    /// The endpoint called `name` at `url`, for example `http://10.0.0.1:8000` or `https://host/prefix/v1`. A `/v1` at the end is
    /// what clients call a base URL; requests bring it themselves, so it is left out.
    ///
    /// # Errors
    /// If the URL is neither http nor https, has no host or has a query.
    pub fn new(name: &str, url: &str) -> Result<Backend, BadBackend> {
        let wrong = || BadBackend { found: url.to_owned(), allowed: "a URL like http://127.0.0.1:8000" };
        let uri: Uri = url.parse().map_err(|_| wrong())?;
        let parts = uri.into_parts();
        let (Some(scheme), Some(authority)) = (parts.scheme, parts.authority) else { return Err(wrong()) };
        let default_port = match scheme.as_str() {
            "http" => 80,
            "https" => 443,
            _ => return Err(wrong()),
        };
        let path = parts.path_and_query.unwrap_or_else(|| PathAndQuery::from_static("/"));
        if authority.host().is_empty() || authority.as_str().contains('@') || path.query().is_some() {
            return Err(wrong());
        }
        let prefix = path.path().trim_end_matches('/');
        let prefix = prefix.strip_suffix("/v1").unwrap_or(prefix).to_owned();
        let config = EndpointConfig::new(name, authority.host(), authority.port_u16().unwrap_or(default_port));
        Ok(Backend { config, scheme, authority, prefix })
    }

    /// As [`Backend::new`], with a name that may stand in a command line: at most 128 letters, digits and `-_.:`.
    ///
    /// # Errors
    /// As [`Backend::new`], and if the name is none.
    pub fn named(name: &str, url: &str) -> Result<Backend, BadBackend> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b':');
        if name.is_empty() || name.len() > 128 || !name.bytes().all(plain) {
            let allowed = "a name of 1 to 128 letters, digits and -_.:";
            return Err(BadBackend { found: name.to_owned(), allowed });
        }
        Backend::new(name, url)
    }

    /// The URL of a path on this endpoint; `None` if the two make no URL.
    pub(crate) fn uri(&self, path: &PathAndQuery) -> Option<Uri> {
        let path = match self.prefix.as_str() {
            "" => path.clone(),
            prefix => format!("{prefix}{path}").parse().ok()?,
        };
        let builder = Uri::builder().scheme(self.scheme.clone()).authority(self.authority.clone());
        builder.path_and_query(path).build().ok()
    }
}

impl FromStr for Backend {
    type Err = BadBackend;

    /// Reads `NAME=URL`, and labels after it: `NAME=URL,LABEL=VALUE,LABEL=VALUE`.
    fn from_str(text: &str) -> Result<Backend, BadBackend> {
        let allowed =
            "NAME=URL or NAME=URL,LABEL=VALUE, for example engine-0=http://127.0.0.1:8000,llm-d.ai/role=decode";
        let wrong = || BadBackend { found: text.to_owned(), allowed };
        let mut parts = text.split(',');
        let endpoint = parts.next().unwrap_or_default();
        let label = |part: &str| {
            let (key, value) = part.split_once('=').filter(|(key, _)| !key.is_empty())?;
            Some((key.to_owned(), value.to_owned()))
        };
        let labels: Option<BTreeMap<String, String>> = parts.map(label).collect();
        let (name, url) = endpoint.split_once('=').filter(|(name, _)| !name.is_empty()).ok_or_else(wrong)?;
        let mut backend = Backend::named(name, url)?;
        backend.config = backend.config.with_labels(labels.ok_or_else(wrong)?);
        Ok(backend)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base_urls_make_urls() {
        let check = |text: &str, port: u16, expect: &str| {
            let backend: Backend = text.parse().unwrap();
            let uri = backend.uri(&PathAndQuery::from_static("/v1/completions?a=1")).unwrap();
            assert_eq!((backend.config.port, uri.to_string().as_str()), (port, expect));
        };
        check("a=http://10.0.0.1:8000", 8000, "http://10.0.0.1:8000/v1/completions?a=1");
        check("a=http://host/", 80, "http://host/v1/completions?a=1");
        check("a=https://host/openai/v1/", 443, "https://host/openai/v1/completions?a=1");
        check("a=https://host:1/x", 1, "https://host:1/x/v1/completions?a=1");
    }

    #[test]
    fn labels_follow_the_url() {
        let backend: Backend = "a=http://h:1,llm-d.ai/role=prefill,zone=".parse().unwrap();
        assert!(backend.config.role().prefills());
        assert_eq!(backend.config.labels().get("zone").map(String::as_str), Some(""));
        assert_eq!((&*backend.config.address, backend.config.port), ("h", 1));
    }

    #[test]
    fn anything_else_is_refused() {
        for bad in [
            "",
            "a",
            "=http://h",
            "a=h:80",
            "a=ftp://h",
            "a=http://",
            "a=http://u:p@h",
            "a=http://h/?q",
            "a b=http://h",
            "a=http://h,role",
            "a=http://h,=x",
        ] {
            assert!(bad.parse::<Backend>().is_err(), "{bad}");
        }
    }
}
