//! Blocks that come from other engines, and blocks that are kept for them.
//!
//! Loading semantics of `_update_waiting_for_remote_kv` and `_handle_invalid_blocks` in vLLM's scheduler. Knows no engine by name.

use super::{Batch, Scheduler, holds_blocks};
use crate::core::block_pool::BlockIx;
use crate::core::kv_transfer::{FetchStages, LoadId};
use crate::core::sequence::{FinishReason, Remote, SeqIx, Sequence, Status};

/// Blocks of an ended request that another engine will read; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PinId(pub u64);

/// A load that starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadStart {
    /// The request.
    pub ix: SeqIx,
    /// The caller's name for it.
    pub tag: u64,
    /// The load.
    pub load: LoadId,
    /// Blocks to load into: the last ones of the request.
    pub blocks: u32,
    /// Tokens found here, which are not loaded.
    pub local_tokens: u32,
    /// Tokens to load.
    pub tokens: u32,
}

/// Where a load leads.
#[derive(Clone, Debug)]
pub(super) enum Destination {
    Request(SeqIx),
    /// The request was aborted: its blocks stay until nobody writes into them any more.
    Nobody(Vec<BlockIx>),
}

/// Blocks kept at the end of a request.
#[derive(Clone, Debug)]
pub(super) struct Pinned {
    blocks: Vec<BlockIx>,
    tokens: u32,
    /// The last step that wrote into them.
    last_step: u64,
}

/// Tokens beyond `local` that another engine holds for `seq`.
pub(super) fn remote_tokens(seq: &Sequence, local: u32) -> u32 {
    match seq.new.remote {
        Remote::None | Remote::Keep => 0,
        // No connector offers more than is missing.
        Remote::Beyond(tokens) => tokens.min(seq.num_tokens() - local),
        Remote::Prompt(tokens) => tokens.min(seq.new.prompt_tokens).saturating_sub(local),
    }
}

impl Scheduler {
    /// Notes in `batch` what a successful lookup means for the remote blocks: a load, or that all are here.
    pub(super) fn use_remote(&mut self, ix: SeqIx, hit_blocks: u32, tokens: u32, batch: &mut Batch) {
        let seq = &mut self.slab[ix];
        if let Remote::Prompt(_) = seq.new.remote {
            seq.new.remote = Remote::None;
            if tokens == 0 {
                batch.covered.push((ix, seq.new.tag));
            }
        }
        if tokens == 0 {
            return;
        }
        self.next_load += 1;
        seq.load = LoadId(self.next_load);
        seq.local_tokens = hit_blocks * self.params.block_size;
        self.loads.insert(seq.load, Destination::Request(ix));
        batch.loads.push(LoadStart {
            ix,
            tag: seq.new.tag,
            load: seq.load,
            blocks: seq.blocks.len() as u32 - hit_blocks,
            local_tokens: seq.local_tokens,
            tokens,
        });
    }

    /// Takes care that no load of `before`, which this scheduler comes after, is taken for one of its own.
    pub(crate) fn never_reuse_loads_of(&mut self, before: &Scheduler) {
        self.next_load = before.next_load;
    }

    /// Leaves the blocks of an aborted request to its load.
    pub(super) fn orphan(&mut self, ix: SeqIx) {
        let seq = &mut self.slab[ix];
        let blocks = std::mem::take(&mut seq.blocks);
        self.loads.insert(seq.load, Destination::Nobody(blocks));
    }

    /// Reports that a load is complete: the request that waits for it may be admitted by the next step that looks at it.
    pub fn load_arrived(&mut self, load: LoadId) {
        match self.loads.remove(&load) {
            Some(Destination::Nobody(blocks)) => self.kv.release_blocks(&blocks),
            Some(Destination::Request(ix)) => self.slab[ix].status = Status::Loading { arrived: true },
            None => {}
        }
    }

    /// Reports that a load failed after its first `arrived` blocks: those and what was found here stay, the rest of the prompt is
    /// computed. Returns the request, unless it was aborted.
    pub fn load_failed(&mut self, load: LoadId, arrived: u32) -> Option<SeqIx> {
        let ix = match self.loads.remove(&load)? {
            Destination::Nobody(blocks) => {
                self.kv.release_blocks(&blocks);
                return None;
            }
            Destination::Request(ix) => ix,
        };
        self.holding.remove(&self.slab, ix);
        let seq = &mut self.slab[ix];
        seq.status = if seq.preemptions > 0 { Status::Preempted } else { Status::Waiting };
        seq.computed = (seq.local_tokens + arrived * self.params.block_size).min(seq.num_tokens() - 1);
        seq.reserving = seq.computed > 0;
        if seq.computed == 0 {
            self.kv.release(seq);
        } else {
            self.kv.register(seq, seq.computed);
        }
        let queue = if holds_blocks(&self.slab[ix]) { &mut self.holding } else { &mut self.waiting };
        queue.push_front(&self.slab, ix);
        Some(ix)
    }

    /// Keeps the blocks of a request that ends for `reason`, if it is one whose blocks are wanted and whole.
    pub(super) fn pin(&mut self, ix: SeqIx, reason: FinishReason) -> Option<PinId> {
        let seq = &mut self.slab[ix];
        let whole = matches!(reason, FinishReason::Stop | FinishReason::Length);
        if seq.new.remote != Remote::Keep || !whole || seq.blocks.is_empty() {
            return None;
        }
        self.next_pin += 1;
        let (blocks, tokens) = (std::mem::take(&mut seq.blocks), seq.computed);
        self.pins.insert(PinId(self.next_pin), Pinned { blocks, tokens, last_step: seq.last_step });
        Some(PinId(self.next_pin))
    }

    /// The blocks of a pin and how many tokens were computed into them.
    pub fn pinned(&self, pin: PinId) -> Option<(&[BlockIx], u32)> {
        self.pins.get(&pin).map(|p| (p.blocks.as_slice(), p.tokens))
    }

    /// Frees the blocks of a pin; nothing happens if they are free already.
    pub fn unpin(&mut self, pin: PinId) {
        let Some(Pinned { blocks, last_step, .. }) = self.pins.remove(&pin) else { return };
        if !self.params.defer_frees || last_step <= self.processed_seq {
            self.kv.release_blocks(&blocks);
        } else {
            self.pending_frees.push_back((self.sched_seq, blocks));
        }
    }

    /// Blocks that are held without belonging to a request: kept for others, or still written into.
    pub fn blocks_without_request(&self) -> usize {
        let orphans = self.loads.values().map(|to| match to {
            Destination::Request(_) => 0,
            Destination::Nobody(blocks) => blocks.len(),
        });
        let pending = self.pending_frees.iter().map(|(_, blocks)| blocks.len());
        self.pins.values().map(|p| p.blocks.len()).chain(orphans).chain(pending).sum()
    }

    /// How far requests with remote blocks are.
    pub fn fetch_stages(&self) -> FetchStages {
        let mut stages = FetchStages::default();
        for seq in self.slab.iter() {
            match seq.status {
                Status::Loading { arrived: false } => stages.in_progress += 1,
                Status::Loading { arrived: true } => stages.completed_waiting += 1,
                Status::Waiting | Status::Preempted if seq.computed > 0 => stages.completed_waiting += 1,
                Status::Waiting | Status::Preempted if matches!(seq.new.remote, Remote::Prompt(_)) => {
                    stages.waiting_to_start += 1;
                }
                Status::Waiting | Status::Preempted | Status::Running | Status::Finished => {}
            }
        }
        stages
    }
}
