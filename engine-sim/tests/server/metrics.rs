//! The metrics page, read by another parser and compared with a table of vLLM's metrics.

use std::collections::{BTreeMap, BTreeSet};

use engine_sim::core::config::BucketFamily;
use prometheus_parse::{Sample, Scrape, Value};
use serde::Deserialize;
use serde_json::json;

use crate::harness::{CHAT, COMPLETIONS, Running, instant};

/// A family as vLLM 0.33 has it: names, labels, values of labels and buckets from `vllm/v1/metrics/{loggers,buckets}.py`.
#[derive(Deserialize)]
struct Family {
    name: String,
    kind: String,
    labels: BTreeSet<String>,
    #[serde(default)]
    values: BTreeMap<String, BTreeSet<String>>,
    #[serde(default)]
    buckets: Vec<f64>,
    /// The option it needs.
    when: Option<String>,
}

fn table() -> Vec<Family> {
    serde_json::from_str(include_str!("../fixtures/vllm_metrics.json")).unwrap()
}

/// A page as the parser sees it. It knows no colons in names, so they are underscores here.
struct Read {
    text: String,
    scrape: Scrape,
}

impl Read {
    async fn of(server: &Running) -> Read {
        let text = server.get("/metrics").await.text.replace("vllm:", "vllm_");
        let lines = text.lines().map(|l| Ok(l.to_owned()));
        let scrape = Scrape::parse(lines).unwrap();
        Read { scrape, text }
    }

    fn samples<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Sample> {
        self.scrape.samples.iter().filter(move |s| s.metric == name)
    }

    /// The families announced, with their kind.
    fn families(&self) -> BTreeMap<&str, &str> {
        let types = self.text.lines().filter_map(|l| l.strip_prefix("# TYPE "));
        types.map(|l| l.split_once(' ').unwrap()).collect()
    }

    fn number(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let fits = |s: &&Sample| labels.iter().all(|(k, v)| s.labels.get(k) == Some(*v));
        match self.samples(name).find(fits).unwrap_or_else(|| panic!("no {name} {labels:?} in\n{}", self.text)).value {
            Value::Counter(x) | Value::Gauge(x) | Value::Untyped(x) => x,
            ref other @ (Value::Histogram(_) | Value::Summary(_)) => panic!("{name} is {other:?}"),
        }
    }

    fn check(&self, family: &Family) {
        let name = family.name.replace(':', "_");
        assert_eq!(self.families().get(name.as_str()), Some(&family.kind.as_str()), "{name}");
        let samples: Vec<&Sample> = self.samples(&name).collect();
        assert!(!samples.is_empty(), "{name} has samples");
        for sample in &samples {
            let labels: BTreeSet<String> = sample.labels.keys().cloned().collect();
            assert_eq!(labels, family.labels, "{name}");
            let kind = match &sample.value {
                Value::Counter(_) => "counter",
                Value::Gauge(_) => "gauge",
                Value::Histogram(buckets) => {
                    let bounds: Vec<f64> = buckets.iter().map(|b| b.less_than).collect();
                    let expect: Vec<f64> = family.buckets.iter().copied().chain([f64::INFINITY]).collect();
                    assert_eq!(bounds, expect, "{name}");
                    assert!(buckets.is_sorted_by(|a, b| a.count <= b.count), "{name} is cumulative");
                    let count = self.number(&format!("{name}_count"), &[]);
                    assert_eq!(buckets.last().unwrap().count, count, "{name}");
                    assert!(self.number(&format!("{name}_sum"), &[]) >= 0.0);
                    "histogram"
                }
                Value::Summary(_) | Value::Untyped(_) => "another",
            };
            assert_eq!(kind, family.kind, "{name}");
        }
        for (label, expect) in &family.values {
            let found: BTreeSet<String> = samples.iter().map(|s| s.labels[label].clone()).collect();
            assert_eq!(&found, expect, "{name}");
        }
    }
}

#[tokio::test]
async fn the_page_has_vllms_families_labels_and_buckets() {
    let mut config = instant();
    config.observability.kv_cache_metrics = true;
    let server = Running::start(config).await;
    server.json(COMPLETIONS, &json!({"prompt": "hello", "max_tokens": 3}).to_string()).await;
    let page = Read::of(&server).await;
    for family in &table() {
        page.check(family);
    }
    let expect: BTreeSet<String> = table().iter().map(|f| f.name.replace(':', "_")).collect();
    let found: BTreeSet<String> =
        page.families().keys().filter(|n| n.starts_with("vllm_")).map(|n| (*n).to_owned()).collect();
    assert_eq!(found, expect, "nothing else has vLLM's prefix");
    for (name, kind) in page.families() {
        assert!(page.scrape.docs.get(name).is_some_and(|d| !d.is_empty()), "{name} has a HELP line");
        assert!(kind != "counter" || name.ends_with("_total"), "{name}");
    }
}

#[tokio::test]
async fn what_needs_an_option_is_not_there_without_it() {
    let server = Running::start(instant()).await;
    let page = Read::of(&server).await;
    for family in table().iter().filter(|f| f.when.is_some()) {
        assert!(!page.families().contains_key(family.name.replace(':', "_").as_str()), "{}", family.name);
    }
    assert!(!page.text.contains("igsim:"), "no KV events, no counts of them");
}

#[tokio::test]
async fn buckets_can_be_others() {
    let mut config = instant();
    config.observability.custom_histogram_buckets = BTreeMap::from([
        (BucketFamily::RequestLatency, vec![0.01, 0.5]),
        (BucketFamily::RequestTokens, vec![7.0, 2e6]),
    ]);
    let server = Running::start(config).await;
    let text = server.get("/metrics").await.text;
    let bounds = |name: &str| {
        let lines = text.lines().filter_map(|l| l.strip_prefix("vllm:")?.strip_prefix(name)?.strip_prefix("_bucket{"));
        let of = |l: &str| l.split_once("le=\"").unwrap().1.split('"').next().unwrap().to_owned();
        lines.map(of).collect::<Vec<_>>().join(" ")
    };
    for name in ["e2e_request_latency_seconds", "request_queue_time_seconds"] {
        assert_eq!(bounds(name), "0.01 0.5 +Inf");
    }
    assert_eq!(bounds("request_prompt_tokens"), "7.0 2e+06 +Inf");
    assert_eq!(bounds("request_num_preemptions"), "1.0 2.0 3.0 4.0 5.0 10.0 20.0 +Inf");
}

#[tokio::test]
async fn counts_are_what_was_done() {
    let server = Running::start(instant()).await;
    let body = json!({"prompt": "x".repeat(4 * 40), "max_tokens": 3}).to_string();
    for _ in 0..2 {
        server.json(COMPLETIONS, &body).await;
    }
    let page = Read::of(&server).await;
    let is = |name: &str, labels: &[(&str, &str)], expect: f64| {
        assert_eq!(page.number(&format!("vllm_{name}"), labels), expect, "{name} {labels:?}");
    };
    is("prompt_tokens_total", &[], 80.0);
    is("prompt_tokens_by_source_total", &[("source", "local_compute")], 48.0);
    is("prompt_tokens_by_source_total", &[("source", "local_cache_hit")], 32.0);
    is("prompt_tokens_cached_total", &[], 32.0);
    is("prompt_tokens_cached_by_source_total", &[("source", "device")], 32.0);
    is("prefix_cache_queries_total", &[], 80.0);
    is("prefix_cache_hits_total", &[], 32.0);
    is("generation_tokens_total", &[], 6.0);
    is("request_success_total", &[("finished_reason", "length")], 2.0);
    is("request_success_total", &[("finished_reason", "stop")], 0.0);
    is("num_requests_running", &[], 0.0);
    is("kv_cache_usage_perc", &[], 0.0);
    for histogram in ["time_to_first_token_seconds", "request_queue_time_seconds", "request_params_n"] {
        is(&format!("{histogram}_count"), &[], 2.0);
    }
    // A prefill of 40 tokens and one of 8, then two steps of one token for each request.
    is("iteration_tokens_total_sum", &[], 54.0);
    let info = page.samples("vllm_cache_config_info").next().unwrap();
    let expect = [
        ("block_size", "16"),
        ("num_gpu_blocks", "28160"),
        ("num_gpu_blocks_override", "None"),
        ("enable_prefix_caching", "True"),
        ("kv_cache_size_tokens", "450560"),
    ];
    for (label, value) in expect {
        assert_eq!(info.labels.get(label), Some(value), "{label}");
    }
}

#[tokio::test]
async fn one_token_takes_no_time_each() {
    let server = Running::start(instant()).await;
    server.json(COMPLETIONS, &json!({"prompt": "x", "max_tokens": 1}).to_string()).await;
    let page = Read::of(&server).await;
    // vLLM observes 0 for it rather than nothing.
    assert_eq!(page.number("vllm_request_time_per_output_token_seconds_count", &[]), 1.0);
    assert_eq!(page.number("vllm_inter_token_latency_seconds_count", &[]), 0.0);
}

#[tokio::test]
async fn requests_count_by_handler_when_their_answer_is_complete() {
    let server = Running::start(instant()).await;
    let body = json!({"prompt": "x", "max_tokens": 2, "stream": true}).to_string();
    server.events(COMPLETIONS, &body).await;
    server.post(CHAT, "{}").await;
    server.get("/v1/models").await;
    server.get("/nothing").await;
    for excluded in ["/health", "/ping", "/version", "/load", "/metrics"] {
        server.get(excluded).await;
    }
    // The last bytes of an answer are written before its body is dropped.
    let (mut page, mut left) = (Read::of(&server).await, 1000);
    while page.samples("http_requests_total").count() < 4 && left > 0 {
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        (page, left) = (Read::of(&server).await, left - 1);
    }
    let requests: BTreeSet<(String, String, String)> = page
        .samples("http_requests_total")
        .map(|s| {
            assert_eq!(s.value, Value::Counter(1.0));
            let label = |name: &str| s.labels.get(name).unwrap().to_owned();
            (label("method"), label("status"), label("handler"))
        })
        .collect();
    let expect =
        [("GET", "2xx", "/v1/models"), ("GET", "4xx", "none"), ("POST", "2xx", COMPLETIONS), ("POST", "4xx", CHAT)];
    assert_eq!(requests, expect.map(|(m, s, h)| (m.into(), s.into(), h.into())).into());
    let sum = |name: &str, handler: &str| page.number(&format!("{name}_sum"), &[("handler", handler)]);
    assert_eq!(sum("http_request_size_bytes", COMPLETIONS), body.len() as f64);
    assert_eq!(sum("http_response_size_bytes", COMPLETIONS), 0.0, "a stream has no length");
    assert!(sum("http_response_size_bytes", "/v1/models") > 100.0);
    assert_eq!(page.number("http_request_duration_highr_seconds_count", &[]), 4.0);
    let bounds = |name: &str| match &page.samples(name).next().unwrap().value {
        Value::Histogram(buckets) => buckets.len(),
        other => panic!("{other:?}"),
    };
    assert_eq!(bounds("http_request_duration_seconds"), 4);
}

#[tokio::test]
async fn the_process_says_what_it_takes() {
    let server = Running::start(instant()).await;
    let page = Read::of(&server).await;
    let text = &page.text;
    if !std::path::Path::new("/proc/self/stat").exists() {
        println!("skipped: there is no /proc");
        return;
    }
    assert!(page.number("process_resident_memory_bytes", &[]) > 1e6, "{text}");
    assert!(page.number("process_start_time_seconds", &[]) > 1.7e9);
    assert!(page.number("process_open_fds", &[]) >= 3.0);
}
