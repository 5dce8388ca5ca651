//! Engines that fail again and again: retries and their budget, ejection, circuit breaking.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::Frame;
use shared::trace::Span;
use shared::units::HumanDur;

use super::harness::{Engine, Running, header, json, named, nobody, stream, text};
use crate::core::config::GatewayConfig;
use crate::server::Backend;

/// Two engines of which the first one is idle and so is asked first.
async fn two(change: impl FnOnce(&mut GatewayConfig)) -> (Engine, Engine, Running) {
    let (a, b) = (Engine::start(0).await, Engine::start(9).await);
    let mut config = GatewayConfig::default();
    change(&mut config);
    let gateway = Running::start(config, vec![a.backend("a"), b.backend("b")]).await;
    (a, b, gateway)
}

fn served_by<T>(response: &http::Response<T>) -> String {
    header(response, "x-gateway-destination-endpoint-served")
}

fn events(spans: &[Span]) -> Vec<&str> {
    spans.iter().flat_map(|s| &s.events).map(|e| e.name.as_ref()).collect()
}

#[tokio::test]
async fn a_status_is_asked_for_elsewhere_where_that_is_configured() {
    let (mut a, mut b, gateway) = two(|c| c.retry.on_status = vec![503]).await;
    let response = gateway.spawn(gateway.chat());
    a.call().await.reply.send(json(503, r#"{"busy":true}"#)).unwrap();
    b.call().await.reply.send(json(200, "{}")).unwrap();
    let response = response.await.unwrap();
    assert_eq!((response.status().as_u16(), served_by(&response).as_str()), (200, "b"));
    text(response).await;
    let (stats, spans) = gateway.stop().done().await;
    assert_eq!((stats.retries, stats.succeeded), (1, 1));
    assert_eq!(events(&spans), ["gateway.retry"]);
    let attempts = named(&spans, "gateway.backend.proxy");
    let status = |s: &Span| s.get("http.response.status_code").and_then(shared::trace::Value::as_int);
    let mut found: Vec<_> =
        attempts.iter().map(|s| (status(s), s.get("error.type").and_then(|v| v.as_str()))).collect();
    found.sort();
    assert_eq!(found, [(Some(200), None), (Some(503), Some("503"))]);
    assert_eq!(named(&spans, "gateway.response.process").len(), 1);
}

#[tokio::test]
async fn without_anybody_else_the_engines_own_answer_is_passed_on() {
    let mut a = Engine::start(0).await;
    let mut config = GatewayConfig::default();
    config.retry.on_status = vec![503];
    let gateway = Running::start(config, vec![a.backend("a")]).await;
    let response = gateway.spawn(gateway.chat());
    a.call().await.reply.send(json(503, r#"{"busy":true}"#)).unwrap();
    let response = response.await.unwrap();
    assert_eq!((response.status().as_u16(), served_by(&response).as_str()), (503, "a"));
    assert_eq!(text(response).await, r#"{"busy":true}"#);
    let (stats, _) = gateway.stop().done().await;
    assert_eq!((stats.retries, stats.server_errors, stats.active), (0, 1, 0));
}

#[tokio::test]
async fn an_answer_that_is_late_is_asked_for_elsewhere_where_that_is_configured() {
    let (mut a, mut b, gateway) = two(|c| {
        c.timeouts.response_head = HumanDur::millis(100);
        c.retry.on_timeout = true;
    })
    .await;
    let response = gateway.spawn(gateway.chat());
    let mut late = a.call().await;
    b.call().await.reply.send(json(200, "{}")).unwrap();
    assert_eq!(served_by(&response.await.unwrap()), "b");
    late.reply.closed().await;
    let (_, spans) = gateway.stop().done().await;
    assert_eq!(named(&spans, "gateway.backend.proxy").len(), 2);
}

#[tokio::test]
async fn an_outage_is_not_made_worse_than_the_budget_allows() {
    let b = Engine::start(9).await;
    let dead = Backend::new("dead", &format!("http://{}", nobody().await)).unwrap();
    let mut config = GatewayConfig::default();
    config.profile.filters.clear();
    (config.retry.budget_ratio, config.retry.budget_min_per_second) = (0.0, 0);
    let gateway = Running::start(config, vec![dead, b.backend("b")]).await;
    assert_eq!(gateway.send(gateway.chat()).await.status(), 502);
    let (_, metrics) = gateway.get("/metrics").await;
    assert!(metrics.contains("gateway_retries_refused_total 1\n"), "{metrics}");
    let (stats, spans) = gateway.stop().done().await;
    assert_eq!((stats.retries, stats.server_errors), (0, 1));
    assert_eq!(events(&spans), ["gateway.retry_refused"]);
}

#[tokio::test]
async fn an_engine_that_fails_again_and_again_is_left_out_for_a_while() {
    let (mut a, mut b, gateway) = two(|c| {
        c.outlier_ejection.consecutive_failures = 2;
        c.outlier_ejection.base_time = HumanDur::millis(300);
    })
    .await;
    for _ in 0..2 {
        let response = gateway.spawn(gateway.chat());
        a.call().await.reply.send(json(500, "{}")).unwrap();
        assert_eq!(text(response.await.unwrap()).await, "{}");
    }
    let (_, metrics) = gateway.get("/metrics").await;
    assert!(metrics.contains("gateway_ejections_total 1\n"), "{metrics}");
    let response = gateway.spawn(gateway.chat());
    b.call().await.reply.send(json(200, "{}")).unwrap();
    assert_eq!(served_by(&response.await.unwrap()), "b");
    // Its scrapes were good all the time; it is back when its time is over.
    loop {
        let response = gateway.spawn(gateway.chat());
        tokio::select! {
            call = a.call() => {
                call.reply.send(json(200, "{}")).unwrap();
                assert_eq!(served_by(&response.await.unwrap()), "a");
                break;
            }
            call = b.call() => call.reply.send(json(200, "{}")).unwrap(),
        }
    }
}

#[tokio::test]
async fn a_full_engine_is_left_out() {
    let (mut a, mut b, gateway) = two(|c| c.limits.max_active_per_endpoint = Some(1)).await;
    let first = gateway.spawn(gateway.chat());
    let to_a = a.call().await;
    let second = gateway.spawn(gateway.chat());
    let to_b = b.call().await;
    let third = gateway.send(gateway.chat()).await;
    assert_eq!(third.status(), 503);
    for (call, response) in [(to_a, first), (to_b, second)] {
        call.reply.send(json(200, "{}")).unwrap();
        assert_eq!(text(response.await.unwrap()).await, "{}");
    }
    let again = gateway.spawn(gateway.chat());
    a.call().await.reply.send(json(200, "{}")).unwrap();
    assert_eq!(served_by(&again.await.unwrap()), "a");
}

#[tokio::test]
async fn a_stream_that_has_begun_is_never_asked_for_again() {
    let (mut a, mut b, gateway) = two(|c| {
        c.limits.retries = 8;
        c.retry.on_timeout = true;
        c.retry.on_status = (500..600).collect();
    })
    .await;
    let response = gateway.spawn(gateway.chat());
    let call = a.call().await;
    let (pieces, reply) = stream();
    let (parts, body) = reply.into_parts();
    let broken = axum::body::Body::new(Breaking(body));
    call.reply.send(http::Response::from_parts(parts, broken)).unwrap();
    let mut response = response.await.unwrap();
    pieces.send(Bytes::from_static(b"data: {}\n\n")).await.unwrap();
    response.body_mut().frame().await.unwrap().unwrap();
    drop(pieces);
    assert!(response.into_body().collect().await.is_err());
    let (stats, spans) = gateway.stop().done().await;
    assert_eq!((stats.retries, stats.broken, stats.active), (0, 1, 0));
    assert_eq!(named(&spans, "gateway.backend.proxy").len(), 1);
    assert!(b.calls.try_recv().is_err(), "nobody else was asked");
}

/// A body that breaks at its end.
struct Breaking(axum::body::Body);

impl hyper::body::Body for Breaking {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let broken = || Err(std::io::Error::other("broken"));
        let frame = Pin::new(&mut self.get_mut().0).poll_frame(cx);
        frame.map(|frame| Some(frame.map_or_else(broken, |f| f.map_err(std::io::Error::other))))
    }
}
