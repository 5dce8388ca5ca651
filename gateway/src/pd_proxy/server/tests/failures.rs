//! What goes wrong, and what the caller and the trace see of it.

use bytes::Bytes;
use http_body_util::BodyExt;
use shared::units::HumanDur;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::engines::{Engine, json, nobody, stream, text as body_of};
use super::harness::{BODY, Sidecar, errors, named, prefilled, text};
use crate::pd_proxy::core::{Failure, PdProxyConfig, Reason};
use crate::server::Backend;

fn hasty(retries: u32) -> PdProxyConfig {
    let backoff = HumanDur::millis(1);
    PdProxyConfig { prefill_max_retries: retries, prefill_retry_backoff: backoff, ..PdProxyConfig::default() }
}

/// A sidecar whose engine to prefill is not there.
async fn alone(retries: u32) -> (Sidecar, String) {
    let (prefill, decode) = (Engine::start(0).await, Engine::start(0).await);
    let gone = nobody().await.to_string();
    let engine = Backend::new("engine-0", &format!("http://{}", decode.addr)).unwrap();
    (Sidecar::before(hasty(retries), engine, &gone, prefill, decode).await, gone)
}

#[tokio::test]
async fn an_engine_that_is_not_there_to_prefill_is_a_502() {
    let (sidecar, gone) = alone(0).await;
    let response = sidecar.send(sidecar.to(&gone, BODY)).await;
    assert_eq!(response.status(), 502);
    assert!(body_of(response).await.contains("The engine that prefills could not be reached."));
    let (done, spans) = sidecar.done().await;
    assert_eq!((done[0].prefill_failed, done[0].status), (true, Some(502)));
    let what = "connection_failed";
    assert_eq!(errors(&spans), ["backend", "prefill", "request"].map(|s| format!("pd_proxy.{s} {what}")));
    assert!(named(&spans, "pd_proxy.decode").is_empty());
}

#[tokio::test]
async fn a_connection_that_is_refused_is_tried_again() {
    let (sidecar, gone) = alone(2).await;
    assert_eq!(sidecar.send(sidecar.to(&gone, BODY)).await.status(), 502);
    let (done, spans) = sidecar.done().await;
    assert_eq!((done[0].prefill_attempts, named(&spans, "pd_proxy.backend").len()), (3, 3));
}

#[tokio::test]
async fn a_503_is_tried_again_and_then_good() {
    let mut sidecar = Sidecar::start(hasty(1)).await;
    let response = sidecar.spawn(sidecar.disaggregated());
    let first = sidecar.prefill.call().await;
    first.reply.send(json(503, r#"{"error":{"message":"the-secret-answer"}}"#)).unwrap();
    let second = sidecar.prefill.call().await;
    assert_eq!(second.body, first.body);
    assert_ne!(second.head.headers["traceparent"], first.head.headers["traceparent"]);
    second.reply.send(prefilled()).unwrap();
    sidecar.decode.call().await.reply.send(json(200, "{}")).unwrap();
    assert_eq!(response.await.unwrap().status(), 200);
    let (done, spans) = sidecar.done().await;
    assert_eq!((done[0].prefill_attempts, done[0].prefill_failed, done[0].failure), (2, false, None));
    assert_eq!(errors(&spans), ["pd_proxy.backend 503"]);
    let resent =
        named(&spans, "pd_proxy.backend").iter().filter(|s| s.get("http.request.resend_count").is_some()).count();
    assert_eq!(resent, 1);
}

#[tokio::test]
async fn what_an_engine_refuses_to_prefill_is_told_as_it_says() {
    for (status, retries) in [(503, 0), (400, 3), (429, 3)] {
        let mut sidecar = Sidecar::start(hasty(retries)).await;
        let response = sidecar.spawn(sidecar.disaggregated());
        sidecar.prefill.call().await.reply.send(json(status, r#"{"error":{"code":7}}"#)).unwrap();
        let response = response.await.unwrap();
        assert_eq!(response.status(), status);
        assert_eq!(body_of(response).await, r#"{"error":{"code":7}}"#);
        let (done, spans) = sidecar.done().await;
        assert_eq!((done[0].prefill_attempts, done[0].prefill_failed), (1, true));
        let expect = |part: &str| format!("pd_proxy.{part} {status}");
        // A caller's mistake is no error of the proxy.
        let failed = if status < 500 { vec!["backend", "prefill"] } else { vec!["backend", "prefill", "request"] };
        assert_eq!(errors(&spans), failed.into_iter().map(expect).collect::<Vec<_>>());
    }
}

#[tokio::test]
async fn a_target_outside_of_the_pool_is_forbidden() {
    let elsewhere = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let sidecar = Sidecar::start(PdProxyConfig::default()).await;
    let target = elsewhere.local_addr().unwrap().to_string();
    // Even where the body is no good: nothing is looked at for such a target.
    for body in [BODY, "{"] {
        let response = sidecar.send(sidecar.to(&target, body)).await;
        assert_eq!(response.status(), 403);
        assert!(body_of(response).await.contains(r#""type":"ForbiddenError""#));
    }
    let called = tokio::time::timeout(std::time::Duration::from_millis(20), elsewhere.accept()).await;
    assert!(called.is_err(), "nobody was called");
    let (done, spans) = sidecar.done().await;
    assert!(done.iter().all(|d| d.reason == Reason::ForbiddenTarget));
    assert_eq!(text(&spans, "pd_proxy.request", "pd_proxy.reason"), "forbidden_target");
    assert_eq!((errors(&spans), spans.len()), (vec![], 2));
}

#[tokio::test]
async fn what_cannot_be_prefilled_elsewhere_is_a_400() {
    let sidecar = Sidecar::start(PdProxyConfig::default()).await;
    let good = sidecar.prefill.addr.to_string();
    for (target, body) in
        [(good.as_str(), "{\"prompt\":\"the-secret-prompt\""), (good.as_str(), "[]"), ("http://x", BODY)]
    {
        let response = sidecar.send(sidecar.to(target, body)).await;
        assert_eq!(response.status(), 400, "{target} {body}");
        assert!(!body_of(response).await.contains("secret"));
    }
    let (done, _) = sidecar.done().await;
    let reasons: Vec<_> = done.iter().map(|d| d.reason).collect();
    assert_eq!(reasons, [Reason::BadBody, Reason::BadBody, Reason::BadTarget]);
}

#[tokio::test]
async fn an_answer_to_a_prefill_has_to_be_readable() {
    let mut config = PdProxyConfig::default();
    config.limits.max_prefill_answer_bytes = 1024;
    let big: &'static str = Box::leak(format!(r#"{{"x":"{}"}}"#, "x".repeat(2000)).into_boxed_str());
    for bad in ["the-secret-answer", big] {
        let mut sidecar = Sidecar::start(config.clone()).await;
        let response = sidecar.spawn(sidecar.disaggregated());
        sidecar.prefill.call().await.reply.send(json(200, bad)).unwrap();
        assert_eq!(response.await.unwrap().status(), 502);
        let (done, spans) = sidecar.done().await;
        assert_eq!(done[0].failure, Some(Failure::BadAnswer));
        assert_eq!(errors(&spans), ["backend", "prefill", "request"].map(|s| format!("pd_proxy.{s} bad_answer")));
    }
}

#[tokio::test]
async fn a_body_has_a_limit() {
    let mut config = PdProxyConfig::default();
    config.limits.max_body_bytes = 1024;
    let sidecar = Sidecar::start(config).await;
    let big: &'static str = Box::leak(format!(r#"{{"prompt":"{}"}}"#, "x".repeat(2000)).into_boxed_str());
    assert_eq!(sidecar.send(sidecar.request(big)).await.status(), 413);
    let (done, _) = sidecar.done().await;
    assert_eq!((done[0].reason, done[0].status), (Reason::Undecided, Some(413)));
}

#[tokio::test]
async fn a_prefill_has_a_time_limit() {
    let mut config = PdProxyConfig::default();
    config.timeouts.prefill = HumanDur::millis(20);
    let mut sidecar = Sidecar::start(config).await;
    let response = sidecar.spawn(sidecar.disaggregated());
    let mut call = sidecar.prefill.call().await;
    assert_eq!(response.await.unwrap().status(), 504);
    call.reply.closed().await;
    let (_, spans) = sidecar.done().await;
    assert_eq!(errors(&spans), ["backend", "prefill", "request"].map(|s| format!("pd_proxy.{s} timeout")));
}

#[tokio::test]
async fn a_request_has_a_time_limit_wherever_it_is() {
    let config = |total| {
        let mut config = PdProxyConfig::default();
        config.timeouts.total = HumanDur::millis(total);
        config
    };
    // During its body.
    let sidecar = Sidecar::start(config(50)).await;
    let mut caller = TcpStream::connect(sidecar.addr).await.unwrap();
    caller.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: h\r\ncontent-length: 9\r\n\r\n{").await.unwrap();
    let mut answer = [0; 12];
    caller.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 408");
    drop(caller);
    sidecar.done().await;
    // During the prefill.
    let mut sidecar = Sidecar::start(config(50)).await;
    let response = sidecar.spawn(sidecar.disaggregated());
    let mut call = sidecar.prefill.call().await;
    assert_eq!(response.await.unwrap().status(), 504);
    call.reply.closed().await;
    sidecar.done().await;
    // During the answer.
    let mut sidecar = Sidecar::start(config(200)).await;
    let response = sidecar.spawn(sidecar.request(BODY));
    let (pieces, reply) = stream();
    sidecar.decode.call().await.reply.send(reply).unwrap();
    let response = response.await.unwrap();
    assert_eq!(response.status(), 200);
    assert!(response.into_body().collect().await.is_err());
    pieces.closed().await;
    let (_, spans) = sidecar.done().await;
    assert_eq!(errors(&spans), ["backend", "decode", "request"].map(|s| format!("pd_proxy.{s} timeout")));
}

#[tokio::test]
async fn an_engine_that_is_not_there_to_decode_is_a_502() {
    let (prefill, decode) = (Engine::start(0).await, Engine::start(0).await);
    let engine = Backend::new("engine-0", &format!("http://{}", nobody().await)).unwrap();
    let pool = prefill.addr.to_string();
    let mut sidecar = Sidecar::before(hasty(0), engine, &pool, prefill, decode).await;
    let response = sidecar.spawn(sidecar.disaggregated());
    sidecar.prefill.call().await.reply.send(prefilled()).unwrap();
    let response = response.await.unwrap();
    assert_eq!(response.status(), 502);
    assert!(body_of(response).await.contains("The engine could not be reached."));
    let (_, spans) = sidecar.done().await;
    let what = "connection_failed";
    assert_eq!(errors(&spans), ["backend", "decode", "request"].map(|s| format!("pd_proxy.{s} {what}")));
}

#[tokio::test]
async fn a_decode_that_dies_in_its_stream_breaks_the_answer_off() {
    let dying = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let engine = Backend::new("engine-0", &format!("http://{}", dying.local_addr().unwrap())).unwrap();
    let (prefill, decode) = (Engine::start(0).await, Engine::start(0).await);
    let pool = prefill.addr.to_string();
    let mut sidecar = Sidecar::before(hasty(0), engine, &pool, prefill, decode).await;
    let response = sidecar.spawn(sidecar.disaggregated());
    sidecar.prefill.call().await.reply.send(prefilled()).unwrap();
    let (mut connection, _) = dying.accept().await.unwrap();
    let mut request = vec![0; 8192];
    let _ = connection.read(&mut request).await.unwrap();
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    connection.write_all(format!("{head}8\r\ndata: x\n\r\n").as_bytes()).await.unwrap();
    let mut response = response.await.unwrap();
    assert_eq!(response.body_mut().frame().await.unwrap().unwrap().into_data().unwrap(), "data: x\n");
    drop(connection);
    assert!(response.body_mut().frame().await.unwrap().is_err(), "the caller sees that it is not whole");
    let (done, spans) = sidecar.done().await;
    assert_eq!((done[0].status, done[0].failure), (Some(200), Some(Failure::Reset)));
    let what = "connection_reset";
    assert_eq!(errors(&spans), ["backend", "decode", "request"].map(|s| format!("pd_proxy.{s} {what}")));
}

#[tokio::test]
async fn a_caller_that_goes_away_stops_whichever_engine_is_at_work() {
    // In the prefill: the engine is let go, and nobody decodes.
    let mut sidecar = Sidecar::start(PdProxyConfig::default()).await;
    let response = sidecar.spawn(sidecar.disaggregated());
    let mut call = sidecar.prefill.call().await;
    response.abort();
    call.reply.closed().await;
    let (done, spans) = sidecar.done().await;
    assert_eq!((done[0].failure, done[0].times.decode), (Some(Failure::Cancelled), None));
    assert_eq!(errors(&spans), [""; 0]);
    let root = named(&spans, "pd_proxy.request")[0];
    assert_eq!(root.events[0].name, "pd_proxy.client_disconnected");
    assert_eq!(root.get("pd_proxy.late"), Some(&shared::trace::Value::Bool(true)));
    // In the stream.
    let mut sidecar = Sidecar::start(PdProxyConfig::default()).await;
    let response = sidecar.spawn(sidecar.disaggregated());
    sidecar.prefill.call().await.reply.send(prefilled()).unwrap();
    let (pieces, reply) = stream();
    sidecar.decode.call().await.reply.send(reply).unwrap();
    let mut response = response.await.unwrap();
    pieces.send(Bytes::from_static(b"data: {}\n\n")).await.unwrap();
    response.body_mut().frame().await.unwrap().unwrap();
    drop(response);
    pieces.closed().await;
    let (done, spans) = sidecar.done().await;
    assert_eq!((done[0].failure, done[0].status), (Some(Failure::Cancelled), Some(200)));
    assert!(done[0].times.first_byte.is_some());
    assert_eq!(errors(&spans), [""; 0]);
}

#[tokio::test]
async fn a_drain_ends_even_if_a_request_does_not() {
    let mut config = PdProxyConfig::default();
    config.timeouts.drain = HumanDur::millis(20);
    let mut sidecar = Sidecar::start(config).await;
    let response = sidecar.spawn(sidecar.request(BODY));
    let (pieces, reply) = stream();
    sidecar.decode.call().await.reply.send(reply).unwrap();
    let response = response.await.unwrap();
    let (done, spans) = sidecar.done().await;
    assert_eq!(done[0].failure, Some(Failure::Abandoned));
    assert_eq!(errors(&spans), ["backend", "decode", "request"].map(|s| format!("pd_proxy.{s} abandoned")));
    pieces.closed().await;
    assert!(response.into_body().collect().await.is_err());
}

/// Calls to an engine share connections.
#[tokio::test]
async fn connections_are_used_again() {
    let engine = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let backend = Backend::new("engine-0", &format!("http://{}", engine.local_addr().unwrap())).unwrap();
    let (prefill, decode) = (Engine::start(0).await, Engine::start(0).await);
    let pool = prefill.addr.to_string();
    let sidecar = Sidecar::before(hasty(0), backend, &pool, prefill, decode).await;
    let serve = async {
        let (mut connection, _) = engine.accept().await.unwrap();
        for _ in 0..3 {
            let mut request = vec![0; 8192];
            let _ = connection.read(&mut request).await.unwrap();
            connection.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").await.unwrap();
        }
        connection
    };
    let ask = async {
        for _ in 0..3 {
            body_of(sidecar.send(sidecar.request(BODY)).await).await;
        }
    };
    // Only one connection is ever accepted.
    let (connection, ()) = tokio::join!(serve, ask);
    drop(connection);
    let (done, _) = sidecar.done().await;
    assert_eq!(done.len(), 3);
}
