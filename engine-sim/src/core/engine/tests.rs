//! Tests of the engine loop, and the helpers that other tests drive an engine with.

use shared::block_hash::ExtraKeys;

use super::*;
use crate::core::sequence::SamplingParams;

/// A request whose prompt is the first tokens of `content` and that ends by length.
pub(crate) fn request(config: &EngineConfig, key: u64, prompt: u32, max_tokens: u32, arrival: Time) -> NewRequest {
    let mut tokens = Vec::new();
    ContentId(key % 3).extend(0, u64::from(prompt), &mut tokens);
    NewRequest {
        key: RequestKey(key),
        prompt: prepare_prompt(&config.cache, &tokens, &ExtraKeys::default()),
        params: SamplingParams { max_tokens, ..SamplingParams::default() },
        priority: 0,
        arrival,
        content: ContentId(1000 + key),
        lora: None,
        trail: Trail::off(),
    }
}

pub(crate) fn engine(config: EngineConfig) -> Engine {
    let profile = LatencyProfile::named(&config.profile).unwrap();
    assert_eq!(config.validate(&profile), []);
    Engine::new(config, profile)
}

/// Advances from wake-up to wake-up until the engine is idle.
pub(crate) fn run_to_idle(engine: &mut Engine) -> Vec<Output> {
    let (mut out, mut last) = (Vec::new(), Time::ZERO);
    while let Some(at) = engine.next_wakeup() {
        assert!(at >= last, "a wake-up never moves back");
        last = at;
        engine.advance(at, &mut out);
    }
    out
}

fn micros(t: Time) -> u64 {
    t.as_nanos() / 1000
}

pub(crate) fn table(outputs: &[Output]) -> String {
    let line = |o: &Output| match o {
        Output::Tokens { key, at, new_tokens } => format!("{:>7} us  {} +{new_tokens}", micros(*at), key.0),
        Output::Finished { key, at, reason, stats } => format!(
            "{:>7} us  {} {} after {} tokens, {} cached, {} preemptions",
            micros(*at),
            key.0,
            reason.as_str(),
            stats.output_tokens,
            stats.cached_tokens,
            stats.preemptions
        ),
        Output::Rejected { key, at, reason } => {
            format!("{:>7} us  {} rejected: {}", micros(*at), key.0, reason.as_str())
        }
        Output::Broken { key, at, lost } => format!("{:>7} us  {} {}", micros(*at), key.0, lost.error_type()),
    };
    outputs.iter().map(line).collect::<Vec<_>>().join("\n")
}

fn run(config: EngineConfig, requests: &[(u64, u32, u32)]) -> String {
    let mut engine = engine(config);
    for (at_us, prompt, max_tokens) in requests {
        let key = u64::from(*prompt);
        let at = Time::ZERO + Dur::from_micros(*at_us);
        let request = request(engine.config(), key, *prompt, *max_tokens, at);
        engine.handle(at, Input::Add(Box::new(request)));
    }
    table(&run_to_idle(&mut engine))
}

fn config(change: impl FnOnce(&mut EngineConfig)) -> EngineConfig {
    let mut config = EngineConfig::default();
    change(&mut config);
    config
}

#[test]
fn a_request_alone_decodes_at_the_published_rate() {
    let small = run(config(|_| ()), &[(0, 100, 3)]);
    insta::assert_snapshot!(small, @r#"
     7730 us  100 +1
    14174 us  100 +1
    20618 us  100 +1
    20618 us  100 length after 3 tokens, 0 cached, 0 preemptions
    "#);
}

#[test]
fn synchronous_steps_pay_for_the_host() {
    let sync = run(config(|c| c.scheduler.async_scheduling = false), &[(0, 100, 3)]);
    insta::assert_snapshot!(sync, @r#"
     7730 us  100 +1
    14203 us  100 +1
    20676 us  100 +1
    20676 us  100 length after 3 tokens, 0 cached, 0 preemptions
    "#);
}

#[test]
fn a_request_that_comes_during_a_step_is_in_neither_batch_in_flight() {
    let two = run(config(|_| ()), &[(0, 100, 5), (1000, 64, 2)]);
    insta::assert_snapshot!(two, @r#"
     7730 us  100 +1
    14174 us  100 +1
    21614 us  100 +1
    21614 us  64 +1
    28091 us  100 +1
    28091 us  64 +1
    28091 us  64 length after 2 tokens, 48 cached, 0 preemptions
    34535 us  100 +1
    34535 us  100 length after 5 tokens, 0 cached, 0 preemptions
    "#);
}

#[test]
fn refusals_are_answers() {
    let limited = config(|c| {
        c.max_num_queued_reqs = Some(1);
        c.max_model_len = Some(64);
    });
    let out = run(limited, &[(0, 64, 1), (0, 10, 1), (0, 11, 1)]);
    insta::assert_snapshot!(out, @r#"
       0 us  64 rejected: prompt_too_long
       0 us  11 rejected: queue_full
    7534 us  10 +1
    7534 us  10 length after 1 tokens, 0 cached, 0 preemptions
    "#);
}

#[test]
fn the_instant_profile_answers_at_once() {
    let out = run(config(|c| c.profile = "instant".into()), &[(5, 100, 3)]);
    insta::assert_snapshot!(out, @r#"
    5 us  100 +1
    5 us  100 +1
    5 us  100 +1
    5 us  100 length after 3 tokens, 0 cached, 0 preemptions
    "#);
}

#[test]
fn an_abort_ends_a_request_once() {
    let mut engine = engine(config(|_| ()));
    let request = request(engine.config(), 1, 50, 1000, Time::ZERO);
    engine.handle(Time::ZERO, Input::Add(Box::new(request)));
    engine.handle(Time::from_nanos(20_000_000), Input::Abort(RequestKey(1)));
    engine.handle(Time::from_nanos(21_000_000), Input::Abort(RequestKey(1)));
    insta::assert_snapshot!(table(&run_to_idle(&mut engine)), @r#"
     7576 us  1 +1
    14018 us  1 +1
    20409 us  1 abort after 2 tokens, 0 cached, 0 preemptions
    "#);
    let snapshot = engine.snapshot();
    assert_eq!((snapshot.running, snapshot.waiting, snapshot.kv_usage), (0, 0, 0.0));
}

#[test]
fn the_end_of_k_steps_is_the_floor_of_their_sum() {
    let profile = LatencyProfile::named(LatencyProfile::DEFAULT_NAME).unwrap();
    let mut engine = engine(config(|_| ()));
    let request = request(engine.config(), 1, 100, 2001, Time::ZERO);
    engine.handle(Time::ZERO, Input::Add(Box::new(request)));
    let out = run_to_idle(&mut engine);
    let shape =
        |context| crate::core::latency::BatchShape { decode_seqs: 1, decode_context: context, ..Default::default() };
    let sum: u64 = (0..2000u64).map(|i| profile.step_ps(&shape(101 + i))).sum();
    let Some(Output::Finished { stats, .. }) = out.last() else { panic!("the last output is the end") };
    let decode = stats.last_token.unwrap() - stats.first_token.unwrap();
    assert_eq!(decode, Dur::from_nanos(sum / 1000));
}

#[test]
fn metrics_count_tokens_and_hits() {
    let mut engine = engine(config(|_| ()));
    for key in [3, 6] {
        let at = Time::from_nanos(key);
        let request = request(engine.config(), key, 64, 4, at);
        engine.handle(at, Input::Add(Box::new(request)));
    }
    run_to_idle(&mut engine);
    let m = engine.metrics();
    assert_eq!((m.prompt_tokens, m.generation_tokens), (128, 8));
    assert_eq!((m.prefix_cache_queries, m.prefix_cache_hits, m.prompt_tokens_cached), (128, 48, 48));
    assert_eq!(m.request_success()[1], (FinishReason::Length, 2));
    assert_eq!((m.inter_token_latency_seconds.count(), m.time_to_first_token_seconds.count()), (6, 2));
    // Two prefills with their first tokens, then three steps of two tokens.
    assert_eq!((m.iteration_tokens_total.count(), m.iteration_tokens_total.sum), (5, 64 + 16 + 8));
}

#[test]
fn reported_gauges_are_those_of_the_last_completed_step() {
    let mut engine = engine(config(|_| ()));
    let request = request(engine.config(), 1, 100, 3, Time::ZERO);
    engine.handle(Time::ZERO, Input::Add(Box::new(request)));
    let (mut out, mut seen) = (Vec::new(), Vec::new());
    let mut look = |engine: &Engine| {
        let running = (engine.snapshot().running, engine.reported().running, engine.metrics().prefix_cache_queries);
        if seen.last() != Some(&running) {
            seen.push(running);
        }
    };
    look(&engine);
    while let Some(at) = engine.next_wakeup() {
        engine.advance(at, &mut out);
        look(&engine);
    }
    // Scheduled, but nobody hears of it before the step is complete.
    assert_eq!(seen, [(0, 0, 0), (1, 0, 0), (1, 1, 100), (0, 0, 100)]);
}
