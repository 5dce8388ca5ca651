//! Requests that wait in the gateway, on real sockets.

use http::HeaderValue;
use shared::trace::Span;
use shared::units::HumanDur;

use super::harness::{Engine, Running, header, json, text};
use crate::core::config::{ConcurrencyConfig, Detector, FlowControlConfig, GatewayConfig};

/// One request at a time; the others wait so long.
fn one_at_a_time(ttl: HumanDur) -> GatewayConfig {
    let mut config = GatewayConfig::default();
    config.saturation.detector = Detector::ConcurrencyDetector;
    config.saturation.concurrency = ConcurrencyConfig { max_requests: 1, ..ConcurrencyConfig::default() };
    config.flow_control =
        Some(FlowControlConfig { enabled: true, default_request_ttl: ttl, ..FlowControlConfig::default() });
    config.objectives = [("high".into(), 1)].into();
    config
}

const LONG: HumanDur = HumanDur::secs(60);
const REASON: &str = "x-llm-d-request-dropped-reason";
const QUEUED: &str = "x-llm-d-flow-queue-duration-ms";

/// Until so many requests wait.
async fn until_waiting(gateway: &Running, n: usize) {
    let line = format!("gateway_flow_control_queue_size {n}\n");
    while !gateway.get("/metrics").await.1.contains(&line) {
        tokio::task::yield_now().await;
    }
}

fn results(spans: &[Span]) -> Vec<&str> {
    let of = spans.iter().filter(|s| s.name == "gateway.flowcontrol.dispatch");
    of.filter_map(|s| s.get("gateway.flow_control.result")?.as_str()).collect()
}

#[tokio::test]
async fn the_next_one_is_the_most_important_that_waits() {
    let mut engine = Engine::start(0).await;
    let gateway = Running::start(one_at_a_time(LONG), vec![engine.backend("a")]).await;
    let first = gateway.spawn(gateway.chat());
    let call = engine.call().await;
    let second = gateway.spawn(gateway.chat());
    until_waiting(&gateway, 1).await;
    let mut important = gateway.chat();
    important.headers_mut().insert("x-llm-d-inference-objective", HeaderValue::from_static("high"));
    important.headers_mut().insert("x-request-id", HeaderValue::from_static("important"));
    let third = gateway.spawn(important);
    until_waiting(&gateway, 2).await;
    call.reply.send(json(200, "{}")).unwrap();
    let first = first.await.unwrap();
    assert_eq!(header(&first, QUEUED), "0");
    text(first).await;
    let call = engine.call().await;
    assert_eq!(call.head.headers["x-request-id"], "important");
    call.reply.send(json(200, "{}")).unwrap();
    let third = third.await.unwrap();
    assert!(header(&third, QUEUED).parse::<u64>().is_ok(), "{third:?}");
    text(third).await;
    engine.call().await.reply.send(json(200, "{}")).unwrap();
    text(second.await.unwrap()).await;
    let (stats, spans) = gateway.stop().done().await;
    assert_eq!((stats.succeeded, stats.rejected, stats.active), (3, 0, 0));
    assert_eq!(results(&spans), ["dispatched"; 3]);
}

#[tokio::test]
async fn waiting_too_long_is_answered_with_429_and_the_reason() {
    let mut engine = Engine::start(0).await;
    let gateway = Running::start(one_at_a_time(HumanDur::millis(20)), vec![engine.backend("a")]).await;
    let first = gateway.spawn(gateway.chat());
    let call = engine.call().await;
    let refused = gateway.send(gateway.chat()).await;
    assert_eq!((refused.status().as_u16(), header(&refused, REASON).as_str()), (429, "rejected-ttl-expired"));
    assert!(header(&refused, QUEUED).parse::<u64>().unwrap() >= 20);
    assert!(text(refused).await.contains(r#""type":"TooManyRequestsError""#));
    // One that wants to wait even less.
    let mut hasty = gateway.chat();
    hasty.headers_mut().insert("x-llm-d-inference-ttl", HeaderValue::from_static("1ms"));
    assert_eq!(header(&gateway.send(hasty).await, REASON), "rejected-ttl-expired");
    call.reply.send(json(200, "{}")).unwrap();
    text(first.await.unwrap()).await;
    assert!(gateway.get("/metrics").await.1.contains("gateway_dropped_total{reason=\"rejected-ttl-expired\"} 2"));
    let (stats, spans) = gateway.stop().done().await;
    assert_eq!((stats.succeeded, stats.client_errors, stats.rejected), (1, 2, 2));
    assert_eq!(results(&spans), ["timeout", "timeout", "dispatched"]);
}

#[tokio::test]
async fn a_caller_that_goes_away_gives_its_place_up() {
    let mut engine = Engine::start(0).await;
    let gateway = Running::start(one_at_a_time(LONG), vec![engine.backend("a")]).await;
    let first = gateway.spawn(gateway.chat());
    let call = engine.call().await;
    let second = gateway.spawn(gateway.chat());
    until_waiting(&gateway, 1).await;
    second.abort();
    until_waiting(&gateway, 0).await;
    call.reply.send(json(200, "{}")).unwrap();
    text(first.await.unwrap()).await;
    let (stats, spans) = gateway.stop().done().await;
    assert_eq!((stats.succeeded, stats.disconnected, stats.active), (1, 1, 0));
    assert_eq!(results(&spans), ["cancelled", "dispatched"]);
}

#[tokio::test]
async fn a_gateway_that_stops_refuses_what_waits_and_finishes_what_runs() {
    let mut engine = Engine::start(0).await;
    let gateway = Running::start(one_at_a_time(LONG), vec![engine.backend("a")]).await;
    let first = gateway.spawn(gateway.chat());
    let call = engine.call().await;
    let second = gateway.spawn(gateway.chat());
    until_waiting(&gateway, 1).await;
    let stopping = gateway.stop();
    let refused = second.await.unwrap();
    assert_eq!((refused.status().as_u16(), header(&refused, REASON).as_str()), (503, "rejected-shutting-down"));
    call.reply.send(json(200, "{}")).unwrap();
    assert_eq!(first.await.unwrap().status(), 200);
    let (stats, spans) = stopping.done().await;
    assert_eq!((stats.succeeded, stats.server_errors), (1, 1));
    assert_eq!(results(&spans), ["shutdown", "dispatched"]);
}

#[tokio::test]
async fn the_whole_request_has_a_time_limit_while_it_waits() {
    let mut engine = Engine::start(0).await;
    let mut config = one_at_a_time(HumanDur::default());
    config.timeouts.total = HumanDur::millis(300);
    let gateway = Running::start(config, vec![engine.backend("a")]).await;
    let first = gateway.spawn(gateway.chat());
    let call = engine.call().await;
    let late = gateway.send(gateway.chat()).await;
    assert_eq!(late.status(), 504);
    assert!(gateway.get("/metrics").await.1.contains("gateway_flow_control_queue_size 0\n"));
    drop(call);
    first.abort();
}
