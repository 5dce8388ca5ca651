//! TLS towards collectors: whom to believe.
//!
//! Without a file the certificate authorities of the web are believed (webpki-roots); with one, those in it alone, as
//! `OTEL_EXPORTER_OTLP_CERTIFICATE` means it.

use std::path::Path;
use std::sync::Arc;

use hyper_rustls::ConfigBuilderExt;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use tonic::transport::{Certificate, ClientTlsConfig};

/// What an HTTP client needs.
///
/// # Errors
/// If the file cannot be read or holds no certificate.
pub(super) fn client(ca_file: Option<&Path>) -> Result<ClientConfig, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let versions = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let builder = versions.map_err(|e| e.to_string())?;
    let Some(path) = ca_file else { return Ok(builder.with_webpki_roots().with_no_client_auth()) };
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots.add(certificate).map_err(|e| format!("ca_file {}: {e}", path.display()))?;
    }
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

/// What a gRPC channel needs.
///
/// # Errors
/// If the file cannot be read or holds no certificate.
pub(super) fn of_channel(ca_file: Option<&Path>) -> Result<ClientTlsConfig, String> {
    let Some(path) = ca_file else { return Ok(ClientTlsConfig::new().with_webpki_roots()) };
    certificates(path)?;
    let pem = std::fs::read(path).map_err(|e| format!("ca_file {}: {e}", path.display()))?;
    Ok(ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem)))
}

/// The certificates in a PEM file; at least one.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    let found: Vec<CertificateDer<'static>> = read.map_err(|e| format!("ca_file {}: {e}", path.display()))?;
    if found.is_empty() {
        return Err(format!("ca_file {}: found no certificate, expected PEM", path.display()));
    }
    Ok(found)
}
