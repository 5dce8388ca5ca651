//! Servers that others run: where they are, as users type it, and what they answer to a question.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Full, Limited};
use shared::time::Dur;

use crate::client::{Pool, pool};

/// What kind of server, for messages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kind {
    /// For example `a Tempo`.
    pub what: &'static str,
    /// An address that such a server may have.
    pub example: &'static str,
    /// The environment variable that holds headers for it.
    pub headers: &'static str,
}

/// A server.
#[derive(Clone)]
pub(crate) struct Remote {
    url: String,
    headers: HeaderMap,
    pool: Pool,
}

impl std::fmt::Debug for Remote {
    /// Headers may be credentials.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.url)
    }
}

impl Remote {
    /// The server at `url`, a base address. `headers` go with every request, as `NAME=VALUE` with commas between:
    /// `X-Scope-OrgID=team`, `Authorization=Basic ...`.
    ///
    /// # Errors
    /// In words, if the address or a header is none, or the address holds credentials, which are not repeated.
    pub(crate) fn new(kind: Kind, url: &str, headers: &str) -> Result<Remote, String> {
        let bad = |problem: &str| format!("{}: {problem}", without_credentials(url));
        let none = || bad(&format!("found no address of {}, expected one such as {}", kind.what, kind.example));
        let uri: Uri = url.parse().map_err(|_| none())?;
        let authority = uri.authority().ok_or_else(none)?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) {
            return Err(bad("expected http:// or https://"));
        }
        if authority.as_str().contains('@') {
            return Err(bad(&format!("found credentials in a URL, expected them in {}", kind.headers)));
        }
        if uri.query().is_some() {
            return Err(bad("found a query, expected a base address"));
        }
        let url = url.trim_end_matches('/').to_owned();
        Ok(Remote { url, headers: parse_headers(kind.headers, headers)?, pool: pool() })
    }

    /// Its address, without a slash at the end.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// What goes with every request.
    pub(crate) fn headers(&self) -> &HeaderMap {
        &self.headers
    }

    /// Asks for `path`: status and body of the answer.
    ///
    /// # Errors
    /// In words, if there is no answer within `timeout`, or one of more than `most` bytes.
    pub(crate) async fn get(&self, path: &str, timeout: Dur, most: usize) -> Result<(StatusCode, Bytes), String> {
        let mut request = Request::get(format!("{}{path}", self.url));
        if let Some(headers) = request.headers_mut() {
            headers.extend(self.headers.clone());
            headers.insert(header::ACCEPT, HeaderValue::from_static("application/json"));
        }
        let request = request.body(Full::new(Bytes::new())).map_err(|e| e.to_string())?;
        let exchange = async {
            let response = self.pool.request(request).await.map_err(|e| cause(&e))?;
            let status = response.status();
            let body = Limited::new(response.into_body(), most).collect().await.map_err(|e| e.to_string())?;
            Ok((status, body.to_bytes()))
        };
        let answer = tokio::time::timeout(timeout.to_std(), exchange).await;
        answer.unwrap_or_else(|_| Err(format!("no answer in {timeout}")))
    }
}

/// The innermost reason: the outer ones only say that something failed.
fn cause(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

fn without_credentials(url: &str) -> String {
    match (url.find("://"), url.rfind('@')) {
        (Some(scheme), Some(at)) if scheme < at => format!("{}://{}", &url[..scheme], &url[at + 1..]),
        (None, Some(at)) => url[at + 1..].to_owned(),
        (_, None) | (Some(_), Some(_)) => url.to_owned(),
    }
}

fn parse_headers(variable: &str, text: &str) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    for pair in text.split(',').filter(|p| !p.trim().is_empty()) {
        // The value may be a secret: it is not repeated.
        let bad = || format!("{variable}: expected NAME=VALUE with commas between");
        let (name, value) = pair.split_once('=').ok_or_else(bad)?;
        let name: HeaderName = name.trim().parse().map_err(|_| bad())?;
        let mut value: HeaderValue = value.trim().parse().map_err(|_| bad())?;
        value.set_sensitive(true);
        headers.insert(name, value);
    }
    Ok(headers)
}
