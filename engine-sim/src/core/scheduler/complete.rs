//! `update_from_output()`: what the sampled tokens of the oldest batch change.

use shared::tokens::TokenId;

use super::{Batch, Scheduler, TokenOut};
use crate::core::sequence::{FinishReason, SeqIx, Status};

impl Scheduler {
    /// Completes the oldest batch in flight.
    ///
    /// `sample(ix, i)` gives output token `i` (from 0) of a request. Returns the batch and its outputs in batch order; the
    /// request of an output with a finish reason is gone. `None` when no batch is in flight.
    pub fn complete(&mut self, mut sample: impl FnMut(SeqIx, u32) -> TokenId) -> Option<(&Batch, &[TokenOut])> {
        let batch = self.in_flight.pop_front()?;
        self.outputs.clear();
        if !batch.entries.is_empty() {
            self.processed_seq += 1;
            self.drain_pending_frees();
        }
        let mut ended = false;
        for at in 0..batch.entries.len() {
            let entry = &batch.entries[at];
            if !self.slab.alive(entry.ix, entry.generation) {
                continue;
            }
            let stale = self.slab[entry.ix].stale > 0;
            let Some((token, finish)) = self.take_output(entry.ix, entry.tokens, entry.samples, &mut sample) else {
                continue;
            };
            self.outputs.push(TokenOut { ix: entry.ix, tag: entry.tag, token, finish, stale });
            if finish.is_some() {
                ended = true;
                self.finish(entry.ix);
            }
        }
        if ended {
            let slab = &self.slab;
            self.running.retain(|&ix| slab[ix].status == Status::Running);
            self.membership += 1;
        }
        self.spare.push(batch);
        Some((self.spare.last()?, &self.outputs))
    }

    /// Appends the sampled token of one request; `None` if there is none or it is discarded.
    #[inline]
    fn take_output(
        &mut self,
        ix: SeqIx,
        scheduled: u32,
        samples: bool,
        sample: &mut impl FnMut(SeqIx, u32) -> TokenId,
    ) -> Option<(TokenId, Option<FinishReason>)> {
        let seq = &mut self.slab[ix];
        seq.in_flight -= scheduled;
        let stale = seq.stale > 0;
        if stale {
            seq.stale = seq.stale.saturating_sub(scheduled);
            if self.params.drop_stale_outputs || seq.drop_stale {
                return None;
            }
        }
        if !samples {
            return None;
        }
        let token = sample(ix, seq.outputs);
        seq.push_output(token, self.params.block_size, self.params.prefix_caching);
        if !stale && seq.placeholders > 0 {
            seq.placeholders -= 1;
            if seq.status == Status::Running {
                // Blocks filled by output are registered when the token comes back; at schedule time it was not known.
                let known = seq.computed - seq.in_flight;
                self.kv.register(seq, known);
            }
        }
        Some((token, seq.stop_reason(token, self.params.max_model_len)))
    }

    fn finish(&mut self, ix: SeqIx) {
        match self.slab[ix].status {
            // Taken out of `running` once per batch.
            Status::Running | Status::Finished => {}
            Status::Waiting | Status::Preempted | Status::Loading { .. } => self.unqueue(ix),
        }
        self.end(ix);
    }

    fn drain_pending_frees(&mut self) {
        while let Some((step, _)) = self.pending_frees.front()
            && *step <= self.processed_seq
            && let Some((_, blocks)) = self.pending_frees.pop_front()
        {
            self.kv.release_blocks(&blocks);
        }
    }
}
