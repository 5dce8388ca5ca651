//! What holds for any workload: random requests, aborts and remote loads through a scheduler of random limits, checked after every
//! call. Invariants are those of docs/invariants.md.

use std::collections::{BTreeMap, HashMap};

use proptest::prelude::*;

use super::tests::{params, sequence};
use super::*;
use crate::core::sequence::Remote;

/// What a client or a connector does before a turn.
#[derive(Clone, Debug)]
enum Act {
    Add {
        content: u64,
        prompt: u32,
        max_tokens: u32,
        priority: i32,
        lora: Option<u32>,
        stop: bool,
        remote: bool,
    },
    /// Aborts the open request with this place among all open ones.
    Abort(usize),
    /// Reports that the load of the request with this place among those under way has arrived.
    Arrive(usize),
    /// Nothing arrives for some turns.
    Wait(u8),
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let lora = prop_oneof![2 => Just(None), 3 => (0u32..4).prop_map(Some)];
    let add = (0u64..4, 1u32..40, 1u32..20, 0i32..3, lora, prop::bool::weighted(0.3), prop::bool::weighted(0.15));
    let add = add.prop_map(|(content, prompt, max_tokens, priority, lora, stop, remote)| Act::Add {
        content,
        prompt,
        max_tokens,
        priority,
        lora,
        stop,
        remote,
    });
    let act = prop_oneof![
        8 => add,
        1 => any::<usize>().prop_map(Act::Abort),
        2 => any::<usize>().prop_map(Act::Arrive),
        4 => (1u8..6).prop_map(Act::Wait),
    ];
    prop::collection::vec(act, 1..60)
}

fn limits() -> impl Strategy<Value = SchedulerParams> {
    let switches = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    let sizes = (12u32..40, 8u32..64, 1u32..8, 0u32..12, 0u32..4, prop_oneof![Just(None), (1u32..3).prop_map(Some)]);
    (switches, sizes).prop_map(|(switches, (blocks, budget, seqs, threshold, watermark, max_loras))| {
        let (async_scheduling, priority, prefix_caching, reserve_full_isl, drop_stale_outputs, defer_frees) = switches;
        SchedulerParams {
            // Sometimes the model's length, sometimes a request's own limit ends it.
            max_model_len: 48.min(4 * blocks),
            max_num_batched_tokens: budget,
            max_num_seqs: seqs,
            long_prefill_token_threshold: threshold,
            policy: if priority { Policy::Priority } else { Policy::Fcfs },
            watermark_blocks: watermark.min(blocks / 4),
            max_loras,
            async_scheduling,
            prefix_caching,
            reserve_full_isl,
            drop_stale_outputs,
            defer_frees,
            ..params(blocks)
        }
    })
}

const STOP: TokenId = TokenId(3);

/// A scheduler with what a driver and a subscriber of its events know.
struct World {
    scheduler: Scheduler,
    /// Open requests: slot and tag.
    open: Vec<(SeqIx, u64)>,
    loads: Vec<LoadId>,
    ended: BTreeMap<u64, FinishReason>,
    tokens: BTreeMap<u64, u32>,
    /// How many blocks hold each key, by the events.
    cached: HashMap<BlockKeyBits, i64>,
    next: u64,
    turns: u32,
}

type BlockKeyBits = u128;

impl World {
    fn new(params: SchedulerParams) -> World {
        World {
            scheduler: Scheduler::new(params),
            open: Vec::new(),
            loads: Vec::new(),
            ended: BTreeMap::new(),
            tokens: BTreeMap::new(),
            cached: HashMap::new(),
            next: 0,
            turns: 0,
        }
    }

    fn act(&mut self, act: &Act) {
        match *act {
            Act::Add { content, prompt, max_tokens, priority, lora, stop, remote } => {
                let mut new = sequence(&self.scheduler, self.next, content, prompt, max_tokens);
                new.priority = priority;
                new.lora = lora;
                if stop {
                    new.params.stop_token_ids = vec![STOP];
                    new.params.min_tokens = max_tokens / 3;
                }
                // A whole prompt, as a prefill engine sends it.
                new.remote = if remote { Remote::Prompt(prompt) } else { Remote::None };
                let tag = self.next;
                let ix = self.scheduler.add(new);
                self.open.push((ix, tag));
                self.next += 1;
            }
            Act::Abort(at) if !self.open.is_empty() => {
                let (ix, tag) = self.open.remove(at % self.open.len());
                self.scheduler.abort(ix, tag);
                assert_eq!(self.ended.insert(tag, FinishReason::Abort), None);
            }
            Act::Arrive(at) if !self.loads.is_empty() => {
                let load = self.loads.remove(at % self.loads.len());
                self.arrive(load);
            }
            Act::Abort(_) | Act::Arrive(_) => {}
            Act::Wait(turns) => (0..turns).for_each(|_| self.turn()),
        }
        self.check();
    }

    fn arrive(&mut self, load: LoadId) {
        self.scheduler.load_arrived(load);
    }

    /// A turn of vLLM's engine loop.
    fn turn(&mut self) {
        let inflight = 1 + usize::from(self.scheduler.params().async_scheduling);
        let mut tokens = 0;
        if self.scheduler.has_work() {
            let batch = self.scheduler.schedule();
            tokens = batch.total_tokens();
            let loads: Vec<LoadId> = batch.loads.iter().map(|start| start.load).collect();
            self.check_batch();
            self.loads.extend(loads);
            self.check();
        }
        let more = tokens > 0 || self.scheduler.has_work();
        if self.scheduler.batches_in_flight() == 0 || (self.scheduler.batches_in_flight() < inflight && more) {
            return;
        }
        let turn = self.turns;
        self.turns += 1;
        let outputs = self.scheduler.complete(|ix, i| TokenId((ix.0 + i + turn) % 5)).expect("a batch is in flight").1;
        for output in outputs {
            *self.tokens.entry(output.tag).or_default() += 1;
            if let Some(reason) = output.finish {
                self.open.retain(|(_, tag)| *tag != output.tag);
                assert_eq!(self.ended.insert(output.tag, reason), None, "a request ends once (I1)");
            } else {
                assert!(self.open.iter().any(|(_, tag)| *tag == output.tag), "no token after the end (I1)");
            }
        }
        self.check();
    }

    fn check(&mut self) {
        self.check_blocks();
        self.check_events();
        let s = &self.scheduler;
        assert!(s.running.len() <= s.params.max_num_seqs as usize, "no more run than may (I14)");
        assert_eq!(s.slab.len(), self.open.len(), "every open request is somewhere (I1)");
        let queued = s.running.len() + s.waiting.len() + s.holding.len();
        assert_eq!(queued, self.open.len(), "in one queue (I1)");
        assert_eq!(s.slab.iter().filter(|q| q.deferred).count(), s.deferred);
    }

    /// I2: every block is held as often as requests have it, or free; two requests have the same one only for the same content.
    fn check_blocks(&self) {
        let s = &self.scheduler;
        let pool = s.kv.pool();
        let mut holders: HashMap<BlockIx, u32> = HashMap::new();
        let mut contents: HashMap<BlockIx, Vec<Option<u128>>> = HashMap::new();
        for seq in s.slab.iter() {
            let mut own = seq.blocks.clone();
            own.sort_unstable();
            assert!(own.windows(2).all(|w| w[0] != w[1]), "a request has a block once");
            for (i, &block) in seq.blocks.iter().enumerate() {
                *holders.entry(block).or_default() += 1;
                contents.entry(block).or_default().push(seq.new.keys.get(i).map(|k| k.0));
            }
        }
        let orphans = s.loads.values().filter_map(|to| match to {
            Destination::Request(_) => None,
            Destination::Nobody(blocks) => Some(blocks),
        });
        let set_aside = s.pending_frees.iter().map(|(_, blocks)| blocks).chain(orphans);
        set_aside.flatten().for_each(|block| *holders.entry(*block).or_default() += 1);
        assert!(!holders.contains_key(&0), "the null block is never handed out (I2)");
        let mut free = 0;
        for block in 1..pool.num_blocks() {
            let expect = holders.get(&block).copied().unwrap_or(0);
            assert_eq!(pool.holders(block), expect, "block {block} is held as often as it is owned (I2)");
            free += u32::from(expect == 0);
        }
        assert_eq!(pool.free_blocks(), free, "free and held blocks add up (I2)");
        assert_eq!(pool.free_list().len() as u32, free);
        for (block, keys) in contents.iter().filter(|(_, keys)| keys.len() > 1) {
            let content = pool.content(*block).map(|k| k.0);
            assert!(
                content.is_some() && keys.iter().all(|k| *k == content),
                "block {block} is shared by its content (I2)"
            );
        }
    }

    /// I15: whoever counts the events knows what is in the cache.
    fn check_events(&mut self) {
        let mut events = Vec::new();
        self.scheduler.drain_kv_events(&mut events);
        for event in events {
            match event {
                KvEvent::Stored { keys, .. } => keys.iter().for_each(|k| *self.cached.entry(k.0).or_default() += 1),
                KvEvent::Removed(key) => *self.cached.entry(key.0).or_default() -= 1,
                KvEvent::Cleared => self.cached.clear(),
            }
        }
        self.cached.retain(|_, n| *n != 0);
        let pool = self.scheduler.kv.pool();
        let mut found: HashMap<BlockKeyBits, i64> = HashMap::new();
        for key in (1..pool.num_blocks()).filter_map(|b| pool.content(b)) {
            *found.entry(key.0).or_default() += 1;
        }
        assert_eq!(self.cached, found, "the events tell the cache's content (I15)");
        assert!(found.keys().all(|k| pool.lookup(shared::block_hash::BlockKey(*k)).is_some()));
    }

    /// I14: the newest batch keeps every limit.
    fn check_batch(&self) {
        let s = &self.scheduler;
        let p = &s.params;
        let batch = s.in_flight.back().expect("it was just scheduled");
        let tokens: u32 = batch.entries.iter().map(|e| e.tokens).sum();
        assert!(tokens <= p.max_num_batched_tokens, "{tokens} tokens (I14)");
        assert!(batch.entries.len() <= p.max_num_seqs as usize, "(I14)");
        for entry in &batch.entries {
            let seq = &s.slab[entry.ix];
            assert!(entry.tokens > 0 && s.running.contains(&entry.ix));
            assert!(entry.computed + entry.tokens <= p.max_model_len, "no longer than the model (I14)");
            assert!(seq.blocks.len() as u32 * p.block_size >= entry.computed + entry.tokens, "every token has a place");
            assert!(batch.entries.iter().filter(|e| e.ix == entry.ix).count() == 1);
        }
        if let Some(most) = p.max_loras {
            let mut loras: Vec<u32> = s.running.iter().filter_map(|ix| s.slab[*ix].new.lora).collect();
            loras.sort_unstable();
            loras.dedup();
            assert!(loras.len() <= most as usize, "{loras:?} (I14)");
        }
    }

    /// Lets everything end.
    fn finish(&mut self) {
        for _ in 0..10_000 {
            if !self.scheduler.has_work() && self.scheduler.batches_in_flight() == 0 {
                break;
            }
            self.loads.pop().into_iter().for_each(|load| self.arrive(load));
            self.turn();
        }
        while let Some(load) = self.loads.pop() {
            self.arrive(load);
        }
        self.check();
        assert_eq!(self.open, [], "every request ends (I1)");
        assert_eq!(self.ended.len() as u64, self.next, "once (I1)");
        let pool = self.scheduler.kv.pool();
        assert_eq!(pool.free_blocks() + 1, pool.num_blocks(), "every block is free again (I2)");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases.max(512), ..ProptestConfig::default() })]

    #[test]
    fn any_workload_keeps_the_invariants(limits in limits(), acts in acts()) {
        let mut world = World::new(limits);
        let mut wanted = Vec::new();
        for act in &acts {
            // Longer requests than the cache holds are refused before the scheduler.
            if let Act::Add { prompt, max_tokens, .. } = act {
                if *prompt >= world.scheduler.params().max_model_len {
                    continue;
                }
                wanted.push(*max_tokens);
            }
            world.act(act);
        }
        world.finish();
        for (tag, reason) in &world.ended {
            let (got, most) = (world.tokens.get(tag).copied().unwrap_or(0), wanted[*tag as usize]);
            match reason {
                FinishReason::Length => prop_assert!((1..=most).contains(&got)),
                FinishReason::Stop => prop_assert!(got > most / 3 && got <= most),
                FinishReason::Abort => prop_assert!(got <= most),
                FinishReason::Error => prop_assert!(false, "nothing fails here"),
            }
        }
    }
}
