//! How requests arrive, as the finest detail shows it.

use http_body_util::{BodyExt, Full};
use shared::trace::Value;

use super::harness::{Engine, Running, Tracing, json, named};
use crate::core::config::GatewayConfig;

async fn at_detail(detail: u8, engine: &Engine) -> Running {
    let backends = vec![engine.backend("a")];
    Running::at("127.0.0.1:0", Tracing::On, |t| t.detail = detail, GatewayConfig::default(), backends).await
}

#[tokio::test]
async fn headers_and_body_are_spans_of_detail_three() {
    for (detail, expect) in [(2, 0), (3, 1)] {
        let mut engine = Engine::start(0).await;
        let gateway = at_detail(detail, &engine).await;
        let mut request = gateway.chat();
        request.headers_mut().insert("x-llm-d-inference-objective", "chat".parse().unwrap());
        let size = super::harness::CHAT.len() as i64;
        let response = gateway.spawn(request);
        engine.call().await.reply.send(json(200, "{}")).unwrap();
        response.await.unwrap().into_body().collect().await.unwrap();
        let (_, spans) = gateway.stop().done().await;
        let (headers, body) = (named(&spans, "gateway.request.headers"), named(&spans, "gateway.request.body"));
        assert_eq!((headers.len(), body.len()), (expect, expect), "detail {detail}");
        let root = named(&spans, "gateway.request")[0];
        for (headers, body) in headers.iter().zip(&body) {
            assert_eq!((headers.start, headers.end), (root.start, body.start), "one after the other");
            assert!(body.end <= named(&spans, "gateway.director.handle_request")[0].start);
            assert!(headers.get("gateway.header.count").and_then(Value::as_int).is_some_and(|n| n >= 2));
            assert_eq!(headers.get("gateway.metadata.extracted"), Some(&Value::Bool(true)));
            let found = (body.get("gateway.body.total_bytes"), body.get("gateway.body.parsed"));
            assert_eq!(found, (Some(&Value::Int(size)), Some(&Value::Bool(true))));
        }
    }
}

#[tokio::test]
async fn a_body_that_cannot_be_read_is_told_as_far_as_it_came() {
    let engine = Engine::start(0).await;
    let gateway = at_detail(3, &engine).await;
    let uri = format!("http://{}/v1/completions", gateway.addr);
    let refused = gateway.send(http::Request::post(&uri).body(Full::from("no object")).unwrap()).await;
    assert_eq!(refused.status(), 400);
    let (_, spans) = gateway.stop().done().await;
    let body = named(&spans, "gateway.request.body")[0];
    assert_eq!(body.get("gateway.body.parsed"), Some(&Value::Bool(false)));
    assert_eq!(body.get("gateway.body.total_bytes"), Some(&Value::Int(9)));
    let headers = named(&spans, "gateway.request.headers")[0];
    assert_eq!(headers.get("gateway.metadata.extracted"), Some(&Value::Bool(false)));
}
