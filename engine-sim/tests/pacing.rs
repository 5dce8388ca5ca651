//! Live pacing: the merge rule under a driver whose lateness the test chooses, and the real thread where the result does not depend
//! on how late it is.

use std::time::Duration;

use engine_sim::core::config::EngineConfig;
use engine_sim::core::engine::{
    Engine, Input, NewRequest, Output, RejectReason, RequestKey, RequestStats, prepare_prompt,
};
use engine_sim::core::latency::LatencyProfile;
use engine_sim::core::sequence::{FinishReason, SamplingParams};
use engine_sim::server::pacing::{Delivery, Pacer, merge};
use proptest::prelude::*;
use shared::block_hash::ExtraKeys;
use shared::clock::RunClock;
use shared::time::{Dur, Time};
use shared::tokens::{ContentId, TokenId};
use shared::trace::Trail;
use tokio::sync::mpsc::UnboundedReceiver;

fn engine(profile: &str) -> Engine {
    let config = EngineConfig { profile: profile.into(), ..EngineConfig::default() };
    Engine::new(config, LatencyProfile::named(profile).unwrap())
}

fn paced() -> Engine {
    engine(LatencyProfile::DEFAULT_NAME)
}

fn request(key: u64, prompt: u32, max_tokens: u32, arrival: Time) -> Box<NewRequest> {
    let config = EngineConfig::default();
    let mut tokens: Vec<TokenId> = Vec::new();
    ContentId(key).extend(0, u64::from(prompt), &mut tokens);
    Box::new(NewRequest {
        key: RequestKey(key),
        prompt: prepare_prompt(&config.cache, &tokens, &ExtraKeys::default()),
        params: SamplingParams { max_tokens, ..SamplingParams::default() },
        priority: 0,
        arrival,
        content: ContentId(key),
        lora: None,
        trail: Trail::off(),
    })
}

const fn micros(us: u64) -> Time {
    Time::from_nanos(us * 1000)
}

/// An input, when it arrived and when the driver gets to see it.
#[derive(Clone, Debug)]
struct Item {
    at: Time,
    seen: Time,
    what: What,
}

#[derive(Clone, Debug)]
enum What {
    Add { key: u64, prompt: u32, max_tokens: u32 },
    Abort { key: u64 },
}

impl Item {
    fn input(&self) -> Input {
        match self.what {
            What::Add { key, prompt, max_tokens } => Input::Add(request(key, prompt, max_tokens, self.at)),
            What::Abort { key } => Input::Abort(RequestKey(key)),
        }
    }
}

/// Does what the pacing thread does, on a clock of its own: it wakes when something is due or when input can be seen, each time late
/// by the next of `late`, merges what it sees in the order of arrival and lets everything happen that is due.
fn drive(engine: &mut Engine, mut items: Vec<Item>, late: &[Dur]) -> Vec<Output> {
    let (mut out, mut now) = (Vec::new(), Time::ZERO);
    let mut late = late.iter().cycle();
    loop {
        let input = items.iter().map(|i| i.seen).min();
        let Some(wake) = engine.next_wakeup().into_iter().chain(input).min() else { return out };
        now = now.max(wake) + *late.next().unwrap();
        let (mut seen, rest): (Vec<_>, Vec<_>) = items.into_iter().partition(|i| i.seen <= now);
        items = rest;
        seen.sort_by_key(|i| i.at);
        for item in seen {
            step(engine, |e| {
                merge(e, item.at, item.input(), &mut out);
            });
        }
        step(engine, |e| e.advance(now, &mut out));
    }
}

/// I3: core time never goes back.
fn step(engine: &mut Engine, work: impl FnOnce(&mut Engine)) {
    let before = engine.core_time();
    work(engine);
    assert!(engine.core_time() >= before, "core time went back from {before:?} to {:?}", engine.core_time());
}

fn ends(outputs: &[Output]) -> Vec<(u64, FinishReason, RequestStats)> {
    let end = |o: &Output| match o {
        Output::Finished { key, reason, stats, .. } => Some((key.0, *reason, **stats)),
        Output::Tokens { .. } | Output::Rejected { .. } | Output::Broken { .. } => None,
    };
    outputs.iter().filter_map(end).collect()
}

const PUNCTUAL: [Dur; 1] = [Dur::ZERO];

/// The start of the second step of a request of 100 tokens that arrives at zero: the first one is launched, the next is scheduled.
fn second_step() -> (Engine, Time) {
    let mut engine = paced();
    let mut out = Vec::new();
    merge(&mut engine, Time::ZERO, Input::Add(request(1, 100, 50, Time::ZERO)), &mut out);
    engine.advance(Time::ZERO, &mut out);
    let start = engine.next_wakeup().unwrap();
    assert!(start > Time::ZERO && engine.snapshot().running == 1);
    (engine, start)
}

/// Hands a request over that arrived at `arrived`, when everything due at `done` has happened; says when it was queued and admitted.
fn admitted(arrived: Time, done: Option<Time>) -> (Time, Time) {
    let (mut engine, _) = second_step();
    let mut out = Vec::new();
    if let Some(done) = done {
        engine.advance(done, &mut out);
    }
    merge(&mut engine, arrived, Input::Add(request(2, 64, 1, arrived)), &mut out);
    while let Some(at) = engine.next_wakeup() {
        engine.advance(at, &mut out);
    }
    let (_, _, stats) = ends(&out).into_iter().find(|(key, ..)| *key == 2).unwrap();
    (stats.queued, stats.first_scheduled.unwrap())
}

#[test]
fn a_step_admits_what_arrived_by_its_planned_start() {
    let (_, start) = second_step();
    let (before, after) = (start - Dur::from_nanos(1), start + Dur::from_nanos(1));
    assert_eq!(admitted(before, None), (before, start));
    assert_eq!(admitted(start, None), (start, start), "an exact tie is in the step");
    let (queued, scheduled) = admitted(after, None);
    assert!(queued == after && scheduled > after, "{scheduled:?}");
}

#[test]
fn what_is_handed_over_late_counts_from_the_cores_time() {
    let (_, start) = second_step();
    let half = micros(start.as_nanos() / 2000);
    // The step is over, whatever the stamp says; the next one takes the request.
    let (queued, scheduled) = admitted(half, Some(start));
    assert!(queued == start && scheduled > start, "{queued:?} {scheduled:?}");
    let (queued, scheduled) = admitted(start, Some(start));
    assert!(queued == start && scheduled > start, "{queued:?} {scheduled:?}");
    // Late, but the core has not got that far.
    assert_eq!(admitted(half, Some(half)), (half, start));
}

#[test]
fn a_late_driver_does_not_move_planned_ends() {
    let add = |key, at, prompt| Item { at, seen: at, what: What::Add { key, prompt, max_tokens: 20 } };
    let items = vec![add(1, micros(0), 500), add(2, micros(9_000), 3000), add(3, micros(9_000), 80)];
    let punctual = drive(&mut paced(), items.clone(), &PUNCTUAL);
    for late in [Dur::from_micros(1), Dur::from_millis(3), Dur::from_millis(40)] {
        assert_eq!(drive(&mut paced(), items.clone(), &[late, Dur::ZERO]), punctual, "{late}");
    }
}

fn plans() -> impl Strategy<Value = Vec<(u64, u64, u32, u32, Option<u64>)>> {
    // Gap to the one before, delay until it is seen, prompt, output, and when it is aborted after its arrival.
    prop::collection::vec((0u64..30_000, 0u64..25_000, 1u32..3000, 1u32..12, prop::option::of(0u64..60_000)), 1..12)
}

fn items(plans: &[(u64, u64, u32, u32, Option<u64>)], delayed: bool) -> Vec<Item> {
    let (mut at, mut items) = (0, Vec::new());
    for (key, (gap, delay, prompt, max_tokens, abort)) in plans.iter().enumerate() {
        let key = key as u64;
        at += gap;
        let delay = if delayed { *delay } else { 0 };
        let what = What::Add { key, prompt: *prompt, max_tokens: *max_tokens };
        items.push(Item { at: micros(at), seen: micros(at + delay), what });
        items.extend(abort.map(|after| {
            let at = at + after;
            // A caller that goes away is seen no earlier than its request.
            Item { at: micros(at), seen: micros(at + delay), what: What::Abort { key } }
        }));
    }
    items
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// I7: as long as inputs are handed over before what comes after them, lateness changes nothing that is planned.
    #[test]
    fn lateness_of_wake_ups_changes_nothing(plans in plans(), late in prop::collection::vec(0u64..30_000, 1..20)) {
        let late: Vec<Dur> = late.into_iter().map(Dur::from_micros).collect();
        let punctual = drive(&mut paced(), items(&plans, false), &PUNCTUAL);
        prop_assert_eq!(drive(&mut paced(), items(&plans, false), &late), punctual);
    }

    /// I1, I2, I3 with inputs handed over late: every request ends once, nothing happens before it arrived, no block is lost.
    #[test]
    fn late_inputs_are_late_and_nothing_else(plans in plans(), late in prop::collection::vec(0u64..30_000, 1..20)) {
        let late: Vec<Dur> = late.into_iter().map(Dur::from_micros).collect();
        let mut engine = paced();
        let outputs = drive(&mut engine, items(&plans, true), &late);
        let mut ends = ends(&outputs);
        ends.sort_by_key(|(key, ..)| *key);
        prop_assert_eq!(ends.iter().map(|(key, ..)| *key).collect::<Vec<_>>(), (0..plans.len() as u64).collect::<Vec<_>>());
        let arrivals = items(&plans, true).into_iter().filter(|i| matches!(i.what, What::Add { .. }));
        for (((_, reason, stats), item), plan) in ends.iter().zip(arrivals).zip(&plans) {
            prop_assert!(stats.queued >= item.at);
            prop_assert!(stats.first_scheduled.is_none_or(|at| at >= stats.queued));
            prop_assert!(stats.first_token.is_none_or(|at| Some(at) > stats.first_scheduled));
            if *reason != FinishReason::Abort {
                prop_assert_eq!(stats.output_tokens, plan.3);
            }
        }
        let snapshot = engine.snapshot();
        prop_assert_eq!(snapshot.free_blocks, snapshot.num_gpu_blocks - 1);
        prop_assert_eq!(engine.open_requests(), 0);
    }
}

/// All that a request's channel carries. The thread is dead or done within the limit; it is there so that a hang is a failure.
async fn deliveries(mut channel: UnboundedReceiver<Delivery>) -> Vec<Delivery> {
    let mut all = Vec::new();
    let rest = async {
        while let Some(delivery) = channel.recv().await {
            all.push(delivery);
        }
    };
    tokio::time::timeout(Duration::from_secs(60), rest).await.expect("the channel ends");
    all
}

fn tokens(deliveries: &[Delivery]) -> Vec<u32> {
    let of = |d: &Delivery| match d {
        Delivery::Tokens(n) | Delivery::Finished { tokens: n, .. } => Some(*n),
        Delivery::Taken | Delivery::Rejected(_) | Delivery::Broken(_) => None,
    };
    deliveries.iter().filter_map(of).collect()
}

#[tokio::test]
async fn the_last_tokens_and_the_end_are_one_message() {
    let clock = RunClock::start();
    let pacer = Pacer::start(clock, vec![paced(), engine("instant")]).unwrap();
    let at = clock.now();
    let slow = deliveries(pacer.engine(0).add(at, request(1, 100, 4, at))).await;
    let fast = deliveries(pacer.engine(1).add(at, request(1, 100, 4, at))).await;
    assert_eq!(slow[0], Delivery::Taken);
    let end = |d: &Delivery| matches!(d, Delivery::Finished { tokens: 1.., reason: FinishReason::Length, .. });
    assert!(slow.last().is_some_and(end), "{slow:?}");
    assert_eq!(tokens(&slow).iter().sum::<u32>(), 4);
    // All at once where no time passes.
    assert_eq!((fast.len(), tokens(&fast)), (1, vec![4]));
}

#[tokio::test]
async fn the_real_thread_keeps_the_plan() {
    let clock = RunClock::start();
    let pacer = Pacer::start(clock, vec![paced()]).unwrap();
    let at = clock.now();
    let live = deliveries(pacer.engine(0).add(at, request(1, 100, 6, at))).await;
    let Some(Delivery::Finished { stats: live, .. }) = live.last() else { panic!("{live:?}") };
    let item = Item { at, seen: at, what: What::Add { key: 1, prompt: 100, max_tokens: 6 } };
    let planned = ends(&drive(&mut paced(), vec![item], &PUNCTUAL))[0].2;
    assert_eq!(**live, planned, "however late the thread was");
    let lateness = pacer.lateness();
    assert!(lateness.events >= 6 && lateness.p50 <= lateness.p99 && lateness.p99 <= lateness.max, "{lateness:?}");
}

#[tokio::test]
async fn a_refusal_is_the_only_message() {
    let clock = RunClock::start();
    let pacer = Pacer::start(clock, vec![paced()]).unwrap();
    let at = clock.now();
    let refused = deliveries(pacer.engine(0).add(at, request(1, 0, 4, at))).await;
    assert_eq!(refused, [Delivery::Rejected(RejectReason::EmptyPrompt)]);
}

#[tokio::test]
async fn requests_of_a_stopped_engine_end_without_a_last_message() {
    let clock = RunClock::start();
    let pacer = Pacer::start(clock, vec![paced()]).unwrap();
    let handle = pacer.engine(0);
    let at = clock.now();
    let open = handle.add(at, request(1, 100, 100_000, at));
    assert!(handle.alive());
    drop(pacer);
    assert!(!handle.alive());
    let ended = |d: &Delivery| matches!(d, Delivery::Finished { .. });
    assert!(!deliveries(open).await.iter().any(ended));
    assert_eq!(deliveries(handle.add(at, request(2, 100, 1, at))).await, []);
}

#[tokio::test]
async fn requests_of_an_engine_that_panics_end_too() {
    let clock = RunClock::start();
    let pacer = Pacer::start(clock, vec![paced()]).unwrap();
    let handle = pacer.engine(0);
    let at = clock.now();
    let open = handle.add(at, request(1, 100, 100_000, at));
    // A key that is taken is a mistake of the driver, which the core does not forgive.
    let twin = handle.add(at, request(1, 100, 1, at));
    assert!(!deliveries(open).await.iter().any(|d| matches!(d, Delivery::Finished { .. })));
    assert!(!deliveries(twin).await.iter().any(|d| matches!(d, Delivery::Finished { .. })));
    assert!(!handle.alive());
}
