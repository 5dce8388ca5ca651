//! The pages beside the two generation endpoints.

use serde_json::{Value, json};

use crate::harness::{COMPLETIONS, Running, instant, timeless};

#[tokio::test]
async fn pages_answer_as_vllms_do() {
    let server = Running::start(instant()).await;
    let check = async |path: &str, status: u16, text: &str| {
        let reply = server.get(path).await;
        assert_eq!((reply.status, reply.text.as_str()), (status, text), "{path}");
    };
    check("/health", 200, "").await;
    check("/ping", 200, "").await;
    check("/version", 200, r#"{"version":"0.33.0"}"#).await;
    check("/load", 200, r#"{"server_load":0}"#).await;
}

#[tokio::test]
async fn the_served_model_is_listed() {
    let server = Running::with(instant(), |c| c.model = "my/model".into()).await;
    let reply = server.get("/v1/models").await;
    let mut list: Value = serde_json::from_str(&reply.text).unwrap();
    let permission = list["data"][0]["permission"][0]["id"].take();
    assert!(permission.as_str().unwrap().starts_with("modelperm-"), "{permission}");
    insta::assert_snapshot!(timeless(&list.to_string()), @r#"{"data":[{"created":T,"id":"my/model","max_model_len":131072,"object":"model","owned_by":"vllm","parent":null,"permission":[{"allow_create_engine":false,"allow_fine_tuning":false,"allow_logprobs":true,"allow_sampling":true,"allow_search_indices":false,"allow_view":true,"created":T,"group":null,"id":null,"is_blocking":false,"object":"model_permission","organization":"*"}],"root":"my/model"}],"object":"list"}"#);
    // What is listed can be asked for, and nothing else.
    let body = |model: &str| json!({"model": model, "prompt": "hello", "max_tokens": 1}).to_string();
    assert_eq!(server.json(COMPLETIONS, &body("my/model")).await["model"], "my/model");
    assert_eq!(server.post(COMPLETIONS, &body("igsim/instant")).await.status, 404);
}
