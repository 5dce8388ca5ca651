//! An engine with faults, step by step.

use proptest::prelude::*;
use shared::rng::Seed;
use shared::time::Dur;

use super::*;
use crate::core::config::EngineConfig;
use crate::core::engine::tests::{engine, request, run_to_idle, table};

fn faulty(rules: &[&str]) -> Engine {
    let rules: Vec<FaultRule> = rules.iter().map(|r| serde_json::from_str(r).unwrap()).collect();
    engine(EngineConfig::default()).with_faults(Faults::new(Seed(1), "engine-0", &rules))
}

fn us(us: u64) -> Time {
    Time::ZERO + Dur::from_micros(us)
}

/// Prompts of 100 tokens (`at_us`, output tokens) through an engine with these faults.
fn run(rules: &[&str], requests: &[(u64, u32)]) -> String {
    let mut engine = faulty(rules);
    let mut out = Vec::new();
    for (key, (at, tokens)) in requests.iter().enumerate() {
        engine.advance(us(*at - 1), &mut out);
        engine.handle(us(*at), Input::Add(Box::new(request(engine.config(), key as u64, 100, *tokens, us(*at)))));
    }
    out.extend(run_to_idle(&mut engine));
    table(&out)
}

#[test]
fn a_crash_loses_what_is_open_and_the_cache() {
    // The first request is done, the second under way, the third comes while nobody is there; the fourth finds an empty cache.
    let crash = [r#"{"kind": "crash", "at": "30ms", "for": "20ms"}"#];
    let requests = [(1, 2), (20_000, 9), (35_000, 1), (60_000, 1)];
    insta::assert_snapshot!(run(&crash, &requests), @r#"
      7731 us  0 +1
     14175 us  0 +1
     14175 us  0 length after 2 tokens, 0 cached, 0 preemptions
     27730 us  1 +1
     30000 us  1 engine_crashed
     35000 us  2 engine_crashed
     67730 us  3 +1
     67730 us  3 length after 1 tokens, 0 cached, 0 preemptions
    "#);
    let dead = [r#"{"kind": "engine_dead", "at": "30ms"}"#];
    insta::assert_snapshot!(run(&dead, &requests[1..]), @r#"
     27730 us  0 +1
     30000 us  0 engine_dead
     35000 us  1 engine_dead
     60000 us  2 engine_dead
    "#);
}

#[test]
fn a_hang_holds_steps_back() {
    insta::assert_snapshot!(run(&[r#"{"kind": "hang", "at": "10ms", "for": "90ms"}"#], &[(1, 3), (20_000, 1)]), @r#"
      7731 us  0 +1
    100051 us  0 +1
    100141 us  0 +1
    100141 us  0 length after 3 tokens, 0 cached, 0 preemptions
    107736 us  1 +1
    107736 us  1 length after 1 tokens, 0 cached, 0 preemptions
    "#);
    // Without an end: what was handed over before stays, nothing more comes.
    assert_eq!(run(&[r#"{"kind": "hang", "at": "10ms"}"#], &[(1, 3), (20_000, 1)]).trim(), "7731 us  0 +1");
}

#[test]
fn a_slow_engine_takes_so_many_times_as_long() {
    // Six milliseconds a token; three times as many from the step that is launched after 15 ms, until 40 ms.
    insta::assert_snapshot!(run(&[r#"{"kind": "slow", "factor": 3, "at": "15ms", "for": "25ms"}"#], &[(1, 6)]), @r#"
      7731 us  0 +1
     14175 us  0 +1
     20619 us  0 +1
     27064 us  0 +1
     46397 us  0 +1
     65731 us  0 +1
     65731 us  0 length after 6 tokens, 0 cached, 0 preemptions
    "#);
}

#[test]
fn faults_can_be_added_and_taken_back() {
    let mut engine = faulty(&[]);
    let rule: FaultRule = serde_json::from_str(r#"{"kind": "crash", "at": "1ms"}"#).unwrap();
    assert!(engine.inject(us(1_000), &rule));
    engine.advance(us(1_999), &mut Vec::new());
    assert_eq!(engine.down(), None);
    engine.advance(us(2_000), &mut Vec::new());
    assert_eq!(engine.down(), Some(Down::Process));
    engine.clear_faults(us(3_000));
    engine.advance(us(3_000), &mut Vec::new());
    assert_eq!((engine.down(), engine.next_wakeup()), (None, None));
    assert_eq!(engine.fault_counts().of(FaultKind::Crash), 1);
    // An engine that was made without faults takes none.
    let mut plain = crate::core::engine::tests::engine(EngineConfig::default());
    assert!(!plain.inject(us(0), &rule));
}

proptest! {
    /// Invariant: each request ends once, whatever goes wrong meanwhile, unless the engine hangs for ever.
    #[test]
    fn requests_are_conserved(
        arrivals in prop::collection::vec((1u64..60_000, 1u32..200, 1u32..8), 1..20),
        crash in 0u64..60, hang in 0u64..60, slow in 0u64..60,
    ) {
        let rules = [
            format!(r#"{{"kind": "crash", "at": "{crash}ms", "for": "7ms"}}"#),
            format!(r#"{{"kind": "hang", "at": "{hang}ms", "for": "9ms"}}"#),
            format!(r#"{{"kind": "slow", "at": "{slow}ms", "for": "9ms", "factor": 2.5}}"#),
        ];
        let mut engine = faulty(&rules.each_ref().map(String::as_str));
        let mut arrivals = arrivals;
        arrivals.sort_unstable();
        let mut out = Vec::new();
        for (key, (at, prompt, tokens)) in arrivals.iter().enumerate() {
            engine.advance(us(*at - 1), &mut out);
            let new = request(engine.config(), key as u64, *prompt, *tokens, us(*at));
            engine.handle(us(*at), Input::Add(Box::new(new)));
        }
        out.extend(run_to_idle(&mut engine));
        let mut ended: Vec<u64> = out.iter().filter(|o| o.is_last()).map(|o| o.key().0).collect();
        ended.sort_unstable();
        prop_assert_eq!(ended, (0..arrivals.len() as u64).collect::<Vec<_>>());
        prop_assert!(out.is_sorted_by_key(Output::at));
        prop_assert_eq!(engine.open_requests(), 0);
        prop_assert_eq!(engine.snapshot().free_blocks, engine.snapshot().num_gpu_blocks - 1);
    }
}
