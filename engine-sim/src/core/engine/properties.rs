//! What holds for any engine under any load: random configurations, requests and aborts in virtual time, checked at every wake-up.
//! Invariants are those of docs/invariants.md; those of the scheduler alone are in `scheduler/properties.rs`.

use std::collections::HashMap;

use proptest::prelude::*;
use shared::block_hash::BlockKey;

use super::tests::{engine, request};
use super::*;
use crate::core::config::Policy;
use crate::core::kv_cache::KvEvent;
use crate::core::kv_events::{BlockName, CacheEvent};

/// What a random client does.
#[derive(Clone, Debug)]
enum Act {
    Add { prompt: u32, max_tokens: u32, priority: i32, lora: Option<u32>, stop: Option<u32>, eos_at: Option<u32> },
    Abort { back: u64 },
}

/// Acts with the nanoseconds before each.
fn acts() -> impl Strategy<Value = Vec<(u32, Act)>> {
    let lora = prop_oneof![Just(None), (0u32..3).prop_map(Some)];
    let stop = prop_oneof![3 => Just(None), 1 => (0u32..50).prop_map(Some)];
    let eos = prop_oneof![3 => Just(None), 1 => (1u32..50).prop_map(Some)];
    let add = (1u32..260, 1u32..60, 0i32..3, lora, stop, eos);
    let add = add.prop_map(|(prompt, max_tokens, priority, lora, stop, eos_at)| Act::Add {
        prompt,
        max_tokens,
        priority,
        lora,
        stop,
        eos_at,
    });
    let abort = (1u64..8).prop_map(|back| Act::Abort { back });
    prop::collection::vec((0u32..40_000_000, prop_oneof![6 => add, 1 => abort]), 1..40)
}

/// Engines whose limits are met all the time.
fn configs() -> impl Strategy<Value = EngineConfig> {
    let switches = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    let sizes = (18u32..40, 1u32..8, 8u32..128, 0u32..40, prop_oneof![Just(0.0), Just(0.1)]);
    let others =
        (prop_oneof![Just(None), (1u32..3).prop_map(Some)], prop_oneof![Just(None), (2u32..12).prop_map(Some)]);
    (switches, sizes, others).prop_map(|(switches, sizes, (max_loras, max_num_queued_reqs))| {
        let (priority, async_scheduling, enable_prefix_caching, reserve) = switches;
        let (blocks, seqs, budget, threshold, watermark) = sizes;
        let mut c =
            EngineConfig { max_model_len: Some(250), max_loras, max_num_queued_reqs, ..EngineConfig::default() };
        c.kv_events_config.enable_kv_cache_events = true;
        c.cache.num_gpu_blocks = Some(blocks);
        c.cache.enable_prefix_caching = enable_prefix_caching;
        let s = &mut c.scheduler;
        s.max_num_batched_tokens = budget.max(seqs);
        s.max_num_seqs = seqs;
        s.long_prefill_token_threshold = threshold;
        s.policy = if priority { Policy::Priority } else { Policy::Fcfs };
        s.watermark = watermark;
        s.async_scheduling = async_scheduling;
        s.scheduler_reserve_full_isl = reserve;
        c
    })
}

/// How a driver wakes an engine up between two inputs. What comes out must be the same.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Driver {
    /// At every wake-up, as it should.
    Punctual,
    /// Not before the next input, as a driver does that fell behind.
    Late,
    /// At many other times as well.
    Restless,
}

struct Run {
    engine: Engine,
    driver: Driver,
    out: Vec<Output>,
    keys: u64,
    /// Planned ends of launched steps, by their launch.
    planned: HashMap<Time, Time>,
    /// How many blocks hold each key, by the events.
    cached: HashMap<u128, i64>,
}

impl Run {
    /// Everything that comes out, and how many requests went in.
    fn of(config: &EngineConfig, acts: &[(u32, Act)], driver: Driver) -> (Vec<Output>, u64) {
        let engine = engine_of(config);
        let (planned, cached) = (HashMap::new(), HashMap::new());
        let mut run = Run { engine, driver, out: Vec::new(), keys: 0, planned, cached };
        let mut now = Time::ZERO;
        for (wait, act) in acts {
            let until = now + Dur::from_nanos(u64::from(*wait));
            run.advance(now, until);
            now = until;
            let input = run.input(config, act, now);
            run.engine.handle(now, input);
            run.check();
        }
        run.wind_down(now);
        (run.out, run.keys)
    }

    fn input(&mut self, config: &EngineConfig, act: &Act, now: Time) -> Input {
        match *act {
            Act::Add { prompt, max_tokens, priority, lora, stop, eos_at } => {
                self.keys += 1;
                let mut request = request(config, self.keys, prompt, max_tokens, now);
                request.priority = priority;
                request.lora = lora;
                request.params.eos_at = eos_at;
                // A token that the request may or may not come to.
                request.params.stop_token_ids = stop.map(|i| request.content.token(u64::from(i))).into_iter().collect();
                Input::Add(Box::new(request))
            }
            Act::Abort { back } => Input::Abort(RequestKey(self.keys.saturating_sub(back))),
        }
    }

    fn advance(&mut self, from: Time, until: Time) {
        match self.driver {
            Driver::Punctual => {
                while let Some(at) = self.engine.next_wakeup().filter(|at| *at <= until) {
                    self.step(at);
                }
            }
            Driver::Late => self.step(until),
            Driver::Restless => {
                let length = (until - from).as_nanos();
                (1..=7).for_each(|i| self.step(from + Dur::from_nanos(length * i / 7)));
            }
        }
    }

    fn step(&mut self, at: Time) {
        let (before, wakeup) = (self.engine.core_time(), self.engine.next_wakeup());
        assert!(wakeup.is_none_or(|w| w >= before), "a wake-up lies ahead (I3)");
        self.engine.advance(at, &mut self.out);
        assert!(self.engine.core_time() >= before, "core time never goes back (I3)");
        self.check();
    }

    fn check(&mut self) {
        let engine = &self.engine;
        assert!(engine.open_requests() == 0 || engine.next_wakeup().is_some(), "an open request has a wake-up (I5)");
        let (now, most) = (engine.snapshot(), engine.config().scheduler.max_num_seqs);
        assert!(now.running <= most, "no more run than may (I14)");
        for flight in engine.in_flight.iter().filter(|f| f.ready > f.launch) {
            let planned = *self.planned.entry(flight.launch).or_insert(flight.ready);
            assert_eq!(planned, flight.ready, "a planned end never moves (I7)");
        }
        self.check_events();
    }

    /// I15: whoever counts the events knows what is in the cache.
    fn check_events(&mut self) {
        while let Some(batch) = self.engine.take_kv_batch() {
            for event in batch.events {
                match event {
                    CacheEvent::Stored { blocks, .. } => blocks.iter().for_each(|b| *self.count(*b) += 1),
                    CacheEvent::Removed(block) => *self.count(block) -= 1,
                    CacheEvent::Cleared => self.cached.clear(),
                }
            }
        }
        // What the next batch would tell.
        let mut events = Vec::new();
        self.engine.scheduler.drain_kv_events(&mut events);
        for event in events {
            match event {
                KvEvent::Stored { keys, .. } => keys.iter().for_each(|k| *self.cached.entry(k.0).or_default() += 1),
                KvEvent::Removed(key) => *self.cached.entry(key.0).or_default() -= 1,
                KvEvent::Cleared => self.cached.clear(),
            }
        }
        self.cached.retain(|_, n| *n != 0);
        let pool = self.engine.scheduler.kv().pool();
        let mut found: HashMap<u128, i64> = HashMap::new();
        for BlockKey(key) in (1..pool.num_blocks()).filter_map(|b| pool.content(b)) {
            *found.entry(key).or_default() += 1;
        }
        assert_eq!(self.cached, found, "the events tell the cache's content (I15)");
    }

    fn count(&mut self, block: BlockName) -> &mut i64 {
        let BlockName::Key(BlockKey(key)) = block else { panic!("no digests were asked for") };
        self.cached.entry(key).or_default()
    }

    fn wind_down(&mut self, from: Time) {
        match self.driver {
            Driver::Late => self.step(from + Dur::from_secs(3600)),
            Driver::Punctual | Driver::Restless => {
                while let Some(at) = self.engine.next_wakeup() {
                    self.step(at);
                }
            }
        }
        let end = self.engine.snapshot();
        assert_eq!((end.running, end.waiting, self.engine.open_requests()), (0, 0, 0), "every request ends (I1)");
        assert_eq!(end.free_blocks, end.num_gpu_blocks - 1, "every block is free again (I2)");
    }
}

fn engine_of(config: &EngineConfig) -> Engine {
    let mut engine = engine(config.clone());
    // The checks count the scheduler's events themselves, between any two wake-ups.
    engine.kv_events = None;
    engine
}

/// I1: each request has tokens, then one end that says how many.
fn check_ends(out: &[Output], keys: u64) -> Result<(), TestCaseError> {
    for key in (1..=keys).map(RequestKey) {
        let of_key: Vec<&Output> = out.iter().filter(|o| o.key() == key).collect();
        let ends = of_key.iter().filter(|o| !matches!(o, Output::Tokens { .. })).count();
        prop_assert_eq!(ends, 1, "every request ends once (I1)");
        prop_assert!(!matches!(of_key.last(), Some(Output::Tokens { .. })), "nothing follows the end (I1)");
        if let Some(Output::Finished { stats, .. }) = of_key.last() {
            prop_assert_eq!(stats.output_tokens as usize, of_key.len() - 1);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases.max(96), ..ProptestConfig::default() })]

    #[test]
    fn any_load_keeps_the_invariants(config in configs(), acts in acts()) {
        let (out, keys) = Run::of(&config, &acts, Driver::Punctual);
        prop_assert!(out.is_sorted_by_key(Output::at), "outputs are in planned order");
        check_ends(&out, keys)?;
        let (again, _) = Run::of(&config, &acts, Driver::Punctual);
        prop_assert_eq!(&out, &again, "the same inputs give the same outputs (I6)");
        for driver in [Driver::Late, Driver::Restless] {
            let (other, _) = Run::of(&config, &acts, driver);
            prop_assert_eq!(&out, &other, "what was planned does not depend on the driver, here {:?} (I7)", driver);
        }
    }
}
