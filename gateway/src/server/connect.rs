//! Connecting to engines, within a time limit that covers all of it: name lookup, TCP and TLS. Knows nothing of requests.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use tower_service::Service;

use crate::core::config::{TimeoutConfig, UpstreamConfig};
use crate::server::tls;

type Https = HttpsConnector<HttpConnector>;
type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Makes connections, each within `limit`.
#[derive(Clone, Debug)]
pub(crate) struct Connector {
    inner: Https,
    limit: Duration,
}

impl Connector {
    /// A connector that trusts the authorities that come with the program, or those that the configuration names instead.
    pub(crate) fn new(timeouts: &TimeoutConfig, upstream: &UpstreamConfig) -> Result<Connector, String> {
        let limit = timeouts.connect.get().to_std();
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        // Shared out among a name's addresses, so that one that does not answer leaves time for the next.
        tcp.set_connect_timeout(Some(limit));
        let provider = rustls::crypto::ring::default_provider();
        let tls = match trusted(upstream)? {
            Some(roots) => {
                let versions = rustls::ClientConfig::builder_with_provider(Arc::new(provider));
                let versions = versions.with_safe_default_protocol_versions().map_err(|e| e.to_string())?;
                let client = versions.with_root_certificates(roots).with_no_client_auth();
                HttpsConnectorBuilder::new().with_tls_config(client)
            }
            None => HttpsConnectorBuilder::new().with_provider_and_webpki_roots(provider).map_err(|e| e.to_string())?,
        };
        Ok(Connector { inner: tls.https_or_http().enable_all_versions().wrap_connector(tcp), limit })
    }
}

/// The authorities of the configuration, if it names any.
fn trusted(config: &UpstreamConfig) -> Result<Option<rustls::RootCertStore>, String> {
    let Some(path) = &config.ca_file else { return Ok(None) };
    let mut roots = rustls::RootCertStore::empty();
    for certificate in tls::certificates("upstream.ca_file", path)? {
        roots.add(certificate).map_err(|e| format!("upstream.ca_file {}: {e}", path.display()))?;
    }
    Ok(Some(roots))
}

impl Service<Uri> for Connector {
    type Response = <Https as Service<Uri>>::Response;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connection = tokio::time::timeout(self.limit, self.inner.call(uri));
        Box::pin(async move { connection.await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))? })
    }
}

/// Whether an error of a call, or what caused it, is a time limit of the connection.
pub(crate) fn timed_out(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut source = Some(error);
    while let Some(e) = source {
        if e.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::TimedOut) {
            return true;
        }
        source = e.source();
    }
    false
}
