//! What clients of the field do, with a reader that forgives nothing: OpenAI's Python client, `vllm bench serve`, guidellm.

use serde_json::{Value, json};

use crate::harness::{CHAT, COMPLETIONS, Reply, Running, paced};

/// Server-sent events as a strict client reads them: each is one line of data, JSON but for the last.
fn strict(reply: &Reply) -> Vec<Value> {
    assert_eq!((reply.status, reply.header("content-type")), (200, "text/event-stream; charset=utf-8"));
    assert!(reply.text.ends_with("\n\n") && !reply.text.contains('\r') && !reply.text.contains("\n\n\n"));
    let events: Vec<&str> = reply.text.trim_end_matches("\n\n").split("\n\n").collect();
    let (last, events) = events.split_last().unwrap();
    assert_eq!(*last, "data: [DONE]");
    let chunk = |e: &&str| {
        assert!(!e.contains('\n'), "one line: {e}");
        serde_json::from_str(e.strip_prefix("data: ").unwrap()).unwrap()
    };
    events.iter().map(chunk).collect()
}

/// A field that a type of OpenAI's client requires, and what it has to be.
type Field = (&'static str, fn(&Value) -> bool);

fn has(value: &Value, fields: &[Field]) {
    for (name, holds) in fields {
        let found = value.get(name).unwrap_or_else(|| panic!("no {name} in {value}"));
        assert!(holds(found), "{name} in {value}");
    }
}

fn usage(value: &Value) {
    has(
        value,
        &[("prompt_tokens", Value::is_u64), ("completion_tokens", Value::is_u64), ("total_tokens", Value::is_u64)],
    );
}

/// `client.models.list()`, `client.chat.completions.create()` and `client.completions.create()`, streaming and not: every field that
/// the client's types (openai 2.x, `types/chat`, `types/completion.py`) require is there and of its type.
#[tokio::test]
async fn openais_client_reads_every_answer() {
    let server = Running::start(paced()).await;
    let models: Value = serde_json::from_str(&server.get("/v1/models").await.text).unwrap();
    let card = &models["data"][0];
    has(
        card,
        &[
            ("id", Value::is_string),
            ("created", Value::is_u64),
            ("object", |v| v == "model"),
            ("owned_by", Value::is_string),
        ],
    );
    let text_or_null = |v: &Value| v.is_string() || v.is_null();
    for (path, body) in
        [(CHAT, json!({"messages": [{"role": "user", "content": "hello"}]})), (COMPLETIONS, json!({"prompt": "hello"}))]
    {
        let chat = path == CHAT;
        let ask = |stream: bool| {
            let mut body = body.clone();
            let more = json!({"model": card["id"], "max_tokens": 5, "n": 2, "stream": stream});
            body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            if stream {
                body["stream_options"] = json!({"include_usage": true});
            }
            body.to_string()
        };
        let whole = server.json(path, &ask(false)).await;
        let head: [Field; 4] = [
            ("id", Value::is_string),
            ("created", Value::is_u64),
            ("model", Value::is_string),
            ("object", Value::is_string),
        ];
        has(&whole, &head);
        usage(&whole["usage"]);
        for choice in whole["choices"].as_array().unwrap() {
            has(choice, &[("index", Value::is_u64), ("finish_reason", Value::is_string)]);
            if chat {
                has(&choice["message"], &[("role", |v| v == "assistant"), ("content", Value::is_string)]);
            } else {
                has(choice, &[("text", Value::is_string)]);
            }
        }
        let chunks = strict(&server.post(path, &ask(true)).await);
        let (last, others) = chunks.split_last().unwrap();
        assert_eq!(last["choices"], json!([]));
        usage(&last["usage"]);
        assert_eq!(last["usage"]["completion_tokens"], whole["usage"]["completion_tokens"]);
        for chunk in others {
            has(chunk, &head);
            assert!(chunk.get("usage").is_none());
            for choice in chunk["choices"].as_array().unwrap() {
                has(choice, &[("index", Value::is_u64), ("finish_reason", text_or_null)]);
                let text = if chat { &choice["delta"]["content"] } else { &choice["text"] };
                assert!(text.is_string(), "{choice}");
            }
        }
    }
    let error: Value = serde_json::from_str(&server.post(CHAT, "{}").await.text).unwrap();
    has(&error["error"], &[("message", Value::is_string), ("type", Value::is_string), ("code", Value::is_u64)]);
}

/// `vllm bench serve --backend openai` and `openai-chat` (`vllm/benchmarks/lib/endpoint_request_func.py`): the first model is asked for,
/// a first request shows that the server is ready, then streams with usage, of which the last chunk has no choices; output is
/// counted by usage and by what choices hold text.
#[tokio::test]
async fn vllms_benchmark_measures() {
    let server = Running::start(paced()).await;
    let models: Value = serde_json::from_str(&server.get("/v1/models").await.text).unwrap();
    let model = models["data"][0]["id"].as_str().unwrap();
    for round in ["ready", "measured"] {
        let body = json!({"model": model, "prompt": "hello world", "temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": 12,
            "logprobs": null, "stream": true, "ignore_eos": true, "stream_options": {"include_usage": true}});
        let mut request = server.request(COMPLETIONS, body.to_string());
        request.headers_mut().insert("x-request-id", round.parse().unwrap());
        request.headers_mut().insert("authorization", "Bearer none".parse().unwrap());
        let chunks = strict(&server.exchange(request).await);
        let with_choices = chunks.iter().filter(|c| c["choices"].as_array().is_some_and(|l| !l.is_empty()));
        let text: String = with_choices.map(|c| c["choices"][0]["text"].as_str().unwrap()).collect();
        let counted = chunks.iter().find_map(|c| c["usage"]["completion_tokens"].as_u64());
        assert_eq!((text.len(), counted), (12 * 4, Some(12)));
        assert!(chunks.iter().all(|c| c["id"] == format!("cmpl-{round}")));
    }
    let body = json!({"model": model, "messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
        "max_completion_tokens": 8, "stream": true, "ignore_eos": true, "stream_options": {"include_usage": true}});
    let chunks = strict(&server.post(CHAT, &body.to_string()).await);
    assert_eq!(chunks.last().unwrap()["usage"]["completion_tokens"], 8);
}
