//! What goes wrong, and what the caller and the trace see of it.

use bytes::Bytes;
use http_body_util::BodyExt;
use shared::trace::{Span, Status};
use shared::units::HumanDur;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::harness::{CHAT, Engine, Running, header, json, nobody, stream, text};
use crate::core::config::GatewayConfig;
use crate::server::Backend;

/// Without the health filter an endpoint that cannot be reached is chosen, as between two scrapes.
fn careless() -> GatewayConfig {
    let mut config = GatewayConfig::default();
    config.profile.filters.clear();
    config
}

async fn dead(name: &str) -> Backend {
    Backend::new(name, &format!("http://{}", nobody().await)).unwrap()
}

fn errors(spans: &[Span]) -> Vec<String> {
    let failed = spans.iter().filter(|s| s.status != Status::Unset);
    let mut all: Vec<_> = failed
        .map(|s| format!("{} {}", s.name, s.get("error.type").and_then(|v| v.as_str()).unwrap_or_default()))
        .collect();
    all.sort();
    all
}

fn events(spans: &[Span]) -> Vec<&str> {
    spans.iter().flat_map(|s| &s.events).map(|e| e.name.as_ref()).collect()
}

#[tokio::test]
async fn a_refused_connection_is_retried_elsewhere() {
    let mut engine = Engine::start(9).await;
    // The dead one has no metrics, so it looks idle and is chosen first.
    let backends = vec![dead("dead").await, engine.backend("alive")];
    let gateway = Running::start(careless(), backends).await;
    let response = gateway.spawn(gateway.chat());
    engine.call().await.reply.send(json(200, "{}")).unwrap();
    let response = response.await.unwrap();
    assert_eq!(header(&response, "x-gateway-destination-endpoint-served"), "alive");
    text(response).await;
    let (stats, spans) = gateway.stop().done().await;
    assert_eq!((stats.retries, stats.succeeded), (1, 1));
    assert_eq!(errors(&spans), ["gateway.backend.proxy connection_failed"]);
    assert_eq!(events(&spans), ["gateway.retry"]);
}

#[tokio::test]
async fn when_nobody_can_be_reached_the_answer_is_502() {
    let gateway = Running::start(careless(), vec![dead("a").await, dead("b").await]).await;
    let response = gateway.send(gateway.chat()).await;
    assert_eq!(response.status(), 502);
    assert!(text(response).await.contains(r#""type":"BadGatewayError""#));
    let (stats, spans) = gateway.stop().done().await;
    assert_eq!((stats.retries, stats.server_errors), (1, 1));
    let proxy = "gateway.backend.proxy connection_failed";
    assert_eq!(errors(&spans), [proxy, proxy, "gateway.request connection_failed"]);
}

#[tokio::test]
async fn an_engine_that_closes_before_its_answer_is_retried_elsewhere() {
    let (mut first, mut second) = (Engine::start(0).await, Engine::start(9).await);
    let gateway = Running::start(GatewayConfig::default(), vec![first.backend("a"), second.backend("b")]).await;
    let response = gateway.spawn(gateway.chat());
    // The handler panics without an answer, which closes the connection.
    drop(first.call().await.reply);
    second.call().await.reply.send(json(200, "{}")).unwrap();
    assert_eq!(header(&response.await.unwrap(), "x-gateway-destination-endpoint-served"), "b");
    assert_eq!(gateway.get("/health").await.0, 200);
}

#[tokio::test]
async fn an_engine_that_breaks_off_is_told_from_one_that_is_not_there() {
    let mut engine = Engine::start(0).await;
    let gateway = Running::start(GatewayConfig::default(), vec![engine.backend("a")]).await;
    let response = gateway.spawn(gateway.chat());
    drop(engine.call().await.reply);
    let response = response.await.unwrap();
    assert_eq!(response.status(), 502);
    assert!(text(response).await.contains("broke off"));
    // It still gets requests, without a scrape in between to bring it back.
    let next = gateway.spawn(gateway.chat());
    engine.call().await.reply.send(json(200, "{}")).unwrap();
    assert_eq!(next.await.unwrap().status(), 200);
    let (_, spans) = gateway.stop().done().await;
    let found = errors(&spans);
    assert!(found.contains(&"gateway.request connection_reset".to_owned()), "{found:?}");
    assert!(found.iter().all(|e| !e.ends_with("connection_failed")), "{found:?}");
}

#[tokio::test]
async fn refusals_have_openais_shape() {
    let engine = Engine::start(9).await;
    let mut config = GatewayConfig::default();
    config.objectives.insert("batch".into(), -1);
    config.limits.max_body_bytes = 1024;
    let gateway = Running::start(config, vec![engine.backend("a")]).await;
    let big: &'static str = Box::leak(format!(r#"{{"prompt":"{}"}}"#, "x".repeat(2000)).into_boxed_str());
    let check = async |path: &str, body: &'static str, status: u16, kind: &str, reason: &str| {
        let mut request = gateway.post(path, body);
        request.headers_mut().insert("x-llm-d-inference-objective", "batch".parse().unwrap());
        let response = gateway.send(request).await;
        assert_eq!(response.status(), status, "{path} {body}");
        assert_eq!(header(&response, "x-llm-d-request-dropped-reason"), reason);
        assert_eq!(header(&response, "content-type"), "application/json");
        let body: serde_json::Value = serde_json::from_str(&text(response).await).unwrap();
        let error = body["error"].as_object().unwrap();
        assert_eq!(error.keys().collect::<Vec<_>>(), ["code", "message", "param", "type"]);
        assert_eq!((error["code"].as_u64(), error["type"].as_str()), (Some(u64::from(status)), Some(kind)));
    };
    check("/v1/chat/completions", "{", 400, "BadRequestError", "").await;
    check("/v1/completions", r#"["m"]"#, 400, "BadRequestError", "").await;
    check("/v1/completions", r#"{"model":"x","prompt":"p"}"#, 404, "NotFoundError", "").await;
    check("/v1/completions", big, 413, "RequestEntityTooLargeError", "").await;
    check("/v1/completions", r#"{"model":"m","prompt":"p"}"#, 429, "TooManyRequestsError", "rejected-saturated").await;
    check("/elsewhere", "", 404, "NotFoundError", "").await;
    let (stats, spans) = gateway.stop().done().await;
    assert_eq!((stats.received, stats.client_errors, stats.rejected), (5, 5, 2));
    assert_eq!(errors(&spans), [""; 0], "a caller's mistake is no error of the gateway");
}

#[tokio::test]
async fn without_an_available_endpoint_the_answer_is_503() {
    let gateway = Running::start(GatewayConfig::default(), vec![dead("a").await]).await;
    let response = gateway.send(gateway.chat()).await;
    assert_eq!(response.status(), 503);
    assert_eq!(header(&response, "x-llm-d-request-dropped-reason"), "rejected-no-endpoints");
    let (_, spans) = gateway.stop().done().await;
    assert_eq!(errors(&spans), ["gateway.director.handle_request rejected-no-endpoints", "gateway.request 503"]);
}

#[tokio::test]
async fn a_caller_that_goes_away_before_the_answer_stops_the_engine() {
    let mut engine = Engine::start(0).await;
    let gateway = Running::start(GatewayConfig::default(), vec![engine.backend("a")]).await;
    let response = gateway.spawn(gateway.chat());
    let mut call = engine.call().await;
    response.abort();
    // The engine's handler is dropped because its connection is closed.
    call.reply.closed().await;
    let (stats, spans) = gateway.stop().done().await;
    assert_eq!((stats.disconnected, stats.active), (1, 0));
    assert_eq!(events(&spans), ["gateway.client_disconnected"]);
    assert_eq!(errors(&spans), [""; 0]);
}

#[tokio::test]
async fn a_caller_that_goes_away_in_a_stream_stops_the_engine() {
    let mut engine = Engine::start(0).await;
    let gateway = Running::start(GatewayConfig::default(), vec![engine.backend("a")]).await;
    let response = gateway.spawn(gateway.chat());
    let (pieces, reply) = stream();
    engine.call().await.reply.send(reply).unwrap();
    let mut response = response.await.unwrap();
    pieces.send(Bytes::from_static(b"data: {}\n\n")).await.unwrap();
    response.body_mut().frame().await.unwrap().unwrap();
    drop(response);
    pieces.closed().await;
    let (stats, spans) = gateway.stop().done().await;
    assert_eq!((stats.disconnected, stats.active, stats.broken), (1, 0, 0));
    assert_eq!(events(&spans), ["gateway.first_token", "gateway.client_disconnected"]);
    assert_eq!(errors(&spans), [""; 0]);
}

#[tokio::test]
async fn an_engine_without_an_answer_in_time_is_a_504() {
    let mut engine = Engine::start(0).await;
    let mut config = GatewayConfig::default();
    config.timeouts.response_head = HumanDur::millis(20);
    let gateway = Running::start(config, vec![engine.backend("a")]).await;
    let response = gateway.spawn(gateway.chat());
    let mut call = engine.call().await;
    assert_eq!(response.await.unwrap().status(), 504);
    call.reply.closed().await;
    let (_, spans) = gateway.stop().done().await;
    assert_eq!(errors(&spans), ["gateway.backend.proxy timeout", "gateway.request timeout"]);
}

#[tokio::test]
async fn a_connection_that_never_gets_to_tls_is_given_up() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}", silent.local_addr().unwrap());
    let mut config = careless();
    config.timeouts.connect = HumanDur::millis(50);
    let gateway = Running::start(config, vec![Backend::new("silent", &url).unwrap()]).await;
    assert_eq!(gateway.send(gateway.chat()).await.status(), 504);
    let (_, spans) = gateway.stop().done().await;
    assert_eq!(errors(&spans)[0], "gateway.backend.proxy timeout");
}

#[tokio::test]
async fn a_stream_that_takes_too_long_is_cut_off() {
    let mut engine = Engine::start(0).await;
    let mut config = GatewayConfig::default();
    config.timeouts.total = HumanDur::millis(100);
    let gateway = Running::start(config, vec![engine.backend("a")]).await;
    let response = gateway.spawn(gateway.chat());
    let (pieces, reply) = stream();
    engine.call().await.reply.send(reply).unwrap();
    let response = response.await.unwrap();
    assert_eq!(response.status(), 200);
    assert!(response.into_body().collect().await.is_err());
    pieces.closed().await;
    let (stats, spans) = gateway.stop().done().await;
    assert_eq!(stats.broken, 1);
    let expect = ["gateway.backend.proxy timeout", "gateway.request timeout", "gateway.response.process timeout"];
    assert_eq!(errors(&spans), expect);
}

/// Sends text on a connection of its own, as a caller that does no more than the test says.
async fn raw(gateway: &Running, text: &str) -> TcpStream {
    let mut caller = TcpStream::connect(gateway.addr).await.unwrap();
    caller.write_all(text.as_bytes()).await.unwrap();
    caller
}

fn hasty(total: u64) -> GatewayConfig {
    let mut config = GatewayConfig::default();
    config.timeouts.total = HumanDur::millis(total);
    config.timeouts.drain = HumanDur::millis(20);
    config
}

#[tokio::test]
async fn a_body_that_does_not_come_in_time_is_a_408() {
    let engine = Engine::start(0).await;
    let gateway = Running::start(hasty(50), vec![engine.backend("a")]).await;
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\ncontent-length: 9\r\n\r\n{";
    let mut caller = raw(&gateway, head).await;
    let mut answer = String::new();
    caller.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    let (stats, spans) = gateway.stop().done().await;
    assert_eq!((stats.client_errors, stats.active), (1, 0));
    assert_eq!(errors(&spans), [""; 0]);
}

#[tokio::test]
async fn a_caller_that_reads_nothing_does_not_hold_the_engine() {
    let mut engine = Engine::start(0).await;
    let gateway = Running::start(hasty(200), vec![engine.backend("a")]).await;
    let length = CHAT.len();
    let head = format!("POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\ncontent-length: {length}\r\n\r\n{CHAT}");
    let caller = raw(&gateway, &head).await;
    let (pieces, reply) = stream();
    engine.call().await.reply.send(reply).unwrap();
    let piece = Bytes::from(vec![b'x'; 1 << 20]);
    // Buffers fill up, then nothing moves until the gateway lets go of the engine.
    while pieces.send(piece.clone()).await.is_ok() {}
    let (stats, spans) = gateway.stop().done().await;
    assert_eq!((stats.broken, stats.disconnected, stats.active), (1, 0, 0));
    let expect = ["gateway.backend.proxy timeout", "gateway.request timeout", "gateway.response.process timeout"];
    assert_eq!(errors(&spans), expect);
    drop(caller);
}

#[tokio::test]
async fn connections_beyond_the_limit_wait() {
    let engine = Engine::start(0).await;
    let mut config = GatewayConfig::default();
    config.limits.max_connections = 1;
    let gateway = Running::start(config, vec![engine.backend("a")]).await;
    let ask = "GET /health HTTP/1.1\r\nhost: h\r\n\r\n";
    let mut first = raw(&gateway, ask).await;
    let mut answer = [0; 12];
    first.read_exact(&mut answer).await.unwrap();
    let mut second = raw(&gateway, ask).await;
    for _ in 0..100 {
        first.write_all(ask.as_bytes()).await.unwrap();
        first.read_exact(&mut answer).await.unwrap();
    }
    let early = second.try_read(&mut answer).map_err(|e| e.kind());
    assert_eq!(early, Err(std::io::ErrorKind::WouldBlock));
    drop(first);
    second.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200");
}

#[tokio::test]
async fn requests_in_flight_finish_while_the_gateway_drains() {
    let mut engine = Engine::start(0).await;
    let gateway = Running::start(GatewayConfig::default(), vec![engine.backend("a")]).await;
    let response = gateway.spawn(gateway.chat());
    let (pieces, reply) = stream();
    engine.call().await.reply.send(reply).unwrap();
    let mut response = response.await.unwrap();
    let addr = gateway.addr;
    let stopping = gateway.stop();
    while tokio::net::TcpStream::connect(addr).await.is_ok() {
        tokio::task::yield_now().await;
    }
    pieces.send(Bytes::from_static(b"data: {}\n\n")).await.unwrap();
    drop(pieces);
    assert!(response.body_mut().frame().await.unwrap().is_ok());
    assert!(response.body_mut().frame().await.is_none());
    let (stats, spans) = stopping.done().await;
    assert_eq!((stats.succeeded, stats.active, stats.disconnected, spans.len()), (1, 0, 0, 12));
}

#[tokio::test]
async fn a_drain_ends_even_if_a_request_does_not() {
    let mut engine = Engine::start(0).await;
    let mut config = GatewayConfig::default();
    config.timeouts.drain = HumanDur::millis(20);
    let gateway = Running::start(config, vec![engine.backend("a")]).await;
    let response = gateway.spawn(gateway.chat());
    let (pieces, reply) = stream();
    engine.call().await.reply.send(reply).unwrap();
    let response = response.await.unwrap();
    let (stats, spans) = gateway.stop().done().await;
    assert_eq!((stats.active, stats.disconnected, spans.len()), (0, 0, 12));
    let expect = ["gateway.backend.proxy abandoned", "gateway.request abandoned", "gateway.response.process abandoned"];
    assert_eq!((errors(&spans), events(&spans)), (expect.map(String::from).to_vec(), vec![]));
    pieces.closed().await;
    assert!(response.into_body().collect().await.is_err());
}
