//! Prefill in one server, decode in another: `kv_transfer_params`, the side channel between them, spans, failures. The router between
//! them is this file.

use bytes::Bytes;
use engine_sim::core::config::EngineConfig;
use engine_sim::core::engine::Engine;
use engine_sim::core::kv_transfer::{KvRole, KvTransferConfig, LinkKind, LoadFailurePolicy, Shipment, Transfer};
use engine_sim::core::latency::LatencyProfile;
use engine_sim::server::pacing::Pacer;
use engine_sim::server::{Frontend, Server, ServerConfig};
use http::Request;
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};
use shared::clock::RunClock;
use shared::time::Dur;
use shared::trace::check::{CheckOptions, check_spans};
use shared::trace::config::ExporterConfig;
use shared::trace::exporter::memory::MemorySpans;
use shared::trace::registry::Registry;
use shared::trace::{Kind, Ratio, Resource, SamplerKind, Span, Telemetry, TelemetryConfig};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::harness::{CHAT, COMPLETIONS, Reply, chunks, instant};

const P: usize = 0;
const D: usize = 1;
/// 256 tokens of four bytes.
const PROMPT_TOKENS: u32 = 256;
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

fn role(kv_role: KvRole) -> EngineConfig {
    EngineConfig { kv_transfer: Some(KvTransferConfig::nixl(kv_role)), ..instant() }
}

fn with_policy(policy: LoadFailurePolicy) -> EngineConfig {
    let mut config = role(KvRole::KvConsumer);
    config.kv_transfer.as_mut().unwrap().kv_load_failure_policy = policy;
    config
}

/// Two servers of one process, on one clock, with one telemetry.
struct Pair {
    urls: [String; 2],
    pacer: Pacer,
    stop: Vec<oneshot::Sender<()>>,
    servers: Vec<JoinHandle<std::io::Result<()>>>,
    telemetry: Telemetry,
    spans: MemorySpans,
    clock: RunClock,
    client: Client<HttpConnector, Full<Bytes>>,
}

impl Pair {
    async fn start(decode: EngineConfig) -> Pair {
        let clock = RunClock::start();
        let spans = MemorySpans::default();
        let sampler = SamplerKind::ParentBasedAlwaysOn.with(Ratio::new(1.0).unwrap());
        let exporters = vec![ExporterConfig::Memory(spans.clone())];
        let telemetry = TelemetryConfig { sampler, exporters, ..TelemetryConfig::default() };
        let telemetry = Telemetry::live(telemetry, clock).unwrap();
        let configs = [role(KvRole::KvProducer), decode];
        let profile = LatencyProfile::named("instant").unwrap();
        let engines = configs.iter().map(|c| Engine::new(c.clone(), profile.clone())).collect();
        let pacer = Pacer::start(clock, engines).unwrap();
        let (mut urls, mut stop, mut servers) = (Vec::new(), Vec::new(), Vec::new());
        for (i, engine) in configs.into_iter().enumerate() {
            assert_eq!(engine.validate(&profile), []);
            let config = ServerConfig {
                engine,
                model: profile.model.as_str().into(),
                max_body_bytes: 1 << 20,
                prompt_tokens_details: true,
                on_served: None,
                frontend: Frontend::default(),
            };
            let tracer = telemetry.tracer(Resource::new("vllm", format!("engine-{i}")));
            let any = "127.0.0.1:0".parse().unwrap();
            let server = Server::bind(any, config, pacer.engine(i), tracer, clock).await.unwrap();
            urls.push(format!("http://{}", server.local_addr().unwrap()));
            let (tell, told) = oneshot::channel::<()>();
            stop.push(tell);
            servers.push(tokio::spawn(server.run(async { _ = told.await })));
        }
        let client = Client::builder(TokioExecutor::new()).build_http();
        let urls = urls.try_into().unwrap();
        Pair { urls, pacer, stop, servers, telemetry, spans, clock, client }
    }

    async fn post(&self, to: usize, path: &str, body: &Value, sampled: bool) -> Reply {
        let flags = if sampled { "01" } else { "00" };
        let request = Request::post(format!("{}{path}", self.urls[to]))
            .header("content-type", "application/json")
            .header("x-request-id", "r-1")
            .header("traceparent", format!("00-{TRACE}-b7ad6b716920333{to}-{flags}"))
            .body(Full::from(body.to_string()))
            .unwrap();
        self.exchange(request).await
    }

    async fn exchange(&self, request: Request<Full<Bytes>>) -> Reply {
        let (head, body) = self.client.request(request).await.unwrap().into_parts();
        let text = String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap();
        Reply { status: head.status.as_u16(), headers: head.headers, text }
    }

    async fn metric(&self, of: usize, name: &str) -> f64 {
        let request = Request::get(format!("{}/metrics", self.urls[of])).body(Full::default()).unwrap();
        let page = self.exchange(request).await.text;
        let line = format!("vllm:{name}{{model_name=\"igsim/instant\",engine=\"0\"");
        let found = page.lines().find_map(|l| l.strip_prefix(&line)?.split_once("} "));
        found.unwrap_or_else(|| panic!("no {name} in\n{page}")).1.parse().unwrap()
    }

    fn leases(&self) -> usize {
        self.pacer.engine(P).inspect(Engine::leases)
    }

    /// Waits for what a notification does: its message is answered by nobody else.
    async fn until_nothing_is_leased(&self) {
        for _ in 0..10_000 {
            if self.leases() == 0 {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        panic!("blocks are still kept");
    }

    async fn stop(self) -> Vec<Span> {
        drop(self.client);
        self.stop.into_iter().for_each(|stop| stop.send(()).unwrap());
        for server in self.servers {
            server.await.unwrap().unwrap();
        }
        drop(self.pacer);
        self.telemetry.shutdown(self.clock.now());
        self.spans.take().spans
    }
}

fn prompt() -> String {
    "pd-x".repeat(PROMPT_TOKENS as usize)
}

/// What a router asks the prefilling engine for.
fn for_prefill() -> Value {
    json!({
        "prompt": prompt(), "max_tokens": 1, "stream": false,
        "kv_transfer_params": {"do_remote_decode": true, "do_remote_prefill": false, "remote_engine_id": null,
            "remote_block_ids": null, "remote_host": null, "remote_port": null},
    })
}

/// What it asks the decoding engine for, with what the prefilling one answered.
fn for_decode(params: &Value) -> Value {
    json!({"prompt": prompt(), "max_tokens": 4, "ignore_eos": true, "kv_transfer_params": params})
}

async fn prefill(pair: &Pair, sampled: bool) -> Value {
    let reply = pair.post(P, COMPLETIONS, &for_prefill(), sampled).await;
    assert_eq!(reply.status, 200, "{}", reply.text);
    let answer: Value = serde_json::from_str(&reply.text).unwrap();
    answer["kv_transfer_params"].clone()
}

async fn decode(pair: &Pair, params: &Value, sampled: bool) -> Value {
    let reply = pair.post(D, COMPLETIONS, &for_decode(params), sampled).await;
    assert_eq!(reply.status, 200, "{}", reply.text);
    serde_json::from_str(&reply.text).unwrap()
}

#[tokio::test]
async fn a_router_sends_a_prompt_to_one_engine_and_the_rest_to_another() {
    let pair = Pair::start(role(KvRole::KvConsumer)).await;
    let params = prefill(&pair, true).await;
    let blocks = params["remote_block_ids"][0].as_array().unwrap();
    assert_eq!((params["remote_block_ids"].as_array().unwrap().len(), blocks.len()), (1, 16));
    assert!(params["remote_request_id"].as_str().unwrap().starts_with("cmpl-r-1-"));
    assert_eq!(params["remote_engine_id"].as_str().unwrap().len(), 36);
    assert_eq!(params["remote_host"], "127.0.0.1");
    assert!(params["remote_port"].as_u64().unwrap() > 0);
    let mut rest = params.clone();
    for varying in ["remote_block_ids", "remote_engine_id", "remote_request_id", "remote_host", "remote_port"] {
        assert!(rest.as_object_mut().unwrap().remove(varying).is_some(), "{varying}");
    }
    let expect = json!({
        "do_remote_prefill": true, "do_remote_decode": false, "tp_size": 1, "pp_size": 1, "dcp_size": 1,
        "remote_num_tokens": 256, "remote_blocks_expiry_time": null, "remote_registration_generation": 0,
        "transfer_mode": "pull", "remote_prefill_cached_tokens": 0,
    });
    assert_eq!(rest, expect);
    assert_eq!(pair.leases(), 1);

    let answer = decode(&pair, &params, true).await;
    assert_eq!(answer["usage"]["completion_tokens"], 4);
    assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 255);
    assert_eq!(answer["kv_transfer_params"], Value::Null);
    assert_eq!(pair.leases(), 0);
    let moved = moved();
    assert_eq!(pair.metric(D, "nixl_bytes_transferred_sum").await, moved.bytes() as f64);
    assert_eq!(pair.metric(D, "nixl_num_descriptors_count").await, 1.0);
    assert_eq!(pair.metric(D, "external_prefix_cache_hits_total").await, 256.0);
    assert_eq!(pair.metric(D, "prompt_tokens_by_source_total").await, 1.0, "local_compute comes first");
    assert_eq!(pair.metric(D, "num_requests_kv_fetch_by_stage").await, 0.0);
    assert_eq!(pair.metric(P, "nixl_num_kv_expired_reqs_total").await, 0.0);

    let spans = pair.stop().await;
    let of = |kind: Kind| spans.iter().find(|s| s.name == "vllm.kv_cache.transfer" && s.kind == kind).unwrap();
    let (client, server) = (of(Kind::Client), of(Kind::Server));
    let request = |instance| spans.iter().find(|s| s.name == "vllm.engine.request" && s.instance == instance).unwrap();
    assert_eq!((client.parent, server.parent), (Some(request(client.instance).span_id), Some(client.span_id)));
    assert!(spans.iter().all(|s| s.trace_id.to_string() == TRACE));
    assert_eq!(server.links.len(), 1);
    assert_eq!(server.links[0].span_id, request(server.instance).span_id);
    assert_eq!(server.end - server.start, moved.time);
    assert!(client.start <= server.start && server.end <= client.end, "{client:?} {server:?}");
    // Loopback and two threads: generous for a busy machine.
    assert!(client.end - client.start < moved.time + Dur::from_secs(5));
    let text = |span: &Span, key: &str| span.get(key).and_then(|v| v.as_str().map(str::to_owned)).unwrap();
    assert_eq!(text(client, "vllm.kv_transfer.peer"), params["remote_engine_id"].as_str().unwrap());
    assert_eq!(client.get("server.port").and_then(|v| v.as_int()), params["remote_port"].as_i64());
    let waits: Vec<String> = spans
        .iter()
        .filter(|s| s.name == "vllm.engine.queue" && s.instance == client.instance)
        .map(|s| text(s, "vllm.queue.reason"))
        .collect();
    assert_eq!(waits, ["capacity", "remote_kv"]);
    let registry = Registry::builtin().unwrap();
    let options = CheckOptions { registry: Some(&registry), clock_tolerance: Dur::ZERO };
    // The router's own span is not recorded, so each engine's request is a local root of the one trace.
    let findings: Vec<String> = check_spans(&spans, &options).iter().map(ToString::to_string).collect();
    assert!(findings.iter().all(|f| f.contains("one-root")), "{findings:#?}");
}

fn moved() -> Transfer {
    let shipment = Shipment { blocks: PROMPT_TOKENS / 16, block_size: 16, receiver_ranks: 1 };
    Transfer::over(LinkKind::InfiniBand, &LatencyProfile::named("instant").unwrap(), shipment)
}

#[tokio::test]
async fn a_stream_tells_the_parameters_in_its_last_chunk() {
    let pair = Pair::start(role(KvRole::KvConsumer)).await;
    for path in [COMPLETIONS, CHAT] {
        let mut body = for_prefill();
        body["stream"] = json!(true);
        body["max_tokens"] = json!(3);
        body["ignore_eos"] = json!(true);
        if path == CHAT {
            let prompt = body.as_object_mut().unwrap().remove("prompt").unwrap();
            body["messages"] = json!([{"role": "user", "content": prompt}]);
        }
        let reply = pair.post(P, path, &body, true).await;
        let events: Vec<String> =
            reply.text.trim_end().split("\n\n").map(|e| e.strip_prefix("data: ").unwrap().to_owned()).collect();
        let chunks = chunks(&events);
        let (last, others) = chunks.split_last().unwrap();
        assert_eq!(last["kv_transfer_params"]["do_remote_prefill"], true, "{last}");
        assert!(others.iter().all(|c| c["kv_transfer_params"].is_null()), "{others:?}");
        assert!(decode(&pair, &last["kv_transfer_params"], true).await["usage"]["completion_tokens"] == 4);
    }
    pair.stop().await;
}

#[tokio::test]
async fn chat_may_bring_the_prompt_as_tokens() {
    let pair = Pair::start(role(KvRole::KvConsumer)).await;
    let mut params = prefill(&pair, true).await;
    let mut tokens = Vec::new();
    shared::tokens::encode(&prompt(), &mut tokens);
    params["prompt_token_ids"] = json!(tokens.iter().map(|t| t.0).collect::<Vec<_>>());
    let body =
        json!({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2, "kv_transfer_params": params});
    let reply = pair.post(D, CHAT, &body, true).await;
    let answer: Value = serde_json::from_str(&reply.text).unwrap();
    assert_eq!(answer["usage"]["prompt_tokens"], 256, "{}", reply.text);
    assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 255);
    pair.stop().await;
}

#[tokio::test]
async fn an_unsampled_request_leaves_no_span_at_either_engine() {
    let pair = Pair::start(role(KvRole::KvConsumer)).await;
    let params = prefill(&pair, false).await;
    decode(&pair, &params, false).await;
    assert_eq!(pair.metric(D, "nixl_xfer_time_seconds_count").await, 1.0);
    assert_eq!(pair.stop().await, []);
}

#[tokio::test]
async fn parameters_that_cannot_be_used_mean_local_compute() {
    let pair = Pair::start(role(KvRole::KvConsumer)).await;
    let params = prefill(&pair, true).await;
    for missing in ["remote_engine_id", "remote_request_id", "remote_host", "remote_port", "remote_block_ids"] {
        let mut partial = params.clone();
        partial.as_object_mut().unwrap().remove(missing);
        // Another prompt each time: nothing is found here either.
        let mut body = for_decode(&partial);
        body["prompt"] = json!(missing.repeat(20));
        let reply = pair.post(D, COMPLETIONS, &body, true).await;
        let answer: Value = serde_json::from_str(&reply.text).unwrap();
        assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 0, "{missing}");
    }
    assert_eq!(pair.metric(D, "nixl_xfer_time_seconds_count").await, 0.0);
    pair.stop().await;
}

#[tokio::test]
async fn without_a_connector_the_parameters_are_ignored() {
    let pair = Pair::start(instant()).await;
    let params = prefill(&pair, true).await;
    assert_eq!(decode(&pair, &params, true).await["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    let reply = pair.post(D, COMPLETIONS, &for_prefill(), true).await;
    let answer: Value = serde_json::from_str(&reply.text).unwrap();
    assert_eq!(answer["kv_transfer_params"], Value::Null);
    let spans = pair.stop().await;
    assert!(spans.iter().all(|s| s.name != "vllm.kv_cache.transfer"));
}

#[tokio::test]
async fn a_request_that_is_refused_lets_the_prefilling_engine_go() {
    let pair = Pair::start(role(KvRole::KvConsumer)).await;
    let params = prefill(&pair, true).await;
    assert_eq!(pair.leases(), 1);
    let mut body = for_decode(&params);
    body["max_tokens"] = json!(0);
    assert_eq!(pair.post(D, COMPLETIONS, &body, true).await.status, 400);
    pair.until_nothing_is_leased().await;
    assert_eq!(pair.metric(P, "nixl_num_kv_expired_reqs_total").await, 0.0);
    pair.stop().await;
}

/// vLLM's answer when blocks cannot be loaded and the policy is `fail`.
const FAILED: &str =
    r#"{"error":{"message":"Internal server error","type":"InternalServerError","param":null,"code":500}}"#;

#[tokio::test]
async fn blocks_that_are_gone_fail_the_request() {
    let pair = Pair::start(role(KvRole::KvConsumer)).await;
    let params = prefill(&pair, true).await;
    decode(&pair, &params, true).await;
    // They were read and are not kept any more; this prompt is not found here either.
    let mut body = for_decode(&params);
    body["prompt"] = json!(format!("not {}", prompt()));
    let reply = pair.post(D, COMPLETIONS, &body, true).await;
    assert_eq!((reply.status, reply.text.as_str()), (500, FAILED));
    body["stream"] = json!(true);
    let reply = pair.post(D, COMPLETIONS, &body, true).await;
    assert_eq!((reply.status, reply.text), (200, format!("data: {FAILED}\n\ndata: [DONE]\n\n")));
    assert_eq!(pair.metric(D, "nixl_num_failed_transfers_total").await, 2.0);
    let spans = pair.stop().await;
    let failed: Vec<_> = spans.iter().filter(|s| s.get("error.type").is_some()).collect();
    let types: Vec<_> = failed.iter().map(|s| (&*s.name, s.get("error.type").unwrap().as_str().unwrap())).collect();
    for expect in [("vllm.engine.request", "kv_load_failed"), ("vllm.kv_cache.transfer", "kv_blocks_not_kept")] {
        assert!(types.contains(&expect), "{types:?}");
    }
}

#[tokio::test]
async fn an_engine_that_cannot_be_reached_costs_the_request_or_a_prefill() {
    for (policy, status) in [(LoadFailurePolicy::Fail, 500), (LoadFailurePolicy::Recompute, 200)] {
        let pair = Pair::start(with_policy(policy)).await;
        let mut params = prefill(&pair, true).await;
        // A port that was free a moment ago.
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        params["remote_port"] = json!(free);
        let reply = pair.post(D, COMPLETIONS, &for_decode(&params), true).await;
        assert_eq!(reply.status, status, "{}", reply.text);
        if status == 200 {
            let answer: Value = serde_json::from_str(&reply.text).unwrap();
            assert_eq!(answer["usage"]["completion_tokens"], 4);
            assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
        }
        let spans = pair.stop().await;
        let client = spans.iter().find(|s| s.name == "vllm.kv_cache.transfer").unwrap();
        assert_eq!(client.get("error.type").and_then(|v| v.as_str()), Some("kv_peer_unreachable"));
    }
}

/// The prefilling engine dies under its server: whoever reads from it learns that and does not wait.
#[tokio::test]
async fn an_engine_that_died_is_not_waited_for() {
    let (first, second) = (Pair::start(role(KvRole::KvConsumer)).await, Pair::start(role(KvRole::KvConsumer)).await);
    let params = prefill(&first, true).await;
    drop(first.pacer);
    let reply = second.post(D, COMPLETIONS, &for_decode(&params), true).await;
    assert_eq!((reply.status, reply.text.as_str()), (500, FAILED));
    let spans = second.stop().await;
    let client = spans.iter().find(|s| s.name == "vllm.kv_cache.transfer").unwrap();
    assert_eq!(client.get("error.type").and_then(|v| v.as_str()), Some("kv_peer_unreachable"));
}

/// Whoever has the place of an engine that was restarted is not asked for the old one's blocks.
#[tokio::test]
async fn a_restarted_engine_does_not_have_the_blocks_of_the_one_before() {
    let pair = Pair::start(with_policy(LoadFailurePolicy::Recompute)).await;
    let mut params = prefill(&pair, true).await;
    params["remote_engine_id"] = json!("00000000-0000-4000-8000-000000000000");
    assert_eq!(decode(&pair, &params, true).await["usage"]["completion_tokens"], 4);
    assert_eq!(pair.metric(D, "nixl_num_failed_transfers_total").await, 1.0);
    let spans = pair.stop().await;
    let sides: Vec<Kind> = spans.iter().filter(|s| s.name == "vllm.kv_cache.transfer").map(|s| s.kind).collect();
    assert!(sides.contains(&Kind::Client) && sides.contains(&Kind::Server), "{sides:?}");
}

/// The side channel takes what it understands and nothing else.
#[tokio::test]
async fn the_side_channel_refuses_nonsense() {
    let pair = Pair::start(role(KvRole::KvConsumer)).await;
    let params = prefill(&pair, true).await;
    let (port, engine) = (params["remote_port"].as_u64().unwrap(), params["remote_engine_id"].clone());
    let post = async |path: &str, body: Value| {
        let request = Request::post(format!("http://127.0.0.1:{port}{path}"));
        pair.exchange(request.body(Full::from(body.to_string())).unwrap()).await
    };
    assert_eq!(post("/kv/pull", json!({"blocks": -1})).await.status, 400);
    assert_eq!(post("/kv/notify", json!([])).await.status, 400);
    assert_eq!(post("/metrics", json!({})).await.status, 404);
    let pull = |blocks: u32| {
        json!({"engine_id": engine, "request_id": params["remote_request_id"], "blocks": blocks, "tp_size": 1,
            "reader": "x"})
    };
    let reply = post("/kv/pull", pull(17)).await;
    assert_eq!((reply.status, reply.text.as_str()), (409, r#"{"error":"kv_blocks_too_many"}"#));
    assert_eq!(pair.leases(), 1);
    assert_eq!(post("/kv/pull", pull(16)).await.status, 200);
    assert_eq!(pair.leases(), 0);
    let reply = post("/kv/pull", pull(16)).await;
    assert_eq!((reply.status, reply.text.as_str()), (404, r#"{"error":"kv_blocks_not_kept"}"#));
    // Nobody is traced who is not sampled by the reader.
    let spans = pair.stop().await;
    assert!(spans.iter().all(|s| s.name != "vllm.kv_cache.transfer"));
}
