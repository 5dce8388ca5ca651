//! The shapes of answers, field by field as vLLM writes them.

use serde_json::{Value, json};

use crate::harness::{CHAT, COMPLETIONS, Running, chunks, content, instant, paced, timeless};

#[tokio::test]
async fn a_completion_has_vllms_fields_and_nulls() {
    let server = Running::start(instant()).await;
    let reply = server.post(COMPLETIONS, r#"{"model":"igsim/instant","prompt":"hello world","max_tokens":3}"#).await;
    insta::assert_snapshot!(timeless(&reply.text), @r#"{"id":"cmpl-r-1","object":"text_completion","created":T,"model":"igsim/instant","choices":[{"index":0,"text":"oqu yni adi ","logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null,"prompt_logprobs":null,"prompt_token_ids":null,"routed_experts":null,"weight_versions":null}],"service_tier":null,"system_fingerprint":"vllm-0.33.0-H","usage":{"prompt_tokens":3,"total_tokens":6,"completion_tokens":3,"prompt_tokens_details":null,"completion_tokens_details":null},"kv_transfer_params":null,"ec_transfer_params":null,"metrics":null}"#);
}

#[tokio::test]
async fn a_chat_completion_has_vllms_fields_and_nulls() {
    let server = Running::start(instant()).await;
    let body = r#"{"messages":[{"role":"user","content":"hello world"}],"max_completion_tokens":2}"#;
    insta::assert_snapshot!(timeless(&server.post(CHAT, body).await.text), @r#"{"id":"chatcmpl-r-1","object":"chat.completion","created":T,"model":"igsim/instant","choices":[{"index":0,"message":{"role":"assistant","content":"oqu yni ","refusal":null,"annotations":null,"audio":null,"function_call":null,"reasoning":null},"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null,"routed_experts":null,"weight_versions":null}],"service_tier":null,"system_fingerprint":"vllm-0.33.0-H","usage":{"prompt_tokens":3,"total_tokens":5,"completion_tokens":2,"prompt_tokens_details":null,"completion_tokens_details":null},"prompt_logprobs":null,"prompt_token_ids":null,"prompt_text":null,"kv_transfer_params":null,"ec_transfer_params":null,"metrics":null}"#);
}

#[tokio::test]
async fn a_completion_stream_ends_with_its_last_tokens_then_usage_then_done() {
    let server = Running::start(instant()).await;
    let body = r#"{"prompt":"hello world","max_tokens":3,"stream":true,"stream_options":{"include_usage":true}}"#;
    let events = server.events(COMPLETIONS, body).await;
    insta::assert_snapshot!(timeless(&events.join("\n")), @r#"
    {"id":"cmpl-r-1","object":"text_completion","created":T,"model":"igsim/instant","choices":[{"index":0,"text":"oqu yni adi ","logprobs":null,"finish_reason":"length","stop_reason":null,"prompt_token_ids":null,"token_ids":null,"weight_versions":null}],"kv_transfer_params":null}
    {"id":"cmpl-r-1","object":"text_completion","created":T,"model":"igsim/instant","choices":[],"usage":{"prompt_tokens":3,"total_tokens":6,"completion_tokens":3},"system_fingerprint":"vllm-0.33.0-H"}
    [DONE]
    "#);
}

#[tokio::test]
async fn a_chat_stream_begins_with_the_role() {
    let server = Running::start(instant()).await;
    let body = r#"{"messages":[{"role":"user","content":"hello world"}],"max_tokens":2,"stream":true}"#;
    insta::assert_snapshot!(timeless(&server.events(CHAT, body).await.join("\n")), @r#"
    {"id":"chatcmpl-r-1","object":"chat.completion.chunk","created":T,"model":"igsim/instant","choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"prompt_token_ids":null,"prompt_text":null}
    {"id":"chatcmpl-r-1","object":"chat.completion.chunk","created":T,"model":"igsim/instant","choices":[{"index":0,"delta":{"content":"oqu yni "},"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null,"weight_versions":null}],"system_fingerprint":"vllm-0.33.0-H","kv_transfer_params":null}
    [DONE]
    "#);
}

#[tokio::test]
async fn continuous_usage_is_on_every_chunk() {
    let server = Running::start(instant()).await;
    let body = r#"{"messages":[{"role":"user","content":"hello world"}],"max_tokens":2,"stream":true,
                   "stream_options":{"include_usage":true,"continuous_usage_stats":true}}"#;
    let chunks = chunks(&server.events(CHAT, body).await);
    let usage: Vec<_> = chunks.iter().map(|c| c["usage"]["completion_tokens"].as_u64()).collect();
    assert_eq!(usage, [Some(0), Some(2), Some(2)]);
    // Alone it means nothing.
    let body = r#"{"prompt":"hello","max_tokens":1,"stream":true,"stream_options":{"continuous_usage_stats":true}}"#;
    let events = server.events(COMPLETIONS, body).await;
    assert!(events.iter().all(|e| !e.contains("usage")), "{events:?}");
}

#[tokio::test]
async fn a_paced_stream_says_what_the_whole_answer_says() {
    let server = Running::start(paced()).await;
    let body = |stream: bool| {
        let message = json!({"role": "user", "content": "tell me more"});
        json!({"messages": [message], "max_tokens": 12, "stream": stream}).to_string()
    };
    let whole = server.json(CHAT, &body(false)).await;
    let chunks = chunks(&server.events(CHAT, &body(true)).await);
    assert_eq!(chunks.iter().map(content).collect::<String>(), content(&whole));
    assert_eq!(content(&whole).len(), 12 * 4);
    let reason = |c: &Value| c["choices"][0]["finish_reason"].as_str().map(str::to_owned);
    let ended: Vec<_> = chunks.iter().map(reason).collect();
    let (last, before) = ended.split_last().unwrap();
    assert_eq!(last.as_deref(), Some("length"));
    assert!(before.iter().all(Option::is_none), "{before:?}");
    // The end is told together with the last tokens, not after them.
    assert!(!content(chunks.last().unwrap()).is_empty(), "{chunks:?}");
}

#[tokio::test]
async fn a_prompt_is_text_or_token_ids() {
    let server = Running::start(instant()).await;
    let prompt = u32::from_le_bytes(*b"hell");
    let mut answers = Vec::new();
    for prompt in [json!("hell"), json!([prompt]), json!(["hell"]), json!([[prompt]])] {
        let body = json!({"prompt": prompt, "max_tokens": 5}).to_string();
        let answer = server.json(COMPLETIONS, &body).await;
        assert_eq!((&answer["usage"]["prompt_tokens"], &answer["usage"]["total_tokens"]), (&json!(1), &json!(6)));
        answers.push(content(&answer));
    }
    assert_eq!(answers, vec![answers[0].clone(); 4]);
}

#[tokio::test]
async fn limits_have_vllms_defaults() {
    let mut config = instant();
    config.max_model_len = Some(24);
    let server = Running::start(config).await;
    let check = async |path, body: Value, tokens: u64, reason: &str| {
        let answer = server.json(path, &body.to_string()).await;
        let choice = &answer["choices"][0];
        assert_eq!(answer["usage"]["completion_tokens"], tokens, "{body}");
        assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!(reason), &Value::Null), "{body}");
    };
    check(COMPLETIONS, json!({"prompt": "hell"}), 16, "length").await;
    check(COMPLETIONS, json!({"prompt": "hell", "max_tokens": 24}), 23, "length").await;
    let messages = json!([{"role": "user", "content": "hell"}]);
    check(CHAT, json!({"messages": messages}), 23, "length").await;
    check(CHAT, json!({"messages": messages, "max_tokens": 9, "max_completion_tokens": 4}), 4, "length").await;
}

#[tokio::test]
async fn an_answer_ends_by_itself_unless_that_is_ignored() {
    let server = Running::start(instant()).await;
    let prompt = |extra: Value| {
        let mut body = json!({"prompt": "hell", "max_tokens": 1000});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        body.to_string()
    };
    let natural = server.json(COMPLETIONS, &prompt(json!({}))).await;
    let length = natural["usage"]["completion_tokens"].as_u64().unwrap();
    assert_eq!(natural["choices"][0]["finish_reason"], "stop");
    assert!((32..544).contains(&length), "{length}");
    let ignored = server.json(COMPLETIONS, &prompt(json!({"ignore_eos": true}))).await;
    assert_eq!(ignored["usage"]["completion_tokens"], 1000);
    let later = server.json(COMPLETIONS, &prompt(json!({"min_tokens": 700}))).await;
    assert_eq!(
        (&later["usage"]["completion_tokens"], &later["choices"][0]["finish_reason"]),
        (&json!(701), &json!("stop"))
    );
}

#[tokio::test]
async fn usage_says_what_was_cached_only_when_asked_to() {
    let prompt = json!({"prompt": "x".repeat(4 * 40), "max_tokens": 1}).to_string();
    for (details, expect) in [(false, [Value::Null, Value::Null]), (true, [json!(0), json!(32)])] {
        let server = Running::with(instant(), |c| c.prompt_tokens_details = details).await;
        let mut cached = Vec::new();
        for _ in 0..2 {
            let answer = server.json(COMPLETIONS, &prompt).await;
            cached.push(answer["usage"]["prompt_tokens_details"]["cached_tokens"].clone());
        }
        assert_eq!(cached, expect);
    }
}

#[tokio::test]
async fn ids_are_the_callers_or_fresh_ones() {
    let server = Running::start(instant()).await;
    let body = r#"{"prompt":"hello","max_tokens":1}"#;
    assert_eq!(server.json(COMPLETIONS, body).await["id"], "cmpl-r-1");
    let mut fresh = std::collections::HashSet::new();
    for _ in 0..50 {
        let mut request = server.request(COMPLETIONS, body);
        request.headers_mut().remove("x-request-id");
        let reply: Value = serde_json::from_str(&server.exchange(request).await.text).unwrap();
        let id = reply["id"].as_str().unwrap().to_owned();
        let (high, low) = id.strip_prefix("cmpl-").unwrap().split_at(16);
        assert_eq!(low.len(), 16, "{id}");
        assert!(fresh.insert(high.to_owned()) && fresh.insert(low.to_owned()), "{id}");
    }
}
