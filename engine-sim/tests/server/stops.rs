//! Stop strings and stop tokens. The answers are filler that a test knows from asking once before.

use serde_json::{Value, json};

use crate::harness::{COMPLETIONS, Running, chunks, content, instant, paced};

fn asked(extra: Value) -> String {
    let mut body = json!({"prompt": "hello world", "max_tokens": 10});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body.to_string()
}

async fn check(server: &Running, extra: Value, text: &str, reason: Value, tokens: u32) {
    let whole = server.json(COMPLETIONS, &asked(extra.clone())).await;
    let choice = &whole["choices"][0];
    assert_eq!((content(&whole).as_str(), &choice["stop_reason"]), (text, &reason), "{extra}");
    assert_eq!((&whole["usage"]["completion_tokens"], &choice["finish_reason"]), (&json!(tokens), &json!("stop")));

    let mut streamed = extra.clone();
    streamed["stream"] = json!(true);
    let chunks = chunks(&server.events(COMPLETIONS, &asked(streamed)).await);
    assert_eq!(chunks.iter().map(content).collect::<String>(), text, "{extra}");
    let last = &chunks.last().unwrap()["choices"][0];
    assert_eq!((&last["finish_reason"], &last["stop_reason"]), (&json!("stop"), &reason), "{extra}");
}

async fn stops(server: Running) {
    let text = content(&server.json(COMPLETIONS, &asked(json!({}))).await);
    assert_eq!(text.len(), 40);
    let word = &text[14..18];
    check(&server, json!({"stop": word}), &text[..14], json!(word), 5).await;
    check(&server, json!({"stop": ["?", word]}), &text[..14], json!(word), 5).await;
    check(&server, json!({"stop": word, "include_stop_str_in_output": true}), &text[..18], json!(word), 5).await;
    check(&server, json!({"stop": " ", "min_tokens": 4}), &text[..19], json!(" "), 5).await;
    let token = u32::from_le_bytes(text.as_bytes()[12..16].try_into().unwrap());
    check(&server, json!({"stop_token_ids": [token]}), &text[..12], json!(token), 4).await;
    // Each of the five was asked for twice.
    let ended = r#"vllm:request_success_total{model_name="igsim/instant",engine="0",finished_reason="stop"}"#;
    let ended = ended.replace("igsim/instant", &server.engine.inspect(|e| e.profile().model.clone()));
    assert_eq!(server.metric(&ended).await, 10.0);
}

#[tokio::test]
async fn an_answer_ends_before_a_stop_string_or_token() {
    stops(Running::start(instant()).await).await;
}

#[tokio::test]
async fn a_paced_stream_holds_back_what_may_be_a_stop_string() {
    stops(Running::start(paced()).await).await;
}

#[tokio::test]
async fn what_is_held_back_comes_with_the_end() {
    let server = Running::start(paced()).await;
    let text = content(&server.json(COMPLETIONS, &asked(json!({}))).await);
    let never = json!({"stop": "this is not filler at all", "stream": true});
    let chunks = chunks(&server.events(COMPLETIONS, &asked(never)).await);
    assert_eq!(chunks.iter().map(content).collect::<String>(), text);
    let last = chunks.last().unwrap();
    assert_eq!(
        (&last["choices"][0]["finish_reason"], &last["choices"][0]["stop_reason"]),
        (&json!("length"), &Value::Null)
    );
    // 24 bytes are held back, so the last chunk has them and the last token.
    assert!(content(last).len() >= 28, "{last}");
}
