//! Callers who may not call, send too much, read too slowly; HTTP/2 and TLS on both sides.

use std::io::Write as _;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use shared::trace::tree::outline;
use shared::units::HumanDur;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::harness::{CHAT, Engine, Running, header, json, stream, text};
use crate::core::config::{AuthConfig, GatewayConfig, TlsConfig, UpstreamHttp};
use crate::server::Backend;

fn kept(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

#[tokio::test]
async fn whoever_has_no_token_is_refused_and_the_token_goes_nowhere() {
    let mut engine = Engine::start(0).await;
    let tokens = kept("# operators\nsesame-1\nsesame-2\n");
    let auth = AuthConfig { bearer_tokens_file: Some(tokens.path().into()), bearer_tokens_env: None };
    let config = GatewayConfig { auth: Some(auth), ..GatewayConfig::default() };
    let gateway = Running::start(config, vec![engine.backend("a")]).await;
    for wrong in [None, Some("Bearer sesame"), Some("Basic sesame-1")] {
        for mut request in [gateway.chat(), gateway.post("/v1/embeddings", "{}"), models(&gateway)] {
            if let Some(value) = wrong {
                request.headers_mut().insert("authorization", value.parse().unwrap());
            }
            let response = gateway.send(request).await;
            assert_eq!((response.status().as_u16(), header(&response, "www-authenticate").as_str()), (401, "Bearer"));
            assert!(text(response).await.contains(r#""type":"AuthenticationError""#));
        }
    }
    assert_eq!(gateway.get("/health").await.0, 200, "probes have no token");
    let mut request = gateway.chat();
    request.headers_mut().insert("authorization", "Bearer sesame-2".parse().unwrap());
    let response = gateway.spawn(request);
    let call = engine.call().await;
    assert!(!call.head.headers.contains_key("authorization"));
    call.reply.send(json(200, "{}")).unwrap();
    text(response.await.unwrap()).await;
    let (_, metrics) = gateway.get("/metrics").await;
    assert!(metrics.contains("gateway_unauthorized_total 9\n"), "{metrics}");
    let (stats, spans) = gateway.stop().done().await;
    assert_eq!((stats.client_errors, stats.succeeded), (6, 1));
    assert!(!outline(&spans).contains("sesame"));
}

fn models(gateway: &Running) -> http::Request<Full<Bytes>> {
    http::Request::get(format!("http://{}/v1/models", gateway.addr)).body(Full::default()).unwrap()
}

#[tokio::test]
async fn too_many_or_too_long_headers_are_a_431() {
    let mut engine = Engine::start(0).await;
    let mut config = GatewayConfig::default();
    (config.limits.max_headers, config.limits.max_header_bytes) = (10, 1000);
    let gateway = Running::start(config, vec![engine.backend("a")]).await;
    let check = async |headers: usize, length: usize| {
        let mut request = gateway.chat();
        for i in 0..headers {
            let name = http::HeaderName::try_from(format!("x-{i}")).unwrap();
            request.headers_mut().insert(name, "v".repeat(length).parse().unwrap());
        }
        gateway.send(request).await.status().as_u16()
    };
    assert_eq!((check(12, 1).await, check(1, 1000).await), (431, 431));
    // More than the parser takes at all.
    assert_eq!(check(150, 1).await, 431);
    let fits = gateway.spawn(gateway.chat());
    engine.call().await.reply.send(json(200, "{}")).unwrap();
    assert_eq!(fits.await.unwrap().status(), 200);
}

#[tokio::test]
async fn a_caller_that_does_not_finish_its_head_is_let_go() {
    let engine = Engine::start(0).await;
    let mut config = GatewayConfig::default();
    config.timeouts.request_head = HumanDur::millis(30);
    let gateway = Running::start(config, vec![engine.backend("a")]).await;
    for begun in ["", "POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\nx-slow: "] {
        let mut caller = TcpStream::connect(gateway.addr).await.unwrap();
        caller.write_all(begun.as_bytes()).await.unwrap();
        let mut rest = Vec::new();
        // Closed, with or without a word.
        let _ = caller.read_to_end(&mut rest).await;
        assert!(rest.is_empty() || rest.starts_with(b"HTTP/1.1 408"), "{}", String::from_utf8_lossy(&rest));
    }
}

#[tokio::test]
async fn a_caller_that_takes_nothing_is_let_go_long_before_the_request_would_end() {
    let mut engine = Engine::start(0).await;
    let mut config = GatewayConfig::default();
    config.timeouts.idle_write = HumanDur::millis(50);
    let gateway = Running::start(config, vec![engine.backend("a")]).await;
    let mut caller = TcpStream::connect(gateway.addr).await.unwrap();
    let length = CHAT.len();
    let request = format!("POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\ncontent-length: {length}\r\n\r\n{CHAT}");
    caller.write_all(request.as_bytes()).await.unwrap();
    let (pieces, reply) = stream();
    engine.call().await.reply.send(reply).unwrap();
    let piece = Bytes::from(vec![b'x'; 1 << 20]);
    while pieces.send(piece.clone()).await.is_ok() {}
    let (stats, _) = gateway.stop().done().await;
    assert_eq!((stats.disconnected, stats.broken, stats.active), (1, 0, 0));
    drop(caller);
}

#[tokio::test]
async fn http2_is_spoken_on_both_sides() {
    let mut engine = Engine::start(0).await;
    let mut config = GatewayConfig::default();
    config.upstream.http = UpstreamHttp::Http2;
    let gateway = Running::start(config, vec![engine.backend("a")]).await;
    let client = Client::builder(TokioExecutor::new()).http2_only(true).build_http();
    let asked = tokio::spawn(client.request(gateway.chat()));
    let call = engine.call().await;
    assert_eq!((call.head.version, &call.body[..]), (http::Version::HTTP_2, CHAT.as_bytes()));
    let (pieces, reply) = stream();
    call.reply.send(reply).unwrap();
    let mut response = asked.await.unwrap().unwrap();
    assert_eq!(response.version(), http::Version::HTTP_2);
    for i in 0..20 {
        let piece = Bytes::from(format!("data: {i}\n\n"));
        pieces.send(piece.clone()).await.unwrap();
        assert_eq!(response.body_mut().frame().await.unwrap().unwrap().into_data().unwrap(), piece);
    }
    // A caller that goes away stops the engine here too.
    drop(response);
    pieces.closed().await;
    let (stats, _) = gateway.stop().done().await;
    assert_eq!((stats.received, stats.disconnected, stats.active), (1, 1, 0));
}

/// A certificate for `localhost` that vouches for itself, and its key.
fn certificate() -> (tempfile::NamedTempFile, TlsConfig, tempfile::NamedTempFile) {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let (cert, key) = (kept(&made.cert.pem()), kept(&made.signing_key.serialize_pem()));
    let tls = TlsConfig { cert_file: cert.path().into(), key_file: key.path().into() };
    (cert, tls, key)
}

/// The outer gateway takes the inner one for an engine: TLS from the caller's end to the gateway, and from a gateway to an engine.
#[tokio::test]
async fn tls_is_spoken_on_both_sides() {
    let mut engine = Engine::start(0).await;
    let (cert, tls, _key) = certificate();
    let mut config = GatewayConfig { tls: Some(tls), ..GatewayConfig::default() };
    let inner = Running::start(config.clone(), vec![engine.backend("a")]).await;
    let behind = Backend::new("inner", &format!("https://localhost:{}", inner.addr.port())).unwrap();
    config.tls = None;
    config.upstream.ca_file = Some(cert.path().into());
    let outer = Running::start(config.clone(), vec![behind.clone()]).await;
    outer.until_ready(true).await;
    let response = outer.spawn(outer.chat());
    engine.call().await.reply.send(json(200, r#"{"over":"tls"}"#)).unwrap();
    assert_eq!(text(response.await.unwrap()).await, r#"{"over":"tls"}"#);
    // Who does not trust the certificate gets nothing through, and says so.
    config.upstream.ca_file = None;
    config.profile.filters.clear();
    let doubtful = Running::start(config, vec![behind]).await;
    assert_eq!(doubtful.send(doubtful.chat()).await.status(), 502);
    // A caller that speaks no TLS is let go.
    let mut plain = TcpStream::connect(inner.addr).await.unwrap();
    plain.write_all(b"GET /health HTTP/1.1\r\nhost: h\r\n\r\n").await.unwrap();
    let mut rest = Vec::new();
    let _ = plain.read_to_end(&mut rest).await;
    assert!(!rest.starts_with(b"HTTP/"), "{rest:?}");
}

#[tokio::test]
async fn what_cannot_be_read_is_known_before_anything_is_served() {
    let said = async |change: fn(&mut GatewayConfig)| {
        let mut config = GatewayConfig::default();
        change(&mut config);
        let clock = shared::clock::RunClock::start();
        let (any, seed) = ("127.0.0.1:0".parse().unwrap(), shared::rng::Seed(1));
        let tracer = shared::trace::Tracer::off();
        let bound = crate::server::Server::bind(any, config, Vec::new(), tracer, clock, seed).await;
        bound.err().map(|e| e.to_string()).unwrap_or_default()
    };
    let found = said(|c| {
        let bearer_tokens_file = Some("/nowhere/at/all".into());
        c.auth = Some(AuthConfig { bearer_tokens_file, bearer_tokens_env: None });
    })
    .await;
    assert!(found.contains("auth.bearer_tokens_file /nowhere/at/all"), "{found}");
    let found = said(|c| c.upstream.ca_file = Some("/nowhere/at/all".into())).await;
    assert!(found.contains("upstream.ca_file /nowhere/at/all"), "{found}");
    let found = said(|c| {
        let file = std::path::PathBuf::from("/nowhere/at/all");
        c.tls = Some(TlsConfig { cert_file: file.clone(), key_file: file });
    })
    .await;
    assert!(found.contains("tls.cert_file /nowhere/at/all"), "{found}");
}
