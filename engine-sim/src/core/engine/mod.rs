//! One engine: the scheduler and the latency model joined by time.
//!
//! The loop of vLLM's engine core (`vllm/v1/engine/core.py`, `step` and `step_with_batch_queue`): schedule, launch, and complete the
//! oldest batch when its outputs are ready. With asynchronous scheduling two batches are in flight, so that scheduling step N+1
//! overlaps executing step N. Every time is planned when its cause is known and never moves afterwards.
//!
//! A driver calls [`Engine::handle`] with what arrived, sleeps until [`Engine::next_wakeup`] and calls [`Engine::advance`]. The
//! engine knows no socket, no text and no clock.

mod api;
mod control;
mod families;
mod faults;
mod fork;
mod notes;
#[cfg(test)]
mod properties;
mod remote;
mod steps;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::VecDeque;
use std::sync::Arc;

use rustc_hash::FxHashMap;
use shared::time::{Dur, Time};
use shared::tokens::{ContentId, TokenId};
use shared::trace::{OwnTraces, Trail};

use crate::core::config::EngineConfig;
use crate::core::facts::{EngineFact, ModelFact};
use crate::core::faults::Faults;
use crate::core::kv_events::{EventLog, KvBatch};
use crate::core::kv_transfer::Connector;
use crate::core::latency::LatencyProfile;
use crate::core::metrics::EngineMetrics;
use crate::core::residency::Residency;
use crate::core::scheduler::{Batch, Entry, Scheduler, SchedulerParams, TokenOut};
use crate::core::sequence::{FinishReason, NewSequence, Parallel, SeqIx};

use control::Controlled;
use families::Families;

use steps::Steps;

pub use crate::core::hasher::{PreparedPrompt, prepare_prompt};
pub use api::{Input, NewRequest, Output, RejectReason, RequestKey, RequestStats, Snapshot};
pub use control::{Asleep, Control, PauseMode};

/// One engine.
#[derive(Debug)]
pub struct Engine {
    config: EngineConfig,
    profile: Arc<LatencyProfile>,
    scheduler: Scheduler,
    /// Requests in the scheduler, by slot.
    open: Vec<Option<Open>>,
    by_key: FxHashMap<RequestKey, SeqIx>,
    /// Inputs that no turn has seen, in time order.
    inbox: VecDeque<(Time, Input)>,
    /// Outputs not handed over, in time order.
    outbox: VecDeque<Output>,
    plan: Plan,
    in_flight: VecDeque<Flight>,
    run: Run,
    /// When the GPU has done everything launched so far.
    gpu_free: Time,
    core_time: Time,
    /// Requests taken so far: the last tie-break of the priority queue.
    taken: u64,
    metrics: EngineMetrics,
    kv_events: Option<EventLog>,
    /// Gauges after the last completed step.
    reported: Snapshot,
    /// Whether the last schedule changed nothing: neither will the next one, unless something else does first.
    quiet: bool,
    /// The KV connector, and loads that ended and that no completed step has seen.
    kv: Option<Connector>,
    received: Vec<remote::Received>,
    /// What spans say about the model.
    model: Arc<ModelFact>,
    steps: Steps,
    /// Prompt tokens of requests without a first token.
    backlog: u64,
    families: Families,
    controlled: Controlled,
    /// What goes wrong, if anything shall.
    faults: Option<Box<Faults>>,
}

/// What the core does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Plan {
    /// Nothing until an input arrives.
    Idle,
    /// Start a turn: schedule if there is anything to do.
    Turn(Time),
    /// Handle the outputs of the oldest batch.
    Complete(Time),
}

/// A launched batch.
#[derive(Clone, Copy, Debug)]
struct Flight {
    launch: Time,
    ready: Time,
    /// Whether no request is in it: it reports ends, or looks for loads that have arrived.
    empty: bool,
}

/// A run of decode steps of one composition: their ends are floors of one sum, not sums of floors.
#[derive(Clone, Copy, Debug, Default)]
struct Run {
    composition: Option<u64>,
    start: Time,
    /// Time between the steps of the run, when the GPU waited for the host.
    gaps: Dur,
    executed_ps: u64,
}

/// What the engine remembers of a request besides the scheduler's state.
#[derive(Clone, Debug)]
struct Open {
    key: RequestKey,
    content: ContentId,
    trail: Trail<EngineFact>,
    arrival: Time,
    max_tokens: u32,
    parallel: Option<Parallel>,
    stats: RequestStats,
    /// When the newest token was handed to the stream.
    handed: Time,
    kv: remote::OpenKv,
    /// Preemptions that the metrics have.
    counted_preemptions: u32,
}

impl Engine {
    /// An idle engine at time zero with an empty cache. The configuration has passed [`EngineConfig::validate`].
    pub fn new(config: EngineConfig, profile: Arc<LatencyProfile>) -> Engine {
        let mut params = SchedulerParams::new(&config, &profile);
        // A request that never fits would wait for ever. Validation refuses such a configuration; this keeps the promise alone.
        let fits = params.num_blocks.saturating_sub(1).saturating_mul(params.block_size);
        params.max_model_len = params.max_model_len.min(fits);
        let kv = config.kv_transfer.clone().map(|kv| Connector::new(kv, Arc::clone(&profile), params.block_size));
        let metrics = EngineMetrics::new(params.max_model_len, &config.observability);
        let kv_events = EventLog::new(&config.kv_events_config, params.block_size);
        let scheduler = Scheduler::new(params);
        Engine {
            metrics,
            kv_events,
            reported: Snapshot::of(&scheduler),
            scheduler,
            config,
            model: Arc::new(ModelFact::new(&profile)),
            profile,
            open: Vec::new(),
            by_key: FxHashMap::default(),
            inbox: VecDeque::new(),
            outbox: VecDeque::new(),
            plan: Plan::Idle,
            in_flight: VecDeque::new(),
            run: Run::default(),
            gpu_free: Time::ZERO,
            core_time: Time::ZERO,
            taken: 0,
            quiet: false,
            kv,
            received: Vec::new(),
            steps: Steps::default(),
            backlog: 0,
            families: Families::default(),
            controlled: Controlled::default(),
            faults: None,
        }
    }

    /// A new engine like this one, idle and with an empty cache.
    pub fn renewed(&self) -> Engine {
        let mut engine = Engine::new(self.config.clone(), Arc::clone(&self.profile));
        engine.trace_steps(self.steps.traces.clone());
        engine.kv_events =
            self.kv_events.as_ref().and_then(|log| log.renewed(&self.config.kv_events_config, self.core_time));
        engine
    }

    /// Records steps scheduled from now on as traces of their own, or none.
    pub fn trace_steps(&mut self, traces: Option<Arc<OwnTraces>>) {
        self.steps.traces = traces;
    }

    /// Takes an input that arrived at `now`. One that is handed over late counts as arrived at [`Engine::core_time`].
    ///
    /// A request takes part in the first step whose planned start is not before its arrival and the frontend's work on it. An
    /// abort passes the same frontend and never overtakes its request.
    pub fn handle(&mut self, now: Time, input: Input) {
        let last = self.inbox.back().map_or(self.core_time, |(at, _)| *at);
        match input {
            Input::Add(request) => match self.refusal(&request) {
                Some(reason) => self.refuse(now.max(last), &request, reason),
                None => self.admit(last.max(now + self.profile.frontend_cost()), request),
            },
            Input::Abort(key) => self.inbox.push_back((now.max(last), Input::Abort(key))),
            Input::Kv(input) => self.hear(now.max(self.core_time), input),
        }
    }

    /// Completes the steps in flight if no request is open, for the end of a run: when they end was planned when they were
    /// launched, and nobody needs to wait for them any more.
    pub fn settle(&mut self) {
        let mut nothing = Vec::new();
        while self.open_requests() == 0
            && !self.in_flight.is_empty()
            && let Some(at) = self.next_event()
        {
            self.advance(at, &mut nothing);
        }
    }

    /// When [`Engine::advance`] has something to do; `None` when the engine is idle.
    pub fn next_wakeup(&self) -> Option<Time> {
        let output = self.outbox.front().map(Output::at);
        let kv = self.kv.as_ref().and_then(Connector::next_wakeup);
        output.into_iter().chain(kv).chain(self.next_event()).chain(self.next_fault()).min()
    }

    /// Does everything that is due at `now` and appends what is handed over by then to `out`, in planned order.
    pub fn advance(&mut self, now: Time, out: &mut Vec<Output>) {
        loop {
            let event = self.next_event();
            // What goes wrong at a time goes wrong before what happens at it.
            if self.suffer(event.map_or(now, |at| at.min(now))) {
                continue;
            }
            let Some(at) = event.filter(|at| *at <= now) else { break };
            self.core_time = self.core_time.max(at);
            if self.connector_due(at) {
                continue;
            }
            match self.plan {
                Plan::Idle | Plan::Turn(_) => self.turn(at),
                Plan::Complete(_) => self.complete(at),
            }
        }
        while self.outbox.front().is_some_and(|o| o.at() <= now) {
            out.extend(self.outbox.pop_front());
        }
        self.hand_over_kv(now);
    }

    /// The time of the newest event handled; never goes back.
    pub const fn core_time(&self) -> Time {
        self.core_time
    }

    /// Gauges, as of [`Engine::core_time`].
    pub fn snapshot(&self) -> Snapshot {
        Snapshot::of(&self.scheduler)
    }

    /// Gauges as the engine reports them: those of the last completed step, as vLLM's scheduler reports at the end of a step. What arrived
    /// or began since is not in them.
    pub const fn reported(&self) -> Snapshot {
        self.reported
    }

    /// How long blocks keep their content, if that is measured.
    pub fn residency(&self) -> Option<&Residency> {
        self.scheduler.kv().residency()
    }

    /// Counters and histograms, as of [`Engine::core_time`].
    pub const fn metrics(&self) -> &EngineMetrics {
        &self.metrics
    }

    /// The configuration.
    pub const fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// The model and GPU it imitates.
    pub fn profile(&self) -> &Arc<LatencyProfile> {
        &self.profile
    }

    /// Requests taken and not ended.
    pub fn open_requests(&self) -> usize {
        let queued = self.inbox.iter().filter(|(_, input)| matches!(input, Input::Add(_))).count();
        self.by_key.len() + queued
    }

    /// The oldest batch of cache events not taken yet; there are none unless the configuration asks for them.
    pub fn take_kv_batch(&mut self) -> Option<KvBatch> {
        self.kv_events.as_mut()?.take()
    }

    /// Empties the prefix cache; `false`, and nothing happens, while a request holds blocks (`/reset_prefix_cache`).
    ///
    /// As in vLLM the event that says so is in the batch of the next step.
    pub fn reset_prefix_cache(&mut self) -> bool {
        self.scheduler.reset_prefix_cache()
    }

    fn next_event(&self) -> Option<Time> {
        let planned = match self.plan {
            Plan::Idle => self.inbox.front().map(|(at, _)| *at),
            Plan::Turn(at) | Plan::Complete(at) => Some(at),
        };
        let own = self.kv.as_ref().and_then(Connector::next_event);
        // What a hang held back happens when it is over.
        let next = planned.into_iter().chain(own).min()?.max(self.core_time);
        self.faults.as_deref().map_or(Some(next), |faults| faults.released(next))
    }

    /// Takes a request in, unless a fault ends it at once.
    fn admit(&mut self, now: Time, request: Box<NewRequest>) {
        match self.lost_at_once(now, &request) {
            Some(lost) => self.emit(Output::Broken { key: request.key, at: now, lost }),
            None => {
                self.backlog += u64::from(request.prompt.tokens);
                self.inbox.push_back((now, Input::Add(request)));
            }
        }
    }

    fn refusal(&self, request: &NewRequest) -> Option<RejectReason> {
        let max_model_len = self.scheduler.params().max_model_len;
        if request.prompt.tokens == 0 {
            return Some(RejectReason::EmptyPrompt);
        }
        if request.prompt.tokens >= max_model_len {
            return Some(RejectReason::TooLong { max_model_len });
        }
        if self.controlled.refuse_new {
            return Some(RejectReason::Paused);
        }
        let places = request.params.places() as usize;
        let over = |limit: &u32| places > 0 && self.open_requests() + places > *limit as usize;
        if let Some(limit) = self.config.max_num_queued_reqs.filter(over) {
            return Some(RejectReason::QueueFull { limit });
        }
        let full = |limit: &u32| places > 0 && self.backlog >= u64::from(*limit);
        let limit = self.config.max_num_queued_tokens.filter(full)?;
        Some(RejectReason::BacklogFull { limit })
    }

    fn refuse(&mut self, now: Time, request: &NewRequest, reason: RejectReason) {
        match reason {
            RejectReason::QueueFull { .. } => self.metrics.admission_rejections_queued_reqs += 1,
            RejectReason::BacklogFull { .. } => self.metrics.admission_rejections_queued_tokens += 1,
            RejectReason::Paused | RejectReason::TooLong { .. } | RejectReason::EmptyPrompt => {}
        }
        request
            .trail
            .note(now, || EngineFact::Failed { error_type: reason.as_str(), http_status: reason.http_status() });
        self.refuse_remote(now, request);
        self.emit(Output::Rejected { key: request.key, at: now, reason });
    }

    /// Queues an output in time order; nearly always at the end.
    fn emit(&mut self, output: Output) {
        let later = self.outbox.iter().rev().take_while(|o| o.at() > output.at()).count();
        self.outbox.insert(self.outbox.len() - later, output);
    }

    /// Hands everything that arrived by `now` to the scheduler.
    fn take_inputs(&mut self, now: Time) {
        while self.inbox.front().is_some_and(|(at, _)| *at <= now)
            && let Some((at, input)) = self.inbox.pop_front()
        {
            self.quiet = false;
            match input {
                Input::Add(request) => self.add(at, *request),
                Input::Abort(key) => self.abort(now, key),
                Input::Kv(input) => self.note_received(at, *input),
            }
        }
    }

    fn add(&mut self, now: Time, request: NewRequest) {
        self.taken += 1;
        let named = request.prompt.keys.len() as u32 * self.config.cache.block_size + request.prompt.tail.len() as u32;
        let complete = !self.config.cache.enable_prefix_caching || named == request.prompt.tokens;
        assert!(complete, "the prompt was prepared with this engine's configuration");
        let (remote, kv) = self.remote_of(now, &request);
        let parallel = request.params.parallel;
        let ix = self.scheduler.add(NewSequence {
            tag: request.key.0,
            prompt_tokens: request.prompt.tokens,
            keys: request.prompt.keys,
            tail: request.prompt.tail,
            hasher: request.prompt.hasher,
            priority: request.priority,
            arrival: request.arrival.as_nanos(),
            tie: self.taken,
            lora: request.lora,
            remote,
            source: request.prompt.source,
            params: request.params,
        });
        let open = Open {
            key: request.key,
            content: request.content,
            trail: request.trail,
            arrival: request.arrival.min(now),
            max_tokens: self.scheduler.max_tokens(ix),
            parallel,
            stats: RequestStats::queued(now, request.prompt.tokens),
            handed: now,
            kv,
            counted_preemptions: 0,
        };
        notes::queued(&self.scheduler, ix, &open.trail, &self.model, now);
        let slot = ix.0 as usize;
        if self.open.len() <= slot {
            self.open.resize_with(slot + 1, || None);
        }
        self.open[slot] = Some(open);
        let before = self.by_key.insert(request.key, ix);
        assert!(before.is_none(), "the driver chooses keys that are unique while open");
    }

    fn abort(&mut self, now: Time, key: RequestKey) {
        // Unknown keys are requests that ended while the abort was under way.
        self.spared(key);
        let Some(ix) = self.by_key.remove(&key) else { return };
        self.scheduler.abort(ix, key.0);
        if let Some(open) = self.open[ix.0 as usize].take() {
            self.families.aborted(open.parallel);
            if open.stats.first_token.is_none() {
                self.backlog -= u64::from(open.stats.prompt_tokens);
            }
            let at = now.max(open.handed);
            open.trail.note(at, || EngineFact::Aborted);
            self.leave_remote(now, &open);
            notes::finished(&open, FinishReason::Abort, at);
            let stats = Box::new(open.stats);
            self.emit(Output::Finished { key, at, reason: FinishReason::Abort, stats, kept: None });
        }
    }

    /// One turn of the loop at `start`: schedule and launch if there is anything to do.
    fn turn(&mut self, start: Time) {
        self.take_inputs(start);
        if !self.scheduler.has_work() && self.in_flight.is_empty() {
            // No step will notice what was read for requests that are gone.
            self.end_loads(start);
        }
        let stalled = self.quiet && self.in_flight.iter().all(|f| f.empty);
        if stalled || !self.scheduler.has_work() {
            self.plan = self.in_flight.front().map_or(Plan::Idle, |f| Plan::Complete(f.ready.max(start)));
            self.settle_pause();
            return;
        }
        self.scheduler.set_now(start);
        let batch = self.scheduler.schedule();
        let cost = self.profile.schedule_cost(&batch.shape);
        let end = start + cost.total();
        let step_ps = faults::slowed(self.faults.as_deref(), self.profile.step_ps(&batch.shape));
        let mut flight = plan_step(&mut self.run, self.gpu_free, end, batch.composition, step_ps);
        flight.empty = batch.entries.is_empty();
        self.quiet = !batch.changes_something();
        self.gpu_free = flight.ready;
        let tokens = batch.total_tokens();
        note_admissions(batch, &mut self.open, start);
        notes::scheduled(batch, &self.open, start, cost);
        let (loads, covered) = (batch.loads.clone(), batch.covered.clone());
        self.steps.scheduled(batch, &self.open, &self.model, start, cost);
        self.start_loads(start, flight.launch, &loads, &covered);
        self.in_flight.push_back(flight);
        let more = tokens > 0 || self.scheduler.has_work();
        let oldest = self.in_flight.front().map_or(end, |f| f.ready);
        self.plan = if self.in_flight.len() < self.config.inflight() && more {
            Plan::Turn(end)
        } else {
            Plan::Complete(end.max(oldest))
        };
    }

    /// Handles the outputs of the oldest batch at `now`, when they are ready or, if later, when the core has time.
    fn complete(&mut self, now: Time) {
        // vLLM handles aborts that came during the step before its outputs.
        self.take_inputs(now);
        let Some(flight) = self.in_flight.pop_front() else {
            self.plan = Plan::Idle;
            return;
        };
        let open = &self.open;
        let tokenizer = self.config.tokenizer;
        let content = |ix: SeqIx| open[ix.0 as usize].as_ref().map(|r| r.content);
        let sample = |ix, i: u32| content(ix).map_or(TokenId(0), |c| tokenizer.filler(c, u64::from(i)));
        let Some((batch, outputs)) = self.scheduler.complete(sample) else { return };
        self.quiet &= flight.empty;
        let mut pinned = Vec::new();
        let update = self.profile.update_cost(batch.entries.len() as u64);
        let (prepare, forward, sample) = parts(&self.profile, flight, batch);
        let step = Step {
            launch: flight.launch,
            ready: now,
            handed: now + update + self.profile.detokenize_cost(),
            prepare,
            forward,
            sample,
            update,
            batch: batch.entries.len() as u32,
            processed: outputs.len() as u32,
            finished: outputs.iter().filter(|o| o.finish.is_some()).count() as u32,
        };
        let (mut iteration, mut next) = (0, 0);
        for entry in &batch.entries {
            let output = outputs.get(next).filter(|o| o.ix == entry.ix && o.tag == entry.tag);
            next += usize::from(output.is_some());
            let slot = &mut self.open[entry.ix.0 as usize];
            let Some(open) = slot.as_mut().filter(|r| r.key.0 == entry.tag) else { continue };
            if output.is_some() && open.stats.first_token.is_none() {
                self.backlog -= u64::from(open.stats.prompt_tokens);
            }
            iteration += take_token(open, entry, output, &step, &mut self.metrics);
            let Some(output) = output else { continue };
            self.outbox.push_back(Output::Tokens { key: open.key, at: step.handed, new_tokens: 1 });
            if let (Some(reason), Some(open)) = (output.finish, slot.take_if(|_| output.finish.is_some())) {
                notes::finished(&open, reason, step.handed);
                count_end(&open, reason, step.handed, &mut self.metrics);
                self.families.ended(open.parallel, open.stats.output_tokens, &mut self.metrics);
                self.by_key.remove(&open.key);
                pinned.extend(output.pin.map(|pin| remote::Pinned::new(pin, &open, self.outbox.len())));
                let (key, stats) = (open.key, Box::new(open.stats));
                self.outbox.push_back(Output::Finished { key, at: step.handed, reason, stats, kept: None });
            }
        }
        self.steps.completed(batch.step, &step);
        self.cut_streams(step.handed);
        if step.processed > 0 {
            self.metrics.iteration_tokens_total.observe(iteration);
        }
        self.keep_blocks(now, pinned);
        self.end_loads(now);
        let prefix = self.scheduler.take_prefix_stats();
        self.metrics.prefix_cache_queries += prefix.queries;
        self.metrics.prefix_cache_hits += prefix.hits;
        self.count_external(prefix);
        self.reported = Snapshot::of(&self.scheduler);
        if let Some(log) = &mut self.kv_events {
            log.collect(now + update, |out| self.scheduler.drain_kv_events(out));
        }
        self.plan = Plan::Turn(now + update);
    }
}

/// A completed step as its requests see it.
#[derive(Clone, Copy, Debug)]
struct Step {
    launch: Time,
    ready: Time,
    handed: Time,
    /// The parts of its execution, in this order from the launch on.
    prepare: Dur,
    forward: Dur,
    sample: Dur,
    /// The engine core's part of handing the outputs over.
    update: Dur,
    batch: u32,
    processed: u32,
    finished: u32,
}

/// When a step that may be launched at `end` runs.
fn plan_step(run: &mut Run, gpu_free: Time, end: Time, composition: Option<u64>, step_ps: u64) -> Flight {
    let launch = end.max(gpu_free);
    if composition.is_some() && run.composition == composition {
        run.gaps += launch - gpu_free;
        run.executed_ps += step_ps;
    } else {
        *run = Run { composition, start: launch, gaps: Dur::ZERO, executed_ps: step_ps };
    }
    Flight { launch, ready: run.start + run.gaps + Dur::from_nanos(run.executed_ps / 1000), empty: false }
}

/// Preparing the inputs, the forward pass, and sampling.
fn parts(profile: &LatencyProfile, flight: Flight, batch: &Batch) -> (Dur, Dur, Dur) {
    let total = flight.ready - flight.launch;
    let (prepare, sample) = profile.around_forward(total, batch.shape.seqs());
    (prepare, total - prepare - sample, sample)
}

/// Stamps first admissions and notes preemptions.
fn note_admissions(batch: &Batch, open: &mut [Option<Open>], now: Time) {
    if batch.shape.admitted > 0 {
        for entry in batch.entries.iter().filter(|e| !e.decode) {
            if let Some(open) = &mut open[entry.ix.0 as usize]
                && open.stats.first_scheduled.is_none()
            {
                open.stats.first_scheduled = Some(now);
                open.stats.cached_tokens = entry.computed;
            }
        }
    }
    for &(ix, _) in &batch.preempted {
        if let Some(open) = &mut open[ix.0 as usize] {
            open.stats.preemptions += 1;
        }
    }
}

/// What a completed step means for one request; returns its share of the iteration's tokens.
#[inline]
fn take_token(
    open: &mut Open,
    entry: &Entry,
    output: Option<&TokenOut>,
    step: &Step,
    metrics: &mut EngineMetrics,
) -> u64 {
    notes::executed(open, entry, output, step);
    if output.is_none() {
        return 0;
    }
    let stats = &mut open.stats;
    // vLLM's frontend hears of a preemption with the request's next token.
    metrics.num_preemptions += u64::from(stats.preemptions - open.counted_preemptions);
    open.counted_preemptions = stats.preemptions;
    let mut tokens = 1;
    match stats.last_token {
        Some(last) => metrics.inter_token_latency_seconds.observe_time(step.ready - last),
        None => {
            stats.first_token = Some(step.ready);
            metrics.time_to_first_token_seconds.observe_time(step.handed - open.arrival);
            metrics.prompt_tokens += u64::from(stats.prompt_tokens);
            metrics.prompt_tokens_external += u64::from(stats.external_tokens);
            metrics.prompt_tokens_recomputed += u64::from(stats.recomputed_tokens);
            metrics.prompt_tokens_cached += u64::from(stats.cached_tokens);
            tokens += u64::from(stats.prompt_tokens - stats.cached_tokens);
        }
    }
    stats.last_token = Some(step.ready);
    stats.output_tokens += 1;
    metrics.generation_tokens += 1;
    open.handed = step.handed;
    tokens
}

fn count_end(open: &Open, reason: FinishReason, handed: Time, metrics: &mut EngineMetrics) {
    let s = &open.stats;
    metrics.count_end(reason);
    metrics.e2e_request_latency_seconds.observe_time(handed - open.arrival);
    if let (Some(scheduled), Some(first), Some(last)) = (s.first_scheduled, s.first_token, s.last_token) {
        metrics.request_queue_time_seconds.observe_time(scheduled - s.queued);
        metrics.request_prefill_time_seconds.observe_time(first - scheduled);
        metrics.request_decode_time_seconds.observe_time(last - first);
        metrics.request_inference_time_seconds.observe_time(last - scheduled);
        // 0 for a single token, as in vLLM.
        let per_token = (last - first).as_nanos() / u64::from(s.output_tokens.saturating_sub(1).max(1));
        metrics.request_time_per_output_token_seconds.observe(per_token);
    }
    metrics.request_prompt_tokens.observe(u64::from(s.prompt_tokens));
    metrics.request_generation_tokens.observe(u64::from(s.output_tokens));
    metrics.request_params_max_tokens.observe(u64::from(open.max_tokens));
    metrics.request_prefill_kv_computed_tokens.observe(u64::from(s.prompt_tokens - s.cached_tokens));
    metrics.request_num_preemptions.observe(u64::from(s.preemptions));
}
