//! Pauses and what goes with them: holding requests back, clearing the prefix cache (`PauseState`, `reset_prefix_cache` of
//! vLLM's `scheduler.py`).

use super::{Batch, Scheduler};
use crate::core::sequence::SeqIx;

/// Which requests a step may take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PauseState {
    /// All.
    #[default]
    Unpaused,
    /// Those that run or own blocks: no new ones.
    New,
    /// None.
    All,
}

impl Scheduler {
    /// What may be scheduled.
    pub const fn pause_state(&self) -> PauseState {
        self.pause
    }

    /// Sets what may be scheduled from the next step on.
    pub const fn set_pause_state(&mut self, state: PauseState) {
        self.pause = state;
    }

    /// The head of the queue of requests without blocks, unless new ones are held back.
    pub(super) fn next_waiting(&self) -> Option<SeqIx> {
        match self.pause {
            PauseState::Unpaused => self.waiting.head(),
            PauseState::New | PauseState::All => None,
        }
    }

    pub(super) fn has_unpaused(&self) -> bool {
        match self.pause {
            PauseState::Unpaused => self.slab.len() > 0,
            PauseState::New => !self.running.is_empty() || self.holding.len() > 0,
            PauseState::All => false,
        }
    }

    /// Takes the blocks of all running requests: they compute everything again when they are resumed, and their tokens in flight
    /// are discarded. Returns them.
    pub fn preempt_running(&mut self) -> Vec<SeqIx> {
        let mut unseen = Batch::default();
        while let Some(ix) = self.running.pop() {
            self.preempt(ix, &mut unseen);
            self.slab[ix].drop_stale = true;
        }
        unseen.preempted.into_iter().map(|(ix, _)| ix).collect()
    }

    /// Adapters that requests run with or wait for, each once, by number.
    pub fn open_loras(&self) -> Vec<u32> {
        let mut loras: Vec<u32> = self.slab.iter().filter_map(|s| s.new.lora).collect();
        loras.sort_unstable();
        loras.dedup();
        loras
    }
}
