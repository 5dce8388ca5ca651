//! The gateway's hot paths: one scheduling decision with two filters and four scorers, and reading a request.
//!
//! llm-d's endpoint picker takes 4.0, 8.9 and 28.3 us for a decision at 5, 25 and 100 endpoints (llm-d-router PR 1171, a fast
//! desktop core): `cargo bench -p benches --bench gateway`.

use std::sync::Arc;

use benches::{Nothing, busy_gateway, head, prompt, request_info, scheduling_gateway};
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use gateway::core::config::PreciseConfig;
use gateway::core::gateway::{Gateway, Input, RequestKey};
use gateway::core::kv_index::KvIndex;
use gateway::core::kv_index::events::{Batch, CacheEvent, EngineHash, Stored, Tier};
use gateway::core::pool::EndpointId;
use gateway::core::prefix_index::prefix_hashes;
use gateway::core::request::{Output, RequestInfo};
use gateway::pd_proxy::core::Object;
use gateway::spans::GatewayFact;
use shared::openai::Request;
use shared::time::{Dur, Stopped, Ticking, Time};
use shared::tokens::TokenId;
use shared::trace::Trail;
use shared::trace::record::Sink;

const ENDPOINTS: [u32; 4] = [5, 25, 100, 1000];

/// One decision and the end of the request, so that nothing piles up; not recorded.
fn schedule(c: &mut Criterion) {
    decisions(c, "schedule", busy_gateway, Trail::off);
}

/// The same, recorded at detail 2: every fact of the decision is noted with the time that a counting clock gives it.
fn schedule_recorded(c: &mut Criterion) {
    let sink: Arc<dyn Sink> = Arc::new(Nothing);
    decisions(c, "schedule_recorded", busy_gateway, || Trail::<GatewayFact>::open(head(), &sink));
}

/// llm-d's optimized-baseline and its disaggregated sim-pd, not recorded.
fn schedule_epp(c: &mut Criterion) {
    let baseline = include_str!("../../scenarios/epp/optimized-baseline.epp.yaml");
    decisions(c, "schedule_optimized_baseline", |n| scheduling_gateway(baseline, n), Trail::off);
    let pd = include_str!("../../scenarios/epp/sim-pd.epp.yaml");
    decisions(c, "schedule_sim_pd", |n| scheduling_gateway(pd, n), Trail::off);
}

fn decisions(c: &mut Criterion, name: &str, gateway: impl Fn(u32) -> Gateway, trail: impl Fn() -> Trail<GatewayFact>) {
    let mut group = c.benchmark_group(name);
    for endpoints in ENDPOINTS {
        let mut gateway = gateway(endpoints);
        // Sixteen prefix blocks of 64 tokens, from one of 50 prompts.
        let prompts: Vec<_> = (0..50).map(|i| prompt(i, 1024)).collect();
        let (mut key, mut out) = (0u64, Vec::new());
        group.bench_function(BenchmarkId::from_parameter(endpoints), |b| {
            b.iter_batched(
                || {
                    key += 1;
                    next(key, &prompts, trail())
                },
                |info| decide(&mut gateway, info, &mut out),
                BatchSize::SmallInput,
            );
        });
    }
    group.finish();
}

/// What a sidecar does to a body: reads its members and writes it for the engine that prefills.
fn edit(c: &mut Criterion) {
    let mut group = c.benchmark_group("pd_proxy_edit");
    for bytes in [256usize, 4096, 65_536] {
        let prompt = "word ".repeat((bytes - 100) / 5);
        let body = format!(r#"{{"model":"m","prompt":"{prompt}","max_tokens":64,"ignore_eos":true,"stream":true}}"#);
        let body = bytes::Bytes::from(body);
        group.throughput(Throughput::Bytes(body.len() as u64));
        group.bench_function(BenchmarkId::from_parameter(bytes), |b| {
            b.iter(|| Object::read(body.clone()).expect("an object").for_prefill());
        });
    }
    group.finish();
}

fn next(key: u64, prompts: &[Vec<TokenId>], trail: Trail<GatewayFact>) -> Box<RequestInfo> {
    request_info(key, &prompts[key as usize % prompts.len()], trail)
}

/// As the server does it: a clock is read only for a request that is recorded. The record itself is dropped outside.
fn decide(gateway: &mut Gateway, info: Box<RequestInfo>, out: &mut Vec<Output>) -> Trail<GatewayFact> {
    let (key, trail) = (info.key, info.trail.clone());
    if trail.is_recording() {
        let mut watch = Ticking::new(Time::ZERO, Dur::from_nanos(1));
        gateway.handle(Time::ZERO, Input::Request(info), &mut watch, out);
    } else {
        gateway.handle(Time::ZERO, Input::Request(info), &mut Stopped(Time::ZERO), out);
    }
    let endpoint = match out.pop() {
        Some(Output::Dispatch { endpoint, .. }) => endpoint,
        Some(Output::Stay { .. } | Output::Reject { .. }) | None => EndpointId(0),
    };
    finish(gateway, key, endpoint);
    trail
}

fn finish(gateway: &mut Gateway, key: RequestKey, endpoint: EndpointId) {
    let input = Input::Finished { key, endpoint };
    gateway.handle(Time::ZERO, input, &mut Stopped(Time::ZERO), &mut Vec::new());
}

/// Reading the body of a chat request and hashing its prompt.
fn parse(c: &mut Criterion) {
    let mut group = c.benchmark_group("gateway_parse");
    for bytes in [256usize, 65_536] {
        let mut text = String::new();
        shared::tokens::push_text(&prompt(1, bytes as u64 / 4), &mut text);
        let body =
            format!("{{\"model\":\"m\",\"stream\":true,\"messages\":[{{\"role\":\"user\",\"content\":\"{text}\"}}]}}");
        group.throughput(Throughput::Bytes(bytes as u64));
        group.bench_function(BenchmarkId::from_parameter(bytes), |b| {
            b.iter(|| {
                let request: Request<'_> = serde_json::from_str(&body).expect("the body is valid");
                (request.stream, prefix_hashes("m", None, text.as_bytes(), 131_072))
            });
        });
    }
    group.finish();
}

/// The index of KV events: finding, rating and taking in a prompt of 450 blocks (7,200 tokens) among eight endpoints, each of which holds
/// 19 groups of such prompts, and every second one this one.
fn kv_index(c: &mut Criterion) {
    let config = PreciseConfig::default();
    let tokens = |n: u64| prompt(n, 7200);
    let stored = |n: u64| {
        let blocks: Vec<EngineHash> = (0..450).map(|i| EngineHash(1000 * n + i)).collect();
        let stored = Stored { blocks: blocks.clone(), tokens: tokens(n), block_tokens: 16, ..Stored::default() };
        (CacheEvent::Stored(stored), CacheEvent::Removed { blocks, tier: Tier::Gpu })
    };
    let mut index = KvIndex::new(&config, 8);
    let mut seq = [0u64; 8];
    let mut take = |index: &mut KvIndex, e: usize, event: CacheEvent| {
        let batch = Batch { seq: seq[e], made: seq[e], events: vec![event] };
        seq[e] += 1;
        index.apply(EndpointId(e as u32), "m", &batch)
    };
    for e in 0..8 {
        for n in 0..19 {
            take(&mut index, e, stored(100 + 19 * e as u64 + n).0);
        }
        if e % 2 == 0 {
            take(&mut index, e, stored(1).0);
        }
    }
    let mut hasher = config.hasher("m", None);
    hasher.tokens(tokens(1));
    let (keys, mut matched) = (hasher.finish(), Vec::new());
    let mut group = c.benchmark_group("kv_index");
    group.throughput(Throughput::Elements(450));
    group.bench_function("walk", |b| b.iter(|| index.walk(Time::ZERO, &keys)));
    group.bench_function("score", |b| b.iter(|| index.score(&mut matched)));
    group.bench_function("apply", |b| {
        b.iter_batched(
            || stored(7),
            |(stored, removed)| (take(&mut index, 3, stored), take(&mut index, 3, removed)),
            BatchSize::SmallInput,
        );
    });
    group.finish();
}

criterion_group!(benches, schedule, schedule_recorded, schedule_epp, parse, edit, kv_index);
criterion_main!(benches);
