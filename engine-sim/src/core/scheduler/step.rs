//! `schedule()`: running requests first, then admissions.

use super::{Batch, Entry, Origin, PauseState, Scheduler, holds_blocks};
use crate::core::config::Policy;
use crate::core::kv_cache::Demand;
use crate::core::sequence::{SeqIx, Status};

/// Result of looking for blocks for a running request.
enum Room {
    Found,
    /// The request was preempted itself.
    Lost,
    /// Nothing can be freed now.
    Refused,
}

/// Result of looking at the head of the waiting queues.
enum Admission {
    /// It runs now.
    Admitted,
    /// It is skipped for a reason that does not concern those behind it.
    Skipped,
    /// There is no capacity, and nobody overtakes.
    Blocked,
}

impl Scheduler {
    /// Decides the next step and puts it in flight.
    pub fn schedule(&mut self) -> &Batch {
        self.step += 1;
        let mut batch = self.spare.pop().unwrap_or_default();
        batch.reset();
        batch.step = self.step;
        batch.waiting_before = (self.waiting.len() + self.holding.len()) as u32;
        batch.free_before = self.kv.pool().free_blocks();
        let evictions = self.kv.pool().evictions();
        std::mem::swap(&mut batch.finished, &mut self.finished);

        let requests = self.running.len() + batch.waiting_before as usize;
        let threshold = if requests > 1 { self.params.long_prefill_token_threshold } else { 0 };
        let mut budget = if self.pause == PauseState::All { 0 } else { self.params.max_num_batched_tokens };
        self.schedule_running(&mut batch, &mut budget, threshold);
        if batch.preempted.is_empty() && batch.waiting_before > 0 {
            self.admit_waiting(&mut batch, &mut budget, threshold);
        }
        batch.evicted = (self.kv.pool().evictions() - evictions) as u32;
        self.count_as_computed(&mut batch);
        self.in_flight.push_back(batch);
        &self.in_flight[self.in_flight.len() - 1]
    }

    fn schedule_running(&mut self, batch: &mut Batch, budget: &mut u32, threshold: u32) {
        let mut i = 0;
        while i < self.running.len() && *budget > 0 {
            let ix = self.running[i];
            let k = self.tokens_for_running(ix, *budget, threshold);
            if k == 0 {
                i += 1;
                continue;
            }
            let owned = self.slab[ix].blocks.len() as u32;
            match self.find_room(&mut i, k, batch, budget) {
                Room::Found => {
                    self.record(batch, ix, k, Origin::Running, owned, 0);
                    *budget -= k;
                    i += 1;
                }
                // Those behind may need fewer blocks; under fcfs there is nobody behind.
                Room::Lost if self.params.policy == Policy::Priority => {}
                Room::Lost | Room::Refused => break,
            }
        }
    }

    fn tokens_for_running(&self, ix: SeqIx, budget: u32, threshold: u32) -> u32 {
        let s = &self.slab[ix];
        let ends_at = s.new.prompt_tokens.saturating_add(s.new.params.max_tokens);
        if s.placeholders > 0 && s.computed + 2 - s.placeholders >= ends_at {
            // The tokens in flight are the last ones it may have.
            return 0;
        }
        let left = s.num_tokens() + s.placeholders - s.computed;
        let chunk = if threshold > 0 { left.min(threshold) } else { left };
        chunk.min(budget).min(self.params.max_model_len.saturating_sub(s.computed + 1))
    }

    /// Allocates for the running request at `i`, preempting others until it fits. Keeps `i` on the request.
    fn find_room(&mut self, i: &mut usize, k: u32, batch: &mut Batch, budget: &mut u32) -> Room {
        let ix = self.running[*i];
        loop {
            let seq = &mut self.slab[ix];
            if self.kv.allocate(seq, seq.computed, k, &[], Demand::default()) {
                return Room::Found;
            }
            let at = self.victim();
            let victim = self.running[at];
            if !self.can_free(victim) {
                return Room::Refused;
            }
            self.running.remove(at);
            if at < *i {
                *i -= 1;
            }
            if let Some(entry) = batch.entries.iter().position(|e| e.ix == victim) {
                *budget += batch.entries.remove(entry).tokens;
            }
            self.preempt(victim, batch);
            if victim == ix {
                return Room::Lost;
            }
        }
    }

    /// Position in `running` of the request to preempt: the newest, or the worst by priority and arrival (the earliest on a tie).
    fn victim(&self) -> usize {
        let last = self.running.len() - 1;
        match self.params.policy {
            Policy::Fcfs => last,
            Policy::Priority => {
                let rank = |at: usize| {
                    let new = &self.slab[self.running[at]].new;
                    (new.priority, new.arrival)
                };
                (0..=last).rev().max_by_key(|&at| rank(at)).unwrap_or(last)
            }
        }
    }

    pub(super) fn preempt(&mut self, ix: SeqIx, batch: &mut Batch) {
        let free = self.kv.pool().free_blocks();
        let seq = &mut self.slab[ix];
        self.kv.release(seq);
        batch.freed += self.kv.pool().free_blocks() - free;
        seq.status = Status::Preempted;
        seq.computed = 0;
        seq.placeholders = 0;
        seq.drop_stale &= seq.stale > 0;
        seq.stale = seq.in_flight;
        seq.preemptions += 1;
        seq.decoding = false;
        seq.reserving = false;
        batch.preempted.push((ix, seq.new.tag));
        self.membership += 1;
        self.waiting.push_front(&self.slab, ix);
    }

    fn admit_waiting(&mut self, batch: &mut Batch, budget: &mut u32, threshold: u32) {
        self.collect_loras();
        while *budget > 0 && self.running.len() < self.params.max_num_seqs as usize {
            let from_holding = self.holding.len() > 0;
            let Some(ix) = self.holding.head().or_else(|| self.next_waiting()) else { break };
            match self.examine(ix, batch, budget, threshold) {
                Admission::Blocked => break,
                admission @ (Admission::Admitted | Admission::Skipped) => {
                    if from_holding {
                        self.holding.pop();
                    } else {
                        self.waiting.pop();
                    }
                    if matches!(admission, Admission::Skipped) {
                        self.skipped.push(ix);
                    }
                }
            }
        }
        while let Some(ix) = self.skipped.pop() {
            let queue = if holds_blocks(&self.slab[ix]) { &mut self.holding } else { &mut self.waiting };
            queue.push_front(&self.slab, ix);
        }
    }

    fn collect_loras(&mut self) {
        self.loras.clear();
        if self.params.max_loras.is_some() {
            for &ix in &self.running {
                if let Some(lora) = self.slab[ix].new.lora
                    && !self.loras.contains(&lora)
                {
                    self.loras.push(lora);
                }
            }
        }
    }

    fn examine(&mut self, ix: SeqIx, batch: &mut Batch, budget: &mut u32, threshold: u32) -> Admission {
        if !self.is_ready(ix) {
            return self.skip(ix);
        }
        let mut hits = std::mem::take(&mut self.hits);
        hits.clear();
        let seq = &self.slab[ix];
        let fresh = seq.computed == 0;
        let mut computed = seq.computed;
        let mut remote = 0;
        if fresh {
            self.kv.lookup(seq, &mut hits);
            let local = hits.len() as u32 * self.params.block_size;
            // No connector offers more than is missing.
            remote = seq.new.remote_tokens.unwrap_or(0).min(seq.num_tokens() - local);
            computed = local + remote;
        }
        let admission = self.try_admit(ix, &hits, computed, remote > 0, batch, budget, threshold);
        let counted = self.kv.caching() && !self.slab[ix].new.params.skip_reading_prefix_cache;
        if fresh && counted && !matches!(admission, Admission::Blocked) {
            self.count_lookup(ix, hits.len() as u32);
        }
        self.hits = hits;
        admission
    }

    #[allow(clippy::too_many_arguments, reason = "the state of one pass over the queue; a struct would only rename it")]
    fn try_admit(
        &mut self,
        ix: SeqIx,
        hits: &[u32],
        computed: u32,
        load: bool,
        batch: &mut Batch,
        budget: &mut u32,
        threshold: u32,
    ) -> Admission {
        let k = if load { 0 } else { self.slab[ix].num_tokens().saturating_sub(computed) };
        let k = if threshold > 0 { k.min(threshold) } else { k };
        if !self.params.chunked_prefill && k > *budget {
            return Admission::Blocked;
        }
        let k = k.min(*budget);
        let demand = Demand {
            full_sequence: self.params.reserve_full_isl,
            watermark: if self.running.is_empty() { 0 } else { self.params.watermark_blocks },
            reserved: if load { self.reserved() } else { 0 },
            delay_registration: load,
        };
        let seq = &mut self.slab[ix];
        let owned = seq.blocks.len() as u32;
        if !self.kv.allocate(seq, computed, k, hits, demand) {
            return Admission::Blocked;
        }
        seq.computed = computed;
        if load {
            seq.status = Status::Loading { arrived: false };
            seq.reserving = true;
            return self.skip(ix);
        }
        self.admit(ix, k, owned, hits.len() as u32, batch);
        *budget -= k;
        Admission::Admitted
    }

    fn admit(&mut self, ix: SeqIx, k: u32, owned: u32, hits: u32, batch: &mut Batch) {
        self.undefer(ix);
        let seq = &mut self.slab[ix];
        seq.status = Status::Running;
        seq.reserving = seq.computed + k < seq.num_tokens();
        let origin = if seq.preemptions > 0 { Origin::Resumed } else { Origin::New };
        if let Some(lora) = seq.new.lora
            && !self.loras.contains(&lora)
        {
            self.loras.push(lora);
        }
        batch.shape.admitted += 1;
        batch.shape.admitted_tokens += u64::from(seq.num_tokens());
        self.running.push(ix);
        self.membership += 1;
        self.record(batch, ix, k, origin, owned, hits);
    }

    /// Whether nothing but capacity keeps the request from running. Completes a remote load that has arrived.
    fn is_ready(&mut self, ix: SeqIx) -> bool {
        let seq = &mut self.slab[ix];
        match seq.status {
            Status::Loading { arrived: false } => return false,
            Status::Loading { arrived: true } => {
                let (computed, all) = (seq.computed, seq.num_tokens());
                self.kv.register(seq, computed.min(all));
                if computed == all {
                    // One token is left to compute, or there would be nothing to sample from.
                    seq.computed -= 1;
                }
                seq.status = if seq.preemptions > 0 { Status::Preempted } else { Status::Waiting };
            }
            Status::Waiting | Status::Running | Status::Preempted | Status::Finished => {}
        }
        if seq.stale > 0 && !self.params.drop_stale_outputs && !seq.drop_stale {
            return false;
        }
        match (self.params.max_loras, seq.new.lora) {
            (Some(max), Some(lora)) => self.loras.len() < max as usize || self.loras.contains(&lora),
            (None, _) | (_, None) => true,
        }
    }

    fn skip(&mut self, ix: SeqIx) -> Admission {
        let seq = &mut self.slab[ix];
        if !std::mem::replace(&mut seq.deferred, true) {
            self.deferred += 1;
        }
        Admission::Skipped
    }

    /// Blocks that prefills under way still need: a remote load may not take them.
    fn reserved(&self) -> u32 {
        let queued = self.holding.iter().chain(self.waiting.iter());
        let all = self.running.iter().chain(&self.skipped).copied().chain(queued);
        all.map(|ix| &self.slab[ix]).filter(|s| s.reserving).map(|s| self.kv.missing_blocks(s)).sum()
    }

    fn count_lookup(&mut self, ix: SeqIx, hit_blocks: u32) {
        let seq = &self.slab[ix];
        let (queries, hits) = (u64::from(seq.num_tokens()), u64::from(hit_blocks * self.params.block_size));
        if seq.preemptions > 0 {
            self.prefix.preempted_queries += queries;
            self.prefix.preempted_hits += hits;
        } else {
            self.prefix.queries += queries;
            self.prefix.hits += hits;
        }
    }

    #[inline]
    fn record(
        &mut self,
        batch: &mut Batch,
        ix: SeqIx,
        tokens: u32,
        origin: Origin,
        owned_blocks: u32,
        hit_blocks: u32,
    ) {
        let seq = &self.slab[ix];
        batch.entries.push(Entry {
            ix,
            generation: seq.generation,
            tag: seq.new.tag,
            tokens,
            computed: seq.computed,
            origin,
            decode: seq.decoding,
            samples: false,
            owned_blocks,
            new_blocks: seq.blocks.len() as u32 - owned_blocks,
            hit_blocks,
        });
    }

    /// Counts what was scheduled as computed, and sums up the batch.
    fn count_as_computed(&mut self, batch: &mut Batch) {
        if !batch.entries.is_empty() {
            self.sched_seq += 1;
        }
        let shape = &mut batch.shape;
        for entry in &mut batch.entries {
            let seq = &mut self.slab[entry.ix];
            let (k, past) = (entry.tokens, entry.computed);
            seq.computed += k;
            seq.in_flight += k;
            seq.last_step = self.sched_seq;
            seq.is_prefill_chunk = seq.computed < seq.num_tokens() + seq.placeholders;
            entry.samples = !seq.is_prefill_chunk;
            if entry.samples {
                seq.decoding = true;
                seq.reserving = false;
                seq.placeholders += u32::from(self.params.async_scheduling);
            }
            batch.max_seq_len = batch.max_seq_len.max(seq.computed);
            if entry.decode {
                shape.decode_seqs += 1;
                shape.decode_context += u64::from(past + k);
            } else {
                shape.prefill_seqs += 1;
                shape.prefill_tokens += k;
                shape.prefill_past += u64::from(past);
                shape.prefill_pairs_x2 += u64::from(k) * (2 * u64::from(past) + u64::from(k));
            }
        }
        let all_decode =
            !batch.entries.is_empty() && shape.is_decode_only() && batch.entries.len() == self.running.len();
        batch.composition = all_decode.then_some(self.membership);
    }
}
