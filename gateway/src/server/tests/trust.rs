//! Trace context of callers that are trusted, and of those that are not.

use http_body_util::BodyExt;
use shared::trace::config::RecorderKind;
use shared::trace::{Ratio, SamplerKind, Span};

use super::harness::{Engine, Running, Tracing, json, named};
use crate::core::config::{GatewayConfig, TrustInbound};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CALLER: &str = "00f067aa0ba902b7";

/// The spans of a request with a caller's context, and the `traceparent` and `tracestate` that the engine got.
async fn asked(
    addr: &str,
    trust: Option<TrustInbound>,
    recorder: RecorderKind,
    ratio: f64,
) -> (Vec<Span>, [String; 2]) {
    let mut engine = Engine::start(0).await;
    let config = GatewayConfig { trust_inbound: trust, ..GatewayConfig::default() };
    let telemetry = |t: &mut shared::trace::TelemetryConfig| {
        t.recorder = recorder;
        t.sampler = SamplerKind::ParentBasedTraceIdRatio.with(Ratio::new(ratio).unwrap());
    };
    let gateway = Running::at(addr, Tracing::On, telemetry, config, vec![engine.backend("a")]).await;
    let mut request = gateway.chat();
    request.headers_mut().insert("traceparent", format!("00-{TRACE}-{CALLER}-01").parse().unwrap());
    request.headers_mut().insert("tracestate", "vendor=1".parse().unwrap());
    let response = gateway.spawn(request);
    let call = engine.call().await;
    let sent = ["traceparent", "tracestate"]
        .map(|name| call.head.headers.get(name).map(|v| v.to_str().unwrap().to_owned()).unwrap_or_default());
    call.reply.send(json(200, "{}")).unwrap();
    response.await.unwrap().into_body().collect().await.unwrap();
    (gateway.stop().done().await.1, sent)
}

/// What became of the caller's context: parent and links of the root.
async fn check(addr: &str, trust: Option<TrustInbound>, parent: bool, link: bool) {
    for recorder in [RecorderKind::Deferred, RecorderKind::Eager] {
        let (spans, [traceparent, tracestate]) = asked(addr, trust, recorder, 1.0).await;
        let roots = named(&spans, "gateway.request");
        let [root] = roots[..] else { panic!("one request: {roots:?}") };
        let told = format!("{addr} {trust:?} {recorder:?}");
        assert_eq!(root.parent.map(|p| p.to_string()), parent.then(|| CALLER.to_owned()), "{told}");
        assert_eq!(root.trace_id.to_string() == TRACE, parent, "{told}");
        let links: Vec<_> = root.links.iter().map(|l| (l.trace_id.to_string(), l.span_id.to_string())).collect();
        let expect = link.then(|| (TRACE.to_owned(), CALLER.to_owned()));
        assert_eq!(links, expect.into_iter().collect::<Vec<_>>(), "{told}");
        // The engine goes on from the gateway's own span, whatever the caller said.
        assert!(traceparent.starts_with(&format!("00-{}-", root.trace_id)) && !traceparent.contains(CALLER), "{told}");
        assert_eq!(tracestate == "vendor=1", parent, "{told}: {tracestate}");
    }
}

#[tokio::test]
async fn a_trusted_caller_is_the_parent() {
    check("127.0.0.1:0", Some(TrustInbound::Always), true, false).await;
}

#[tokio::test]
async fn a_caller_that_is_not_trusted_is_linked_or_forgotten() {
    check("127.0.0.1:0", Some(TrustInbound::Link), false, true).await;
    check("127.0.0.1:0", Some(TrustInbound::Never), false, false).await;
}

#[tokio::test]
async fn the_address_decides_where_nothing_else_does() {
    check("127.0.0.1:0", None, true, false).await;
    check("0.0.0.0:0", None, false, true).await;
}

#[tokio::test]
async fn only_a_trusted_caller_decides_what_is_kept() {
    for recorder in [RecorderKind::Deferred, RecorderKind::Eager] {
        for (trust, kept) in [(TrustInbound::Always, true), (TrustInbound::Link, false), (TrustInbound::Never, false)] {
            let (spans, [traceparent, _]) = asked("127.0.0.1:0", Some(trust), recorder, 0.0).await;
            assert_eq!((!spans.is_empty(), traceparent.ends_with("-01")), (kept, kept), "{trust:?} {recorder:?}");
        }
    }
}

/// With telemetry off nothing takes the place of a context that engines would believe.
#[tokio::test]
async fn without_telemetry_an_untrusted_context_stops_here() {
    let mut engine = Engine::start(0).await;
    let config = GatewayConfig { trust_inbound: Some(TrustInbound::Never), ..GatewayConfig::default() };
    let gateway = Running::with(Tracing::Off, config, vec![engine.backend("a")]).await;
    let mut request = gateway.chat();
    request.headers_mut().insert("traceparent", format!("00-{TRACE}-{CALLER}-01").parse().unwrap());
    let response = gateway.spawn(request);
    let call = engine.call().await;
    assert!(!call.head.headers.contains_key("traceparent"));
    call.reply.send(json(200, "{}")).unwrap();
    response.await.unwrap();
}

/// Scrapes have traces of their own, with their own share.
#[tokio::test]
async fn scrapes_are_recorded_on_their_own() {
    let engine = Engine::start(7).await;
    let dead = super::harness::nobody().await;
    let backends = vec![engine.backend("a"), crate::server::Backend::new("b", &format!("http://{dead}")).unwrap()];
    let telemetry = |t: &mut shared::trace::TelemetryConfig| t.scrapes = Ratio::ALL;
    let gateway = Running::at("127.0.0.1:0", Tracing::On, telemetry, GatewayConfig::default(), backends).await;
    gateway.until_ready(true).await;
    let (stats, spans) = gateway.stop().done().await;
    let of = |name: &str| {
        let is = |s: &&&Span| s.get("gateway.backend.endpoint.name").and_then(|v| v.as_str()) == Some(name);
        *named(&spans, "gateway.metrics.collect").iter().find(is).expect("a scrape")
    };
    let (good, bad) = (of("a"), of("b"));
    assert_eq!((good.parent, good.get("gateway.metrics.waiting").and_then(|v| v.as_int())), (None, Some(7)));
    assert_eq!(good.get("gateway.metrics.success"), Some(&shared::trace::Value::Bool(true)));
    assert_eq!(bad.get("error.type").and_then(|v| v.as_str()), Some("connection_failed"));
    assert!(stats.scrapes >= 2);
}
