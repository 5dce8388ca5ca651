//! The engine's hot paths: one `schedule()` with its `complete()`, `schedule()` alone, the preparation of a prompt, a metrics page, a batch
//! of KV events, and the tokens of a text.
//!
//! vLLM's own `schedule()` takes about 2 to 2.5 us a running request on a server (`cargo bench -p benches --bench engine`).

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use engine_sim::core::config::{CacheConfig, EngineConfig, EventFormat};
use engine_sim::core::engine::{Engine, Input, NewRequest, RequestKey};
use engine_sim::core::hasher::prepare_prompt;
use engine_sim::core::kv_events::{BlockName, CacheEvent, StoredContent};
use engine_sim::core::latency::LatencyProfile;
use engine_sim::core::scheduler::{Scheduler, SchedulerParams};
use engine_sim::core::sequence::{NewSequence, Remote, SamplingParams};
use engine_sim::core::tokenizer::Tokenizer;
use engine_sim::server::kv_events::wire::{Form, payload};
use engine_sim::server::metrics;
use shared::block_hash::{BlockKey, ExtraKeys};
use shared::clock::RunClock;
use shared::time::{Dur, Time};
use shared::tokens::{ContentId, TokenId};
use shared::trace::Trail;

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
        remote: Remote::None,
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
    complete(scheduler);
}

fn complete(scheduler: &mut Scheduler) {
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

/// `schedule()` alone: completing the step before is not in the time.
fn schedule_only(c: &mut Criterion) {
    let mut group = c.benchmark_group("engine_schedule");
    let clock = RunClock::start();
    for running in [8, 64, 256, 1024] {
        group.bench_function(BenchmarkId::from_parameter(running), |b| {
            let mut scheduler = decoding(running);
            b.iter_custom(|steps| {
                let mut spent = Dur::ZERO;
                for _ in 0..steps {
                    let begin = clock.now();
                    scheduler.schedule();
                    spent += clock.now() - begin;
                    complete(&mut scheduler);
                    // Requests grow by a token a step: start again before their blocks run out, and when they are as long as may be.
                    let all = scheduler.running().len() as u64 == running;
                    if !all || scheduler.kv().pool().usage() > 0.9 {
                        scheduler = decoding(running);
                    }
                }
                spent.to_std()
            });
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

/// The page that a gateway reads every 50 ms, of an engine that has served requests.
fn metrics_page(c: &mut Criterion) {
    let engine = served(100);
    let mut group = c.benchmark_group("metrics_page");
    group.throughput(Throughput::Elements(1));
    group.bench_function("render", |b| {
        b.iter(|| metrics::render(&engine, "meta-llama/Llama-3.1-8B-Instruct", 0.0, &|_| String::new()).into_text());
    });
    group.finish();
}

/// An engine that has answered `requests`.
fn served(requests: u64) -> Engine {
    let config = EngineConfig::default();
    let profile = LatencyProfile::named(&config.profile).expect("the default profile exists");
    let mut engine = Engine::new(config, profile);
    for key in 0..requests {
        engine.handle(Time::ZERO, Input::Add(Box::new(request(engine.config(), key))));
    }
    let mut out = Vec::new();
    while let Some(at) = engine.next_wakeup() {
        engine.advance(at, &mut out);
    }
    engine
}

fn request(config: &EngineConfig, key: u64) -> NewRequest {
    let mut tokens = Vec::new();
    ContentId(key).extend(0, PROMPT_TOKENS, &mut tokens);
    NewRequest {
        key: RequestKey(key),
        prompt: prepare_prompt(&config.cache, &tokens, &ExtraKeys::default()),
        params: SamplingParams { max_tokens: 16, ignore_eos: true, ..SamplingParams::default() },
        priority: 0,
        arrival: Time::ZERO,
        content: ContentId(key),
        lora: None,
        kv: None,
        trail: Trail::off(),
    }
}

/// Events of a full step: a prompt of 8,192 tokens stored in one event.
fn kv_events(c: &mut Criterion) {
    let blocks = (0..512).map(|n| BlockName::Key(BlockKey(n << 40 | n))).collect();
    let content = StoredContent { tokens: (0..8192).map(TokenId).collect(), ..StoredContent::default() };
    let events = [CacheEvent::Stored { blocks, parent: None, block_size: 16, content: Some(Box::new(content)) }];
    let form = Form { format: EventFormat::Map, int_hashes: true };
    let mut group = c.benchmark_group("kv_events");
    group.throughput(Throughput::Elements(8192));
    group.bench_function("encode", |b| b.iter(|| payload(1.8e9, &events, form)));
    group.finish();
}

/// A megabyte of the texts that are hardest to tokenize: one letter, and spaces only.
fn tokenize(c: &mut Criterion) {
    const BYTES: usize = 1 << 20;
    Tokenizer::Bpe.load();
    let mut group = c.benchmark_group("tokenize_bpe");
    group.sample_size(10).throughput(Throughput::Bytes(BYTES as u64));
    for (name, letter) in [("letter", "a"), ("spaces", " ")] {
        let text = letter.repeat(BYTES);
        let mut tokens = Vec::new();
        group.bench_function(name, |b| {
            b.iter(|| {
                tokens.clear();
                Tokenizer::Bpe.encode(&text, &mut tokens);
                tokens.len()
            });
        });
    }
    group.finish();
}

criterion_group!(benches, schedule, schedule_only, prompt, metrics_page, kv_events, tokenize);
criterion_main!(benches);
