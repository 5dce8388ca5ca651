//! Sampling at the edge beyond a ratio: what engines see of it, what they are told, and whom the gateway believes.

use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Frame;
use shared::trace::policy::{Force, Rule};
use shared::trace::verdict::{KEEP_PATH, PREEMPTIONS, read};
use shared::trace::{Keep, Policy, Ratio, SamplerKind, Span, TelemetryConfig};

use super::harness::{Call, Engine, Running, Tracing, json, named};
use crate::core::config::{GatewayConfig, TrustInbound};

/// A gateway that samples nothing by itself, and does what `policy` says.
async fn gateway(policy: Policy, trust: Option<TrustInbound>, engine: &Engine) -> Running {
    let telemetry = |t: &mut TelemetryConfig| {
        t.sampler = SamplerKind::ParentBasedTraceIdRatio.with(Ratio::NONE);
        t.hold = policy.keep.as_ref().map(Keep::hold);
        t.policy = policy;
    };
    let config = GatewayConfig { trust_inbound: trust, ..GatewayConfig::default() };
    Running::at("127.0.0.1:0", Tracing::On, telemetry, config, vec![engine.backend("a")]).await
}

fn keeping() -> Policy {
    Policy { keep: Some(Keep::default()), ..Policy::default() }
}

fn text<'c>(call: &'c Call, name: &str) -> &'c str {
    call.head.headers.get(name).map_or("", |v| v.to_str().unwrap())
}

/// The trace that an engine was asked for, and whether it is sampled.
fn trace(call: &Call) -> (String, bool) {
    let parent = text(call, "traceparent");
    (parent[3..35].to_owned(), parent.ends_with("01"))
}

fn reason(spans: &[Span]) -> Option<String> {
    let root = named(spans, "gateway.request").first().copied()?.clone();
    root.get("sampling.reason").and_then(|v| v.as_str()).map(str::to_owned)
}

/// Sends one chat request, answers it with `answer`, and returns what the engine was asked and the spans. If `told`, the engine learns
/// that the trace is kept.
async fn one(policy: Policy, answer: Response, told: bool) -> (Call, Vec<Span>) {
    let mut engine = Engine::start(0).await;
    let gateway = gateway(policy, None, &engine).await;
    let response = gateway.spawn(gateway.chat());
    let mut call = engine.call().await;
    let reply = std::mem::replace(&mut call.reply, tokio::sync::oneshot::channel().0);
    reply.send(answer).unwrap();
    let response = response.await.unwrap();
    assert!(!response.headers().contains_key("traceresponse") && !response.headers().contains_key(PREEMPTIONS));
    let collected = response.into_body().collect().await.unwrap();
    assert!(collected.trailers().is_none(), "they were meant for the gateway");
    if told {
        let verdict = engine.call().await;
        assert_eq!((verdict.head.uri.path(), text(&verdict, "traceparent")), (KEEP_PATH, ""));
        let ids: Vec<String> = read(&verdict.body).unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(ids, [trace(&call).0]);
        verdict.reply.send(Response::new(Body::empty())).unwrap();
    }
    (call, gateway.stop().done().await.1)
}

#[tokio::test]
async fn a_candidate_is_marked_and_dropped_if_it_was_nothing_special() {
    let (call, spans) = one(keeping(), json(200, "{}"), false).await;
    assert_eq!((trace(&call).1, text(&call, "tracestate"), text(&call, "te")), (false, "igsim=c", "trailers"));
    assert!(spans.is_empty(), "{spans:?}");
}

#[tokio::test]
async fn a_failure_is_kept_and_told() {
    let (call, spans) = one(keeping(), json(503, "{}"), true).await;
    assert_eq!(reason(&spans).as_deref(), Some("error"));
    assert!(spans.iter().all(|s| s.trace_id.to_string() == trace(&call).0));
    assert!(spans.iter().all(|s| s.tracestate.as_deref() == Some("igsim=c")), "no threshold");
}

#[tokio::test]
async fn an_engine_says_in_the_head_that_it_preempted() {
    let mut answer = json(200, "{}");
    answer.headers_mut().insert(PREEMPTIONS, 2.into());
    assert_eq!(reason(&one(keeping(), answer, true).await.1).as_deref(), Some("preempted"));
}

/// A stream with trailers.
struct WithTrailers(Vec<Frame<Bytes>>);

impl hyper::body::Body for WithTrailers {
    type Data = Bytes;
    type Error = std::convert::Infallible;
    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        Poll::Ready(self.0.pop().map(Ok))
    }
}

#[tokio::test]
async fn an_engine_says_in_trailers_that_it_preempted() {
    let trailers = http::HeaderMap::from_iter([(PREEMPTIONS.parse().unwrap(), 1.into())]);
    let data = Bytes::from_static(b"data: {\"choices\":[]}\n\ndata: [DONE]\n\n");
    let body = Body::new(WithTrailers(vec![Frame::trailers(trailers), Frame::data(data)]));
    let answer = Response::builder().header("content-type", "text/event-stream").header("trailer", PREEMPTIONS);
    let (_, spans) = one(keeping(), answer.body(body).unwrap(), true).await;
    assert_eq!(reason(&spans).as_deref(), Some("preempted"));
}

#[tokio::test]
async fn many_tokens_and_error_events_are_reasons() {
    let keep = Keep { more_tokens_than: Some(100), ..Keep::default() };
    let policy = Policy { keep: Some(keep), ..Policy::default() };
    let usage = |n: u32| -> &'static str {
        Box::leak(format!(r#"{{"usage":{{"prompt_tokens":50,"completion_tokens":{n},"total_tokens":0}}}}"#).into())
    };
    assert_eq!(reason(&one(policy.clone(), json(200, usage(51)), true).await.1).as_deref(), Some("tokens"));
    assert_eq!(reason(&one(policy, json(200, usage(50)), false).await.1), None);
    let event = Body::from("data: {\"error\":{\"message\":\"x\"}}\n\ndata: [DONE]\n\n");
    let answer = Response::builder().header("content-type", "text/event-stream").body(event).unwrap();
    assert_eq!(reason(&one(keeping(), answer, true).await.1).as_deref(), Some("error"));
}

#[tokio::test]
async fn a_rule_decides_on_the_body_before_anything_is_sent() {
    let rule = |model: &str, ratio| Rule { model: Some(model.to_owned()), ratio, ..Rule::default() };
    for (rules, expect) in [(vec![rule("m", 1.0)], true), (vec![rule("m", 0.0), rule("*", 1.0)], false)] {
        let (call, spans) = one_sampled(Policy { rules, ..Policy::default() }).await;
        assert_eq!((trace(&call).1, !spans.is_empty(), reason(&spans)), (expect, expect, None));
        let roots = named(&spans, "gateway.request");
        assert!(roots.iter().all(|r| r.get("http.route").is_some()), "what came before the decision is there");
    }
}

/// As [`one`], of a request that may be sampled.
async fn one_sampled(policy: Policy) -> (Call, Vec<Span>) {
    let mut engine = Engine::start(0).await;
    let gateway = gateway(policy, None, &engine).await;
    let response = gateway.spawn(gateway.chat());
    let mut call = engine.call().await;
    let reply = std::mem::replace(&mut call.reply, tokio::sync::oneshot::channel().0);
    reply.send(json(200, "{}")).unwrap();
    response.await.unwrap().into_body().collect().await.unwrap();
    (call, gateway.stop().done().await.1)
}

#[tokio::test]
async fn a_request_that_is_refused_before_its_rule_is_known_is_decided_too() {
    let rules = vec![Rule { route: Some("/v1/chat/completions".to_owned()), ratio: 1.0, ..Rule::default() }];
    let engine = Engine::start(0).await;
    let gateway = gateway(Policy { rules, ..Policy::default() }, None, &engine).await;
    let response = gateway.send(gateway.post("/v1/chat/completions", "no json")).await;
    assert_eq!(response.status(), 400);
    response.into_body().collect().await.unwrap();
    assert_eq!(named(&gateway.stop().done().await.1, "gateway.request").len(), 1);
}

/// What the engine sees of a request with these headers.
async fn asked(policy: Policy, trust: TrustInbound, headers: &[(&'static str, &str)]) -> (Call, Vec<Span>) {
    let mut engine = Engine::start(0).await;
    let gateway = gateway(policy, Some(trust), &engine).await;
    let mut request: http::Request<Full<Bytes>> = gateway.chat();
    for (name, value) in headers {
        request.headers_mut().insert(*name, value.parse().unwrap());
    }
    let response = gateway.spawn(request);
    let mut call = engine.call().await;
    let reply = std::mem::replace(&mut call.reply, tokio::sync::oneshot::channel().0);
    reply.send(json(200, "{}")).unwrap();
    response.await.unwrap().into_body().collect().await.unwrap();
    (call, gateway.stop().done().await.1)
}

#[tokio::test]
async fn only_trusted_callers_can_force_a_trace() {
    let force = || Policy { force: Some(Force::default()), ..Policy::default() };
    let (call, spans) = asked(force(), TrustInbound::Always, &[("x-igsim-trace", "1")]).await;
    assert_eq!((trace(&call).1, reason(&spans).as_deref()), (true, Some("forced")));
    assert_eq!(text(&call, "tracestate"), "");
    for trust in [TrustInbound::Never, TrustInbound::Link] {
        let (call, spans) = asked(force(), trust, &[("x-igsim-trace", "1")]).await;
        assert_eq!((trace(&call).1, spans.len()), (false, 0), "{trust:?}");
    }
}

#[tokio::test]
async fn nobody_else_marks_a_candidate() {
    let caller = [
        ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"),
        ("tracestate", "igsim=c,vendor=1"),
    ];
    let (call, spans) = asked(keeping(), TrustInbound::Always, &caller).await;
    assert_eq!((text(&call, "tracestate"), text(&call, "te"), spans.len()), ("vendor=1", "", 0));
    for trust in [TrustInbound::Never, TrustInbound::Link] {
        let (call, _) = asked(Policy::default(), trust, &caller).await;
        assert_eq!(text(&call, "tracestate"), "", "{trust:?}");
        let (call, _) = asked(keeping(), trust, &caller).await;
        assert_eq!(text(&call, "tracestate"), "igsim=c", "{trust:?}: the gateway's own");
        assert!(!text(&call, "traceparent").contains("4bf92f35"), "{trust:?}");
    }
}
