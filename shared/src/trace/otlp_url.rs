//! Addresses of collectors, and how to show them: credentials never appear in names, logs, counts and errors.
//!
//! A user name and a password in the URL are refused, for they would be shown wherever URLs are; headers carry them instead.
//! A query may hold a key: it is sent, and left out of everything that is shown. Knows nothing of transports.

use http::Uri;

use crate::trace::config::{OtlpProtocol, Signal};

/// A URL with scheme `http` or `https`, a host, and no credentials before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OtlpUrl(Uri);

/// Why a URL cannot be used; never holds the URL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OtlpUrlError {
    NotHttp,
    Credentials,
}

impl OtlpUrlError {
    /// What may be given instead.
    pub(crate) const fn allowed(self) -> &'static str {
        match self {
            OtlpUrlError::NotHttp => {
                "a URL like http://127.0.0.1:4318 (HTTP) or http://127.0.0.1:4317 (gRPC) is allowed"
            }
            OtlpUrlError::Credentials => {
                "a URL without user name and password is allowed (credentials go into OTEL_EXPORTER_OTLP_HEADERS)"
            }
        }
    }
}

impl OtlpUrl {
    pub(crate) fn parse(text: &str) -> Result<OtlpUrl, OtlpUrlError> {
        if authority(text).contains('@') {
            return Err(OtlpUrlError::Credentials);
        }
        let uri: Uri = text.parse().map_err(|_| OtlpUrlError::NotHttp)?;
        let web = matches!(uri.scheme_str(), Some("http" | "https"));
        // `user:pa` of a password with a `/` or `?` parses as a host with a port that is no number.
        let host = uri.authority().filter(|a| !a.host().is_empty() && (a.as_str() == a.host() || a.port().is_some()));
        if web && host.is_some() { Ok(OtlpUrl(uri)) } else { Err(OtlpUrlError::NotHttp) }
    }

    /// gRPC for its registered port 4317, HTTP otherwise.
    pub(crate) fn protocol_of_port(&self) -> OtlpProtocol {
        if self.0.port_u16() == Some(4317) { OtlpProtocol::Grpc } else { OtlpProtocol::HttpProtobuf }
    }

    /// The URL as it was given.
    pub(crate) fn whole(&self) -> String {
        self.0.to_string()
    }

    /// The URL without a slash at the end of its path.
    pub(crate) fn base(&self) -> String {
        self.with_path("")
    }

    /// The URL with the signal's path appended to its path.
    pub(crate) fn for_signal(&self, signal: Signal) -> String {
        self.with_path(signal.path())
    }

    /// Whether the path ends with that of the signal.
    pub(crate) fn names(&self, signal: Signal) -> bool {
        self.0.path().trim_end_matches('/').ends_with(signal.path())
    }

    /// Scheme, host, port and path.
    pub(crate) fn shown(&self) -> String {
        let (scheme, authority) = (self.0.scheme_str().unwrap_or_default(), self.0.authority());
        let path = self.0.path().trim_end_matches('/');
        format!("{scheme}://{}{path}", authority.map_or("", |a| a.as_str()))
    }

    fn with_path(&self, suffix: &str) -> String {
        let query = self.0.query().map(|q| format!("?{q}")).unwrap_or_default();
        format!("{}{suffix}{query}", self.shown())
    }
}

/// Any text that was meant as a URL, without what may be secret in it.
pub(crate) fn redacted(text: &str) -> String {
    if let Ok(url) = OtlpUrl::parse(text) {
        return url.shown();
    }
    let (scheme, rest) = match text.split_once("://") {
        Some((scheme, rest)) => (format!("{scheme}://"), rest),
        None => (String::new(), text),
    };
    // A password may hold any character, unescaped: everything up to the last `@` is taken for one.
    let (stars, rest) = rest.rsplit_once('@').map_or(("", rest), |(_, host)| ("***@", host));
    format!("{scheme}{stars}{}", rest.split(['?', '#']).next().unwrap_or_default())
}

/// What stands between the scheme and the path.
fn authority(text: &str) -> &str {
    let rest = text.split_once("://").map_or(text, |(_, rest)| rest);
    rest.split(['/', '?', '#']).next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_taken_apart() {
        let check = |text: &str, base: &str, traces: &str, shown: &str| {
            let url = OtlpUrl::parse(text).unwrap();
            assert_eq!(
                (url.base().as_str(), url.for_signal(Signal::Traces).as_str(), url.shown().as_str()),
                (base, traces, shown)
            );
        };
        check("http://h:4318", "http://h:4318", "http://h:4318/v1/traces", "http://h:4318");
        check("https://h/a/", "https://h/a", "https://h/a/v1/traces", "https://h/a");
        check("http://[::1]:4317/", "http://[::1]:4317", "http://[::1]:4317/v1/traces", "http://[::1]:4317");
        check("http://h?key=s/", "http://h?key=s/", "http://h/v1/traces?key=s/", "http://h");
        check("http://h/a/?key=u@s", "http://h/a?key=u@s", "http://h/a/v1/traces?key=u@s", "http://h/a");
    }

    #[test]
    fn what_cannot_be_used_is_shown_without_secrets() {
        use OtlpUrlError::{Credentials, NotHttp};
        let check = |text: &str, why: OtlpUrlError, shown: &str| {
            assert_eq!((OtlpUrl::parse(text), redacted(text).as_str()), (Err(why), shown), "{text}");
        };
        check("http://user:secret@h:4318/x", Credentials, "http://***@h:4318/x");
        check("http://user:se@cret@h", Credentials, "http://***@h");
        check("https://secret@h?key=secret", Credentials, "https://***@h");
        check("user:secret@h:4318", Credentials, "***@h:4318");
        check("http://user:sec/ret@h", NotHttp, "http://***@h");
        check("http://user:sec?ret@h", NotHttp, "http://***@h");
        check("ftp://h:1?key=secret", NotHttp, "ftp://h:1");
        check("localhost:4317", NotHttp, "localhost:4317");
        check("http://", NotHttp, "http://");
        check("", NotHttp, "");
        assert_eq!(redacted("http://h:4318/x?key=secret"), "http://h:4318/x");
    }
}
