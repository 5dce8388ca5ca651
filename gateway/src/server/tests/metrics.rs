//! The page of metrics: what it counts, how it points at traces, and that it stays small whatever callers send.

use bytes::Bytes;
use http_body_util::{BodyExt, Full};

use super::harness::{Call, Engine, Running, header, json, named, stream, text};
use crate::core::config::GatewayConfig;

const ANSWER: &str = r#"{"model":"m","choices":[{"finish_reason":"stop"}],"usage":{"prompt_tokens":9,"total_tokens":12,"completion_tokens":3}}"#;

/// The page as OpenMetrics.
async fn open_metrics(gateway: &Running) -> String {
    let request = http::Request::get(format!("http://{}/metrics", gateway.addr));
    let request = request.header("accept", "application/openmetrics-text;version=1.0.0,text/plain;q=0.5");
    let response = gateway.send(request.body(Full::default()).unwrap()).await;
    assert_eq!(header(&response, "content-type"), "application/openmetrics-text; version=1.0.0; charset=utf-8");
    text(response).await
}

/// A chat request whose caller decided on its trace.
fn chat(gateway: &Running, trace: u32, flags: &str) -> http::Request<Full<Bytes>> {
    let mut request = gateway.chat();
    let parent = format!("00-{trace:032x}-00f067aa0ba902b7-{flags}");
    request.headers_mut().insert("traceparent", parent.parse().unwrap());
    request
}

async fn answered(gateway: &Running, engine: &mut Engine, request: http::Request<Full<Bytes>>) {
    let response = gateway.spawn(request);
    engine.call().await.reply.send(json(200, ANSWER)).unwrap();
    response.await.unwrap().into_body().collect().await.unwrap();
}

fn lines<'a>(page: &'a str, start: &str) -> Vec<&'a str> {
    page.lines().filter(|l| l.starts_with(start)).collect()
}

#[tokio::test]
async fn exemplars_point_at_kept_traces_only() {
    let mut engine = Engine::start(0).await;
    let gateway = Running::start(GatewayConfig::default(), vec![engine.backend("a")]).await;
    answered(&gateway, &mut engine, chat(&gateway, 7, "01")).await;
    answered(&gateway, &mut engine, chat(&gateway, 8, "00")).await;
    let page = open_metrics(&gateway).await;
    assert!(page.ends_with("\n# EOF\n"));
    let exemplars: Vec<_> = page.lines().filter_map(|l| l.split_once(" # {").map(|(_, e)| e)).collect();
    // One for each of duration, input and output tokens.
    assert_eq!(exemplars.len(), 3, "{page}");
    let plain = gateway.get("/metrics").await.1;
    assert!(!plain.contains("trace_id"), "the other format has none: {plain}");
    let (_, spans) = gateway.stop().done().await;
    let root = named(&spans, "gateway.request")[0];
    let expect = format!("trace_id=\"{:032x}\",span_id=\"{}\"}}", 7, root.span_id);
    assert!(exemplars.iter().all(|e| e.starts_with(&expect)), "{exemplars:?}");
}

/// Tokens are counted whether or not a trace is kept, from a body or from the end of a stream.
#[tokio::test]
async fn tokens_of_requests_that_are_not_recorded_are_counted() {
    let mut engine = Engine::start(0).await;
    let gateway = Running::start(GatewayConfig::default(), vec![engine.backend("a")]).await;
    answered(&gateway, &mut engine, chat(&gateway, 7, "00")).await;
    for flags in ["00", "01"] {
        let response = gateway.spawn(chat(&gateway, 8, flags));
        let (pieces, reply) = stream();
        engine.call().await.reply.send(reply).unwrap();
        let response = response.await.unwrap();
        for piece in [
            "data: {\"choices\":[{\"delta\":{\"content\":\"x\"}}]}\n\n",
            "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":10,\"total_tokens\":14,",
            "\"completion_tokens\":4}}\n\ndata: [DONE]\n\n",
        ] {
            pieces.send(Bytes::from_static(piece.as_bytes())).await.unwrap();
        }
        drop(pieces);
        response.into_body().collect().await.unwrap();
    }
    let page = gateway.get("/metrics").await.1;
    let series = "gen_ai_operation_name=\"chat\",gen_ai_provider_name=\"vllm\",gen_ai_request_model=\"m\"";
    for expect in [
        format!("gen_ai_client_token_usage_sum{{{series},gen_ai_token_type=\"input\"}} 29"),
        format!("gen_ai_client_token_usage_sum{{{series},gen_ai_token_type=\"output\"}} 11"),
        format!("gen_ai_server_request_duration_seconds_count{{{series}}} 3"),
        format!("gen_ai_server_time_to_first_token_seconds_count{{{series}}} 2"),
        format!("gen_ai_server_time_per_output_token_seconds_count{{{series}}} 2"),
    ] {
        assert!(page.lines().any(|l| l == expect), "{expect} is not in\n{page}");
    }
    gateway.stop().done().await;
}

/// Ten thousand models, tenants and users: the page has as many lines as after a hundred.
#[tokio::test]
async fn the_page_does_not_grow_with_what_callers_send() {
    let mut engine = Engine::start(0).await;
    let gateway =
        Running::with(super::harness::Tracing::Off, GatewayConfig::default(), vec![engine.backend("a")]).await;
    let request = |i: u32| {
        // Paths that are not for inference pass whatever the model is; the others are refused.
        let path = if i.is_multiple_of(100) { "/v1/embeddings" } else { "/v1/chat/completions" };
        let body = format!(r#"{{"model":"model-{i}","user":"user-{i}","messages":[{{"role":"user","content":"x"}}]}}"#);
        let request = http::Request::post(format!("http://{}{path}", gateway.addr));
        let request = request.header("x-llm-d-inference-fairness-id", format!("tenant-{i}"));
        let request = request.header("x-session-id", format!("session-{i}")).header("x-request-id", format!("id-{i}"));
        request.body(Full::from(body)).unwrap()
    };
    let reply = |call: Call| call.reply.send(json(200, ANSWER)).unwrap();
    let mut sizes = Vec::new();
    for (from, to) in [(0, 100), (100, 10_000)] {
        for i in from..to {
            let response = gateway.spawn(request(i));
            tokio::pin!(response);
            let answer = tokio::select! {
                answer = &mut response => answer,
                call = engine.call() => {
                    reply(call);
                    response.await
                }
            };
            answer.unwrap().into_body().collect().await.unwrap();
        }
        sizes.push(gateway.get("/metrics").await.1.lines().count());
    }
    assert_eq!(sizes[0], sizes[1]);
    let page = gateway.get("/metrics").await.1;
    for word in ["model-", "user-", "tenant-", "session-", "id-"] {
        assert!(!page.contains(word), "{word} is in {page}");
    }
    assert_eq!(lines(&page, "gateway_requests_total").len(), 15);
    gateway.stop().done().await;
}
