//! Notes facts about recorded requests. An unrecorded request costs one branch.

use std::sync::Arc;

use shared::time::{Dur, Time};
use shared::trace::Trail;

use super::{Open, Step};
use crate::core::facts::{
    AdmitFact, AllocateFact, DecodeRun, EngineFact, ExecuteFact, FineFact, FinishFact, ModelFact, QueueReason,
    StepFact, TokenTimes,
};
use crate::core::latency::ScheduleCost;
use crate::core::scheduler::{Batch, Entry, Origin, Scheduler, TokenOut};
use crate::core::sequence::{FinishReason, SeqIx};

/// The detail level that shows the parts of an execution.
pub(super) const FINE: u8 = 3;

/// A request entered the waiting queue for the first time.
pub(super) fn queued(scheduler: &Scheduler, ix: SeqIx, trail: &Trail<EngineFact>, model: &Arc<ModelFact>, now: Time) {
    if trail.detail() >= FINE {
        trail.note(now, || EngineFact::Model(Arc::clone(model)));
    }
    trail.note(now, || {
        let (capacity, deferred) = scheduler.num_waiting();
        EngineFact::Queued {
            reason: if scheduler.lora_blocked(ix) { QueueReason::Lora } else { QueueReason::Capacity },
            // The request itself is in the queue already.
            position: (capacity + deferred).saturating_sub(1),
            running: scheduler.running().len() as u32,
        }
    });
}

/// A scheduling pass: chunks, admissions and preemptions.
pub(super) fn scheduled(batch: &Batch, open: &[Option<Open>], start: Time, cost: ScheduleCost) {
    if !batch.shape.is_decode_only() {
        for entry in batch.entries.iter().filter(|e| !e.decode) {
            if let Some(open) = &open[entry.ix.0 as usize]
                && open.trail.is_on()
            {
                chunk(batch, entry, &open.trail, start, cost);
            }
        }
    }
    for &(ix, _) in &batch.preempted {
        if let Some(open) = &open[ix.0 as usize] {
            preempted(open, batch.entries.len() as u32, start);
        }
    }
}

/// A request gave its blocks up and waits again; `running` others run.
pub(super) fn preempted(open: &Open, running: u32, now: Time) {
    open.trail.note(now, || EngineFact::Preempted);
    open.trail.note(now, || EngineFact::Queued { reason: QueueReason::Preempted, position: 0, running });
}

fn chunk(batch: &Batch, entry: &Entry, trail: &Trail<EngineFact>, start: Time, cost: ScheduleCost) {
    let shape = &batch.shape;
    trail.note(start, || {
        EngineFact::Scheduled(StepFact {
            iteration: batch.step,
            length_ns: short(cost.total()),
            prefill_seqs: shape.prefill_seqs,
            decode_seqs: shape.decode_seqs,
            prefill_tokens: shape.prefill_tokens,
            max_seq_len: batch.max_seq_len,
            tokens: entry.tokens,
            resumed: entry.origin == Origin::Resumed,
        })
    });
    if entry.origin != Origin::Running {
        trail.note(start, || {
            EngineFact::Admitted(AdmitFact {
                end_ns: short(cost.admit),
                waiting: batch.waiting_before,
                admitted: shape.admitted,
                preempted: batch.preempted.len() as u32,
                needed: entry.new_blocks - entry.hit_blocks,
                available: batch.free_before,
            })
        });
    }
    trail.note(start, || {
        EngineFact::Allocated(AllocateFact {
            start_ns: short(cost.admit),
            end_ns: short(cost.admit + cost.allocate),
            available: batch.free_before,
            allocated: entry.new_blocks,
            freed: batch.freed,
            evicted: batch.evicted,
            hit: entry.hit_blocks,
        })
    });
}

/// A step of the request was executed.
#[inline]
pub(super) fn executed(open: &Open, entry: &Entry, output: Option<&TokenOut>, step: &Step) {
    if !open.trail.is_on() {
        return;
    }
    if entry.decode {
        if let Some(output) = output {
            decoded(open, step, output.stale);
        }
        return;
    }
    open.trail.note(step.launch, || {
        EngineFact::Prefilled(ExecuteFact {
            ready: step.ready,
            hand_over_ns: if output.is_some() { short(step.handed - step.ready) } else { 0 },
            forward_ns: step.forward.as_nanos(),
            batch: step.batch,
            processed: step.processed,
            finished: step.finished,
            new_tokens: u32::from(output.is_some()),
        })
    });
    if open.trail.detail() >= FINE {
        open.trail.note(step.launch, || EngineFact::Fine(fine(step)));
    }
}

fn fine(step: &Step) -> FineFact {
    FineFact {
        launch: step.launch,
        prepare_ns: short(step.prepare),
        forward_ns: step.forward.as_nanos(),
        sample_ns: short(step.sample),
        update_ns: short(step.update),
    }
}

/// Extends the run of decode steps under way, or starts one. A stale token still belongs to the run before the preemption.
fn decoded(open: &Open, step: &Step, stale: bool) {
    let since = open.stats.last_token.map_or(Dur::ZERO, |last| step.ready - last);
    let count = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
    let mut interrupted = false;
    let extend = |fact: &mut EngineFact| match fact {
        EngineFact::DecodeTimes(times) if !interrupted => {
            times.add(since);
            None
        }
        EngineFact::Decoded(run) if !interrupted => {
            run.ready = step.ready;
            run.hand_over_ns = short(step.handed - step.ready);
            run.batch_sum += u64::from(step.batch);
            run.batch_max = run.batch_max.max(count(step.batch));
            run.forward_ns += step.forward.as_nanos();
            run.count += 1;
            run.processed = count(step.processed);
            run.finished = count(step.finished);
            Some(())
        }
        EngineFact::Preempted | EngineFact::Prefilled(_) => {
            interrupted |= !stale;
            None
        }
        EngineFact::DecodeTimes(_)
        | EngineFact::Decoded(_)
        | EngineFact::Model(_)
        | EngineFact::Fine(_)
        | EngineFact::Decoding(_)
        | EngineFact::Received { .. }
        | EngineFact::Asked { .. }
        | EngineFact::Langfuse(_)
        | EngineFact::Adapter(_)
        | EngineFact::InputsProcessed { .. }
        | EngineFact::FirstWrite
        | EngineFact::LastWrite
        | EngineFact::Aborted
        | EngineFact::Failed { .. }
        | EngineFact::Queued { .. }
        | EngineFact::Scheduled(_)
        | EngineFact::Admitted(_)
        | EngineFact::Allocated(_)
        | EngineFact::PullStarted { .. }
        | EngineFact::PullEnded(_)
        | EngineFact::Fault(_)
        | EngineFact::Finished(_) => None,
    };
    let mut first = false;
    open.trail.amend(step.launch, extend, || {
        first = true;
        EngineFact::Decoded(DecodeRun {
            ready: step.ready,
            batch_sum: u64::from(step.batch),
            forward_ns: step.forward.as_nanos(),
            hand_over_ns: short(step.handed - step.ready),
            count: 1,
            batch_max: count(step.batch),
            processed: count(step.processed),
            finished: count(step.finished),
        })
    });
    if first {
        open.trail.note(step.launch, || EngineFact::DecodeTimes(TokenTimes::new(since)));
    }
    if open.trail.detail() >= FINE {
        last_step(open, step, first);
    }
}

/// The parts of a run's execution are those of its last step.
fn last_step(open: &Open, step: &Step, first: bool) {
    if first {
        return open.trail.note(step.launch, || EngineFact::Fine(fine(step)));
    }
    let replace = |fact: &mut EngineFact| {
        let EngineFact::Fine(last) = fact else { return None };
        *last = fine(step);
        Some(())
    };
    open.trail.amend(step.launch, replace, || EngineFact::Fine(fine(step)));
}

/// The request ended.
pub(super) fn finished(open: &Open, reason: FinishReason, at: Time) {
    let s = &open.stats;
    open.trail.note(at, || {
        EngineFact::Finished(FinishFact {
            admitted: s.first_scheduled.is_some(),
            queue: between(Some(s.queued), s.first_scheduled),
            prefill: between(s.first_scheduled, s.first_token),
            decode: between(s.first_token, s.last_token),
            output_tokens: s.output_tokens,
            cached_tokens: s.cached_tokens,
            preemptions: u16::try_from(s.preemptions).unwrap_or(u16::MAX),
            reason,
        })
    });
}

fn between(from: Option<Time>, to: Option<Time>) -> Dur {
    from.zip(to).map_or(Dur::ZERO, |(from, to)| to - from)
}

/// Nanoseconds in 32 bits: four seconds are more than any scheduling pass takes.
pub(super) fn short(d: Dur) -> u32 {
    u32::try_from(d.as_nanos()).unwrap_or(u32::MAX)
}
