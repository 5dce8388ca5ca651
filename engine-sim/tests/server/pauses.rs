//! Pausing, sleeping and emptying a server under load.

use http_body_util::BodyExt;
use serde_json::{Value, json};

use crate::harness::{COMPLETIONS, Running, instant, paced};

const LONG: &str = r#"{"prompt":"hello","max_tokens":100000,"ignore_eos":true,"stream":true}"#;

async fn dev(engine: engine_sim::core::config::EngineConfig) -> Running {
    Running::with(engine, |c| {
        c.frontend.dev_mode = true;
        c.prompt_tokens_details = true;
    })
    .await
}

/// The last chunk before the end of a stream.
async fn last_chunk(response: http::Response<hyper::body::Incoming>) -> Value {
    let text = response.into_body().collect().await.unwrap().to_bytes();
    let text = String::from_utf8(text.to_vec()).unwrap();
    let events: Vec<&str> = text.trim_end().split("\n\n").collect();
    assert_eq!(events.last(), Some(&"data: [DONE]"));
    serde_json::from_str(events[events.len() - 2].strip_prefix("data: ").unwrap()).unwrap()
}

#[tokio::test]
async fn a_pause_ends_what_runs() {
    let server = dev(paced()).await;
    let open = server.send(server.request(COMPLETIONS, LONG)).await;
    server.until("running", |s| s.running == 1).await;
    assert_eq!(server.post("/pause", "").await.text, r#"{"status":"paused"}"#);
    let last = last_chunk(open).await;
    assert_eq!(last["choices"][0]["finish_reason"], "abort");
    server.until("idle", |s| s.running + s.waiting == 0).await;
    assert_eq!(server.post(COMPLETIONS, r#"{"prompt":"a"}"#).await.status, 503);
    server.post("/resume", "").await;
    assert_eq!(server.post(COMPLETIONS, r#"{"prompt":"a","max_tokens":1}"#).await.status, 200);
    let aborted = r#"vllm:request_success_total{model_name="meta-llama/Llama-3.1-8B-Instruct",engine="0",finished_reason="abort"}"#;
    assert_eq!(server.metric(aborted).await, 1.0, "the engine's own aborts are counted");
}

#[tokio::test]
async fn a_pause_that_waits_lets_what_runs_end() {
    let server = dev(paced()).await;
    let open = server.spawn(server.request(COMPLETIONS, r#"{"prompt":"hello","max_tokens":20,"ignore_eos":true}"#));
    server.until("running", |s| s.running == 1).await;
    assert_eq!(server.post("/pause?mode=wait", "").await.text, r#"{"status":"paused"}"#);
    // The pause is complete only when nothing is in flight.
    assert_eq!(server.engine.inspect(|e| (e.open_requests(), e.is_pausing())), (0, false));
    let whole = open.await.unwrap().into_body().collect().await.unwrap().to_bytes();
    let whole: Value = serde_json::from_slice(&whole).unwrap();
    assert_eq!(whole["usage"]["completion_tokens"], 20);
}

#[tokio::test]
async fn a_pause_that_keeps_freezes_what_runs() {
    let server = dev(paced()).await;
    let open = server.spawn(server.request(COMPLETIONS, r#"{"prompt":"hello","max_tokens":40,"ignore_eos":true}"#));
    server.until("running", |s| s.running == 1).await;
    server.post("/pause?mode=keep&clear_cache=false", "").await;
    let steps = || server.engine.inspect(|e| (e.metrics().generation_tokens, e.next_wakeup()));
    let (before, wakeup) = steps();
    assert_eq!(wakeup, None, "nothing is planned while everything is frozen");
    // New requests are taken and wait.
    let new = server.spawn(server.request(COMPLETIONS, r#"{"prompt":"hello","max_tokens":1}"#));
    server.until("waiting", |s| s.waiting == 1).await;
    assert_eq!(steps().0, before);
    server.post("/resume", "").await;
    for (request, tokens) in [(open, 40), (new, 1)] {
        let whole = request.await.unwrap().into_body().collect().await.unwrap().to_bytes();
        let whole: Value = serde_json::from_slice(&whole).unwrap();
        assert_eq!(whole["usage"]["completion_tokens"], tokens);
    }
}

#[tokio::test]
async fn a_frozen_request_whose_cache_is_forgotten_computes_it_anew() {
    let server = dev(paced()).await;
    let open = server.spawn(server.request(COMPLETIONS, r#"{"prompt":"hello","max_tokens":40,"ignore_eos":true}"#));
    server.until("running", |s| s.running == 1).await;
    server.post("/pause?mode=keep", "").await;
    assert_eq!(server.engine.inspect(|e| e.snapshot().kv_usage), 0.0);
    server.post("/resume", "").await;
    let whole = open.await.unwrap().into_body().collect().await.unwrap().to_bytes();
    let whole: Value = serde_json::from_slice(&whole).unwrap();
    assert_eq!(whole["usage"]["completion_tokens"], 40);
    assert_eq!(server.engine.inspect(|e| e.metrics().request_num_preemptions.sum), 1);
}

#[tokio::test]
async fn requests_wait_for_a_sleeping_engine() {
    let server = dev(instant()).await;
    let state = |state: &str| {
        format!(r#"vllm:engine_sleep_state{{model_name="igsim/instant",engine="0",sleep_state="{state}"}}"#)
    };
    server.post("/sleep", "").await;
    assert_eq!((server.metric(&state("awake")).await, server.metric(&state("weights_offloaded")).await), (0.0, 1.0));
    let waiting = server.spawn(server.request(COMPLETIONS, r#"{"prompt":"hello","max_tokens":1}"#));
    server.until("waiting", |s| s.waiting == 1).await;
    assert_eq!(
        server.post("/wake_up?tags=weights&tags=kv_cache", "").await.text,
        r#"{"status":"awake","tags":["weights","kv_cache"]}"#
    );
    assert_eq!(waiting.await.unwrap().status(), 200);
    assert_eq!(server.metric(&state("awake")).await, 1.0);
}

#[tokio::test]
async fn a_prefix_cache_is_forgotten_when_nobody_holds_it() {
    let server = dev(paced()).await;
    let body = json!({"prompt": "x".repeat(4 * 40), "max_tokens": 1}).to_string();
    let cached = async || {
        let answer = server.json(COMPLETIONS, &body).await;
        answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
    };
    assert_eq!((cached().await, cached().await), (0, 32));
    server.until("idle", |s| s.free_blocks + 1 == s.num_gpu_blocks).await;
    assert_eq!(server.post("/reset_prefix_cache", "").await.text, r#"{"success":true}"#);
    assert_eq!(cached().await, 0);
    let open = server.send(server.request(COMPLETIONS, LONG)).await;
    server.until("running", |s| s.running == 1).await;
    assert_eq!(server.post("/reset_prefix_cache", "").await.text, r#"{"success":false}"#);
    assert_eq!(server.post("/reset_prefix_cache?reset_running_requests=true", "").await.text, r#"{"success":true}"#);
    server.until("running again", |s| s.running == 1).await;
    drop(open);
}

#[tokio::test]
async fn requests_are_aborted_by_name() {
    let server = dev(paced()).await;
    let named = |id: &str| {
        let mut request = server.request(COMPLETIONS, LONG);
        request.headers_mut().insert("x-request-id", id.parse().unwrap());
        request
    };
    let (one, two) = (server.send(named("one")).await, server.send(named("two")).await);
    server.until("running", |s| s.running == 2).await;
    let reply = server.post("/abort_requests", r#"{"request_ids":["cmpl-one"]}"#).await;
    assert_eq!(serde_json::from_str::<Value>(&reply.text).unwrap(), json!({"status": "aborted", "aborted": 1}));
    assert_eq!(last_chunk(one).await["choices"][0]["finish_reason"], "abort");
    server.until("one left", |s| s.running == 1).await;
    assert_eq!(server.json("/abort_requests", "{}").await, json!({"status": "aborted", "aborted": 1}));
    assert_eq!(last_chunk(two).await["choices"][0]["finish_reason"], "abort");
}
