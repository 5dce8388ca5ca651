//! TLS towards callers: certificate and key from files, HTTP/2 or HTTP/1.1 by what the caller offers.

use std::path::Path;
use std::sync::Arc;

use rustls_pki_types::pem::{Error as PemError, PemObject};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::TlsAcceptor;

use crate::core::config::TlsConfig;

/// What accepts TLS connections.
///
/// # Errors
/// If a file cannot be read or holds no certificate or key, or the two do not belong together.
pub(crate) fn acceptor(config: &TlsConfig) -> Result<TlsAcceptor, String> {
    let chain = certificates("tls.cert_file", &config.cert_file)?;
    let key = PrivateKeyDer::from_pem_file(&config.key_file).map_err(|e| told("tls.key_file", &config.key_file, &e))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let versions = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let builder = versions.map_err(|e| e.to_string())?.with_no_client_auth();
    let mut tls = builder.with_single_cert(chain, key).map_err(|e| format!("tls: {e}"))?;
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(tls)))
}

/// The certificates in a PEM file; at least one. `field` names the file in errors.
pub(crate) fn certificates(field: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    let found: Vec<CertificateDer<'static>> = read.map_err(|e| told(field, path, &e))?;
    if found.is_empty() {
        return Err(format!("{field} {}: found no certificate, expected PEM", path.display()));
    }
    Ok(found)
}

fn told(field: &str, path: &Path, error: &PemError) -> String {
    format!("{field} {}: {error}", path.display())
}
