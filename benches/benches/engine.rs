//! The engine's hot paths: one `schedule()` with its `complete()`, and the preparation of a prompt.
//!
//! vLLM's own `schedule()` takes about 2 to 2.5 us a running request on a server (`cargo bench -p benches --bench engine`).

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use engine_sim::core::config::{CacheConfig, EngineConfig};
use engine_sim::core::hasher::prepare_prompt;
use engine_sim::core::latency::LatencyProfile;
use engine_sim::core::scheduler::{Scheduler, SchedulerParams};
use engine_sim::core::sequence::{NewSequence, SamplingParams};
use shared::block_hash::ExtraKeys;
use shared::tokens::{ContentId, TokenId};

const PROMPT_TOKENS: u64 = 256;
/// Steps per measurement: enough for every request to cross block boundaries; the throughput printed is in steps.
const STEPS: u64 = 256;

fn sequence(config: &EngineConfig, tag: u64) -> NewSequence {
    let mut tokens = Vec::new();
    ContentId(tag).extend(0, PROMPT_TOKENS, &mut tokens);
    let prompt = prepare_prompt(&config.cache, &tokens, &ExtraKeys::default());
    NewSequence {
        tag,
        prompt_tokens: prompt.tokens,
        keys: prompt.keys,
        tail: prompt.tail,
        hasher: prompt.hasher,
        params: SamplingParams { max_tokens: 1 << 20, ignore_eos: true, ..SamplingParams::default() },
        priority: 0,
        arrival: tag,
        tie: tag,
        lora: None,
        remote_tokens: None,
        source: None,
    }
}

/// A scheduler with `running` requests, all of them decoding.
fn decoding(running: u64) -> Scheduler {
    let mut config = EngineConfig::default();
    config.cache.num_gpu_blocks = Some(1 << 20);
    let profile = LatencyProfile::named(&config.profile).expect("the default profile exists");
    let mut scheduler = Scheduler::new(SchedulerParams::new(&config, &profile));
    for tag in 0..running {
        scheduler.add(sequence(&config, tag));
    }
    // 256 tokens each at 8,192 a step: 32 requests are admitted per step.
    for _ in 0..running / 32 + 4 {
        step(&mut scheduler);
    }
    assert_eq!(scheduler.running().len() as u64, running);
    scheduler
}

fn step(scheduler: &mut Scheduler) {
    scheduler.schedule();
    if scheduler.batches_in_flight() == 2 {
        scheduler.complete(|ix, n| ContentId(u64::from(ix.0)).token(u64::from(n)));
    }
}

fn schedule(c: &mut Criterion) {
    let mut group = c.benchmark_group("engine_step");
    for running in [8, 64, 256, 1024] {
        group.throughput(Throughput::Elements(STEPS));
        group.bench_function(BenchmarkId::from_parameter(running), |b| {
            b.iter_batched_ref(|| decoding(running), |s| (0..STEPS).for_each(|_| step(s)), BatchSize::PerIteration);
        });
    }
    group.finish();
}

fn prompt(c: &mut Criterion) {
    let mut group = c.benchmark_group("prepare_prompt");
    for tokens in [128u64, 2048, 8192] {
        let mut prompt: Vec<TokenId> = Vec::new();
        ContentId(1).extend(0, tokens, &mut prompt);
        group.throughput(Throughput::Elements(tokens));
        group.bench_function(BenchmarkId::from_parameter(tokens), |b| {
            b.iter_batched(
                ExtraKeys::default,
                |extra| prepare_prompt(&CacheConfig::default(), &prompt, &extra),
                BatchSize::SmallInput,
            );
        });
    }
    group.finish();
}

criterion_group!(benches, schedule, prompt);
criterion_main!(benches);
