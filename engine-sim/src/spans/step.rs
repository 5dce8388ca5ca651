//! Folds the facts of an engine's step into a trace of its own: what the batch did, with links to the requests in it.

use std::sync::Arc;

use shared::ids::SpanId;
use shared::time::{Dur, Time};
use shared::trace::{Cx, Draft, Ending, Fact, Fold, Form, Inner, Kind, Naming};

use super::pass::{Allocation, Composition};
use super::{fine, level, nanos};
use crate::core::facts::ModelFact;
use crate::core::step_facts::{BatchFact, BatchOutputs, BatchRun, PassBlocks, PassFact};

impl Fact for BatchFact {
    type Fold<S: Form> = StepFold<S::Draft>;

    fn stands_in(naming: Naming) -> bool {
        naming == Naming::Proposal
    }

    fn is_final(&self) -> bool {
        match self {
            BatchFact::Executed(_) | BatchFact::Processed(_) => true,
            BatchFact::Scheduled(_)
            | BatchFact::Blocks(_)
            | BatchFact::Linked(_)
            | BatchFact::LinksDropped(_)
            | BatchFact::Model(_) => false,
        }
    }
}

/// A step's spans under construction.
pub struct StepFold<D> {
    root: D,
    inner: Vec<D>,
    drawn: usize,
    pass: Option<PassFact>,
    model: Option<Arc<ModelFact>>,
}

impl<S: Form> Fold<BatchFact, S> for StepFold<S::Draft> {
    fn begin(cx: &mut Cx<'_, S>) -> Self {
        let root = cx.outermost("vllm.engine.step", Kind::Internal);
        StepFold { root, inner: Vec::with_capacity(9), drawn: 0, pass: None, model: None }
    }

    fn fact(&mut self, cx: &mut Cx<'_, S>, at: Time, fact: &BatchFact) {
        match fact {
            BatchFact::Scheduled(pass) => self.scheduled(pass),
            BatchFact::Blocks(blocks) => self.blocks(cx, at, blocks),
            BatchFact::Linked(to) => {
                self.root.link(to, &[]);
            }
            BatchFact::LinksDropped(n) => {
                self.root.set("vllm.batch.links_dropped", *n);
            }
            BatchFact::Model(model) => self.model = Some(model.clone()),
            BatchFact::Executed(run) => self.executed(cx, at, run),
            BatchFact::Processed(outputs) => self.processed(cx, at, outputs),
        }
    }

    fn end(mut self, cx: &mut Cx<'_, S>, ending: &Ending) {
        let last = self.inner.iter().map(Draft::end).max();
        self.root.set_end(ending.closed.max(last.unwrap_or_default()));
        if ending.abandoned {
            self.root.fail("abandoned", "the step was never finished");
        }
        cx.emit(self.root);
        self.inner.into_iter().for_each(|span| cx.emit(span));
    }
}

impl<D: Draft> StepFold<D> {
    fn span<S: Form<Draft = D>>(
        &mut self,
        cx: &mut Cx<'_, S>,
        name: &'static str,
        parent: SpanId,
        (start, end): (Time, Time),
        fill: impl FnOnce(&mut D),
    ) -> SpanId {
        let id = cx.head.inner_id(self.drawn);
        self.drawn += 1;
        if level(name) <= cx.head.detail {
            let mut span = cx.inner(Inner { name, kind: Kind::Internal, parent, id, start, end });
            fill(&mut span);
            self.inner.push(span);
        }
        id
    }

    fn scheduled(&mut self, pass: &PassFact) {
        self.root
            .set("vllm.scheduler.iteration", pass.iteration)
            .set("vllm.batch.phase", phase(pass))
            .set("vllm.batch.size", pass.prefill_seqs + pass.decode_seqs)
            .set("vllm.batch.total_tokens", pass.prefill_tokens + pass.decode_seqs);
        self.pass = Some(*pass);
    }

    fn blocks<S: Form<Draft = D>>(&mut self, cx: &mut Cx<'_, S>, at: Time, blocks: &PassBlocks) {
        let Some(pass) = self.pass else { return };
        let end = at + nanos(pass.length_ns);
        let total = pass.prefill_tokens + pass.decode_seqs;
        let parent = self.span(cx, "vllm.scheduler.schedule", self.root.id(), (at, end), |span| {
            span.set("vllm.scheduler.iteration", pass.iteration)
                .set("vllm.batch.phase", phase(&pass))
                .set("vllm.batch.prefill_requests", pass.prefill_seqs)
                .set("vllm.batch.decode_requests", pass.decode_seqs)
                .set("vllm.batch.total_tokens", total)
                .set("vllm.batch.max_seq_len", pass.max_seq_len)
                .set("vllm.kv_cache.blocks_available", blocks.available)
                .set("vllm.kv_cache.blocks_allocated", blocks.allocated)
                .set("vllm.kv_cache.blocks_freed", blocks.freed);
        });
        let (admitted, allocated) = (at + nanos(pass.admitted_ns), at + nanos(pass.allocated_ns));
        self.span(cx, "vllm.scheduler.admit_requests", parent, (at, admitted), |span| {
            span.set("vllm.requests.waiting", blocks.waiting)
                .set("vllm.requests.admitted", blocks.admitted)
                .set("vllm.requests.preempted", blocks.preempted)
                .set("vllm.blocks.needed", blocks.allocated - blocks.hit)
                .set("vllm.blocks.available", blocks.available);
        });
        self.span(cx, "vllm.scheduler.allocate_blocks", parent, (admitted, allocated), |span| {
            let (allocated, freed, evicted, hit) = (blocks.allocated, blocks.freed, blocks.evicted, blocks.hit);
            Allocation { allocated, freed, evicted, hit }.tell(span);
        });
        self.span(cx, "vllm.scheduler.create_batch", parent, (allocated, end), |span| {
            let (prefill_seqs, decode_seqs, prefill_tokens) =
                (pass.prefill_seqs, pass.decode_seqs, pass.prefill_tokens);
            Composition { prefill_seqs, decode_seqs, prefill_tokens }.tell(span);
        });
    }

    fn executed<S: Form<Draft = D>>(&mut self, cx: &mut Cx<'_, S>, at: Time, run: &BatchRun) {
        let Some(pass) = self.pass else { return };
        let size = pass.prefill_seqs + pass.decode_seqs;
        let forward = Dur::from_nanos(run.forward_ns);
        let parent = self.span(cx, "vllm.executor.execute_model", self.root.id(), (at, run.ready), |span| {
            span.set("vllm.executor.phase", phase(&pass))
                .set("vllm.executor.iterations", 1u32)
                .set("vllm.batch.size_mean", f64::from(size))
                .set("vllm.batch.size_max", size)
                .set("vllm.model.forward_duration_ms", forward.as_millis_f64());
        });
        self.parts(cx, parent, at, run);
    }

    /// The parts of the execution `parent`, of which the finest detail only shows anything.
    fn parts<S: Form<Draft = D>>(&mut self, cx: &mut Cx<'_, S>, parent: SpanId, at: Time, run: &BatchRun) {
        let prepared = at + nanos(run.prepare_ns);
        let forwarded = prepared + Dur::from_nanos(run.forward_ns);
        let sampled = forwarded + nanos(run.sample_ns);
        let model = self.model.take();
        self.span(cx, "vllm.worker.prepare_inputs", parent, (at, prepared), |span| {
            fine::prepare(span, model.as_deref());
        });
        self.span(cx, "vllm.model.forward", parent, (prepared, forwarded), |span| {
            fine::forward(span, model.as_deref());
        });
        self.span(cx, "vllm.sampler.sample", parent, (forwarded, sampled), |span| {
            span.set("vllm.sampling.tokens", run.sampled);
        });
    }

    fn processed<S: Form<Draft = D>>(&mut self, cx: &mut Cx<'_, S>, at: Time, outputs: &BatchOutputs) {
        let Some(pass) = self.pass else { return };
        self.span(cx, "vllm.output.process_batch", self.root.id(), (at, outputs.handed), |span| {
            span.set("vllm.output.phase", phase(&pass))
                .set("vllm.outputs.processed", outputs.processed)
                .set("vllm.outputs.finished", outputs.finished)
                .set("vllm.tokens.new", outputs.processed);
        });
    }
}

fn phase(pass: &PassFact) -> &'static str {
    match (pass.prefill_seqs, pass.decode_seqs) {
        (0, _) => "decode",
        (_, 0) => "prefill",
        (_, _) => "mixed",
    }
}

#[cfg(test)]
mod tests;
