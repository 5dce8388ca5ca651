//! Two engines and a network of the test's own: prefill here, decode there, in injected time.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use shared::rng::Seed;
use shared::time::{Dur, Time};
use shared::trace::Trail;

use super::*;
use crate::core::config::EngineConfig;
use crate::core::engine::tests::{engine, request};
use crate::core::engine::{Engine, Input, Output, RequestKey, RequestStats};
use crate::core::faults::{FaultRule, Faults};
use crate::core::latency::LatencyProfile;
use crate::core::scheduler::SchedulerParams;
use crate::core::sequence::FinishReason;

const P: usize = 0;
const D: usize = 1;

/// What the network does with messages.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wire {
    Whole,
    /// Nothing from D reaches P, and D learns that its pulls failed.
    Cut,
}

struct Net {
    engines: [Engine; 2],
    wire: Wire,
    queue: BTreeMap<(Time, u64), (usize, Input)>,
    sequence: u64,
    pulls: BTreeMap<PullKey, LoadId>,
    now: Time,
    outputs: [Vec<Output>; 2],
    said: Vec<String>,
}

const DELAY: Dur = Dur::from_micros(100);

fn ms(ms: u64) -> Time {
    Time::ZERO + Dur::from_millis(ms)
}

fn config(role: KvRole, change: impl FnOnce(&mut EngineConfig)) -> EngineConfig {
    let mut config = EngineConfig { kv_transfer: Some(KvTransferConfig::nixl(role)), ..EngineConfig::default() };
    change(&mut config);
    config
}

impl Net {
    fn new(p: EngineConfig, d: EngineConfig) -> Net {
        Net {
            engines: [engine(p), engine(d)],
            wire: Wire::Whole,
            queue: BTreeMap::new(),
            sequence: 0,
            pulls: BTreeMap::new(),
            now: Time::ZERO,
            outputs: [Vec::new(), Vec::new()],
            said: Vec::new(),
        }
    }

    fn default() -> Net {
        Net::new(config(KvRole::KvProducer, |_| ()), config(KvRole::KvConsumer, |_| ()))
    }

    fn push(&mut self, at: Time, to: usize, input: Input) {
        self.sequence += 1;
        self.queue.insert((at, self.sequence), (to, input));
    }

    fn add(&mut self, at: Time, to: usize, key: u64, prompt: u32, max_tokens: u32, kv: Option<KvAsk>) {
        let mut new = request(self.engines[to].config(), key, prompt, max_tokens, at);
        new.kv = kv;
        self.push(at, to, Input::Add(Box::new(new)));
    }

    /// Runs to the end of everything, at most until `end`.
    fn run(&mut self, end: Time) -> &mut Net {
        loop {
            let message = self.queue.first_key_value().map(|((at, _), _)| *at);
            let own = self.engines.iter().filter_map(Engine::next_wakeup).min();
            let Some(at) = message.into_iter().chain(own).min().filter(|at| *at <= end) else { break };
            self.now = at;
            if message == Some(at) {
                let (_, (to, input)) = self.queue.pop_first().unwrap();
                self.engines[to].handle(at, input);
            }
            for i in [P, D] {
                self.engines[i].advance(at, &mut self.outputs[i]);
                self.carry(i);
            }
        }
        self.now = self.now.max(end);
        self
    }

    fn carry(&mut self, from: usize) {
        let mut said = Vec::new();
        self.engines[from].drain_kv(&mut said);
        for output in said {
            self.said.push(describe(&output));
            let arrives = output.at() + DELAY;
            match output {
                KvOutput::Pull { load, .. } if self.wire == Wire::Cut => {
                    let outcome = Err(TransferError::Unreachable);
                    self.push(arrives, D, Input::Kv(Box::new(KvInput::Received { load, outcome })));
                }
                KvOutput::Notify { .. } if self.wire == Wire::Cut => {
                    self.push(arrives, D, Input::Kv(Box::new(KvInput::NotReached)));
                }
                KvOutput::Pull { load, remote, blocks, ranks, breaks_after, .. } => {
                    self.sequence += 1;
                    let key = PullKey(self.sequence);
                    self.pulls.insert(key, load);
                    let (request, peer) = (Arc::clone(&remote.request), "d".into());
                    let pull = Pull { key, request, blocks, ranks, breaks_after, peer, trail: Trail::off() };
                    self.push(arrives, P, Input::Kv(Box::new(KvInput::Pull(pull))));
                }
                KvOutput::Notify { what, requests, .. } => {
                    let input = match what {
                        Notice::Heartbeat => KvInput::Heartbeat(requests),
                        Notice::Done => KvInput::Done(requests),
                    };
                    self.push(arrives, P, Input::Kv(Box::new(input)));
                }
                KvOutput::Sent { key, outcome, .. } => {
                    let load = self.pulls.remove(&key).unwrap();
                    self.push(arrives, D, Input::Kv(Box::new(KvInput::Received { load, outcome })));
                }
            }
        }
    }

    /// Prefills a prompt at P and gives what D is asked with.
    fn prefill(&mut self, at: Time, key: u64, prompt: u32) -> KvAsk {
        self.add(at, P, key, prompt, 1, Some(KvAsk::Keep(name(key))));
        self.run(at + Dur::from_secs(1));
        let kept = self.kept(key).expect("its blocks are kept");
        assert_eq!((kept.tokens, kept.blocks.len() as u32), (prompt, prompt.div_ceil(16)));
        pull(key, kept.blocks.len() as u32)
    }

    fn kept(&self, key: u64) -> Option<Kept> {
        self.outputs[P].iter().find_map(|o| match o {
            Output::Finished { key: k, kept, .. } if k.0 == key => kept.as_deref().cloned(),
            Output::Finished { .. } | Output::Tokens { .. } | Output::Rejected { .. } | Output::Broken { .. } => None,
        })
    }

    fn end(&self, engine: usize, key: u64) -> Option<(Time, FinishReason, RequestStats)> {
        self.outputs[engine].iter().find_map(|o| match o {
            Output::Finished { key: k, at, reason, stats, .. } if k.0 == key => Some((*at, *reason, **stats)),
            Output::Finished { .. } | Output::Tokens { .. } | Output::Rejected { .. } | Output::Broken { .. } => None,
        })
    }

    fn held(&self, engine: usize) -> u32 {
        let s = self.engines[engine].snapshot();
        s.num_gpu_blocks - 1 - s.free_blocks
    }

    fn metrics(&self, engine: usize) -> &KvMetrics {
        self.engines[engine].kv_metrics().unwrap()
    }
}

fn name(key: u64) -> Arc<str> {
    format!("cmpl-{key}-0000abcd").into()
}

fn pull(key: u64, blocks: u32) -> KvAsk {
    let peer = Arc::new(Peer { engine_id: "p".into(), host: "127.0.0.1".into(), port: 5600 });
    KvAsk::Pull(Arc::new(RemoteBlocks { peer, request: name(key), blocks }))
}

fn describe(output: &KvOutput) -> String {
    match output {
        KvOutput::Pull { at, blocks, remote, .. } => format!("{:?} pull {} of {}", at, blocks, remote.request),
        KvOutput::Notify { at, what, requests, .. } => format!("{at:?} {what:?} {requests:?}"),
        KvOutput::Sent { at, outcome, .. } => format!("{at:?} sent {:?}", outcome.map(|t| t.blocks)),
    }
}

/// What the roles mean for the scheduler: vLLM's deferred frees and dropped stale outputs.
#[test]
fn a_role_decides_when_blocks_are_free_and_stale_tokens_count() {
    let check = |role: Option<KvRole>, async_scheduling: bool, expect: (bool, bool)| {
        let mut c = EngineConfig { kv_transfer: role.map(KvTransferConfig::nixl), ..EngineConfig::default() };
        c.scheduler.async_scheduling = async_scheduling;
        let params = SchedulerParams::new(&c, &LatencyProfile::named(LatencyProfile::DEFAULT_NAME).unwrap());
        assert_eq!((params.defer_frees, params.drop_stale_outputs), expect, "{role:?} {async_scheduling}");
    };
    check(None, true, (false, false));
    check(Some(KvRole::KvProducer), true, (false, true));
    check(Some(KvRole::KvConsumer), true, (true, false));
    check(Some(KvRole::KvConsumer), false, (false, false));
    check(Some(KvRole::KvBoth), true, (true, true));
}

/// I2 where nothing is open any more.
fn nothing_is_held(net: &Net) {
    for i in [P, D] {
        assert_eq!((net.held(i), net.engines[i].blocks_without_request(), net.engines[i].leases()), (0, 0, 0), "{i}");
        assert_eq!(net.engines[i].open_requests(), 0, "{i}");
    }
}

#[test]
fn the_prompt_moves_and_one_token_of_it_is_computed_again() {
    let mut net = Net::default();
    let ask = net.prefill(Time::ZERO, 1, 1024);
    assert_eq!((net.held(P), net.engines[P].leases()), (64, 1));
    net.add(ms(1000), D, 1, 1024, 4, Some(ask));
    net.run(ms(2000));
    let (_, reason, stats) = net.end(D, 1).unwrap();
    assert_eq!((reason, stats.output_tokens), (FinishReason::Length, 4));
    assert_eq!((stats.cached_tokens, stats.external_tokens, stats.recomputed_tokens), (1023, 1024, 1));
    // 64 blocks of 2 MiB over InfiniBand: 1 ms + 4,096 descriptors + bytes; and two ways on the network.
    let moved = Transfer::over(
        LinkKind::InfiniBand,
        &LatencyProfile::named(LatencyProfile::DEFAULT_NAME).unwrap(),
        Shipment { blocks: 64, block_size: 16, receiver_ranks: 1 },
    );
    let waited = stats.first_scheduled.unwrap() - stats.queued;
    let least = moved.time + DELAY + DELAY;
    assert!(waited >= least && waited <= least + Dur::from_millis(1), "{waited} for {least}");
    let m = net.metrics(D);
    assert_eq!((m.nixl_bytes_transferred.sum, m.nixl_num_descriptors.sum), (64 << 21, 4096));
    assert_eq!(m.nixl_xfer_time_seconds.sum, u128::from(moved.time.as_nanos()));
    assert_eq!((m.external_prefix_cache_queries, m.external_prefix_cache_hits), (1024, 1024));
    let counts = net.engines[D].metrics();
    assert_eq!((counts.prompt_tokens_external, counts.prompt_tokens_recomputed), (1024, 1));
    nothing_is_held(&net);
}

#[test]
fn only_what_is_not_here_is_read() {
    let mut net = Net::default();
    let ask = net.prefill(Time::ZERO, 3, 640);
    // The same content, 320 tokens of it, is in D's cache.
    net.add(ms(1000), D, 30, 320, 1, None);
    net.add(ms(1100), D, 3, 640, 1, Some(ask));
    net.run(ms(2000));
    let (_, _, stats) = net.end(D, 3).unwrap();
    assert_eq!((stats.cached_tokens, stats.external_tokens), (639, 320));
    assert!(net.said.iter().any(|s| s.contains("pull 20 of")), "{:?}", net.said);
    nothing_is_held(&net);
}

#[test]
fn a_full_local_hit_reads_nothing_and_still_tells_the_sender() {
    let mut net = Net::default();
    let ask = net.prefill(Time::ZERO, 3, 64);
    // All four blocks are here, and the prompt is longer than what P computed.
    net.add(ms(1000), D, 30, 128, 1, None);
    net.add(ms(1100), D, 3, 128, 1, Some(ask));
    net.run(ms(2000));
    assert!(net.said.iter().all(|s| !s.contains("pull")), "{:?}", net.said);
    let (_, _, stats) = net.end(D, 3).unwrap();
    assert_eq!((stats.cached_tokens, stats.external_tokens), (112, 0));
    nothing_is_held(&net);
}

#[test]
fn blocks_are_kept_only_for_whole_answers() {
    let mut net = Net::default();
    net.add(Time::ZERO, P, 1, 100, 50, Some(KvAsk::Keep(name(1))));
    net.push(ms(30), P, Input::Abort(RequestKey(1)));
    net.run(ms(100));
    assert_eq!((net.kept(1), net.end(P, 1).unwrap().1), (None, FinishReason::Abort));
    nothing_is_held(&net);
}

#[test]
fn a_lease_that_nobody_renews_expires() {
    let mut net = Net::default();
    net.prefill(Time::ZERO, 1, 1024);
    let (end, _, _) = net.end(P, 1).unwrap();
    net.run(ms(29_990) + (end - Time::ZERO) - Dur::from_millis(5));
    assert_eq!(net.held(P), 64);
    net.run(ms(31_000));
    assert_eq!(net.metrics(P).nixl_num_kv_expired_reqs, 1);
    nothing_is_held(&net);
}

/// D is full for longer than the lease: its heartbeats keep the blocks.
#[test]
fn heartbeats_of_a_queued_request_renew_its_lease() {
    let full = config(KvRole::KvConsumer, |c| c.scheduler.max_num_seqs = 1);
    let mut net = Net::new(config(KvRole::KvProducer, |_| ()), full);
    // 6.4 ms a token: some 58 seconds.
    net.add(Time::ZERO, D, 30, 100, 9000, None);
    let ask = net.prefill(Time::ZERO, 1, 160);
    net.add(ms(1000), D, 1, 160, 1, Some(ask));
    net.run(ms(50_000));
    assert_eq!(net.engines[D].fetch_stages(), FetchStages { waiting_to_start: 1, ..FetchStages::default() });
    assert_eq!(net.held(P), 10);
    let beats = net.said.iter().filter(|s| s.contains("Heartbeat")).count();
    // At 1, 6, ... 46 seconds.
    assert_eq!(beats, 10, "{:?}", net.said);
    net.run(ms(100_000));
    assert_eq!(net.end(D, 1).unwrap().1, FinishReason::Length);
    assert_eq!(net.metrics(P).nixl_num_kv_expired_reqs, 0);
    nothing_is_held(&net);
}

#[test]
fn a_failed_load_ends_the_request_or_is_computed_here() {
    for (policy, reason, cached) in
        [(LoadFailurePolicy::Fail, FinishReason::Error, 0), (LoadFailurePolicy::Recompute, FinishReason::Length, 0)]
    {
        let d = config(KvRole::KvConsumer, |c| {
            c.kv_transfer.as_mut().unwrap().kv_load_failure_policy = policy;
        });
        let mut net = Net::new(config(KvRole::KvProducer, |_| ()), d);
        let ask = net.prefill(Time::ZERO, 1, 1024);
        net.run(ms(40_000));
        net.add(ms(40_000), D, 1, 1024, 2, Some(ask));
        net.run(ms(50_000));
        let (_, ended, stats) = net.end(D, 1).unwrap();
        assert_eq!((ended, stats.cached_tokens, stats.external_tokens), (reason, cached, 0), "{policy:?}");
        assert_eq!(net.metrics(D).nixl_num_failed_transfers, 1);
        nothing_is_held(&net);
    }
}

/// What was found here before a failed load counts.
#[test]
fn after_a_failed_load_the_local_part_is_not_computed_again() {
    let d = config(KvRole::KvConsumer, |c| {
        c.kv_transfer.as_mut().unwrap().kv_load_failure_policy = LoadFailurePolicy::Recompute;
    });
    let mut net = Net::new(config(KvRole::KvProducer, |_| ()), d);
    net.wire = Wire::Cut;
    net.add(Time::ZERO, D, 30, 320, 1, None);
    net.add(ms(500), D, 3, 640, 2, Some(pull(3, 40)));
    net.run(ms(2000));
    let (_, reason, stats) = net.end(D, 3).unwrap();
    assert_eq!((reason, stats.cached_tokens), (FinishReason::Length, 320));
    let m = net.metrics(D);
    assert_eq!((m.nixl_num_failed_transfers, m.nixl_num_failed_notifications), (1, 1));
    nothing_is_held(&net);
}

#[test]
fn blocks_of_an_aborted_load_stay_until_it_is_done() {
    let mut net = Net::default();
    let ask = net.prefill(Time::ZERO, 1, 1024);
    net.add(ms(1000), D, 1, 1024, 4, Some(ask));
    net.push(ms(1005), D, Input::Abort(RequestKey(1)));
    net.run(ms(1006));
    assert_eq!(net.end(D, 1).unwrap().1, FinishReason::Abort);
    assert_eq!((net.held(D), net.engines[D].blocks_without_request()), (64, 64));
    // With nothing else to do, too: no step of D is needed to let go of them.
    net.run(ms(1200));
    assert_eq!((net.held(D), net.engines[D].blocks_without_request()), (0, 0));
    // Its name may be used again.
    let again = net.prefill(ms(1200), 1, 1024);
    net.add(ms(2300), D, 1, 1024, 4, Some(again));
    net.run(ms(4000));
    nothing_is_held(&net);
}

#[test]
fn a_request_that_ends_before_its_load_lets_the_sender_go() {
    let full = config(KvRole::KvConsumer, |c| c.scheduler.max_num_seqs = 1);
    let mut net = Net::new(config(KvRole::KvProducer, |_| ()), full);
    net.add(Time::ZERO, D, 30, 100, 400, None);
    let ask = net.prefill(Time::ZERO, 1, 160);
    net.add(ms(1100), D, 1, 160, 1, Some(ask));
    net.push(ms(1200), D, Input::Abort(RequestKey(1)));
    net.run(ms(1300));
    assert_eq!((net.held(P), net.metrics(P).nixl_num_kv_expired_reqs), (0, 0));
    net.run(ms(9000));
    nothing_is_held(&net);
}

#[test]
fn a_refused_request_lets_the_sender_go() {
    let small = config(KvRole::KvConsumer, |c| c.max_model_len = Some(100));
    let mut net = Net::new(config(KvRole::KvProducer, |_| ()), small);
    let ask = net.prefill(Time::ZERO, 1, 160);
    net.add(ms(1000), D, 1, 160, 1, Some(ask));
    let ask = net.prefill(ms(1000), 2, 160);
    let KvAsk::Pull(remote) = ask else { unreachable!() };
    net.push(ms(2100), D, Input::Kv(Box::new(KvInput::Refused(remote))));
    net.run(ms(3000));
    assert_eq!(net.metrics(P).nixl_num_kv_expired_reqs, 0);
    nothing_is_held(&net);
}

/// An engine whose only request waits for leased blocks sleeps until the lease ends, and does not spin meanwhile.
#[test]
fn a_request_that_waits_for_leased_blocks_runs_when_the_lease_ends() {
    let small = config(KvRole::KvProducer, |c| {
        c.max_model_len = Some(1600);
        c.cache.num_gpu_blocks = Some(102);
    });
    let mut net = Net::new(small, config(KvRole::KvConsumer, |_| ()));
    net.prefill(Time::ZERO, 1, 1024);
    net.add(ms(1000), P, 2, 1100, 1, None);
    net.run(ms(2000));
    assert_eq!((net.engines[P].snapshot().waiting, net.end(P, 2)), (1, None));
    let wake = net.engines[P].next_wakeup().unwrap();
    assert!(wake > ms(30_000), "sleeps until the lease ends, not until {wake:?}");
    net.run(ms(31_000));
    assert_eq!(net.end(P, 2).unwrap().1, FinishReason::Length);
    nothing_is_held(&net);
}

#[test]
fn a_waiting_decoder_sleeps_until_its_load_ends() {
    let mut net = Net::default();
    let ask = net.prefill(Time::ZERO, 1, 16_000);
    net.add(ms(4000), D, 1, 16_000, 1, Some(ask));
    net.run(ms(4010));
    assert_eq!(net.engines[D].fetch_stages().in_progress, 1);
    let before = net.engines[D].next_wakeup().unwrap();
    assert!(before >= ms(9000), "the next heartbeat, not {before:?}");
    net.run(ms(9000));
    assert_eq!(net.end(D, 1).unwrap().1, FinishReason::Length);
}

fn faulty(config: EngineConfig, rule: &str) -> Engine {
    let rule: FaultRule = serde_json::from_str(rule).unwrap();
    engine(config).with_faults(Faults::new(Seed(1), "engine", &[rule]))
}

/// A link that breaks after half of the blocks: they are here, and the lease ends by itself, since nobody says that all were read.
#[test]
fn a_broken_link_leaves_what_has_arrived() {
    for (policy, reason, cached) in
        [(LoadFailurePolicy::Fail, FinishReason::Error, 0), (LoadFailurePolicy::Recompute, FinishReason::Length, 512)]
    {
        let d = config(KvRole::KvConsumer, |c| {
            c.kv_transfer.as_mut().unwrap().kv_load_failure_policy = policy;
        });
        let mut net = Net::default();
        net.engines[D] = faulty(d, r#"{"kind": "kv_transfer", "moved": 0.5}"#);
        let ask = net.prefill(Time::ZERO, 1, 1024);
        net.add(ms(1000), D, 1, 1024, 2, Some(ask));
        net.run(ms(3000));
        let (_, ended, stats) = net.end(D, 1).unwrap();
        assert_eq!((ended, stats.cached_tokens), (reason, cached), "{policy:?}");
        assert_eq!((net.metrics(D).nixl_num_failed_transfers, net.engines[P].leases()), (1, 1));
        net.run(ms(60_000));
        assert_eq!(net.metrics(P).nixl_num_kv_expired_reqs, 1);
        nothing_is_held(&net);
    }
}

#[test]
fn a_sender_that_crashes_fails_the_reads_under_way_and_forgets_the_others() {
    let mut net = Net::default();
    let p = config(KvRole::KvProducer, |_| ());
    net.engines[P] = faulty(p, r#"{"kind": "crash", "at": "1010ms", "for": "2s"}"#);
    let ask = net.prefill(Time::ZERO, 1, 1024);
    net.add(ms(1000), D, 1, 1024, 2, Some(ask.clone()));
    // While nobody is there, and when somebody is again.
    net.add(ms(2000), D, 2, 512, 2, Some(ask.clone()));
    net.add(ms(4000), D, 3, 512, 2, Some(ask));
    net.run(ms(9000));
    for (key, at) in [(1, ms(1010)), (2, ms(2000)), (3, ms(4000))] {
        let (end, reason, _) = net.end(D, key).unwrap();
        assert_eq!(reason, FinishReason::Error, "{key}");
        assert!(end > at && end < at + Dur::from_millis(2), "{key}: {end:?}");
    }
    let sent: Vec<&String> = net.said.iter().filter(|s| s.contains("sent")).collect();
    let errors: Vec<&str> = sent.iter().map(|s| s.split("sent ").nth(1).unwrap()).collect();
    assert_eq!(errors, ["Err(Unreachable)", "Err(Unreachable)", "Err(NotKept)"]);
    nothing_is_held(&net);
}

/// What was read for a decoder that crashed is not taken for what the next one reads.
#[test]
fn a_reader_that_crashes_does_not_mix_up_its_loads() {
    let mut net = Net::default();
    let d = config(KvRole::KvConsumer, |_| ());
    net.engines[D] = faulty(d, r#"{"kind": "crash", "at": "1005ms", "for": "1ms"}"#);
    let first = net.prefill(Time::ZERO, 1, 1024);
    let second = net.prefill(ms(0), 2, 2048);
    net.add(ms(1000), D, 1, 1024, 2, Some(first));
    net.add(ms(1008), D, 2, 2048, 2, Some(second));
    net.run(ms(5000));
    let (_, reason, stats) = net.end(D, 2).unwrap();
    assert_eq!((reason, stats.external_tokens), (FinishReason::Length, 2048));
    assert_eq!(net.metrics(D).nixl_bytes_transferred.sum, 128 << 21);
    net.run(ms(60_000));
    nothing_is_held(&net);
}

/// A request at random: where its answer is asked for, what becomes of it.
#[derive(Clone, Debug)]
struct Story {
    wait_ms: u64,
    prompt: u32,
    /// From the prefill's end to the decode.
    think_ms: u64,
    output: u32,
    /// Aborted at D so long after it was sent there.
    abort_ms: Option<u64>,
    /// Whether D gets it at all.
    decoded: bool,
}

fn stories() -> impl Strategy<Value = Vec<Story>> {
    let one = (0u64..300, 1u32..220, prop_oneof![5 => 0u64..50, 1 => 29_000u64..32_000], 1u32..30).prop_flat_map(
        |(wait_ms, prompt, think_ms, output)| {
            (proptest::option::weighted(0.3, 0u64..200), proptest::bool::weighted(0.85))
                .prop_map(move |(abort_ms, decoded)| Story { wait_ms, prompt, think_ms, output, abort_ms, decoded })
        },
    );
    proptest::collection::vec(one, 1..12)
}

fn tight(role: KvRole, policy: LoadFailurePolicy, async_scheduling: bool) -> EngineConfig {
    config(role, |c| {
        c.max_model_len = Some(250);
        c.cache.num_gpu_blocks = Some(40);
        c.scheduler.max_num_seqs = 4;
        c.scheduler.async_scheduling = async_scheduling;
        let kv = c.kv_transfer.as_mut().unwrap();
        kv.kv_load_failure_policy = policy;
        kv.kv_connector_extra_config.link = LinkKind::Tcp;
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// I1, I2: with leases, loads, aborts and a cut wire every request ends once and every block is free in the end.
    #[test]
    fn blocks_are_conserved_with_leases_and_aborts(
        stories in stories(), recompute: bool, async_scheduling: bool, both: bool, cut: bool,
    ) {
        let policy = if recompute { LoadFailurePolicy::Recompute } else { LoadFailurePolicy::Fail };
        let role = |own| if both { KvRole::KvBoth } else { own };
        let p = tight(role(KvRole::KvProducer), policy, async_scheduling);
        let d = tight(role(KvRole::KvConsumer), policy, async_scheduling);
        let mut net = Net::new(p, d);
        net.wire = if cut { Wire::Cut } else { Wire::Whole };
        let mut at = Time::ZERO;
        let mut sent = BTreeSet::new();
        for (key, story) in (1..).zip(&stories) {
            at = at.max(net.now) + Dur::from_millis(story.wait_ms);
            net.add(at, P, key, story.prompt, 1, Some(KvAsk::Keep(name(key))));
            net.run(at + Dur::from_millis(40));
            if !story.decoded { continue }
            let decode = net.now + Dur::from_millis(story.think_ms);
            sent.insert(key);
            net.add(decode, D, key, story.prompt, story.output, Some(pull(key, story.prompt.div_ceil(16))));
            if let Some(after) = story.abort_ms {
                net.push(decode + Dur::from_millis(after), D, Input::Abort(RequestKey(key)));
            }
            let total = |i: usize| {
                let s = net.engines[i].snapshot();
                s.free_blocks + net.held(i) == s.num_gpu_blocks - 1
            };
            prop_assert!(total(P) && total(D));
        }
        let end = net.now + Dur::from_secs(120);
        net.run(end);
        for key in sent {
            let ends = net.outputs[D].iter().filter(|o| o.key().0 == key && !matches!(o, Output::Tokens { .. }));
            prop_assert_eq!(ends.count(), 1);
        }
        nothing_is_held(&net);
    }
}
