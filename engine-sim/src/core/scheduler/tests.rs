//! Rules of vLLM's scheduler that no recording can show, each from its description (vLLM 0.33, `vllm/v1/core/sched/scheduler.py`),
//! and the helpers that other tests of the scheduler use.

use shared::block_hash::ExtraKeys;
use shared::tokens::ContentId;

use super::*;
use crate::core::config::{HashAlgo, ObservabilityConfig};
use crate::core::hasher::BlockHasher;
use crate::core::sequence::SamplingParams;

/// A small scheduler: blocks of 4 tokens, of which `blocks` may be held.
pub(super) fn params(blocks: u32) -> SchedulerParams {
    SchedulerParams {
        block_size: 4,
        num_blocks: blocks + 1,
        max_model_len: 4 * blocks,
        max_num_batched_tokens: 64,
        max_num_seqs: 8,
        chunked_prefill: true,
        long_prefill_token_threshold: 0,
        policy: Policy::Fcfs,
        reserve_full_isl: true,
        watermark_blocks: 0,
        async_scheduling: false,
        prefix_caching: true,
        max_loras: None,
        kv_events: true,
        drop_stale_outputs: false,
        defer_frees: false,
        observability: ObservabilityConfig::default(),
    }
}

/// A request whose prompt is the first tokens of `content`.
pub(super) fn sequence(scheduler: &Scheduler, tag: u64, content: u64, prompt: u32, max_tokens: u32) -> NewSequence {
    let mut hasher = BlockHasher::new(HashAlgo::Chain, &ExtraKeys::default());
    let mut tokens = Vec::new();
    ContentId(content).extend(0, u64::from(prompt), &mut tokens);
    let p = scheduler.params();
    let blocks = tokens.chunks_exact(p.block_size as usize);
    let tail = if p.prefix_caching { blocks.remainder().to_vec() } else { Vec::new() };
    let keys = if p.prefix_caching { blocks.map(|b| hasher.next_key(b)).collect() } else { Vec::new() };
    NewSequence {
        tag,
        prompt_tokens: prompt,
        keys,
        tail,
        hasher,
        params: SamplingParams { max_tokens, ..SamplingParams::default() },
        priority: 0,
        arrival: tag,
        tie: tag,
        lora: None,
        remote_tokens: None,
        source: None,
    }
}

fn scheduled(scheduler: &mut Scheduler) -> Vec<(u64, u32)> {
    scheduler.schedule().entries.iter().map(|e| (e.tag, e.tokens)).collect()
}

/// The tags that got a token, with what ended them.
fn completed(scheduler: &mut Scheduler, token: u32) -> Vec<(u64, Option<FinishReason>)> {
    let (_, outputs) = scheduler.complete(|_, _| TokenId(token)).expect("a batch is in flight");
    outputs.iter().map(|o| (o.tag, o.finish)).collect()
}

const STOP: u32 = 7;

/// A request that stops with its first token while a newer batch holds it, under deferred frees or not: what is free after each
/// completion, and the block that is handed out next.
fn stopped_in_flight(defer_frees: bool) -> (Vec<u32>, u32) {
    let mut s = Scheduler::new(SchedulerParams { async_scheduling: true, defer_frees, ..params(8) });
    let mut new = sequence(&s, 1, 1, 6, 10);
    new.params.stop_token_ids = vec![TokenId(STOP)];
    s.add(new);
    let free = |s: &Scheduler| s.kv().pool().free_blocks();
    assert_eq!(scheduled(&mut s), [(1, 6)]);
    assert_eq!(scheduled(&mut s), [(1, 1)]);
    let mut seen = vec![free(&s)];
    assert_eq!(completed(&mut s, STOP), [(1, Some(FinishReason::Stop))]);
    seen.push(free(&s));
    assert!(s.has_work(), "the end is not reported yet");
    assert_eq!(scheduled(&mut s), []);
    assert_eq!(completed(&mut s, STOP), [], "the entry of the newer batch is ignored");
    seen.push(free(&s));
    assert_eq!(completed(&mut s, STOP), []);
    (seen, s.kv().pool().next_free())
}

/// Rule B3 (b): blocks of a finished request stay while a batch in flight writes into them, and are freed when that batch is
/// completed, the request's last block foremost. Without a connector that receives KV they are free at once.
#[test]
fn a_finished_request_keeps_its_blocks_while_a_newer_batch_holds_it() {
    // 6 tokens and one more are two blocks of 4; the second one is not full and so without content.
    assert_eq!(stopped_in_flight(false), (vec![6, 8, 8], 2));
    assert_eq!(stopped_in_flight(true), (vec![6, 6, 8], 2));
}

/// The same for an abort (B3, B8): nothing is put out for it.
#[test]
fn an_aborted_request_keeps_its_blocks_while_a_batch_holds_it() {
    let mut s = Scheduler::new(SchedulerParams { async_scheduling: true, defer_frees: true, ..params(8) });
    let new = sequence(&s, 1, 1, 6, 10);
    let ix = s.add(new);
    scheduled(&mut s);
    scheduled(&mut s);
    s.abort(ix, 1);
    assert_eq!(s.kv().pool().free_blocks(), 6);
    // Another request takes the slot; the old entries are none of its.
    let new = sequence(&s, 2, 2, 5, 1);
    assert_eq!(s.add(new), ix);
    assert_eq!((completed(&mut s, 1), s.kv().pool().free_blocks()), (vec![], 6), "the newer batch is in flight");
    assert_eq!((completed(&mut s, 1), s.kv().pool().free_blocks()), (vec![], 8));
    assert_eq!(scheduled(&mut s), [(2, 5)]);
}

/// Rule B4: a victim before the request that needs room moves that one down by one, whether or not it was scheduled in this
/// step; the pass goes on at the same request, and nobody behind it is left out.
#[test]
fn a_victim_that_was_skipped_moves_those_behind_it_up() {
    // Under the priority policy the victim is the worst by priority, here the first that was admitted.
    let tight =
        SchedulerParams { policy: Policy::Priority, async_scheduling: true, prefix_caching: false, ..params(6) };
    let mut s = Scheduler::new(tight);
    // Prompts of two full blocks each; the first one is done with the token after next, so it is soon skipped.
    for (tag, priority, max_tokens) in [(1, 9, 2), (2, 0, 20), (3, 0, 20)] {
        let mut new = sequence(&s, tag, tag, 7, max_tokens);
        new.priority = priority;
        s.add(new);
    }
    // By priority: 2, 3, then 1.
    assert_eq!(scheduled(&mut s), [(2, 7), (3, 7), (1, 7)]);
    let order = |s: &Scheduler| s.running().iter().map(|&ix| s.tag(ix)).collect::<Vec<_>>();
    s.running.rotate_right(1);
    assert_eq!(order(&s), [1, 2, 3]);
    assert_eq!(scheduled(&mut s), [(1, 1), (2, 1), (3, 1)]);
    assert_eq!(s.kv().pool().free_blocks(), 0);
    // Both tokens of 1 are in flight: it is skipped. 2 needs a third block, so 1 goes.
    let batch = s.schedule();
    assert_eq!(batch.preempted.iter().map(|(_, tag)| *tag).collect::<Vec<_>>(), [1]);
    let entries: Vec<_> = batch.entries.iter().map(|e| (e.tag, e.tokens)).collect();
    assert_eq!(entries, [(2, 1), (3, 1)], "3 has its turn in the step in which 2 made room");
    assert_eq!(order(&s), [2, 3]);
}

/// A victim that was scheduled in the step gives its tokens back, and the place of the one that needs room is kept (B4).
#[test]
fn a_victim_that_was_scheduled_gives_its_tokens_back() {
    let tight = SchedulerParams { policy: Policy::Priority, prefix_caching: false, ..params(3) };
    let mut s = Scheduler::new(tight);
    for (tag, priority, prompt) in [(1, 9, 1), (2, 0, 3), (3, 0, 1)] {
        let mut new = sequence(&s, tag, tag, prompt, 8);
        new.priority = priority;
        s.add(new);
    }
    assert_eq!(scheduled(&mut s), [(2, 3), (3, 1), (1, 1)]);
    completed(&mut s, 1);
    s.running.rotate_right(1);
    assert_eq!(scheduled(&mut s), [(1, 1), (2, 1), (3, 1)]);
    completed(&mut s, 1);
    // 1 has room in its block, 2 needs a second one. There are tokens for two requests: 1 has one until 2 takes its blocks.
    s.params.max_num_batched_tokens = 2;
    let batch = s.schedule();
    assert_eq!(batch.preempted.iter().map(|(_, tag)| *tag).collect::<Vec<_>>(), [1]);
    assert_eq!(batch.entries.iter().map(|e| (e.tag, e.tokens)).collect::<Vec<_>>(), [(2, 1), (3, 1)]);
}

/// Abort during a remote load: the blocks are written to until the load is reported complete, and only then free.
#[test]
fn an_abort_during_a_remote_load_keeps_the_blocks_until_it_arrives() {
    let mut s = Scheduler::new(params(8));
    let mut new = sequence(&s, 1, 1, 16, 4);
    new.remote_tokens = Some(16);
    let ix = s.add(new);
    assert_eq!(scheduled(&mut s), [], "it loads, which costs no tokens");
    assert_eq!((s.kv().pool().free_blocks(), s.num_waiting()), (4, (0, 1)));
    completed(&mut s, 0);

    s.abort(ix, 1);
    assert_eq!((s.kv().pool().free_blocks(), s.num_waiting()), (4, (0, 0)), "the load still writes");
    assert_eq!(s.schedule().finished, [1], "its end is reported");
    completed(&mut s, 0);
    // The slot has a new user, which the arrival of the old load does not concern.
    let new = sequence(&s, 2, 2, 8, 4);
    assert_eq!(s.add(new), ix);
    s.load_arrived(ix, 1);
    assert_eq!(s.kv().pool().free_blocks(), 8);
    s.load_arrived(ix, 1);
    assert_eq!(s.kv().pool().free_blocks(), 8, "once");
    assert_eq!(scheduled(&mut s), [(2, 8)]);
    let mut events = Vec::new();
    s.drain_kv_events(&mut events);
    assert!(
        matches!(events[..], [KvEvent::Stored { tag: 2, .. }]),
        "what was loaded for nobody is not found: {events:?}"
    );
}

/// A load that has arrived writes no more: an abort before the request is looked at again frees its blocks at once.
#[test]
fn an_abort_after_a_remote_load_frees_the_blocks() {
    let mut s = Scheduler::new(params(8));
    let mut new = sequence(&s, 1, 1, 16, 4);
    new.remote_tokens = Some(16);
    let ix = s.add(new);
    scheduled(&mut s);
    completed(&mut s, 0);
    s.load_arrived(ix, 1);
    s.abort(ix, 1);
    assert_eq!((s.kv().pool().free_blocks(), s.num_waiting()), (8, (0, 0)));
}

/// A load that has arrived is not registered before the waiting loop looks at its request (C6), and then one token is left to
/// compute.
#[test]
fn a_loaded_request_computes_its_last_token() {
    let mut s = Scheduler::new(params(8));
    let mut new = sequence(&s, 1, 1, 16, 4);
    new.remote_tokens = Some(16);
    let ix = s.add(new);
    scheduled(&mut s);
    completed(&mut s, 0);
    s.load_arrived(ix, 1);
    let mut events = Vec::new();
    s.drain_kv_events(&mut events);
    assert_eq!(events, []);
    assert_eq!(scheduled(&mut s), [(1, 1)]);
    s.drain_kv_events(&mut events);
    assert!(matches!(&events[..], [KvEvent::Stored { keys, .. }] if keys.len() == 4), "{events:?}");
}
