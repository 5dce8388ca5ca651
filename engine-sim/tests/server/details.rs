//! What few requests ask for: log probabilities, token ids, the prompt again.

use serde_json::{Value, json};

use crate::harness::{CHAT, COMPLETIONS, Running, chunks, instant, paced, timeless};

#[tokio::test]
async fn log_probabilities_of_a_completion() {
    let server = Running::start(instant()).await;
    let answer = server.json(COMPLETIONS, r#"{"prompt":"hello","max_tokens":3,"logprobs":2}"#).await;
    let logprobs = &answer["choices"][0]["logprobs"];
    assert_eq!(logprobs["text_offset"], json!([0, 4, 8]));
    let tokens: Vec<&str> = logprobs["tokens"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
    assert_eq!(tokens.concat(), answer["choices"][0]["text"].as_str().unwrap());
    for (i, token) in tokens.iter().enumerate() {
        let (own, top) = (&logprobs["token_logprobs"][i], &logprobs["top_logprobs"][i]);
        assert!(own.as_f64().unwrap() < 0.0);
        // The token is the likeliest, so that two are told and not three.
        assert_eq!((top.as_object().unwrap().len(), &top[*token]), (2, own), "{top}");
    }
    let named = r#"{"prompt":"hello","max_tokens":1,"logprobs":0,"return_tokens_as_token_ids":true}"#;
    let named = server.json(COMPLETIONS, named).await;
    let name = named["choices"][0]["logprobs"]["tokens"][0].as_str().unwrap();
    assert!(name.strip_prefix("token_id:").is_some_and(|id| id.parse::<u32>().is_ok()), "{name}");
}

#[tokio::test]
async fn log_probabilities_of_a_chat() {
    let server = Running::start(instant()).await;
    let ask = async |stream: bool, top: u32| {
        let message = json!([{"role": "user", "content": "hello"}]);
        let body =
            json!({"messages": message, "max_tokens": 2, "logprobs": true, "top_logprobs": top, "stream": stream});
        if stream {
            let chunks = chunks(&server.events(CHAT, &body.to_string()).await);
            chunks[1]["choices"][0]["logprobs"]["content"].clone()
        } else {
            server.json(CHAT, &body.to_string()).await["choices"][0]["logprobs"]["content"].clone()
        }
    };
    let told = ask(false, 3).await;
    assert_eq!(told, ask(true, 3).await);
    for token in told.as_array().unwrap() {
        assert_eq!(token["bytes"], json!(token["token"].as_str().unwrap().as_bytes()));
        assert_eq!(token["top_logprobs"].as_array().unwrap().len(), 3);
        assert_eq!(token["top_logprobs"][0]["token"], token["token"]);
    }
    assert_eq!(ask(false, 0).await[0]["top_logprobs"], json!([]));
}

#[tokio::test]
async fn log_probabilities_of_a_prompt_are_computed_anew() {
    let server = Running::with(instant(), |c| c.prompt_tokens_details = true).await;
    let cached = async |more: &str| {
        let prompt = "x".repeat(4 * 40);
        let body = format!(r#"{{"prompt":"{prompt}","max_tokens":1{more}}}"#);
        let answer = server.json(COMPLETIONS, &body).await;
        (answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap(), answer)
    };
    assert_eq!(cached("").await.0, 0);
    assert_eq!(cached("").await.0, 32);
    let (hit, answer) = cached(r#","prompt_logprobs":1"#).await;
    assert_eq!(hit, 0, "vLLM does not read the prefix cache for them");
    let told = answer["choices"][0]["prompt_logprobs"].as_array().unwrap();
    assert_eq!((told.len(), &told[0]), (40, &Value::Null));
    let token = u32::from_le_bytes(*b"xxxx").to_string();
    for entry in &told[1..] {
        let own = &entry[&token];
        assert_eq!(own["decoded_token"], "xxxx", "{entry}");
        let likeliest = own["rank"] == 1;
        assert_eq!(entry.as_object().unwrap().len(), if likeliest { 1 } else { 2 }, "{entry}");
    }
    // Such a request is not counted among the lookups; see `get_computed_blocks` of vLLM.
    let queries = server.metric(r#"vllm:prefix_cache_queries_total{model_name="igsim/instant",engine="0"}"#).await;
    assert_eq!(queries, 80.0);
}

#[tokio::test]
async fn token_ids_are_told_once() {
    let server = Running::start(paced()).await;
    let body = |stream| json!({"prompt": [5, 6, 7], "max_tokens": 6, "return_token_ids": true, "stream": stream});
    let whole = server.json(COMPLETIONS, &body(false).to_string()).await;
    let ids = whole["choices"][0]["token_ids"].as_array().unwrap().clone();
    assert_eq!((ids.len(), &whole["choices"][0]["prompt_token_ids"]), (6, &json!([5, 6, 7])));
    let chunks = chunks(&server.events(COMPLETIONS, &body(true).to_string()).await);
    let streamed = chunks.iter().flat_map(|c| c["choices"][0]["token_ids"].as_array().unwrap().clone());
    assert_eq!(streamed.collect::<Vec<_>>(), ids);
    let prompts: Vec<_> = chunks.iter().map(|c| c["choices"][0]["prompt_token_ids"].is_array()).collect();
    assert!(prompts[0] && prompts[1..].iter().all(|p| !p), "{prompts:?}");
    // What a stream tells can be asked again: the ids are the text.
    let again = json!({"prompt": ids, "max_tokens": 1, "echo": true}).to_string();
    let text = server.json(COMPLETIONS, &again).await["choices"][0]["text"].as_str().unwrap().to_owned();
    assert!(text.starts_with(whole["choices"][0]["text"].as_str().unwrap()), "{text}");
}

#[tokio::test]
async fn a_chat_goes_on_where_the_assistant_stopped() {
    let server = Running::start(instant()).await;
    let body = |last: &str, stream: bool| {
        let messages = json!([{"role": "user", "content": "hello"}, {"role": last, "content": "so \"far\""}]);
        json!({"messages": messages, "max_tokens": 1, "echo": true, "stream": stream}).to_string()
    };
    let text = async |last| {
        let answer = server.json(CHAT, &body(last, false)).await;
        answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
    };
    assert!(text("assistant").await.starts_with("so \"far\""));
    assert_eq!(text("user").await.len(), 4);
    let events = server.events(CHAT, &body("assistant", true)).await;
    insta::assert_snapshot!(timeless(&events[1]), @r#"{"id":"chatcmpl-r-1","object":"chat.completion.chunk","created":T,"model":"igsim/instant","choices":[{"index":0,"delta":{"content":"so \"far\""},"logprobs":null,"finish_reason":null}]}"#);
}
