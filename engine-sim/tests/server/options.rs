//! What options of the server add to answers.

use shared::time::Dur;

use crate::harness::{CHAT, COMPLETIONS, Running, chunks, instant, paced, timeless};

#[tokio::test]
async fn answers_carry_the_callers_id() {
    let server = Running::with(instant(), |c| c.frontend.request_id_headers = true).await;
    assert_eq!(server.post(COMPLETIONS, r#"{"prompt":"a","max_tokens":1}"#).await.header("x-request-id"), "r-1");
    assert_eq!(server.post(COMPLETIONS, "nonsense").await.header("x-request-id"), "r-1");
    let own = server.get("/health").await;
    assert_eq!(own.header("x-request-id").len(), 32);
    let server = Running::start(instant()).await;
    assert_eq!(server.post(COMPLETIONS, r#"{"prompt":"a","max_tokens":1}"#).await.header("x-request-id"), "");
}

#[tokio::test]
async fn answers_tell_their_times() {
    let server = Running::with(paced(), |c| c.frontend.per_request_metrics = true).await;
    let answer = server.json(COMPLETIONS, r#"{"prompt":"hello","max_tokens":11,"ignore_eos":true}"#).await;
    let of = |name: &str| answer["metrics"][name].as_f64().unwrap();
    assert!((of("generation_time_ms") / 10.0 - of("mean_itl_ms")).abs() < 1e-9, "{answer}");
    let (inference, tokens) = (of("time_to_first_token_ms") + of("generation_time_ms"), 11.0);
    assert!((of("tokens_per_second") / (tokens / inference * 1000.0) - 1.0).abs() < 1e-6, "{answer}");
    assert!(of("queue_time_ms") >= 0.0 && answer["metrics"]["speculative_decoding"].is_null());
    let body = r#"{"prompt":"hello","max_tokens":2,"stream":true,"stream_options":{"include_usage":true}}"#;
    let chunks = chunks(&server.events(COMPLETIONS, body).await);
    let last = chunks.last().unwrap();
    assert!(last["metrics"]["mean_itl_ms"].is_number() && last["metrics"].get("speculative_decoding").is_none());
    let several = server.json(COMPLETIONS, r#"{"prompt":"hello","max_tokens":2,"n":2}"#).await;
    assert!(several["metrics"].is_null(), "times of several choices are nobody's");
}

#[tokio::test]
async fn usage_can_be_told_to_everybody() {
    let server = Running::with(instant(), |c| c.frontend.force_include_usage = true).await;
    let events =
        server.events(CHAT, r#"{"messages":[{"role":"user","content":"hell"}],"max_tokens":1,"stream":true}"#).await;
    insta::assert_snapshot!(timeless(&events[0]), @r#"{"id":"chatcmpl-r-1","object":"chat.completion.chunk","created":T,"model":"igsim/instant","choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"usage":{"prompt_tokens":1,"total_tokens":1,"completion_tokens":0,"completion_tokens_details":null},"prompt_token_ids":null,"prompt_text":null}"#);
    let told = chunks(&events).iter().all(|c| c["usage"]["prompt_tokens"] == 1);
    assert!(told, "{events:?}");
}

#[tokio::test]
async fn open_requests_are_counted_where_that_is_asked_for() {
    let long = r#"{"prompt":"hello","max_tokens":100000,"ignore_eos":true,"stream":true}"#;
    let server = Running::with(paced(), |c| c.frontend.server_load_tracking = true).await;
    let open = server.send(server.request(COMPLETIONS, long)).await;
    assert_eq!(server.get("/load").await.text, r#"{"server_load":1}"#);
    drop(open);
    server.until("idle", |s| s.running + s.waiting == 0).await;
    assert_eq!(server.get("/load").await.text, r#"{"server_load":0}"#);
}

#[tokio::test]
async fn a_quiet_stream_says_that_it_lives() {
    let mut engine = paced();
    engine.scheduler.max_num_seqs = 1;
    let server = Running::with(engine, |c| c.frontend.sse_keep_alive = Some(Dur::from_millis(1))).await;
    // A step takes some six milliseconds: there is silence between any two tokens.
    let reply = server.post(COMPLETIONS, r#"{"prompt":"hello","max_tokens":5,"ignore_eos":true,"stream":true}"#).await;
    let (comments, events): (Vec<&str>, Vec<&str>) =
        reply.text.trim_end().split("\n\n").partition(|e| *e == ": keep-alive");
    assert!(!comments.is_empty(), "{}", reply.text);
    assert!(events.iter().all(|e| e.starts_with("data: ")) && events.last() == Some(&"data: [DONE]"), "{events:?}");
}

#[tokio::test]
async fn a_model_has_several_names() {
    let server = Running::with(instant(), |c| {
        c.model = "one".into();
        c.frontend.aliases = vec!["two".into()];
    })
    .await;
    for asked in ["one", "two"] {
        let answer = server.json(COMPLETIONS, &format!(r#"{{"model":"{asked}","prompt":"a","max_tokens":1}}"#)).await;
        assert_eq!(answer["model"], "one", "answers carry the first name");
    }
    let unknown = server.post(COMPLETIONS, r#"{"model":"three","prompt":"a"}"#).await;
    assert!(unknown.text.contains("Valid aliases: one, two."), "{}", unknown.text);
}

#[tokio::test]
async fn a_backlog_of_prompts_is_refused() {
    let mut engine = paced();
    engine.scheduler.max_num_seqs = 1;
    engine.max_num_queued_tokens = Some(10);
    let server = Running::start(engine).await;
    let long = r#"{"prompt":"hello","max_tokens":100000,"ignore_eos":true,"stream":true}"#;
    let running = server.send(server.request(COMPLETIONS, long)).await;
    server.until("decoding", |s| s.running == 1 && s.waiting == 0).await;
    let prompt = "x".repeat(4 * 10);
    let waiting = format!(r#"{{"prompt":"{prompt}","max_tokens":100000,"ignore_eos":true,"stream":true}}"#);
    let waiting = server.send(server.request(COMPLETIONS, waiting)).await;
    let refused = server.post(COMPLETIONS, r#"{"prompt":"a"}"#).await;
    let text =
        "The engine has reached its prefill token backlog limit. Please try again later or on a different instance.";
    assert_eq!(refused.status, 503);
    assert!(refused.text.contains(text), "{}", refused.text);
    let counted = r#"vllm:admission_rejections_total{model_name="meta-llama/Llama-3.1-8B-Instruct",engine="0",reason="max_num_queued_tokens"}"#;
    assert_eq!(server.metric(counted).await, 1.0);
    drop((running, waiting));
    server.until("idle", |s| s.running + s.waiting == 0).await;
    assert_eq!(server.post(COMPLETIONS, r#"{"prompt":"a","max_tokens":1}"#).await.status, 200);
}
