//! A second attempt while the first one has not answered.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt;
use shared::trace::{Span, Status, Value};
use shared::units::HumanDur;

use super::harness::{Engine, Running, header, json, named, stream, text};
use crate::core::config::{GatewayConfig, HedgeAfter, HedgeConfig};

/// Two engines of which the first one is idle and so is asked first; another one is asked after so many milliseconds.
async fn two(after_ms: u64) -> (Engine, Engine, Running) {
    let (a, b) = (Engine::start(0).await, Engine::start(9).await);
    let mut config = GatewayConfig::default();
    config.retry.hedge = Some(HedgeConfig { after: HedgeAfter::Fixed(HumanDur::millis(after_ms)) });
    let gateway = Running::start(config, vec![a.backend("a"), b.backend("b")]).await;
    (a, b, gateway)
}

fn served_by<T>(response: &http::Response<T>) -> String {
    header(response, "x-gateway-destination-endpoint-served")
}

/// The attempts at `a` and `b`, which overlap; of these the one at `loser` was cancelled, which is no error.
fn check_race(spans: &[Span], loser: &str) {
    let attempts = named(spans, "gateway.backend.proxy");
    let of = |name: &str| {
        let at = |s: &&&Span| s.get("gateway.backend.endpoint.name").and_then(Value::as_str) == Some(name);
        *attempts.iter().find(at).unwrap_or_else(|| panic!("no attempt at {name}: {attempts:?}"))
    };
    let (a, b) = (of("a"), of("b"));
    assert_eq!(attempts.len(), 2);
    assert!(a.start < b.start && b.start < a.end, "they overlap: {a:?} {b:?}");
    for (span, name) in [(a, "a"), (b, "b")] {
        let cancelled = span.get("gateway.backend.cancelled") == Some(&Value::Bool(true));
        assert_eq!(cancelled, name == loser, "{span:?}");
        assert_eq!(span.status, Status::Unset, "{span:?}");
        assert_eq!(span.get("http.response.status_code").is_some(), name != loser, "{span:?}");
    }
    let events: Vec<_> = spans.iter().flat_map(|s| &s.events).map(|e| e.name.as_ref()).collect();
    assert_eq!(events.iter().filter(|e| **e == "gateway.hedge").count(), 1, "{events:?}");
}

#[tokio::test]
async fn the_second_answers_for_one_that_hangs() {
    let (mut a, mut b, gateway) = two(20).await;
    let response = gateway.spawn(gateway.chat());
    let mut hangs = a.call().await;
    b.call().await.reply.send(json(200, r#"{"from":"b"}"#)).unwrap();
    let response = response.await.unwrap();
    assert_eq!((response.status().as_u16(), served_by(&response).as_str()), (200, "b"));
    assert_eq!(text(response).await, r#"{"from":"b"}"#);
    // Its connection is closed, so that the engine aborts.
    hangs.reply.closed().await;
    let (_, metrics) = gateway.get("/metrics").await;
    assert!(
        metrics.contains("\ngateway_hedges_total 1\n") && metrics.contains("\ngateway_retries_total 0\n"),
        "{metrics}"
    );
    let (stats, spans) = gateway.stop().done().await;
    assert_eq!((stats.succeeded, stats.disconnected, stats.active), (1, 0, 0));
    check_race(&spans, "a");
}

#[tokio::test]
async fn the_first_may_still_win() {
    let (mut a, mut b, gateway) = two(20).await;
    let response = gateway.spawn(gateway.chat());
    let first = a.call().await;
    let mut second = b.call().await;
    let (pieces, reply) = stream();
    first.reply.send(reply).unwrap();
    let response = response.await.unwrap();
    assert_eq!(served_by(&response), "a");
    second.reply.closed().await;
    pieces.send(Bytes::from_static(b"data: [DONE]\n\n")).await.unwrap();
    drop(pieces);
    assert_eq!(text(response).await, "data: [DONE]\n\n");
    let (stats, spans) = gateway.stop().done().await;
    assert_eq!((stats.succeeded, stats.active), (1, 0));
    check_race(&spans, "b");
}

#[tokio::test]
async fn one_that_breaks_leaves_the_other() {
    for first_breaks in [true, false] {
        let (mut a, mut b, gateway) = two(20).await;
        let response = gateway.spawn(gateway.chat());
        let (first, second) = (a.call().await, b.call().await);
        let (breaks, answers) = if first_breaks { (first, second) } else { (second, first) };
        // An engine whose task panics closes the connection.
        drop(breaks.reply);
        answers.reply.send(json(200, "{}")).unwrap();
        let response = response.await.unwrap();
        assert_eq!(served_by(&response), if first_breaks { "b" } else { "a" });
        text(response).await;
        let (stats, spans) = gateway.stop().done().await;
        assert_eq!((stats.succeeded, stats.server_errors), (1, 0));
        assert_eq!(named(&spans, "gateway.backend.proxy").len(), 2);
        assert!(named(&spans, "gateway.request")[0].status == Status::Unset);
    }
}

#[tokio::test]
async fn a_response_that_has_begun_is_never_asked_for_again() {
    let (mut a, mut b, gateway) = two(30).await;
    let response = gateway.spawn(gateway.chat());
    let (pieces, reply) = stream();
    a.call().await.reply.send(reply).unwrap();
    let response = response.await.unwrap();
    // Longer than the time after which a second attempt would be made.
    tokio::time::sleep(Duration::from_millis(90)).await;
    assert!(b.calls.try_recv().is_err(), "nobody else is asked");
    drop(pieces);
    response.into_body().collect().await.unwrap();
    let (_, spans) = gateway.stop().done().await;
    assert_eq!(named(&spans, "gateway.backend.proxy").len(), 1);
}

#[tokio::test]
async fn a_caller_that_goes_away_ends_both() {
    let (mut a, mut b, gateway) = two(20).await;
    let response = gateway.spawn(gateway.chat());
    let (mut first, mut second) = (a.call().await, b.call().await);
    response.abort();
    first.reply.closed().await;
    second.reply.closed().await;
    let (stats, spans) = gateway.stop().done().await;
    assert_eq!((stats.disconnected, stats.active), (1, 0));
    let attempts = named(&spans, "gateway.backend.proxy");
    assert!(attempts.len() == 2 && attempts.iter().all(|s| s.status == Status::Unset), "{attempts:?}");
}
