//! Several choices and several prompts: one request of the caller, several in the engine.

use serde_json::{Value, json};

use crate::harness::{CHAT, COMPLETIONS, Running, chunks, content, instant, paced};

fn texts(answer: &Value) -> Vec<String> {
    let choices = answer["choices"].as_array().unwrap();
    choices.iter().map(|c| content(&json!({"choices": [c]}))).collect()
}

#[tokio::test]
async fn choices_differ_and_repeat_themselves() {
    let server = Running::start(instant()).await;
    let ask = async |more: Value| {
        let mut body = json!({"prompt": "hello world", "max_tokens": 4, "n": 3, "ignore_eos": true});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let answer = server.json(COMPLETIONS, &body.to_string()).await;
        assert_eq!(
            answer["usage"],
            json!({"prompt_tokens": 3, "total_tokens": 15, "completion_tokens": 12,
            "prompt_tokens_details": null, "completion_tokens_details": null})
        );
        texts(&answer)
    };
    let some = ask(json!({})).await;
    assert!(some[0] != some[1] && some[1] != some[2] && some[0] != some[2], "{some:?}");
    assert_eq!(ask(json!({})).await, some);
    let (five, six) = (ask(json!({"seed": 5})).await, ask(json!({"seed": 6})).await);
    // vLLM counts the seed up: the second choice of seed 5 is the first of seed 6.
    assert_eq!(five[1..], six[..2]);
    // The first choice is what a request for one gets.
    let one = server.json(COMPLETIONS, r#"{"prompt":"hello world","max_tokens":4,"ignore_eos":true}"#).await;
    assert_eq!(texts(&one)[0], some[0]);
}

#[tokio::test]
async fn prompts_are_answered_in_order() {
    let server = Running::start(instant()).await;
    let body = json!({"prompt": ["one", "two, longer", "three"], "max_tokens": 3, "n": 2, "seed": 1});
    let all = server.json(COMPLETIONS, &body.to_string()).await;
    let indexes: Vec<_> = all["choices"].as_array().unwrap().iter().map(|c| c["index"].as_u64().unwrap()).collect();
    assert_eq!(indexes, [0, 1, 2, 3, 4, 5]);
    assert_eq!((&all["usage"]["prompt_tokens"], &all["usage"]["completion_tokens"]), (&json!(1 + 3 + 2), &json!(18)));
    for (i, prompt) in ["one", "two, longer", "three"].iter().enumerate() {
        let body = json!({"prompt": prompt, "max_tokens": 3, "n": 2, "seed": 1});
        let alone = texts(&server.json(COMPLETIONS, &body.to_string()).await);
        assert_eq!(alone[..], texts(&all)[2 * i..2 * i + 2]);
    }
    let lines = |name: &str| format!(r#"vllm:{name}{{model_name="igsim/instant",engine="0"}}"#);
    assert_eq!(server.metric(&lines("request_params_n_count")).await, 6.0);
    assert_eq!(server.metric(&lines("request_params_n_sum")).await, 12.0);
    assert_eq!(server.metric(&lines("request_max_num_generation_tokens_sum")).await, 18.0);
}

#[tokio::test]
async fn a_stream_of_choices_is_told_apart_by_their_indexes() {
    let server = Running::start(paced()).await;
    let message = json!([{"role": "user", "content": "tell me more"}]);
    let body = |stream: bool| {
        let usage = stream.then(|| json!({"include_usage": true}));
        json!({"messages": message, "max_tokens": 6, "n": 3, "stream": stream, "stream_options": usage}).to_string()
    };
    let whole = server.json(CHAT, &body(false)).await;
    let chunks = chunks(&server.events(CHAT, &body(true)).await);
    let (usage, chunks) = chunks.split_last().unwrap();
    assert_eq!((&usage["choices"], &usage["usage"]["completion_tokens"]), (&json!([]), &json!(18)));
    let roles = &chunks[..3];
    for (i, chunk) in roles.iter().enumerate() {
        let choice = &chunk["choices"][0];
        assert_eq!((&choice["index"], &choice["delta"]["role"]), (&json!(i), &json!("assistant")));
    }
    for i in 0..3 {
        let own: Vec<&Value> = chunks[3..].iter().filter(|c| c["choices"][0]["index"] == json!(i)).collect();
        assert_eq!(own.iter().map(|c| content(c)).collect::<String>(), texts(&whole)[i]);
        let ends = own.iter().filter(|c| !c["choices"][0]["finish_reason"].is_null()).count();
        assert_eq!((ends, own.last().unwrap()["choices"][0]["finish_reason"].as_str()), (1, Some("length")));
    }
}

#[tokio::test]
async fn each_choice_has_a_span_below_the_caller() {
    let server = Running::start(instant()).await;
    let mut request = server.request(COMPLETIONS, r#"{"prompt":["a","b"],"n":2,"max_tokens":2,"stream":true}"#);
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    request.headers_mut().insert("traceparent", parent.parse().unwrap());
    server.exchange(request).await;
    let spans = server.stop().await;
    let roots: Vec<_> = spans.iter().filter(|s| s.name == "vllm.engine.request").collect();
    let mut ids: Vec<&str> =
        roots.iter().map(|s| s.get("gen_ai.request.id").and_then(|v| v.as_str()).unwrap()).collect();
    ids.sort_unstable();
    // The first one has the name of the whole; the others are vLLM's: choice and prompt beside it.
    assert_eq!(ids, ["0_cmpl-r-1-1", "1_cmpl-r-1-0", "1_cmpl-r-1-1", "cmpl-r-1"]);
    for span in roots {
        assert_eq!(span.parent.map(|p| p.to_string()).as_deref(), Some("b7ad6b7169203331"));
        assert_eq!(span.get("gen_ai.usage.output_tokens").and_then(|v| v.as_int()), Some(2), "{span:?}");
    }
}

#[tokio::test]
async fn choices_take_places_and_leave_together() {
    let mut config = paced();
    config.max_num_queued_reqs = Some(3);
    let server = Running::start(config).await;
    let body = |n: u32| format!(r#"{{"prompt":"hello","n":{n},"max_tokens":100000,"ignore_eos":true,"stream":true}}"#);
    assert_eq!(server.post(COMPLETIONS, &body(4)).await.status, 503, "four choices need four places");
    let open = server.send(server.request(COMPLETIONS, body(3))).await;
    server.until("running", |s| s.running == 3).await;
    assert_eq!(server.post(COMPLETIONS, &body(1)).await.status, 503);
    drop(open);
    server.until("idle", |s| s.running + s.waiting == 0).await;
    assert_eq!(
        server.json(COMPLETIONS, r#"{"prompt":"hello","n":3,"max_tokens":1}"#).await["object"],
        "text_completion"
    );
}
