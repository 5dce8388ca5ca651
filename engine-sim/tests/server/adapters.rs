//! LoRA adapters: chosen by model name, kept apart in the cache, limited in a batch.

use engine_sim::core::config::{EngineConfig, LoraModule};
use serde_json::json;

use crate::harness::{COMPLETIONS, Running, instant, paced};

fn with_adapters(engine: EngineConfig) -> EngineConfig {
    let module =
        |name: &str| LoraModule { name: name.into(), path: format!("/adapters/{name}"), base_model_name: None };
    EngineConfig { lora_modules: vec![module("sql"), module("chat")], ..engine }
}

#[tokio::test]
async fn adapters_do_not_share_a_cache() {
    let server = Running::with(with_adapters(instant()), |c| c.prompt_tokens_details = true).await;
    let cached = async |model: &str| {
        let body = json!({"model": model, "prompt": "x".repeat(4 * 40), "max_tokens": 1}).to_string();
        let answer = server.json(COMPLETIONS, &body).await;
        assert_eq!(answer["model"], model);
        answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
    };
    for model in ["igsim/instant", "sql", "chat"] {
        assert_eq!((cached(model).await, cached(model).await), (0, 32), "{model}");
    }
    let spans = server.stop().await;
    let of = |name: &str| {
        let roots = spans.iter().filter(|s| s.name == "vllm.engine.request");
        roots.filter(|s| s.get("gen_ai.request.model").and_then(|v| v.as_str()) == Some(name)).collect::<Vec<_>>()
    };
    assert!(of("sql").iter().all(|s| s.get("vllm.lora.name").and_then(|v| v.as_str()) == Some("sql")));
    assert!(of("igsim/instant").iter().all(|s| s.get("vllm.lora.name").is_none()));
    assert_eq!([of("sql").len(), of("chat").len(), of("igsim/instant").len()], [2, 2, 2]);
}

#[tokio::test]
async fn an_adapter_waits_for_its_place_and_nobody_behind_it_does() {
    // One adapter in a batch is vLLM's default.
    let server = Running::start(with_adapters(paced())).await;
    let body = |model: &str| {
        json!({"model": model, "prompt": "hello", "max_tokens": 100_000, "ignore_eos": true, "stream": true})
            .to_string()
    };
    let first = server.send(server.request(COMPLETIONS, body("sql"))).await;
    server.until("running", |s| s.running == 1).await;
    let second = server.send(server.request(COMPLETIONS, body("chat"))).await;
    server.until("deferred", |s| s.waiting_deferred == 1).await;
    let third = server.send(server.request(COMPLETIONS, body("meta-llama/Llama-3.1-8B-Instruct"))).await;
    server.until("the base model runs beside it", |s| s.running == 2 && s.waiting_deferred == 1).await;
    let page = server.get("/metrics").await.text;
    let info = page.lines().find(|l| l.starts_with("vllm:lora_requests_info{")).unwrap();
    let (labels, time) = info.rsplit_once(' ').unwrap();
    assert_eq!(
        labels,
        r#"vllm:lora_requests_info{max_lora="1",waiting_lora_adapters="sql,chat",running_lora_adapters="sql,chat"}"#
    );
    assert!(time.parse::<f64>().unwrap() > 1.7e9);
    drop(first);
    server.until("its turn", |s| s.running == 2 && s.waiting == 0).await;
    drop((second, third));
    let spans = server.stop().await;
    let waited = spans.iter().filter(|s| s.name == "vllm.engine.queue");
    let lora = waited.filter(|s| s.get("vllm.queue.reason").and_then(|v| v.as_str()) == Some("lora")).count();
    assert_eq!(lora, 1);
}
