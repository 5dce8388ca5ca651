//! What is injected, recorded and told to the caller.

use bytes::Bytes;
use http_body_util::BodyExt;
use shared::trace::tree::outline;
use shared::trace::{Kind, Span};

use super::harness::{Call, Engine, Running, Tracing, header, json, stream};
use crate::core::config::GatewayConfig;

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CALLER: &str = "00f067aa0ba902b7";

fn with_parent(gateway: &Running, flags: &str) -> http::Request<http_body_util::Full<Bytes>> {
    let mut request = gateway.chat();
    let headers = request.headers_mut();
    headers.insert("traceparent", format!("00-{TRACE}-{CALLER}-{flags}").parse().unwrap());
    headers.insert("tracestate", "vendor=1".parse().unwrap());
    headers.insert("baggage", "tenant=7".parse().unwrap());
    request
}

fn traceparent(call: &Call) -> (String, String, String) {
    let all: Vec<_> = call.head.headers.get_all("traceparent").iter().collect();
    assert_eq!(all.len(), 1, "one traceparent: {all:?}");
    let parts: Vec<&str> = all[0].to_str().unwrap().split('-').collect();
    (parts[1].to_owned(), parts[2].to_owned(), parts[3].to_owned())
}

fn named<'a>(spans: &'a [Span], name: &str) -> &'a Span {
    spans.iter().find(|s| s.name == name).unwrap_or_else(|| panic!("no {name} in {spans:?}"))
}

#[tokio::test]
async fn the_callers_trace_goes_on_from_the_proxy_span() {
    let mut engine = Engine::start(0).await;
    let gateway = Running::start(GatewayConfig::default(), vec![engine.backend("a")]).await;
    let response = gateway.spawn(with_parent(&gateway, "01"));
    let call = engine.call().await;
    let (trace, injected, flags) = traceparent(&call);
    assert_eq!((trace.as_str(), flags.as_str()), (TRACE, "01"));
    assert_eq!(call.head.headers["tracestate"], "vendor=1");
    assert_eq!(call.head.headers["baggage"], "tenant=7");
    let (pieces, reply) = stream();
    call.reply.send(reply).unwrap();
    let response = response.await.unwrap();
    let told = header(&response, "traceresponse");
    for piece in [
        "data: {\"model\":\"m-2\",\"choices\":[{\"delta\":{\"content\":\"secret\"}}]}\n\n",
        "data: {\"model\":\"m-2\",\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n",
        "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":2,\"total_tokens\":3,\"completion_tokens\":1}}\n\ndata: [DONE]\n\n",
    ] {
        pieces.send(Bytes::from_static(piece.as_bytes())).await.unwrap();
    }
    drop(pieces);
    response.into_body().collect().await.unwrap();
    let (_, spans) = gateway.stop().done().await;
    let (root, proxy) = (named(&spans, "gateway.request"), named(&spans, "gateway.backend.proxy"));
    assert_eq!(spans.len(), 12, "{}", outline(&spans));
    assert_eq!(root.parent.unwrap().to_string(), CALLER);
    assert_eq!(told, format!("00-{TRACE}-{}-01", root.span_id));
    assert_eq!((proxy.span_id.to_string(), proxy.kind, proxy.parent), (injected, Kind::Client, Some(root.span_id)));
    let int = |span: &Span, key: &str| span.get(key).and_then(shared::trace::Value::as_int);
    assert_eq!(int(root, "gen_ai.usage.input_tokens"), Some(2));
    assert_eq!(int(named(&spans, "gateway.response.process"), "gateway.response.chunks"), Some(3));
    assert_eq!(root.get("gen_ai.response.model").and_then(|v| v.as_str()), Some("m-2"));
    assert_eq!(root.events.len(), 1, "{:?}", root.events);
    let all = outline(&spans);
    assert!(!all.contains("secret") && !all.contains("hello"), "content in spans: {all}");
}

#[tokio::test]
async fn an_unsampled_trace_is_continued_and_not_recorded() {
    let mut engine = Engine::start(0).await;
    let gateway = Running::start(GatewayConfig::default(), vec![engine.backend("a")]).await;
    let response = gateway.spawn(with_parent(&gateway, "00"));
    let call = engine.call().await;
    let (trace, injected, flags) = traceparent(&call);
    assert_eq!((trace.as_str(), flags.as_str()), (TRACE, "00"));
    assert_ne!(injected, CALLER);
    call.reply.send(json(200, "{}")).unwrap();
    response.await.unwrap().into_body().collect().await.unwrap();
    let (stats, spans) = gateway.stop().done().await;
    assert_eq!((stats.succeeded, spans.len()), (1, 0));
}

#[tokio::test]
async fn a_request_without_a_caller_is_a_root() {
    let mut engine = Engine::start(0).await;
    let gateway = Running::start(GatewayConfig::default(), vec![engine.backend("a")]).await;
    let response = gateway.spawn(gateway.chat());
    let call = engine.call().await;
    let (trace, ..) = traceparent(&call);
    call.reply.send(json(500, r#"{"error":{}}"#)).unwrap();
    response.await.unwrap().into_body().collect().await.unwrap();
    let (_, spans) = gateway.stop().done().await;
    let root = named(&spans, "gateway.request");
    assert_eq!((root.parent, root.trace_id.to_string()), (None, trace));
    let failed: Vec<_> = spans.iter().filter(|s| s.get("error.type").is_some()).map(|s| s.name.as_ref()).collect();
    assert!(failed.contains(&"gateway.request") && failed.contains(&"gateway.backend.proxy"), "{failed:?}");
}

#[tokio::test]
async fn what_callers_and_engines_send_as_names_is_bounded() {
    let mut engine = Engine::start(0).await;
    let gateway = Running::start(GatewayConfig::default(), vec![engine.backend("a")]).await;
    let secret: &'static str = Box::leak("secret ".repeat(1000).into_boxed_str());
    let body = |text: String| -> &'static str { Box::leak(text.into_boxed_str()) };
    let unknown = body(format!(r#"{{"model":"{secret}","prompt":"p"}}"#));
    let refused = gateway.send(gateway.post("/v1/completions", unknown)).await;
    assert_eq!(refused.status(), 404);
    let refused = refused.into_body().collect().await.unwrap().to_bytes();
    assert!(!refused.windows(6).any(|w| w == b"secret"));
    let path = format!("/v1/{}", secret.replace(' ', "/"));
    let response = gateway.spawn(gateway.post(&path, r#"{"model":"m"}"#));
    engine.call().await.reply.send(json(200, body(format!(r#"{{"model":"{secret}"}}"#)))).unwrap();
    response.await.unwrap().into_body().collect().await.unwrap();
    let (_, spans) = gateway.stop().done().await;
    let all = outline(&spans);
    assert!(!all.contains("secret"), "content in spans: {all}");
    let paths: Vec<_> = spans.iter().filter_map(|s| s.get("url.path")?.as_str()).collect();
    assert_eq!(paths, ["/v1/completions", "/v1/{*path}", "/v1/{*path}"]);
}

#[tokio::test]
async fn without_a_propagator_no_header_names_the_trace() {
    let mut engine = Engine::start(0).await;
    let backends = vec![engine.backend("a")];
    let gateway = Running::with(Tracing::Alone, GatewayConfig::default(), backends).await;
    let response = gateway.spawn(gateway.chat());
    let call = engine.call().await;
    assert!(!call.head.headers.contains_key("traceparent"));
    call.reply.send(json(200, "{}")).unwrap();
    let response = response.await.unwrap();
    assert_eq!(header(&response, "traceresponse"), "");
    response.into_body().collect().await.unwrap();
    let (_, spans) = gateway.stop().done().await;
    named(&spans, "gateway.request");
}
