//! A client that goes away: the request is aborted and its blocks are free again.

use http_body_util::BodyExt;
use shared::trace::check::{CheckOptions, check_spans};
use shared::trace::{Span, Status, Value};

use crate::harness::{CHAT, COMPLETIONS, Running, paced};

const LONG: &str = r#"{"prompt":"hello","max_tokens":100000,"ignore_eos":true}"#;
const LONG_STREAM: &str = r#"{"prompt":"hello","max_tokens":100000,"ignore_eos":true,"stream":true}"#;

/// The engine is empty, nothing is counted as success, and the one request's span says that its caller went away.
async fn check_aborted(server: Running, tokens: impl Fn(i64) -> bool) {
    server.until("idle", |s| s.running + s.waiting == 0 && s.kv_usage == 0.0).await;
    let snapshot = server.engine.inspect(|e| e.snapshot());
    // All but the null block.
    assert_eq!(snapshot.free_blocks, snapshot.num_gpu_blocks - 1);
    assert_eq!(server.engine.inspect(|e| e.open_requests()), 0);
    let ended = server.engine.inspect(|e| e.metrics().request_success().map(|(_, n)| n));
    assert_eq!(ended, [0; 4], "vLLM does not count a caller's abort");
    assert_eq!(server.get("/load").await.text, r#"{"server_load":0}"#);

    let spans = server.stop().await;
    let roots: Vec<&Span> = spans.iter().filter(|s| s.name == "vllm.engine.request").collect();
    let [root] = roots[..] else { panic!("one request: {roots:?}") };
    assert!(matches!(root.status, Status::Unset), "the caller's own cancellation is no error: {:?}", root.status);
    assert_eq!(root.get("error.type"), None);
    let reasons = root.get("gen_ai.response.finish_reasons");
    assert_eq!(format!("{reasons:?}").matches("abort").count(), 1, "{reasons:?}");
    let written = root.get("gen_ai.usage.output_tokens").and_then(Value::as_int);
    assert!(written.is_some_and(&tokens), "{written:?}");
    let findings = check_spans(&spans, &CheckOptions::default());
    assert!(findings.is_empty(), "{findings:?}");
}

#[tokio::test]
async fn in_the_middle_of_a_stream() {
    let server = Running::start(paced()).await;
    let mut response = server
        .send(server.request(
            CHAT,
            r#"{"messages":[{"role":"user","content":"hi"}],"stream":true,
        "max_tokens":100000,"ignore_eos":true}"#,
        ))
        .await;
    // The first chunk comes while the engine has most of the work before it.
    let first = response.body_mut().frame().await.unwrap().unwrap().into_data().unwrap();
    assert!(first.starts_with(b"data: {"), "{first:?}");
    let open = server.engine.inspect(|e| (e.open_requests(), e.snapshot().kv_usage > 0.0));
    assert_eq!(open, (1, true));
    drop(response);
    check_aborted(server, |tokens| (1..100_000).contains(&tokens)).await;
}

#[tokio::test]
async fn while_it_waits_for_the_whole_answer() {
    let server = Running::start(paced()).await;
    let whole = server.spawn(server.request(COMPLETIONS, LONG));
    server.until("running", |s| s.running == 1).await;
    whole.abort();
    check_aborted(server, |tokens| (0..100_000).contains(&tokens)).await;
}

#[tokio::test]
async fn before_the_first_token() {
    let server = Running::start(paced()).await;
    // The head is sent as soon as the engine has the request; prefill of 125,000 tokens takes seconds.
    let body = serde_json::json!({"prompt": "x".repeat(500_000), "stream": true}).to_string();
    let response = server.send(server.request(COMPLETIONS, body)).await;
    server.until("running", |s| s.running == 1).await;
    drop(response);
    check_aborted(server, |tokens| tokens == 0).await;
}

#[tokio::test]
async fn while_another_request_goes_on() {
    let mut config = paced();
    config.scheduler.max_num_seqs = 1;
    let server = Running::start(config).await;
    let mut running = server.send(server.request(COMPLETIONS, LONG_STREAM)).await;
    server.until("running", |s| s.running == 1).await;
    let waiting = server.send(server.request(COMPLETIONS, LONG_STREAM)).await;
    server.until("waiting", |s| s.waiting == 1).await;
    drop(waiting);
    server.until("not waiting", |s| s.waiting == 0).await;
    assert_eq!(server.engine.inspect(|e| e.snapshot().running), 1);
    assert!(running.body_mut().frame().await.is_some_and(|f| f.is_ok()), "the other one goes on");
    drop(running);
    server.until("idle", |s| s.running == 0 && s.kv_usage == 0.0).await;
    let spans = server.stop().await;
    let roots = spans.iter().filter(|s| s.name == "vllm.engine.request");
    assert_eq!(roots.filter(|s| matches!(s.status, Status::Unset)).count(), 2);
}
