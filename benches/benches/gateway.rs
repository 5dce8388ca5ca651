//! The gateway's hot paths: one scheduling decision with two filters and four scorers, and reading a request.
//!
//! llm-d's endpoint picker takes 4.0, 8.9 and 28.3 us for a decision at 5, 25 and 100 endpoints (llm-d-router PR 1171, a fast
//! desktop core): `cargo bench -p benches --bench gateway`.

use benches::{busy_gateway, prompt, request_info};
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use gateway::core::gateway::{Input, RequestKey};
use gateway::core::pool::EndpointId;
use gateway::core::prefix_index::prefix_hashes;
use gateway::core::request::Output;
use shared::openai::Request;
use shared::time::{Stopped, Time};
use shared::trace::Trail;

/// One decision and the end of the request, so that nothing piles up.
fn schedule(c: &mut Criterion) {
    let mut group = c.benchmark_group("schedule");
    for endpoints in [5u32, 25, 100] {
        let mut gateway = busy_gateway(endpoints);
        // Sixteen prefix blocks of 64 tokens, from one of 50 prompts.
        let prompts: Vec<_> = (0..50).map(|i| prompt(i, 1024)).collect();
        let (mut key, mut out) = (0u64, Vec::new());
        group.bench_function(BenchmarkId::from_parameter(endpoints), |b| {
            b.iter_batched(
                || {
                    key += 1;
                    request_info(key, &prompts[key as usize % prompts.len()], Trail::off())
                },
                |info| {
                    let key = info.key;
                    gateway.handle(Time::ZERO, Input::Request(info), &mut Stopped(Time::ZERO), &mut out);
                    let endpoint = match out.pop() {
                        Some(Output::Dispatch { endpoint, .. }) => endpoint,
                        Some(Output::Reject { .. }) | None => EndpointId(0),
                    };
                    finish(&mut gateway, key, endpoint);
                },
                BatchSize::SmallInput,
            );
        });
    }
    group.finish();
}

fn finish(gateway: &mut gateway::core::gateway::Gateway, key: RequestKey, endpoint: EndpointId) {
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

criterion_group!(benches, schedule, parse);
criterion_main!(benches);
