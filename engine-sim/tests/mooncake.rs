//! The whole Mooncake conversation trace through eight engines: a check of speed and of conservation at scale.
//!
//! Needs `IGSIM_DATA`, the folder with `traces/mooncake_conversation_trace.jsonl`; without it the test says so and passes.

use engine_sim::core::config::EngineConfig;
use engine_sim::core::engine::{Engine, Input, NewRequest, Output, RequestKey, prepare_prompt};
use engine_sim::core::latency::LatencyProfile;
use engine_sim::core::sequence::{FinishReason, SamplingParams};
use shared::block_hash::ExtraKeys;
use shared::clock::RunClock;
use shared::time::{Dur, Time};
use shared::tokens::{ContentId, TokenId};
use shared::trace::Trail;

const ENGINES: usize = 8;
/// Tokens that one hash id of the trace stands for.
const SEGMENT: usize = 512;

#[derive(serde::Deserialize)]
struct Line {
    timestamp: u64,
    input_length: u32,
    output_length: u32,
    hash_ids: Vec<u64>,
}

fn prompt(line: &Line) -> Vec<TokenId> {
    let mut tokens = Vec::with_capacity(line.hash_ids.len() * SEGMENT);
    for &id in &line.hash_ids {
        ContentId(id).extend(0, SEGMENT as u64, &mut tokens);
    }
    tokens.truncate(line.input_length as usize);
    tokens
}

#[test]
fn the_whole_trace_ends() {
    let Some(data) = std::env::var_os("IGSIM_DATA") else {
        println!("skipped: IGSIM_DATA is not set");
        return;
    };
    let path = std::path::Path::new(&data).join("traces/mooncake_conversation_trace.jsonl");
    let text = std::fs::read_to_string(path).unwrap();
    let lines: Vec<Line> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let config = EngineConfig { max_model_len: Some(200_000), ..EngineConfig::default() };
    let clock = RunClock::start();
    let (mut preparing, mut running, mut finished, mut generated) = (Dur::ZERO, Dur::ZERO, 0, 0);
    let (mut hits, mut queries, mut preemptions, mut end) = (0, 0, 0, Time::ZERO);
    for at in 0..ENGINES {
        let mut engine = Engine::new(config.clone(), LatencyProfile::named(LatencyProfile::DEFAULT_NAME).unwrap());
        let mut out = Vec::new();
        for (key, line) in lines.iter().enumerate().skip(at).step_by(ENGINES) {
            let begin = clock.now();
            let arrival = Time::ZERO + Dur::from_millis(line.timestamp);
            let request = NewRequest {
                key: RequestKey(key as u64),
                prompt: prepare_prompt(&config.cache, &prompt(line), &ExtraKeys::default()),
                params: SamplingParams { max_tokens: line.output_length.max(1), ..SamplingParams::default() },
                priority: 0,
                arrival,
                content: ContentId(key as u64 ^ 0xFEED_0000_0000),
                lora: None,
                trail: Trail::off(),
            };
            let prepared = clock.now();
            preparing += prepared - begin;
            while let Some(next) = engine.next_wakeup()
                && next <= arrival
            {
                engine.advance(next, &mut out);
            }
            engine.handle(arrival, Input::Add(Box::new(request)));
            running += clock.now() - prepared;
        }
        let begin = clock.now();
        while let Some(next) = engine.next_wakeup() {
            engine.advance(next, &mut out);
        }
        running += clock.now() - begin;
        let ended = |o: &&Output| matches!(o, Output::Finished { reason: FinishReason::Length, .. });
        finished += out.iter().filter(ended).count();
        let m = engine.metrics();
        generated += m.generation_tokens;
        hits += m.prefix_cache_hits;
        queries += m.prefix_cache_queries;
        preemptions += m.num_preemptions;
        end = end.max(engine.core_time());
    }
    println!(
        "{} requests, {generated} output tokens, {:.1} % prefix hits, {preemptions} preemptions, {:.0} s simulated",
        lines.len(),
        100.0 * hits as f64 / queries as f64,
        end.as_secs_f64()
    );
    println!("prompts made and hashed in {preparing}, engines ran in {running}");
    assert_eq!(finished, lines.len());
    assert_eq!(generated, lines.iter().map(|l| u64::from(l.output_length.max(1))).sum::<u64>());
}
