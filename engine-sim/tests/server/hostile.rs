//! Bodies that nobody should send: a clear 4xx, never a 5xx, never a word of the body.

use bytes::Bytes;
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::harness::{CHAT, COMPLETIONS, Running, instant};

/// Sends `body` everywhere a body is read, and checks the answers.
async fn send_everywhere(server: &Running, body: &[u8]) {
    let paths =
        [CHAT, COMPLETIONS, "/invocations", "/tokenize", "/detokenize", "/v1/load_lora_adapter", "/abort_requests"];
    for path in paths {
        let reply = server.exchange(server.request(path, Bytes::copy_from_slice(body))).await;
        let shown = String::from_utf8_lossy(&body[..body.len().min(2000)]);
        assert!(
            reply.status == 200 || (400..500).contains(&reply.status),
            "{path} {shown}: {} {}",
            reply.status,
            reply.text
        );
        if reply.status != 200 {
            let error: Value = serde_json::from_str(&reply.text).unwrap();
            assert_eq!(error["error"]["code"], reply.status, "{path} {shown}");
            // Names of models and adapters are told, as vLLM does.
            let named = ["\"model\"", "\"lora_name\""].iter().any(|n| shown.contains(n));
            assert!(named || !reply.text.contains("canary"), "{path} {shown}: {}", reply.text);
        }
    }
}

async fn server() -> Running {
    let mut engine = instant();
    engine.max_model_len = Some(256);
    engine.max_loras = Some(1);
    Running::with(engine, |c| {
        c.frontend.dev_mode = true;
        c.frontend.runtime_lora = true;
    })
    .await
}

#[tokio::test]
async fn broken_bodies_are_refused() {
    let server = server().await;
    let deep = |open: &str, close: &str| format!("{}{}", open.repeat(100_000), close.repeat(100_000));
    let nested = format!(r#"{{"prompt":{}}}"#, deep("[", "]"));
    let ignored =
        format!(r#"{{"prompt":"a","max_tokens":1,"metadata":{}}}"#, deep("{\"a\":", "}").replace(":}", ":1}"));
    let message = format!(r#"{{"messages":[{{"role":"user","content":{}}}]}}"#, deep("[", "]"));
    let bodies: [&[u8]; 24] = [
        b"",
        b"{",
        b"null",
        b"\"canary\"",
        b"[[[",
        b"{\"prompt\":\"\xff\xfecanary\"}",
        b"\xff\xfe\x00c",
        b"{\"prompt\":\"canary\\ud800\"}",
        b"{\"prompt\":\"a\",\"max_tokens\":1e400}",
        b"{\"prompt\":\"a\",\"max_tokens\":99999999999999999999999999}",
        b"{\"prompt\":\"a\",\"temperature\":1e999}",
        b"{\"prompt\":\"a\",\"seed\":18446744073709551615}",
        b"{\"prompt\":\"a\",\"n\":4294967297}",
        b"{\"prompt\":[4294967296]}",
        b"{\"prompt\":[-1]}",
        b"{\"prompt\":[[1],[\"canary\"]]}",
        b"{\"prompt\":\"a\",\"stop_token_ids\":[-5]}",
        b"{\"prompt\":\"a\",\"stop\":{\"canary\":1}}",
        b"{\"tokens\":[1.5]}",
        b"{\"tokens\":[18446744073709551616]}",
        b"{\"messages\":{\"role\":\"canary\"}}",
        nested.as_bytes(),
        ignored.as_bytes(),
        message.as_bytes(),
    ];
    for body in bodies {
        send_everywhere(&server, body).await;
    }
    // It serves as before.
    assert_eq!(server.post(COMPLETIONS, r#"{"prompt":"a","max_tokens":1}"#).await.status, 200);
}

#[tokio::test]
async fn a_text_that_no_context_holds_is_refused_before_it_is_read() {
    let server = Running::with(instant(), |c| c.max_body_bytes = 64 << 20).await;
    let text = "x".repeat(128 * 131_072 + 1);
    for (path, body) in
        [(COMPLETIONS, json!({"prompt": text})), (CHAT, json!({"messages": [{"role": "user", "content": text}]}))]
    {
        let reply = server.post(path, &body.to_string()).await;
        assert_eq!(reply.status, 400);
        assert!(reply.text.contains("contains 16777217 characters (more than 16777216 characters"), "{}", reply.text);
    }
}

#[tokio::test]
async fn only_so_much_is_read() {
    let server = Running::with(instant(), |c| c.max_body_bytes = 100).await;
    let body = |n: usize| json!({"prompt": "x".repeat(n), "max_tokens": 1}).to_string();
    assert_eq!(server.post(COMPLETIONS, &body(50)).await.status, 200);
    assert_eq!(server.post(COMPLETIONS, &body(100)).await.status, 413);
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_filter("JSON has no infinity", |f| f.is_finite()).prop_map(Value::from),
        "(canary){1,2}".prop_map(Value::from),
        Just(json!("3")),
        Just(json!({"role": "user", "content": "hi"})),
    ];
    leaf.prop_recursive(3, 12, 4, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::hash_map("role|content|text|include_usage", inner, 0..3)
                .prop_map(|m| Value::Object(m.into_iter().collect())),
        ]
    })
}

fn field() -> impl Strategy<Value = String> {
    let names = [
        "model",
        "messages",
        "prompt",
        "stream",
        "stream_options",
        "max_tokens",
        "max_completion_tokens",
        "min_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "n",
        "seed",
        "ignore_eos",
        "stop",
        "stop_token_ids",
        "priority",
        "cache_salt",
        "echo",
        "logprobs",
        "top_logprobs",
        "prompt_logprobs",
        "return_token_ids",
        "tokens",
        "lora_name",
        "lora_path",
        "request_ids",
    ];
    proptest::sample::select(names.to_vec()).prop_map(str::to_owned)
}

#[test]
fn whatever_is_sent_is_answered() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let server = runtime.block_on(server());
    let config = ProptestConfig { cases: 150, ..ProptestConfig::default() };
    proptest!(config, |(fields in proptest::collection::vec((field(), value()), 0..6), valid in any::<bool>())| {
        let mut body: serde_json::Map<String, Value> = fields.into_iter().collect();
        if valid {
            body.insert("prompt".into(), json!("hello"));
            body.insert("messages".into(), json!([{"role": "user", "content": "hello"}]));
        }
        let body = Value::Object(body).to_string();
        runtime.block_on(send_everywhere(&server, body.as_bytes()));
    });
}
