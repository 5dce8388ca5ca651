//! Refusals in vLLM's words.

use http_body_util::BodyExt;
use serde_json::{Value, json};

use crate::harness::{CHAT, COMPLETIONS, Running, instant, paced};

/// Posts `body` and expects an error of this status, type, parameter and message.
async fn check(server: &Running, path: &str, body: &str, status: u16, expect: (&str, Option<&str>, &str)) {
    let reply = server.post(path, body).await;
    assert_eq!((reply.status, reply.header("content-type")), (status, "application/json"), "{body}");
    let error: Value = serde_json::from_str(&reply.text).unwrap();
    let (kind, param, message) = expect;
    assert_eq!(error, json!({"error": {"message": message, "type": kind, "param": param, "code": status}}), "{body}");
}

#[tokio::test]
async fn values_out_of_range_are_named() {
    let mut config = instant();
    config.max_model_len = Some(64);
    let server = Running::start(config).await;
    let check = async |extra: Value, param: &str, message: &str| {
        let mut body = json!({"prompt": "hello"});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        check(&server, COMPLETIONS, &body.to_string(), 400, ("BadRequestError", Some(param), message)).await;
    };
    let zero = "max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)";
    check(json!({"max_tokens": 0}), "max_tokens", zero).await;
    let cold = "temperature must be non-negative, got -1.0. (parameter=temperature, value=-1.0)";
    check(json!({"temperature": -1}), "temperature", cold).await;
    let nucleus = "top_p must be in (0, 1], got 1.5. (parameter=top_p, value=1.5)";
    check(json!({"top_p": 1.5}), "top_p", nucleus).await;
    check(json!({"top_p": 0}), "top_p", "top_p must be in (0, 1], got 0.0. (parameter=top_p, value=0.0)").await;
    let many = "max_tokens=65 cannot be greater than max_model_len=64. Please request fewer output tokens. \
                (parameter=max_tokens, value=65)";
    check(json!({"max_tokens": 65}), "max_tokens", many).await;
    let least = "min_tokens must be less than or equal to max_tokens=4, got 5. (parameter=min_tokens, value=5)";
    check(json!({"max_tokens": 4, "min_tokens": 5}), "min_tokens", least).await;
    let long = "This model's maximum context length is 64 tokens. However, your prompt contains 64 input tokens, which exceeds \
                this limit even without any output tokens. Please reduce the length of the input prompt. \
                (parameter=input_tokens, value=64)";
    check(json!({"prompt": "x".repeat(4 * 63 + 1)}), "input_tokens", long).await;
    let choices = "This emulator generates one choice per request: n must be 1. (parameter=n, value=2)";
    check(json!({"n": 2}), "n", choices).await;
    let stream = "Stream options can only be defined when `stream=True`.";
    check(json!({"stream_options": {"include_usage": true}}), "stream_options", stream).await;
    let several = "This emulator takes one prompt per request: prompt must be one text or one list of token ids.";
    check(json!({"prompt": ["a", "b"]}), "prompt", several).await;
    check(json!({"prompt": [[1], [2]]}), "prompt", several).await;
    let empty = "Either prompt or prompt_embeds must be provided and non-empty.";
    check(json!({"prompt": ""}), "prompt", empty).await;
    check(json!({"prompt": []}), "prompt", empty).await;
    check(json!({"prompt": null}), "prompt", empty).await;
}

#[tokio::test]
async fn what_a_request_may_not_be() {
    let server = Running::start(instant()).await;
    let bad = ("BadRequestError", None, "stop cannot contain an empty string.");
    check(&server, COMPLETIONS, r#"{"prompt":"a","stop":""}"#, 400, bad).await;
    check(&server, COMPLETIONS, r#"{"prompt":"a","stop":["b",""]}"#, 400, bad).await;
    let unknown = "The model `gpt-9` does not exist. Valid aliases: igsim/instant.";
    let unknown = ("NotFoundError", Some("model"), unknown);
    check(&server, COMPLETIONS, r#"{"model":"gpt-9","prompt":"a"}"#, 404, unknown).await;
    check(&server, CHAT, r#"{"model":"gpt-9","messages":[]}"#, 404, unknown).await;
    let messages = ("BadRequestError", Some("messages"), "Field required: messages");
    check(&server, CHAT, r#"{"prompt":"a"}"#, 400, messages).await;
}

#[tokio::test]
async fn a_body_that_is_no_request_is_not_quoted() {
    let server = Running::start(instant()).await;
    for body in [r#"{"prompt":"canary"#, r#"{"max_tokens":"canary"}"#, r#"{"prompt":{"canary":1}}"#, "canary", ""] {
        let reply = server.post(COMPLETIONS, body).await;
        let error: Value = serde_json::from_str(&reply.text).unwrap();
        assert_eq!((reply.status, error["error"]["type"].as_str()), (400, Some("Bad Request")), "{body}");
        let message = error["error"]["message"].as_str().unwrap();
        assert!(message.starts_with("1 validation error:\n  {"), "{message}");
        assert!(!reply.text.contains("canary"), "{}", reply.text);
    }
}

#[tokio::test]
async fn only_json_is_read_and_only_so_much() {
    let server = Running::start(instant()).await;
    for kind in [None, Some("text/plain")] {
        let mut request = server.request(COMPLETIONS, r#"{"prompt":"a"}"#);
        request.headers_mut().remove("content-type");
        kind.map(|k| request.headers_mut().insert("content-type", k.parse().unwrap()));
        let reply = server.exchange(request).await;
        let error: Value = serde_json::from_str(&reply.text).unwrap();
        assert_eq!((reply.status, &error["error"]["type"]), (400, &json!("Bad Request")));
        assert_eq!(error["error"]["message"], "Unsupported Media Type: Only 'application/json' is allowed");
    }
    let server = Running::with(instant(), |c| c.max_body_bytes = 100).await;
    let body = |n: usize| json!({"prompt": "x".repeat(n), "max_tokens": 1}).to_string();
    assert_eq!(server.post(COMPLETIONS, &body(50)).await.status, 200);
    assert_eq!(server.post(COMPLETIONS, &body(100)).await.status, 413);
}

#[tokio::test]
async fn a_full_queue_is_503() {
    let mut config = paced();
    config.scheduler.max_num_seqs = 1;
    config.max_num_queued_reqs = Some(1);
    let server = Running::start(config).await;
    let long = r#"{"prompt":"hello","max_tokens":100000,"ignore_eos":true,"stream":true}"#;
    let running = server.send(server.request(COMPLETIONS, long)).await;
    server.until("running", |s| s.running == 1).await;
    let waiting = server.send(server.request(COMPLETIONS, long)).await;
    server.until("waiting", |s| s.waiting == 1).await;
    let busy = "The engine is currently busy and cannot accept new requests. Please try again later or on a different instance.";
    for body in [long, r#"{"prompt":"hello"}"#] {
        check(&server, COMPLETIONS, body, 503, ("Service Unavailable", None, busy)).await;
    }
    let refused = r#"vllm:admission_rejections_total{model_name="meta-llama/Llama-3.1-8B-Instruct",reason="max_num_queued_reqs"}"#;
    assert_eq!(server.metric(refused).await, 2.0);
    drop((running, waiting));
    server.until("idle", |s| s.running + s.waiting == 0).await;
    assert_eq!(server.post(COMPLETIONS, r#"{"prompt":"hello","max_tokens":1}"#).await.status, 200);
}

#[tokio::test]
async fn a_dead_engine_says_so_everywhere() {
    let mut server = Running::start(paced()).await;
    let long = r#"{"prompt":"hello","max_tokens":100000,"ignore_eos":true,"stream":true}"#;
    let open = server.send(server.request(COMPLETIONS, long)).await;
    let whole =
        server.spawn(server.request(COMPLETIONS, r#"{"prompt":"hello","max_tokens":100000,"ignore_eos":true}"#));
    server.until("running", |s| s.running == 2).await;
    server.kill_engine();
    let died = "The server had an error while processing your request.";
    let error = json!({"error": {"message": died, "type": "InternalServerError", "param": null, "code": 500}});
    let streamed = open.into_body().collect().await.unwrap().to_bytes();
    let streamed = String::from_utf8(streamed.to_vec()).unwrap();
    let events: Vec<_> = streamed.trim_end().split("\n\n").collect();
    let (last, end) = (events[events.len() - 2], events[events.len() - 1]);
    assert_eq!(serde_json::from_str::<Value>(last.strip_prefix("data: ").unwrap()).unwrap(), error);
    assert_eq!(end, "data: [DONE]");
    assert_eq!(whole.await.unwrap().status(), 500);
    for body in [long, r#"{"prompt":"hello"}"#] {
        check(&server, COMPLETIONS, body, 500, ("InternalServerError", None, died)).await;
    }
    assert_eq!(server.get("/health").await.status, 503);
    let failed = server.stop().await;
    let failed: Vec<_> = failed.iter().filter(|s| s.name == "vllm.engine.request").collect();
    assert_eq!(failed.len(), 4);
    let error = |s: &&shared::trace::Span| s.get("error.type").and_then(|v| v.as_str()) == Some("500");
    assert!(failed.iter().all(error), "{failed:?}");
}
