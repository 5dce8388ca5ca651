//! Spans of the server: they continue the caller's trace and hold no content.

use http::Request;
use http_body_util::Full;
use serde_json::json;
use shared::trace::check::{CheckOptions, check_spans};
use shared::trace::tree::{Forest, Show, outline};
use shared::trace::{Kind, Span, Value};

use crate::harness::{CHAT, COMPLETIONS, Running, content, instant, paced};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const OTHER: &str = "5cf92f3577b34da6a3ce929d0e0e4736";
const CALLER: &str = "00f067aa0ba902b7";

fn called(mut request: Request<Full<bytes::Bytes>>, trace: &str, flags: &str) -> Request<Full<bytes::Bytes>> {
    let parent = format!("00-{trace}-{CALLER}-{flags}");
    request.headers_mut().insert("traceparent", parent.parse().unwrap());
    request
}

fn root(spans: &[Span]) -> &Span {
    spans.iter().find(|s| s.name == "vllm.engine.request").unwrap_or_else(|| panic!("no request in {spans:?}"))
}

#[tokio::test]
async fn the_callers_trace_goes_on() {
    let server = Running::start(paced()).await;
    for (trace, path, body) in [
        (TRACE, COMPLETIONS, r#"{"prompt":"hello","max_tokens":3,"stream":true,"temperature":0.5,"priority":2}"#),
        (OTHER, CHAT, r#"{"messages":[{"role":"user","content":"hello"}],"max_tokens":3}"#),
    ] {
        assert_eq!(server.exchange(called(server.request(path, body), trace, "01")).await.status, 200);
    }
    let spans = server.stop().await;
    let roots: Vec<_> = spans.iter().filter(|s| s.name == "vllm.engine.request").collect();
    assert_eq!(roots.iter().map(|s| s.trace_id.to_string()).collect::<Vec<_>>(), [TRACE, OTHER]);
    for root in &roots {
        assert_eq!((root.parent.unwrap().to_string().as_str(), root.kind), (CALLER, Kind::Server));
        let int = |key: &str| root.get(key).and_then(Value::as_int);
        assert_eq!((int("gen_ai.usage.input_tokens"), int("gen_ai.usage.output_tokens")), (Some(2), Some(3)));
        // It ends with the last write, so all that happened lies within.
        let inside = |s: &&Span| s.parent == Some(root.span_id);
        assert!(spans.iter().filter(inside).all(|s| root.start <= s.start && s.end <= root.end), "{}", outline(&spans));
    }
    let of_one: Vec<Span> = spans.iter().take(12).cloned().collect();
    insta::assert_snapshot!(Forest::new(&of_one).text(Show::default()), @r#"
    vllm.engine.request (server)
      vllm.processor.process_inputs (internal)
      vllm.engine.add_to_core (internal)
      vllm.engine.queue (internal)
      vllm.scheduler.schedule (internal)
        vllm.scheduler.admit_requests (internal)
        vllm.scheduler.allocate_blocks (internal)
        vllm.scheduler.create_batch (internal)
      vllm.executor.execute_model (internal)
      vllm.executor.execute_model (internal)
      vllm.output.process_batch (internal)
      vllm.output.process_batch (internal)
    "#);
    assert_eq!(spans.len(), 24);
    let findings = check_spans(&spans, &CheckOptions::default());
    assert!(findings.is_empty(), "{findings:?}");
}

#[tokio::test]
async fn an_unsampled_caller_is_not_recorded_and_no_caller_is_a_root() {
    let server = Running::start(instant()).await;
    let body = r#"{"prompt":"hello","max_tokens":1}"#;
    server.exchange(called(server.request(COMPLETIONS, body), TRACE, "00")).await;
    server.exchange(server.request(COMPLETIONS, body)).await;
    let spans = server.stop().await;
    assert_eq!(root(&spans).parent, None);
    assert_eq!(spans.iter().filter(|s| s.name == "vllm.engine.request").count(), 1);
    assert!(spans.iter().all(|s| s.trace_id.to_string() != TRACE));
}

#[tokio::test]
async fn a_refused_request_has_a_span_that_says_so() {
    let server = Running::start(instant()).await;
    server.exchange(called(server.request(COMPLETIONS, r#"{"model":"gpt-9","prompt":"hello"}"#), TRACE, "01")).await;
    let spans = server.stop().await;
    assert_eq!(spans.len(), 1, "{}", outline(&spans));
    assert_eq!(root(&spans).get("error.type").and_then(|v| v.as_str()), Some("404"));
}

/// I8: whatever carries content, nothing of it is in a span or on the metrics page.
#[tokio::test]
async fn no_content_is_recorded() {
    let server = Running::start(instant()).await;
    let canary = "canary7331";
    let mut answers = Vec::new();
    for (path, body) in [
        (
            COMPLETIONS,
            json!({"prompt": canary, "max_tokens": 40, "stop": canary, "cache_salt": canary, "user": canary}),
        ),
        (COMPLETIONS, json!({"prompt": [canary.repeat(9)], "suffix": canary, "logit_bias": {canary: 1}})),
        (CHAT, json!({"messages": [{"role": "user", "name": canary, "content": [{"type": "text", "text": canary}]}]})),
        (CHAT, json!({"messages": [{"role": canary, "content": canary}], "tools": [{"function": {"name": canary}}]})),
    ] {
        let body = body.to_string();
        assert!(body.contains(canary));
        answers.push(content(&server.json(path, &body).await));
    }
    // Refused requests have a record, too.
    for body in [format!("{{\"prompt\":\"{canary}"), json!({"prompt": canary, "max_tokens": 0}).to_string()] {
        assert_eq!(server.post(COMPLETIONS, &body).await.status, 400);
    }
    let metrics = server.get("/metrics").await.text;
    let spans = server.stop().await;
    assert_eq!(spans.iter().filter(|s| s.name == "vllm.engine.request").count(), 6);
    let recorded = outline(&spans) + &metrics;
    assert!(!recorded.contains(canary), "{recorded}");
    for answer in answers {
        // Two words of filler: a single one could be in a name by chance.
        assert!(answer.len() >= 40 && !recorded.contains(&answer[..7]), "{answer} in {recorded}");
    }
}
