//! Folds an engine's facts into spans: the one place where their names and attributes are set.
//!
//! Names, keys and units are those of `registry/vllm.yaml`. Facts come in the order in which they were noted, which is not quite
//! the order of their times: a step's execution is noted when its outputs are handled.

use std::borrow::Cow;

use shared::ids::SpanId;
use shared::time::{Dur, Time};
use shared::trace::{Fact, Kind, Record, Span, Value};

use crate::core::facts::{
    AdmitFact, AllocateFact, DecodeRun, EngineFact, ExecuteFact, FinishFact, QueueReason, StepFact, TokenTimes,
};
use crate::core::sequence::FinishReason;

impl Fact for EngineFact {
    fn is_final(&self) -> bool {
        match self {
            EngineFact::FirstWrite
            | EngineFact::LastWrite
            | EngineFact::Aborted
            | EngineFact::Failed { .. }
            | EngineFact::Decoded(_)
            | EngineFact::DecodeTimes(_)
            | EngineFact::Finished(_) => true,
            EngineFact::Received { .. }
            | EngineFact::Asked { .. }
            | EngineFact::Adapter(_)
            | EngineFact::InputsProcessed { .. }
            | EngineFact::Queued { .. }
            | EngineFact::Scheduled(_)
            | EngineFact::Admitted(_)
            | EngineFact::Allocated(_)
            | EngineFact::Prefilled(_)
            | EngineFact::Preempted => false,
        }
    }

    fn fold(record: &Record<EngineFact>, out: &mut Vec<Span>) {
        let mut fold = Fold::new(record);
        for (at, fact) in &record.facts {
            fold.take(*at, fact);
        }
        fold.finish(out);
    }
}

/// How a request ended for its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    /// Not yet known, or simply at the end of the record.
    Open,
    Written(Time),
    Aborted(Time),
}

struct Fold<'a> {
    record: &'a Record<EngineFact>,
    root: Span,
    inner: Vec<Span>,
    ending: Ending,
    /// When the tokens were ready.
    inputs: Option<Time>,
    /// The wait under way.
    queue: Option<(Time, QueueReason, u32)>,
    /// The newest scheduling pass: its span's place in `inner`.
    pass: Option<(usize, StepFact)>,
    /// The newest run of decode steps: its span's place in `inner`.
    run: Option<usize>,
    /// When the first token was handed to the stream, and when the first bytes were written.
    first_token: Option<Time>,
    first_write: Option<Time>,
}

impl<'a> Fold<'a> {
    fn new(record: &'a Record<EngineFact>) -> Fold<'a> {
        Fold {
            record,
            root: record.outermost("vllm.engine.request", Kind::Server, record.closed),
            inner: Vec::with_capacity(16),
            ending: Ending::Open,
            inputs: None,
            queue: None,
            pass: None,
            run: None,
            first_token: None,
            first_write: None,
        }
    }

    fn take(&mut self, at: Time, fact: &EngineFact) {
        match fact {
            EngineFact::Received { model, request, operation } => {
                self.root
                    .set("gen_ai.operation.name", operation.as_str())
                    .set("gen_ai.provider.name", "vllm")
                    .set("gen_ai.request.model", model.clone())
                    .set("gen_ai.request.id", request.as_str().to_owned());
            }
            EngineFact::Asked { max_tokens, temperature, top_p, n, priority } => {
                // vLLM leaves out what is zero.
                let given = |v: &Option<f32>| v.filter(|v| *v != 0.0).map(f64::from);
                self.root
                    .set_some("gen_ai.request.max_tokens", max_tokens.filter(|v| *v != 0))
                    .set_some("gen_ai.request.temperature", given(temperature))
                    .set_some("gen_ai.request.top_p", given(top_p))
                    .set_some("gen_ai.request.n", n.filter(|v| *v != 0))
                    .set_some("vllm.request.priority", *priority);
            }
            EngineFact::Adapter(name) => {
                self.root.set("vllm.lora.name", name.clone());
            }
            EngineFact::InputsProcessed { started, prompt_tokens, truncated } => {
                self.inputs_processed(at, *started, *prompt_tokens, *truncated);
            }
            EngineFact::FirstWrite => self.first_write = Some(at),
            EngineFact::LastWrite => self.ending = Ending::Written(at),
            EngineFact::Aborted => self.ending = Ending::Aborted(at),
            EngineFact::Failed { error_type, http_status } => self.failed(error_type, *http_status),
            EngineFact::Queued { reason, position, running } => self.queued(at, *reason, *position, *running),
            EngineFact::Scheduled(step) => self.scheduled(at, step),
            EngineFact::Admitted(admit) => self.admitted(at, admit),
            EngineFact::Allocated(allocate) => self.allocated(at, allocate),
            EngineFact::Prefilled(step) => self.prefilled(at, step),
            EngineFact::Decoded(run) => self.decoded(at, run),
            EngineFact::DecodeTimes(times) => self.decode_times(times),
            EngineFact::Preempted => {
                self.root.event("vllm.preempted", at, Vec::new());
            }
            EngineFact::Finished(end) => self.finished(at, end),
        }
    }

    /// Starts a span under the request's; returns its place.
    fn child(&mut self, name: &'static str, start: Time, end: Time) -> usize {
        self.span(name, self.record.head.span_id, start, end)
    }

    fn span(&mut self, name: &'static str, parent: SpanId, start: Time, end: Time) -> usize {
        let id = self.record.inner_id(self.inner.len());
        let start = start.max(self.record.head.opened);
        self.inner.push(self.record.span(name, Kind::Internal, Some(parent), id, start, end));
        self.inner.len() - 1
    }

    fn inputs_processed(&mut self, at: Time, started: Time, prompt_tokens: u32, truncated: bool) {
        let span = self.child("vllm.processor.process_inputs", started, at);
        self.inner[span]
            .set("vllm.tokenization.prompt_tokens", prompt_tokens)
            .set("vllm.tokenization.truncated", truncated);
        self.root.set("gen_ai.usage.prompt_tokens", prompt_tokens).set("gen_ai.usage.input_tokens", prompt_tokens);
        self.inputs = Some(at);
    }

    /// Core and server may both note a refusal: the first one stands.
    fn failed(&mut self, error_type: &'static str, http_status: u16) {
        if self.root.get("error.type").is_some() {
            return;
        }
        if http_status >= 500 {
            self.root.fail(error_type, "the engine refused or failed the request");
        } else {
            // The caller's mistake: an error on the client's span only (HTTP semantic conventions).
            self.root.set("error.type", error_type);
        }
    }

    fn queued(&mut self, at: Time, reason: QueueReason, position: u32, running: u32) {
        if let Some(ready) = self.inputs.take() {
            let span = self.child("vllm.engine.add_to_core", ready, at);
            self.inner[span].set("vllm.core.queue_size", position).set("vllm.core.requests_running", running);
        }
        self.root.event("vllm.queued", at, vec![attr("vllm.queue.reason", reason.as_str())]);
        self.queue = Some((at, reason, position));
    }

    fn leave_queue(&mut self, at: Time) {
        if let Some((since, reason, position)) = self.queue.take() {
            let span = self.child("vllm.engine.queue", since, at);
            self.inner[span].set("vllm.queue.reason", reason.as_str()).set("vllm.queue.position", position);
        }
    }

    fn scheduled(&mut self, at: Time, step: &StepFact) {
        if self.queue.is_some() {
            self.leave_queue(at);
            self.root.event(if step.resumed { "vllm.resumed" } else { "vllm.scheduled" }, at, Vec::new());
        }
        let span = self.child("vllm.scheduler.schedule", at, at + nanos(step.length_ns));
        let phase = if step.decode_seqs > 0 { "mixed" } else { "prefill" };
        self.inner[span]
            .set("vllm.scheduler.iteration", step.iteration)
            .set("vllm.batch.phase", phase)
            .set("vllm.batch.prefill_requests", step.prefill_seqs)
            .set("vllm.batch.decode_requests", step.decode_seqs)
            .set("vllm.batch.total_tokens", step.prefill_tokens + step.decode_seqs)
            .set("vllm.batch.max_seq_len", step.max_seq_len)
            .set("vllm.scheduler.scheduled_tokens", step.tokens);
        self.pass = Some((span, *step));
    }

    fn admitted(&mut self, at: Time, admit: &AdmitFact) {
        let Some((pass, _)) = self.pass else { return };
        let parent = self.inner[pass].span_id;
        let span = self.span("vllm.scheduler.admit_requests", parent, at, at + nanos(admit.end_ns));
        self.inner[span]
            .set("vllm.requests.waiting", admit.waiting)
            .set("vllm.requests.admitted", admit.admitted)
            .set("vllm.requests.preempted", admit.preempted)
            .set("vllm.blocks.needed", admit.needed)
            .set("vllm.blocks.available", admit.available);
    }

    fn allocated(&mut self, at: Time, blocks: &AllocateFact) {
        let Some((pass, step)) = self.pass else { return };
        self.inner[pass]
            .set("vllm.kv_cache.blocks_available", blocks.available)
            .set("vllm.kv_cache.blocks_allocated", blocks.allocated)
            .set("vllm.kv_cache.blocks_freed", blocks.freed);
        let (parent, end) = (self.inner[pass].span_id, self.inner[pass].end);
        let done = at + nanos(blocks.end_ns);
        let span = self.span("vllm.scheduler.allocate_blocks", parent, at + nanos(blocks.start_ns), done);
        self.inner[span]
            .set("vllm.allocation.blocks_allocated", blocks.allocated)
            .set("vllm.allocation.blocks_freed", blocks.freed)
            .set("vllm.allocation.blocks_evicted", blocks.evicted)
            .set("vllm.prefix_cache.hit", blocks.hit > 0)
            .set("vllm.prefix_cache.blocks_reused", blocks.hit);
        let span = self.span("vllm.scheduler.create_batch", parent, done, end);
        self.inner[span]
            .set("vllm.batch.size", step.prefill_seqs + step.decode_seqs)
            .set("vllm.batch.total_tokens", step.prefill_tokens + step.decode_seqs)
            .set("vllm.batch.prefill_tokens", step.prefill_tokens)
            .set("vllm.batch.decode_tokens", step.decode_seqs);
    }

    fn prefilled(&mut self, at: Time, step: &ExecuteFact) {
        self.execute("prefill", at, step.ready, 1, f64::from(step.batch), step.batch, step.forward_ns);
        if step.new_tokens > 0 {
            let handed = step.ready + nanos(step.hand_over_ns);
            self.process("prefill", step.ready, handed, step.processed, step.finished, step.new_tokens);
            self.token_at(handed);
        }
    }

    fn decoded(&mut self, at: Time, run: &DecodeRun) {
        let mean = run.batch_sum as f64 / f64::from(run.count.max(1));
        let span = self.execute("decode", at, run.ready, run.count, mean, u32::from(run.batch_max), run.forward_ns);
        self.run = Some(span);
        let handed = run.ready + nanos(run.hand_over_ns);
        self.process("decode", run.ready, handed, u32::from(run.processed), u32::from(run.finished), run.count);
    }

    #[allow(clippy::too_many_arguments, reason = "one attribute each; a struct would only repeat their names")]
    fn execute(
        &mut self,
        phase: &'static str,
        launch: Time,
        ready: Time,
        iterations: u32,
        mean: f64,
        max: u32,
        forward_ns: u64,
    ) -> usize {
        let span = self.child("vllm.executor.execute_model", launch, ready);
        self.inner[span]
            .set("vllm.executor.phase", phase)
            .set("vllm.executor.iterations", iterations)
            .set("vllm.batch.size_mean", mean)
            .set("vllm.batch.size_max", max)
            .set("vllm.model.forward_duration_ms", Dur::from_nanos(forward_ns).as_millis_f64());
        span
    }

    fn process(&mut self, phase: &'static str, ready: Time, handed: Time, processed: u32, finished: u32, new: u32) {
        let span = self.child("vllm.output.process_batch", ready, handed);
        self.inner[span]
            .set("vllm.output.phase", phase)
            .set("vllm.outputs.processed", processed)
            .set("vllm.outputs.finished", finished)
            .set("vllm.tokens.new", new);
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
            self.root.event("vllm.first_token", handed, Vec::new());
        }
    }

    fn finished(&mut self, at: Time, end: &FinishFact) {
        let reasons = || Value::StrList(vec![Cow::Borrowed(end.reason.as_str())]);
        self.root.event("vllm.finished", at, vec![(Cow::Borrowed("gen_ai.response.finish_reasons"), reasons())]);
        self.root
            .set("gen_ai.usage.completion_tokens", end.output_tokens)
            .set("gen_ai.usage.output_tokens", end.output_tokens)
            .set("gen_ai.response.finish_reasons", reasons())
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

    fn finish(mut self, out: &mut Vec<Span>) {
        let record = self.record;
        let end = match self.ending {
            Ending::Open => record.closed,
            Ending::Written(at) | Ending::Aborted(at) => at,
        };
        // What was noted has happened, so the request spans it all; only an abort is the end whatever the engine still does.
        let last = self.inner.iter().map(|s| s.end).max().unwrap_or(end);
        let end = match self.ending {
            Ending::Open | Ending::Written(_) => end.max(last),
            Ending::Aborted(_) => end,
        };
        let end = end.max(record.head.opened);
        self.leave_queue(end);
        self.root.end = end;
        if matches!(self.ending, Ending::Aborted(_)) {
            // The caller has left: its own span may have ended before the engine could handle that.
            self.root.set("vllm.late", true);
        }
        for span in self.inner.iter_mut().filter(|s| s.end > end) {
            span.set("vllm.late", true);
        }
        self.latencies(end);
        if record.abandoned {
            // A failure noted before is the better reason.
            if self.root.get("error.type").is_none() {
                self.root.fail("abandoned", "the request was never finished");
            }
        }
        if record.cut > 0 {
            self.root.set("vllm.record.facts_cut", record.cut);
        }
        self.root.events.sort_by_key(|e| e.at);
        out.push(self.root);
        out.extend(self.inner.into_iter().filter(|s| level(&s.name) <= record.head.detail));
    }

    fn latencies(&mut self, end: Time) {
        let opened = self.record.head.opened;
        let first = self.first_write.or(self.first_token);
        self.root.set_some("gen_ai.latency.time_to_first_token", first.map(|at| (at - opened).as_secs_f64()));
        if self.root.get("gen_ai.response.finish_reasons").is_some() {
            self.root.set("gen_ai.latency.e2e", (end - opened).as_secs_f64());
        }
    }
}

/// The detail level from which a span is emitted, as the registry has it.
fn level(name: &str) -> u8 {
    match name {
        "vllm.engine.request" | "vllm.engine.queue" | "vllm.scheduler.schedule" | "vllm.executor.execute_model" => 1,
        _ => 2,
    }
}

fn attr(key: &'static str, value: impl Into<Value>) -> (Cow<'static, str>, Value) {
    (Cow::Borrowed(key), value.into())
}

fn nanos(ns: u32) -> Dur {
    Dur::from_nanos(u64::from(ns))
}

#[cfg(test)]
mod tests;
