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

#[tokio::test]
async fn metrics_have_vllms_names_and_kinds() {
    let server = Running::start(instant()).await;
    let reply = server.get("/metrics").await;
    assert_eq!(reply.header("content-type"), "text/plain; version=0.0.4; charset=utf-8");
    let kinds: Vec<_> = reply.text.lines().filter_map(|l| l.strip_prefix("# TYPE ")).collect();
    insta::assert_snapshot!(kinds.join("\n"), @r#"
    vllm:num_requests_running gauge
    vllm:num_requests_waiting gauge
    vllm:num_requests_waiting_by_reason gauge
    vllm:kv_cache_usage_perc gauge
    vllm:engine_sleep_state gauge
    vllm:cache_config_info gauge
    vllm:prompt_tokens_total counter
    vllm:prompt_tokens_by_source_total counter
    vllm:prompt_tokens_cached_total counter
    vllm:generation_tokens_total counter
    vllm:prefix_cache_queries_total counter
    vllm:prefix_cache_hits_total counter
    vllm:num_preemptions_total counter
    vllm:request_success_total counter
    vllm:admission_rejections_total counter
    vllm:time_to_first_token_seconds histogram
    vllm:inter_token_latency_seconds histogram
    vllm:request_time_per_output_token_seconds histogram
    vllm:e2e_request_latency_seconds histogram
    vllm:request_queue_time_seconds histogram
    vllm:request_inference_time_seconds histogram
    vllm:request_prefill_time_seconds histogram
    vllm:request_decode_time_seconds histogram
    vllm:iteration_tokens_total histogram
    vllm:request_prompt_tokens histogram
    vllm:request_generation_tokens histogram
    vllm:request_params_max_tokens histogram
    vllm:request_prefill_kv_computed_tokens histogram
    vllm:request_num_preemptions histogram
    vllm:request_max_num_generation_tokens histogram
    vllm:request_params_n histogram
    "#);
    // Every line is a sample of a metric announced before, with a number.
    for line in reply.text.lines().filter(|l| !l.starts_with('#')) {
        let (name, value) = line.rsplit_once(' ').unwrap();
        let name = name.split('{').next().unwrap();
        let family = ["_bucket", "_sum", "_count"].iter().find_map(|s| name.strip_suffix(s)).unwrap_or(name);
        assert!(kinds.iter().any(|k| k.split(' ').next() == Some(family)), "{line}");
        assert!(value.parse::<f64>().is_ok(), "{line}");
    }
}

#[tokio::test]
async fn metrics_count_what_was_done() {
    let server = Running::start(instant()).await;
    let body = json!({"prompt": "x".repeat(4 * 40), "max_tokens": 3}).to_string();
    for _ in 0..2 {
        server.json(COMPLETIONS, &body).await;
    }
    let page = server.get("/metrics").await.text;
    let lines = page.lines().filter(|l| {
        let telling = [
            "tokens_total{",
            "by_source",
            "prefix_cache",
            "request_success",
            "kv_cache_usage",
            "num_requests",
            "cache_config",
        ];
        !l.starts_with('#') && telling.iter().any(|t| l.contains(t))
    });
    insta::assert_snapshot!(lines.collect::<Vec<_>>().join("\n"), @r#"
    vllm:num_requests_running{model_name="igsim/instant",engine="0"} 0.0
    vllm:num_requests_waiting{model_name="igsim/instant",engine="0"} 0.0
    vllm:num_requests_waiting_by_reason{model_name="igsim/instant",engine="0",reason="capacity"} 0.0
    vllm:num_requests_waiting_by_reason{model_name="igsim/instant",engine="0",reason="deferred"} 0.0
    vllm:kv_cache_usage_perc{model_name="igsim/instant",engine="0"} 0.0
    vllm:cache_config_info{block_size="16",num_gpu_blocks="28160",enable_prefix_caching="True",engine="0"} 1.0
    vllm:prompt_tokens_total{model_name="igsim/instant",engine="0"} 80.0
    vllm:prompt_tokens_by_source_total{model_name="igsim/instant",engine="0",source="local_compute"} 48.0
    vllm:prompt_tokens_by_source_total{model_name="igsim/instant",engine="0",source="local_cache_hit"} 32.0
    vllm:prompt_tokens_by_source_total{model_name="igsim/instant",engine="0",source="external_kv_transfer"} 0.0
    vllm:generation_tokens_total{model_name="igsim/instant",engine="0"} 6.0
    vllm:prefix_cache_queries_total{model_name="igsim/instant",engine="0"} 80.0
    vllm:prefix_cache_hits_total{model_name="igsim/instant",engine="0"} 32.0
    vllm:request_success_total{model_name="igsim/instant",engine="0",finished_reason="stop"} 0.0
    vllm:request_success_total{model_name="igsim/instant",engine="0",finished_reason="length"} 2.0
    vllm:request_success_total{model_name="igsim/instant",engine="0",finished_reason="error"} 0.0
    vllm:request_success_total{model_name="igsim/instant",engine="0",finished_reason="abort"} 0.0
    vllm:request_success_total{model_name="igsim/instant",engine="0",finished_reason="repetition"} 0.0
    "#);
    for histogram in
        ["time_to_first_token_seconds", "e2e_request_latency_seconds", "request_prompt_tokens", "request_params_n"]
    {
        let count = format!(r#"vllm:{histogram}_count{{model_name="igsim/instant",engine="0"}}"#);
        assert_eq!(server.metric(&count).await, 2.0, "{histogram}");
    }
}
