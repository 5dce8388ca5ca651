//! Folds an engine's facts into spans: the one place where their names and attributes are set.
//!
//! Names, keys and units are those of `registry/vllm.yaml`. Facts come in the order in which they were noted, which is not quite
//! the order of their times: a step's execution is noted when its outputs are handled.

mod fine;
mod langfuse;
mod llm_d;
mod pass;
mod step;
mod transfer;

use shared::ids::SpanId;
use shared::time::{Dur, Time};
use shared::trace::{Cx, Draft, Ending, Fact, Fold, Form, Inner, Kind, Named, Val};

use self::pass::{Allocation, Composition};
use crate::core::facts::{
    AdmitFact, AllocateFact, DecodeRun, EngineFact, ExecuteFact, FinishFact, QueueReason, StepFact, TokenTimes,
};
use crate::core::sequence::FinishReason;

pub use llm_d::LlmdFold;
pub use transfer::{SendFold, transfer_span_id};

impl Fact for EngineFact {
    type Fold<S: Form> = Named<EngineFold<S::Draft>, LlmdFold<S::Draft>>;

    fn is_final(&self) -> bool {
        match self {
            EngineFact::FirstWrite
            | EngineFact::LastWrite
            | EngineFact::Aborted
            | EngineFact::Failed { .. }
            | EngineFact::Decoded(_)
            | EngineFact::DecodeTimes(_)
            | EngineFact::Fine(_)
            | EngineFact::Fault(_)
            | EngineFact::Finished(_) => true,
            EngineFact::Received { .. }
            | EngineFact::Asked { .. }
            | EngineFact::Langfuse(_)
            | EngineFact::Decoding(_)
            | EngineFact::Adapter(_)
            | EngineFact::InputsProcessed { .. }
            | EngineFact::Model(_)
            | EngineFact::Queued { .. }
            | EngineFact::Scheduled(_)
            | EngineFact::Admitted(_)
            | EngineFact::Allocated(_)
            | EngineFact::Prefilled(_)
            | EngineFact::PullStarted { .. }
            | EngineFact::PullEnded(_)
            | EngineFact::Preempted => false,
        }
    }

    fn is_amendable(&self) -> bool {
        matches!(self, EngineFact::Decoded(_) | EngineFact::DecodeTimes(_) | EngineFact::Fine(_))
    }

    fn settles(&self) -> bool {
        // A token that was on its way when its request was preempted still belongs to the run before.
        matches!(self, EngineFact::Prefilled(_) | EngineFact::Finished(_))
    }
}

/// How a request ended for its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    /// Not yet known, or simply at the end of the record.
    Open,
    Written(Time),
    Aborted(Time),
}

/// Spans under construction. `D` is a span in the form that the recorder asks for.
pub struct EngineFold<D> {
    opened: Time,
    root: D,
    inner: Vec<D>,
    /// Whether the root has an `error.type`, and whether the engine said how it finished.
    failed: bool,
    finished: bool,
    /// Inner spans so far, those of levels not wanted included, and the latest end of any.
    drawn: usize,
    last: Time,
    ending: Ended,
    /// When the tokens were ready.
    inputs: Option<Time>,
    /// The wait under way.
    queue: Option<(Time, QueueReason, u32)>,
    /// The newest scheduling pass: its span's place in `inner`.
    pass: Option<(usize, StepFact)>,
    /// The newest run of decode steps: its span's place in `inner`.
    run: Option<usize>,
    /// The read of blocks under way: its span's place in `inner`.
    pull: Option<usize>,
    /// When the first token was handed to the stream, and when the first bytes were written.
    first_token: Option<Time>,
    first_write: Option<Time>,
    fine: fine::Fine,
    langfuse: langfuse::Collected,
}

impl<S: Form> Fold<EngineFact, S> for EngineFold<S::Draft> {
    fn begin(cx: &mut Cx<'_, S>) -> Self {
        EngineFold {
            opened: cx.head.opened,
            root: cx.outermost("vllm.engine.request", Kind::Server),
            inner: Vec::with_capacity(16),
            failed: false,
            finished: false,
            drawn: 0,
            last: cx.head.opened,
            ending: Ended::Open,
            inputs: None,
            queue: None,
            pass: None,
            run: None,
            pull: None,
            first_token: None,
            first_write: None,
            fine: fine::Fine::default(),
            langfuse: langfuse::Collected::default(),
        }
    }

    fn fact(&mut self, cx: &mut Cx<'_, S>, at: Time, fact: &EngineFact) {
        match fact {
            EngineFact::Received { model, request, operation } => {
                self.root
                    .set("gen_ai.operation.name", operation.as_str())
                    .set("gen_ai.provider.name", "vllm")
                    .set("gen_ai.request.model", model)
                    .set("gen_ai.request.id", Val::Text(request.as_str()));
            }
            EngineFact::Asked { max_tokens, temperature, top_p, n, priority } => {
                // vLLM tells what it samples with, its defaults too, and leaves out what is zero.
                let (temperature, top_p) = (decimal(temperature.unwrap_or(1.0)), decimal(top_p.unwrap_or(1.0)));
                self.root
                    .set_some("gen_ai.request.max_tokens", max_tokens.filter(|v| *v != 0))
                    .set_some("gen_ai.request.temperature", Some(temperature).filter(|v| *v != 0.0))
                    .set_some("gen_ai.request.top_p", Some(top_p).filter(|v| *v != 0.0))
                    .set_some("gen_ai.request.n", Some(n.unwrap_or(1)).filter(|v| *v != 0))
                    .set_some("vllm.request.priority", *priority);
                (self.fine.temperature, self.fine.top_p) = (temperature, top_p);
                self.langfuse.parameter("max_tokens", *max_tokens);
                self.langfuse.parameter("temperature", Some(temperature));
                self.langfuse.parameter("top_p", Some(top_p));
            }
            EngineFact::Langfuse(generation) => self.langfuse.asked(generation),
            EngineFact::Decoding(asked) => self.fine.asked = *asked,
            EngineFact::Model(model) => self.fine.model = Some(model.clone()),
            EngineFact::Fine(parts) => self.parts(cx, parts),
            EngineFact::Adapter(name) => {
                self.root.set("vllm.lora.name", name);
            }
            EngineFact::InputsProcessed { started, prompt_tokens, truncated } => {
                self.inputs_processed(cx, at, *started, *prompt_tokens, *truncated);
            }
            EngineFact::FirstWrite => self.first_write = Some(at),
            EngineFact::LastWrite => self.ending = Ended::Written(at),
            EngineFact::Aborted => self.ending = Ended::Aborted(at),
            EngineFact::Failed { error_type, http_status } => self.failed(error_type, *http_status),
            EngineFact::Queued { reason, position, running } => self.queued(cx, at, *reason, *position, *running),
            EngineFact::Scheduled(step) => self.scheduled(cx, at, step),
            EngineFact::Admitted(admit) => self.admitted(cx, at, admit),
            EngineFact::Allocated(allocate) => self.allocated(cx, at, allocate),
            EngineFact::Prefilled(step) => self.prefilled(cx, at, step),
            EngineFact::Decoded(run) => self.decoded(cx, at, run),
            EngineFact::DecodeTimes(times) => self.decode_times(times),
            EngineFact::Preempted => {
                self.root.event("vllm.preempted", at, &[]);
            }
            EngineFact::PullStarted { peer, blocks, link } => {
                self.inner.push(transfer::receive(cx, self.root.id(), at.max(self.opened), peer, *blocks, *link));
                self.pull = Some(self.inner.len() - 1);
            }
            EngineFact::PullEnded(outcome) => {
                if let Some(place) = self.pull.take() {
                    transfer::received(&mut self.inner[place], at, outcome);
                    self.last = self.last.max(self.inner[place].end());
                }
            }
            EngineFact::Fault(kind) => {
                self.root.event("vllm.fault_injected", at, &[("vllm.fault.kind", Val::Static(kind.as_str()))]);
            }
            EngineFact::Finished(end) => self.finished(at, end),
        }
    }

    fn end(mut self, cx: &mut Cx<'_, S>, ending: &Ending) {
        let end = match self.ending {
            Ended::Open => ending.closed,
            Ended::Written(at) | Ended::Aborted(at) => at,
        };
        // What was noted has happened, so the request spans it all; only an abort is the end whatever the engine still does.
        let end = match self.ending {
            Ended::Open | Ended::Written(_) => end.max(self.last),
            Ended::Aborted(_) => end,
        };
        let end = end.max(self.opened);
        self.leave_queue(cx, end);
        if let Some(place) = self.pull {
            self.inner[place].set_end(end);
        }
        self.root.set_end(end);
        if matches!(self.ending, Ended::Aborted(_)) {
            // The caller has left: its own span may have ended before the engine could handle that.
            self.root.set("vllm.late", true);
        }
        self.latencies(end);
        self.langfuse.tell(&mut self.root, self.first_write.or(self.first_token));
        // A failure noted before is the better reason.
        if ending.abandoned && !self.failed {
            self.root.fail("abandoned", "the request was never finished");
        }
        self.root.set_some("vllm.record.facts_cut", (ending.cut > 0).then_some(ending.cut));
        self.end_detokenized();
        cx.emit(self.root);
        for mut span in self.inner {
            if span.end() > end {
                span.set("vllm.late", true);
            }
            cx.emit(span);
        }
    }
}

impl<D: Draft> EngineFold<D> {
    /// Starts a span under the request's; returns its place, unless its level is not wanted.
    fn child<S: Form<Draft = D>>(
        &mut self,
        cx: &mut Cx<'_, S>,
        name: &'static str,
        (start, end): (Time, Time),
        fill: impl FnOnce(&mut D),
    ) -> Option<usize> {
        self.span(cx, name, self.root.id(), (start, end), fill)
    }

    fn span<S: Form<Draft = D>>(
        &mut self,
        cx: &mut Cx<'_, S>,
        name: &'static str,
        parent: SpanId,
        (start, end): (Time, Time),
        fill: impl FnOnce(&mut D),
    ) -> Option<usize> {
        let start = start.max(self.opened);
        self.last = self.last.max(end).max(start);
        // The finest spans are numbered apart, so that they do not change the ids of the others.
        let finest = level(name) == 3;
        let (drawn, first) = if finest { (&mut self.fine.drawn, fine::FIRST_ID) } else { (&mut self.drawn, 0) };
        *drawn += 1;
        let number = first + *drawn - 1;
        if level(name) > cx.head.detail {
            return None;
        }
        let id = cx.head.inner_id(number);
        let mut span = cx.inner(Inner { name, kind: Kind::Internal, parent, id, start, end });
        fill(&mut span);
        self.inner.push(span);
        Some(self.inner.len() - 1)
    }

    fn inputs_processed<S: Form<Draft = D>>(
        &mut self,
        cx: &mut Cx<'_, S>,
        at: Time,
        started: Time,
        prompt_tokens: u32,
        truncated: bool,
    ) {
        self.child(cx, "vllm.processor.process_inputs", (started, at), |span| {
            span.set("vllm.tokenization.prompt_tokens", prompt_tokens).set("vllm.tokenization.truncated", truncated);
        });
        self.root.set("gen_ai.usage.prompt_tokens", prompt_tokens).set("gen_ai.usage.input_tokens", prompt_tokens);
        self.inputs = Some(at);
        self.langfuse.prompt(prompt_tokens);
    }

    /// Core and server may both note a refusal: the first one stands.
    fn failed(&mut self, error_type: &'static str, http_status: u16) {
        if std::mem::replace(&mut self.failed, true) {
            return;
        }
        if http_status >= 500 {
            self.root.fail(error_type, "the engine refused or failed the request");
        } else {
            // The caller's mistake: an error on the client's span only (HTTP semantic conventions).
            self.root.set("error.type", error_type);
        }
    }

    fn queued<S: Form<Draft = D>>(
        &mut self,
        cx: &mut Cx<'_, S>,
        at: Time,
        reason: QueueReason,
        position: u32,
        running: u32,
    ) {
        if let Some(ready) = self.inputs.take() {
            self.child(cx, "vllm.engine.add_to_core", (ready, at), |span| {
                span.set("vllm.core.queue_size", position).set("vllm.core.requests_running", running);
            });
        }
        // A request whose blocks are being loaded waits for another reason from then on.
        self.leave_queue(cx, at);
        self.root.event("vllm.queued", at, &[("vllm.queue.reason", Val::Static(reason.as_str()))]);
        self.queue = Some((at, reason, position));
    }

    fn leave_queue<S: Form<Draft = D>>(&mut self, cx: &mut Cx<'_, S>, at: Time) {
        if let Some((since, reason, position)) = self.queue.take() {
            self.child(cx, "vllm.engine.queue", (since, at), |span| {
                span.set("vllm.queue.reason", reason.as_str()).set("vllm.queue.position", position);
            });
        }
    }

    fn scheduled<S: Form<Draft = D>>(&mut self, cx: &mut Cx<'_, S>, at: Time, step: &StepFact) {
        if self.queue.is_some() {
            self.leave_queue(cx, at);
            self.root.event(if step.resumed { "vllm.resumed" } else { "vllm.scheduled" }, at, &[]);
        }
        let phase = if step.decode_seqs > 0 { "mixed" } else { "prefill" };
        let end = at + nanos(step.length_ns);
        let span = self.child(cx, "vllm.scheduler.schedule", (at, end), |span| {
            span.set("vllm.scheduler.iteration", step.iteration)
                .set("vllm.batch.phase", phase)
                .set("vllm.batch.prefill_requests", step.prefill_seqs)
                .set("vllm.batch.decode_requests", step.decode_seqs)
                .set("vllm.batch.total_tokens", step.prefill_tokens + step.decode_seqs)
                .set("vllm.batch.max_seq_len", step.max_seq_len)
                .set("vllm.scheduler.scheduled_tokens", step.tokens);
        });
        self.pass = span.map(|span| (span, *step));
    }

    fn admitted<S: Form<Draft = D>>(&mut self, cx: &mut Cx<'_, S>, at: Time, admit: &AdmitFact) {
        let Some((pass, _)) = self.pass else { return };
        let parent = self.inner[pass].id();
        self.span(cx, "vllm.scheduler.admit_requests", parent, (at, at + nanos(admit.end_ns)), |span| {
            span.set("vllm.requests.waiting", admit.waiting)
                .set("vllm.requests.admitted", admit.admitted)
                .set("vllm.requests.preempted", admit.preempted)
                .set("vllm.blocks.needed", admit.needed)
                .set("vllm.blocks.available", admit.available);
        });
    }

    fn allocated<S: Form<Draft = D>>(&mut self, cx: &mut Cx<'_, S>, at: Time, blocks: &AllocateFact) {
        let Some((pass, step)) = self.pass else { return };
        self.inner[pass]
            .set("vllm.kv_cache.blocks_available", blocks.available)
            .set("vllm.kv_cache.blocks_allocated", blocks.allocated)
            .set("vllm.kv_cache.blocks_freed", blocks.freed);
        let (parent, end) = (self.inner[pass].id(), self.inner[pass].end());
        let done = at + nanos(blocks.end_ns);
        self.span(cx, "vllm.scheduler.allocate_blocks", parent, (at + nanos(blocks.start_ns), done), |span| {
            let (allocated, freed, evicted, hit) = (blocks.allocated, blocks.freed, blocks.evicted, blocks.hit);
            Allocation { allocated, freed, evicted, hit }.tell(span);
        });
        self.span(cx, "vllm.scheduler.create_batch", parent, (done, end), |span| {
            let (prefill_seqs, decode_seqs, prefill_tokens) =
                (step.prefill_seqs, step.decode_seqs, step.prefill_tokens);
            Composition { prefill_seqs, decode_seqs, prefill_tokens }.tell(span);
        });
    }

    fn prefilled<S: Form<Draft = D>>(&mut self, cx: &mut Cx<'_, S>, at: Time, step: &ExecuteFact) {
        let run = Executed {
            iterations: 1,
            mean: f64::from(step.batch),
            max: step.batch,
            forward: Dur::from_nanos(step.forward_ns),
        };
        let executed = self.execute(cx, "prefill", (at, step.ready), &run);
        let mut processed = None;
        if step.new_tokens > 0 {
            let handed = step.ready + nanos(step.hand_over_ns);
            let counts = [step.processed, step.finished, step.new_tokens];
            processed = self.process(cx, "prefill", (step.ready, handed), counts);
            self.token_at(handed);
        }
        self.fine.newest = executed.map(|executed| (executed, processed));
    }

    fn decoded<S: Form<Draft = D>>(&mut self, cx: &mut Cx<'_, S>, at: Time, run: &DecodeRun) {
        let executed = Executed {
            iterations: run.count,
            mean: run.batch_sum as f64 / f64::from(run.count.max(1)),
            max: u32::from(run.batch_max),
            forward: Dur::from_nanos(run.forward_ns),
        };
        self.run = self.execute(cx, "decode", (at, run.ready), &executed);
        let handed = run.ready + nanos(run.hand_over_ns);
        let counts = [u32::from(run.processed), u32::from(run.finished), run.count];
        let processed = self.process(cx, "decode", (run.ready, handed), counts);
        self.fine.newest = self.run.map(|executed| (executed, processed));
    }

    /// From the launch of the first step to the outputs of the last.
    fn execute<S: Form<Draft = D>>(
        &mut self,
        cx: &mut Cx<'_, S>,
        phase: &'static str,
        when: (Time, Time),
        run: &Executed,
    ) -> Option<usize> {
        self.child(cx, "vllm.executor.execute_model", when, |span| {
            span.set("vllm.executor.phase", phase)
                .set("vllm.executor.iterations", run.iterations)
                .set("vllm.batch.size_mean", run.mean)
                .set("vllm.batch.size_max", run.max)
                .set("vllm.model.forward_duration_ms", run.forward.as_millis_f64());
        })
    }

    /// From the outputs to their hand-over.
    fn process<S: Form<Draft = D>>(
        &mut self,
        cx: &mut Cx<'_, S>,
        phase: &'static str,
        when: (Time, Time),
        [processed, finished, new]: [u32; 3],
    ) -> Option<usize> {
        self.child(cx, "vllm.output.process_batch", when, |span| {
            span.set("vllm.output.phase", phase)
                .set("vllm.outputs.processed", processed)
                .set("vllm.outputs.finished", finished)
                .set("vllm.tokens.new", new);
        })
    }

    fn decode_times(&mut self, times: &TokenTimes) {
        if let Some(span) = self.run {
            self.inner[span]
                .set("vllm.token_latency.p50_ms", times.quantile_ms(0.5))
                .set("vllm.token_latency.p99_ms", times.quantile_ms(0.99));
        }
    }

    fn token_at(&mut self, handed: Time) {
        if self.first_token.is_none() {
            self.first_token = Some(handed);
            self.root.event("vllm.first_token", handed, &[]);
        }
    }

    fn finished(&mut self, at: Time, end: &FinishFact) {
        self.finished = true;
        self.fine.ended(end);
        self.langfuse.finished(end);
        let reason = [end.reason.as_str()];
        let reasons = Val::Statics(&reason);
        self.root.event("vllm.finished", at, &[("gen_ai.response.finish_reasons", reasons)]);
        self.root
            .set("gen_ai.usage.completion_tokens", end.output_tokens)
            .set("gen_ai.usage.output_tokens", end.output_tokens)
            .set("gen_ai.response.finish_reasons", reasons)
            .set("vllm.kv_cache.cached_tokens", end.cached_tokens)
            .set("vllm.request.preemptions", end.preemptions)
            .set_some("gen_ai.latency.time_in_queue", end.admitted.then(|| end.queue.as_secs_f64()));
        if end.output_tokens > 0 {
            self.root
                .set("gen_ai.latency.time_in_model_prefill", end.prefill.as_secs_f64())
                .set("gen_ai.latency.time_in_model_decode", end.decode.as_secs_f64())
                .set("gen_ai.latency.time_in_model_inference", (end.prefill + end.decode).as_secs_f64());
        }
        match end.reason {
            FinishReason::Error => self.failed("engine_error", 500),
            FinishReason::Stop | FinishReason::Length | FinishReason::Abort => {}
        }
    }

    fn latencies(&mut self, end: Time) {
        let first = self.first_write.or(self.first_token);
        self.root.set_some("gen_ai.latency.time_to_first_token", first.map(|at| (at - self.opened).as_secs_f64()));
        if self.finished {
            self.root.set("gen_ai.latency.e2e", (end - self.opened).as_secs_f64());
        }
    }
}

/// Steps that were executed.
struct Executed {
    iterations: u32,
    /// Requests in a batch, on average.
    mean: f64,
    /// The largest batch.
    max: u32,
    /// Forward passes alone.
    forward: Dur,
}

/// The detail level from which a span is emitted, as the registry has it.
fn level(name: &str) -> u8 {
    match name {
        "vllm.engine.request"
        | "vllm.engine.queue"
        | "vllm.scheduler.schedule"
        | "vllm.executor.execute_model"
        | "vllm.kv_cache.transfer" => 1,
        "vllm.worker.prepare_inputs"
        | "vllm.model.forward"
        | "vllm.sampler.sample"
        | "vllm.detokenizer.update"
        | "vllm.logprobs.compute" => 3,
        _ => 2,
    }
}

/// A number as it was written: facts keep it in four bytes, and 0.7 must not become 0.699999988079071.
fn decimal(v: f32) -> f64 {
    (f64::from(v) * 1e6).round() / 1e6
}

fn nanos(ns: u32) -> Dur {
    Dur::from_nanos(u64::from(ns))
}

#[cfg(test)]
mod tests;
