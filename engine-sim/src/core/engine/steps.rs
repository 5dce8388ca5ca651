//! Notes facts about steps that are recorded for themselves. Where none is, a step costs one branch here and one at its end.

use std::collections::VecDeque;
use std::sync::Arc;

use shared::time::Time;
use shared::trace::{LinkTo, OwnTraces, Trail};

use super::notes::{FINE, short};
use super::{Open, Step};
use crate::core::facts::ModelFact;
use crate::core::latency::ScheduleCost;
use crate::core::scheduler::{Batch, Entry};
use crate::core::step_facts::{BatchFact, BatchOutputs, BatchRun, MAX_LINKS, PassBlocks, PassFact};

/// Records of steps in flight.
#[derive(Clone, Debug, Default)]
pub(super) struct Steps {
    pub(super) traces: Option<Arc<OwnTraces>>,
    /// By number; at most as many as there may be batches in flight.
    open: VecDeque<(u64, Trail<BatchFact>)>,
}

impl Steps {
    /// A step was scheduled at `start`. One with nothing to compute is never recorded.
    #[inline]
    pub(super) fn scheduled(
        &mut self,
        batch: &Batch,
        open: &[Option<Open>],
        model: &Arc<ModelFact>,
        start: Time,
        cost: ScheduleCost,
    ) {
        if let Some(traces) = &self.traces
            && !batch.entries.is_empty()
        {
            let trail = traces.start::<BatchFact>(start);
            if trail.is_on() {
                pass(&trail, batch, start, cost);
                links(&trail, batch, open, start);
                if trail.detail() >= FINE {
                    trail.note(start, || BatchFact::Model(Arc::clone(model)));
                }
                self.open.push_back((batch.step, trail));
            }
        }
    }

    /// The outputs of step `number` were handled.
    #[inline]
    pub(super) fn completed(&mut self, number: u64, step: &Step) {
        if let Some((_, trail)) = self.open.pop_front_if(|(open, _)| *open == number) {
            executed(&trail, step);
            trail.finish(step.handed);
        }
    }
}

fn pass(trail: &Trail<BatchFact>, batch: &Batch, start: Time, cost: ScheduleCost) {
    let shape = &batch.shape;
    trail.note(start, || {
        BatchFact::Scheduled(PassFact {
            iteration: batch.step,
            admitted_ns: short(cost.admit),
            allocated_ns: short(cost.admit + cost.allocate),
            length_ns: short(cost.total()),
            prefill_seqs: shape.prefill_seqs,
            decode_seqs: shape.decode_seqs,
            prefill_tokens: shape.prefill_tokens,
            max_seq_len: batch.max_seq_len,
        })
    });
    trail.note(start, || {
        let sum = |of: fn(&Entry) -> u32| batch.entries.iter().map(of).sum();
        BatchFact::Blocks(PassBlocks {
            waiting: batch.waiting_before,
            admitted: shape.admitted,
            preempted: batch.preempted.len() as u32,
            available: batch.free_before,
            allocated: sum(|e| e.new_blocks),
            hit: sum(|e| e.hit_blocks),
            freed: batch.freed,
            evicted: batch.evicted,
        })
    });
}

fn links(trail: &Trail<BatchFact>, batch: &Batch, open: &[Option<Open>], start: Time) {
    let recorded = |entry: &Entry| {
        let request = open[entry.ix.0 as usize].as_ref().filter(|r| r.trail.is_recording())?;
        // What may be dropped yet is nothing to point to.
        let request = Some(request).filter(|r| !r.trail.is_candidate())?;
        request.trail.ids().map(|(trace_id, span_id)| LinkTo { trace_id, span_id })
    };
    let mut all = batch.entries.iter().filter_map(recorded);
    for link in all.by_ref().take(MAX_LINKS) {
        trail.note(start, || BatchFact::Linked(link));
    }
    let dropped = all.count() as u32;
    if dropped > 0 {
        trail.note(start, || BatchFact::LinksDropped(dropped));
    }
}

fn executed(trail: &Trail<BatchFact>, step: &Step) {
    trail.note(step.launch, || {
        BatchFact::Executed(BatchRun {
            ready: step.ready,
            prepare_ns: short(step.prepare),
            sample_ns: short(step.sample),
            forward_ns: step.forward.as_nanos(),
            sampled: step.processed,
        })
    });
    trail.note(step.ready, || {
        BatchFact::Processed(BatchOutputs { handed: step.handed, processed: step.processed, finished: step.finished })
    });
}
