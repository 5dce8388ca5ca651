//! What an operator does to an engine: pause and resume, sleep and wake, clear the prefix cache, abort.
//!
//! Semantics of vLLM's `engine/core.py` (`pause_scheduler`, `sleep`, `wake_up`). A pause holds requests back or ends them; it is complete when
//! nothing is in flight, and only then caches are cleared and the engine sleeps.

use shared::time::Time;

use super::{Engine, Plan, RequestKey, notes};
use crate::core::scheduler::PauseState;
use crate::core::sequence::FinishReason;

/// What happens to open requests in a pause (`PauseMode` of vLLM).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PauseMode {
    /// They end at once, with the reason `abort`.
    Abort,
    /// They run to their end, new ones wait.
    Wait,
    /// They stay as they are.
    Keep,
}

/// An order to an engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Control {
    /// Pause. Except in mode `keep` new requests are refused until the engine is resumed.
    Pause {
        /// What happens to open requests.
        mode: PauseMode,
        /// Whether the prefix cache is forgotten.
        clear_cache: bool,
    },
    /// End a pause.
    Resume,
    /// Pause without refusing anything, then give memory up.
    Sleep {
        /// 0 keeps all memory, 1 keeps the weights on the host, 2 keeps nothing.
        level: u8,
        /// What happens to open requests.
        mode: PauseMode,
    },
    /// Take memory back; when all of it is there the engine is resumed.
    WakeUp {
        /// The weights.
        weights: bool,
        /// The KV cache.
        kv_cache: bool,
    },
    /// Forget the prefix cache.
    ResetPrefixCache {
        /// Whether running requests give up their blocks for it.
        running: bool,
    },
    /// End these requests with the reason `abort`.
    Abort(Vec<RequestKey>),
    /// End all requests with the reason `abort`.
    AbortAll,
}

/// Which memory of a sleeping engine is given up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Asleep {
    /// Level it was put to sleep with.
    pub level: u8,
    /// The weights.
    pub weights: bool,
    /// The KV cache.
    pub kv_cache: bool,
}

impl Asleep {
    /// Whether any memory is given up.
    pub const fn any(self) -> bool {
        self.weights || self.kv_cache
    }
}

/// Orders under way and their effects.
#[derive(Clone, Debug, Default)]
pub(super) struct Controlled {
    pub(super) refuse_new: bool,
    asleep: Asleep,
    pending: Option<Pending>,
}

/// What is left to do when nothing is in flight any more.
#[derive(Clone, Copy, Debug)]
struct Pending {
    clear_cache: bool,
    sleep: u8,
}

impl Engine {
    /// Carries out an order at `now`, after everything that was due before. Returns whether it succeeded; a pause and a sleep succeed
    /// and are complete once [`Engine::is_pausing`] is false.
    pub fn control(&mut self, now: Time, order: Control) -> bool {
        let now = now.max(self.core_time);
        self.core_time = now;
        self.take_inputs(now);
        // What nothing could be done about may be possible now.
        self.quiet = false;
        let done = match order {
            Control::Pause { mode, clear_cache } => {
                self.controlled.refuse_new = mode != PauseMode::Keep;
                self.pause(now, mode, Pending { clear_cache, sleep: 0 });
                true
            }
            Control::Sleep { level, mode } => {
                self.pause(now, mode, Pending { clear_cache: level > 0, sleep: level });
                true
            }
            Control::Resume => {
                self.resume();
                true
            }
            Control::WakeUp { weights, kv_cache } => self.wake_up(weights, kv_cache),
            Control::ResetPrefixCache { running } => self.forget_cache(running),
            Control::Abort(keys) => {
                keys.into_iter().for_each(|key| self.abort(now, key));
                true
            }
            Control::AbortAll => {
                self.abort_all(now);
                true
            }
        };
        self.settle_pause();
        if self.plan == Plan::Idle && self.scheduler.has_work() {
            self.plan = Plan::Turn(now);
        }
        done
    }

    /// Whether requests are held back.
    pub fn is_paused(&self) -> bool {
        self.scheduler.pause_state() != PauseState::Unpaused
    }

    /// Whether a pause was ordered and something is still in flight.
    pub const fn is_pausing(&self) -> bool {
        self.controlled.pending.is_some()
    }

    /// Which memory is given up.
    pub const fn asleep(&self) -> Asleep {
        self.controlled.asleep
    }

    /// Adapters that requests run with or wait for, each once, by number.
    pub fn open_loras(&self) -> Vec<u32> {
        self.scheduler.open_loras()
    }

    /// Completes a pause if nothing is in flight any more. Called whenever that may have changed.
    pub(super) fn settle_pause(&mut self) {
        if let Some(pending) = self.controlled.pending
            && self.in_flight.is_empty()
            && !self.scheduler.has_work()
        {
            self.controlled.pending = None;
            if pending.clear_cache {
                self.forget_cache(true);
            }
            if pending.sleep > 0 {
                self.controlled.asleep = Asleep { level: pending.sleep, weights: true, kv_cache: true };
            }
        }
    }

    /// Forgets the prefix cache; false if blocks are held. With `preempt` running requests give theirs up.
    fn forget_cache(&mut self, preempt: bool) -> bool {
        let preempted = if preempt { self.scheduler.preempt_running() } else { Vec::new() };
        for ix in preempted {
            if let Some(open) = &mut self.open[ix.0 as usize] {
                open.stats.preemptions += 1;
                notes::preempted(open, 0, self.core_time);
            }
        }
        self.scheduler.reset_prefix_cache()
    }

    fn pause(&mut self, now: Time, mode: PauseMode, then: Pending) {
        if mode == PauseMode::Abort {
            let aborted = self.abort_all(now);
            (0..aborted).for_each(|_| self.metrics.count_end(FinishReason::Abort));
        }
        let state = if mode == PauseMode::Keep { PauseState::All } else { PauseState::New };
        self.scheduler.set_pause_state(state);
        self.controlled.pending = Some(then);
    }

    fn resume(&mut self) {
        self.controlled.refuse_new = false;
        self.controlled.pending = None;
        self.scheduler.set_pause_state(PauseState::Unpaused);
    }

    /// Returns whether all memory is there.
    fn wake_up(&mut self, weights: bool, kv_cache: bool) -> bool {
        let asleep = &mut self.controlled.asleep;
        asleep.weights &= !weights;
        asleep.kv_cache &= !kv_cache;
        let awake = !asleep.any();
        if awake {
            asleep.level = 0;
            self.resume();
        }
        awake
    }

    /// Returns how many there were.
    fn abort_all(&mut self, now: Time) -> usize {
        let mut keys: Vec<RequestKey> = self.by_key.keys().copied().collect();
        keys.sort_unstable();
        keys.iter().for_each(|key| self.abort(now, *key));
        keys.len()
    }
}
