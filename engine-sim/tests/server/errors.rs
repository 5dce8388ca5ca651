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
async fn the_parameter_at_fault_is_named() {
    let server = Running::start(instant()).await;
    let check = async |extra: Value, param: Option<&str>, message: &str| {
        let mut body = json!({"prompt": "hello"});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        check(&server, COMPLETIONS, &body.to_string(), 400, ("BadRequestError", param, message)).await;
    };
    let zero = "max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)";
    check(json!({"max_tokens": 0}), Some("max_tokens"), zero).await;
    let least = "min_tokens must be less than or equal to max_tokens=4, got 5.";
    check(json!({"max_tokens": 4, "min_tokens": 5}), None, least).await;
    let stream = "Stream options can only be defined when `stream=True`. (parameter=stream_options)";
    check(json!({"stream_options": {"include_usage": true}}), Some("stream_options"), stream).await;
    let empty = "Either prompt or prompt_embeds must be provided and non-empty. (parameter=prompt)";
    check(json!({"prompt": null}), Some("prompt"), empty).await;
}

#[tokio::test]
async fn validation_errors_name_the_first_field_and_count_all() {
    let server = Running::start(instant()).await;
    let error = async |body: &str| {
        let reply = server.post(CHAT, body).await;
        let error: Value = serde_json::from_str(&reply.text).unwrap();
        assert_eq!((reply.status, &error["error"]["type"]), (400, &json!("Bad Request")), "{body}");
        (error["error"]["param"].clone(), error["error"]["message"].as_str().unwrap().to_owned())
    };
    let (param, message) = error(r#"{"messages":[{"role":1},{"role":"user","content":{}}],"n":"canary"}"#).await;
    assert_eq!(param, "body.messages.0.role");
    assert!(
        message.starts_with("4 validation errors:\n  {'type': 'string_type', 'loc': 'body.messages.0.role',"),
        "{message}"
    );
    let many = json!({"messages": vec![json!({}); 12]}).to_string();
    let (_, message) = error(&many).await;
    assert_eq!(message.lines().count(), 12);
    assert!(message.ends_with("\n  ...and 2 more errors"), "{message}");
}

#[tokio::test]
async fn a_full_queue_is_503() {
    let mut config = paced();
    config.scheduler.max_num_seqs = 1;
    config.max_num_queued_reqs = Some(2);
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
