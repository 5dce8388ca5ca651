//! What is worth saying of a span in a few words, behind its bar.

use shared::trace::{Span, Status};

use shared::trace::tree::value_text;

/// Attributes shown for a span of this name, with a word before each.
fn shown(name: &str) -> &'static [(&'static str, &'static str)] {
    match name {
        "gateway.request" => &[
            ("", "gen_ai.request.model"),
            ("in", "gen_ai.usage.input_tokens"),
            ("out", "gen_ai.usage.output_tokens"),
            ("status", "http.response.status_code"),
        ],
        "gateway.request.headers" => &[("", "gateway.header.count")],
        "gateway.request.body" => &[("bytes", "gateway.body.total_bytes"), ("in", "gateway.body.chunks")],
        "gateway.director.handle_request" => &[
            ("", "gateway.admission.result"),
            ("", "gateway.admission.reason"),
            ("->", "gateway.target_endpoint.name"),
            ("saturation", "gateway.saturation"),
        ],
        "gateway.flowcontrol.enqueue" => &[
            ("", "gateway.flow_control.flow_id"),
            ("band", "gateway.flow_control.priority_band"),
            ("position", "gateway.queue.position"),
            ("ttl ms", "gateway.flow_control.ttl_ms"),
        ],
        "gateway.flowcontrol.dispatch" => &[
            ("", "gateway.flow_control.result"),
            ("wait ms", "gateway.queue.wait_ms"),
            ("held at", "gateway.saturation"),
            ("of", "gateway.flow_control.ceiling"),
        ],
        "gateway.scheduler.schedule" => &[
            ("from", "gateway.scheduler.candidates.initial"),
            ("left", "gateway.scheduler.candidates.after_filter"),
            ("score", "gateway.scheduler.selected.score"),
            ("next", "gateway.scheduler.runner_up.score"),
            ("metrics age ms", "gateway.scheduler.metrics_age_ms"),
        ],
        "gateway.scheduler.filter" => &[
            ("", "gateway.scheduler.filter.name"),
            ("in", "gateway.scheduler.filter.candidates_in"),
            ("out", "gateway.scheduler.filter.candidates_out"),
        ],
        "gateway.scheduler.score" => &[
            ("", "gateway.scheduler.scorer.name"),
            ("w", "gateway.scheduler.scorer.weight"),
            ("min", "gateway.scheduler.score.min"),
            ("max", "gateway.scheduler.score.max"),
        ],
        "gateway.scheduler.pick" => &[("", "gateway.scheduler.picker.type"), ("ties", "gateway.scheduler.picker.ties")],
        "gateway.pd.decide" => &[
            ("", "gateway.pd.decision"),
            ("", "gateway.pd.reason"),
            ("uncached", "gateway.pd.uncached_tokens"),
            ("prefill", "gateway.pd.prefill_endpoint.name"),
        ],
        "kvcache.manager.get_scores" => {
            &[("found", "llm_d.kv_cache.blocks_found"), ("of", "llm_d.kv_cache.block_keys.count")]
        }
        "gateway.backend.proxy" => &[("", "gateway.backend.endpoint.name"), ("status", "http.response.status_code")],
        "gateway.response.process" => {
            &[("chunks", "gateway.response.chunks"), ("bytes", "gateway.response.total_bytes")]
        }
        "pd_proxy.request" => &[
            ("", "pd_proxy.reason"),
            ("ttft ms", "pd_proxy.time_to_first_token_ms"),
            ("coordination ms", "pd_proxy.coordination_ms"),
        ],
        "pd_proxy.prefill" => &[("", "pd_proxy.prefill.target"), ("status", "pd_proxy.prefill.status_code")],
        "pd_proxy.decode" => &[("status", "pd_proxy.decode.status_code")],
        "pd_proxy.backend" => &[("port", "server.port"), ("status", "http.response.status_code")],
        "vllm.kv_cache.transfer" => &[
            ("", "vllm.kv_transfer.direction"),
            ("", "vllm.kv_transfer.protocol"),
            ("blocks", "vllm.kv_transfer.blocks"),
            ("bytes", "vllm.kv_transfer.bytes"),
        ],
        "vllm.engine.request" => &[
            ("cached", "vllm.kv_cache.cached_tokens"),
            ("preemptions", "vllm.request.preemptions"),
            ("ttft s", "gen_ai.latency.time_to_first_token"),
        ],
        "vllm.engine.queue" => &[("", "vllm.queue.reason"), ("position", "vllm.queue.position")],
        "vllm.processor.process_inputs" => &[("tokens", "vllm.tokenization.prompt_tokens")],
        "vllm.scheduler.schedule" => {
            &[("step", "vllm.scheduler.iteration"), ("", "vllm.batch.phase"), ("tokens", "vllm.batch.total_tokens")]
        }
        "vllm.engine.step" => &[
            ("step", "vllm.scheduler.iteration"),
            ("", "vllm.batch.phase"),
            ("requests", "vllm.batch.size"),
            ("tokens", "vllm.batch.total_tokens"),
        ],
        "vllm.model.forward" => &[("", "vllm.model.name")],
        "vllm.executor.execute_model" => &[
            ("", "vllm.executor.phase"),
            ("steps", "vllm.executor.iterations"),
            ("batch", "vllm.batch.size_mean"),
            ("p50 ms", "vllm.token_latency.p50_ms"),
        ],
        _ => &[],
    }
}

/// A few words on `span`.
pub(super) fn gist(span: &Span) -> String {
    let mut words: Vec<String> = Vec::new();
    if let Status::Error(text) = &span.status {
        let kind = span.get("error.type").map(value_text).unwrap_or_default();
        words.push(format!("ERROR {kind} {text}").trim_end().to_owned());
    }
    for (word, key) in shown(&span.name) {
        if let Some(value) = span.get(key) {
            let value = match value.as_f64() {
                Some(number) if number.fract() != 0.0 => format!("{number:.3}"),
                Some(_) | None => value_text(value).trim_matches('"').to_owned(),
            };
            words.push(if word.is_empty() { value } else { format!("{word} {value}") });
        }
    }
    words.join("  ")
}
