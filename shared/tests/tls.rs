//! Collectors behind TLS: only a certificate of the authority that was named is believed, over HTTP and gRPC, by either encoding.

mod support;

use std::path::PathBuf;
use std::sync::Arc;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Request, Response};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use shared::clock::RunClock;
use shared::time::Dur;
use shared::trace::config::{ExporterConfig, OtlpConfig, OtlpEncoding, OtlpProtocol};
use shared::trace::stats::ExporterStats;
use shared::trace::{Resource, Telemetry};
use support::{config, otlp, requests};
use tonic::transport::{Identity, ServerTlsConfig};

/// A certificate authority, a certificate for localhost, and the key of it, all as PEM.
struct Certificates {
    authority: PathBuf,
    chain: String,
    key: String,
    _folder: tempfile::TempDir,
}

impl Certificates {
    fn new() -> Certificates {
        let mut params = CertificateParams::new(Vec::new()).expect("parameters");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority =
            CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("an authority");
        let key = KeyPair::generate().expect("a key");
        let params = CertificateParams::new(vec!["localhost".to_owned()]).expect("parameters");
        let chain = params.signed_by(&key, &*authority).expect("a certificate").pem();
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("ca.pem");
        std::fs::write(&path, authority.pem()).expect("a file");
        Certificates { authority: path, chain, key: key.serialize_pem(), _folder: folder }
    }
}

struct Accepting;

#[tonic::async_trait]
impl TraceService for Accepting {
    async fn export(
        &self,
        _: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

async fn accept(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, hyper::Error> {
    request.into_body().collect().await?;
    Ok(Response::new(Full::default()))
}

/// Serves behind TLS until the runtime ends; the URL.
fn serve(runtime: &tokio::runtime::Runtime, certificates: &Certificates, protocol: OtlpProtocol) -> String {
    let _entered = runtime.enter();
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).expect("a port");
    let port = listener.local_addr().expect("an address").port();
    match protocol {
        OtlpProtocol::Grpc => {
            let identity = Identity::from_pem(&certificates.chain, &certificates.key);
            let server = tonic::transport::Server::builder().tls_config(ServerTlsConfig::new().identity(identity));
            let server = server.expect("TLS").add_service(TraceServiceServer::new(Accepting));
            let incoming = tonic::transport::server::TcpIncoming::from(listener);
            runtime.spawn(async move { server.serve_with_incoming(incoming).await });
        }
        OtlpProtocol::HttpProtobuf => {
            let provider = Arc::new(rustls::crypto::ring::default_provider());
            let chain = CertificateDer::pem_slice_iter(certificates.chain.as_bytes()).collect::<Result<_, _>>();
            let key = PrivateKeyDer::from_pem_slice(certificates.key.as_bytes()).expect("a key");
            let config = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
            let config = config.expect("versions").with_no_client_auth();
            let config = config.with_single_cert(chain.expect("a chain"), key).expect("a certificate");
            let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
            runtime.spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    let acceptor = acceptor.clone();
                    tokio::spawn(async move {
                        let Ok(stream) = acceptor.accept(stream).await else { return };
                        let io = hyper_util::rt::TokioIo::new(stream);
                        let service = hyper::service::service_fn(accept);
                        let _ = hyper::server::conn::http1::Builder::new().serve_connection(io, service).await;
                    });
                }
            });
        }
    }
    format!("https://localhost:{port}")
}

fn sent(to: OtlpConfig) -> ExporterStats {
    let clock = RunClock::start();
    let telemetry = Telemetry::live(config(vec![ExporterConfig::Otlp(to)]), clock).expect("telemetry");
    requests(&telemetry.tracer(Resource::new("test", "one")), clock, 2);
    telemetry.shutdown(clock.now()).exporters.remove(0)
}

#[test]
fn spans_reach_a_collector_behind_tls() {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let (ours, other) = (Certificates::new(), Certificates::new());
    for protocol in [OtlpProtocol::Grpc, OtlpProtocol::HttpProtobuf] {
        let url = serve(&runtime, &ours, protocol);
        for encoding in [OtlpEncoding::Sdk, OtlpEncoding::Direct] {
            let timeout = Dur::from_secs(2);
            let to = OtlpConfig { encoding, timeout, ca_file: Some(ours.authority.clone()), ..otlp(protocol, &url) };
            let stats = sent(to.clone());
            assert_eq!((stats.exported, &stats.last_error), (6, &None), "{protocol} {encoding:?}");
            for ca_file in [Some(other.authority.clone()), None] {
                let timeout = Dur::from_millis(300);
                let stats = sent(OtlpConfig { ca_file, timeout, ..to.clone() });
                assert_eq!((stats.exported, stats.dropped.export_failed), (0, 6), "{protocol} {encoding:?}");
            }
        }
    }
}

#[test]
fn a_file_without_certificates_is_an_error_at_the_start() {
    let folder = tempfile::tempdir().expect("a folder");
    let empty = folder.path().join("empty.pem");
    std::fs::write(&empty, "").expect("a file");
    for protocol in [OtlpProtocol::Grpc, OtlpProtocol::HttpProtobuf] {
        for (path, expect) in
            [(empty.clone(), "found no certificate, expected PEM"), (folder.path().join("no"), "no: ")]
        {
            let to = OtlpConfig { ca_file: Some(path), ..otlp(protocol, "https://localhost:1") };
            let error = Telemetry::live(config(vec![ExporterConfig::Otlp(to)]), RunClock::start());
            let error = error.expect_err("an error").to_string();
            assert!(error.contains("ca_file ") && error.contains(expect), "{error}");
        }
    }
}
