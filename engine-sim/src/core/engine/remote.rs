//! The engine and its KV connector: what a request's remote blocks mean for the scheduler, and what the connector is told.
//!
//! A load that ended is noticed when a step completes, as vLLM's workers report it, and counts from the next schedule. An engine
//! with nothing to do but wait sleeps until the load ends, where vLLM runs empty steps; the empty step that notices it is run then.

use std::sync::Arc;

use shared::ids::{SpanId, TraceId};
use shared::time::Time;

use super::{Engine, Input, NewRequest, Open, Output, Plan, count_end, notes};
use crate::core::facts::{EngineFact, QueueReason};
use crate::core::faults::FaultKind;
use crate::core::kv_transfer::{
    Connector, FetchStages, Freed, Kept, KvAsk, KvInput, KvMetrics, KvOutput, LoadFailurePolicy, LoadId, RemoteBlocks,
    Request, Transfer, TransferError,
};
use crate::core::scheduler::{LoadStart, PinId, PrefixStats};
use crate::core::sequence::{FinishReason, Remote, SeqIx};

/// What an open request has to do with other engines.
#[derive(Clone, Debug, Default)]
pub(super) enum OpenKv {
    #[default]
    Nothing,
    /// Its blocks are kept at its end, under this name.
    Keep(Arc<str>),
    /// Its blocks are elsewhere.
    Wanted(Arc<RemoteBlocks>),
    /// They are being loaded.
    Loading(Arc<RemoteBlocks>, LoadStart),
}

/// A load that ended and that no completed step has seen.
#[derive(Clone, Debug)]
pub(super) struct Received {
    at: Time,
    load: LoadId,
    outcome: Result<Transfer, TransferError>,
}

/// A request that ended and whose blocks are kept.
#[derive(Clone, Debug)]
pub(super) struct Pinned {
    pin: PinId,
    name: Arc<str>,
    cached_tokens: u32,
    span: Option<(TraceId, SpanId)>,
    /// Where its end is in the outbox.
    end: usize,
}

impl Pinned {
    pub(super) fn new(pin: PinId, open: &Open, end: usize) -> Pinned {
        let OpenKv::Keep(name) = &open.kv else { unreachable!("only blocks that are wanted are pinned") };
        let (name, cached_tokens) = (Arc::clone(name), open.stats.cached_tokens);
        Pinned { pin, name, cached_tokens, span: open.trail.context().map(|c| (c.trace_id, c.span_id)), end }
    }
}

impl Engine {
    /// Moves what the engine tells other engines to `out`: everything up to the last [`Engine::advance`].
    pub fn drain_kv(&mut self, out: &mut Vec<KvOutput>) {
        if let Some(kv) = &mut self.kv {
            kv.drain(out);
        }
    }

    /// What the KV connector counts; `None` without one.
    pub fn kv_metrics(&self) -> Option<&KvMetrics> {
        self.kv.as_ref().map(|kv| &kv.metrics)
    }

    /// How far requests are whose blocks are elsewhere.
    pub fn fetch_stages(&self) -> FetchStages {
        self.scheduler.fetch_stages()
    }

    /// Requests that ended and whose blocks are kept for other engines.
    pub fn leases(&self) -> usize {
        self.kv.as_ref().map_or(0, Connector::leases)
    }

    /// Blocks held for no open request: kept, or still written into.
    pub fn blocks_without_request(&self) -> usize {
        self.scheduler.blocks_without_request()
    }

    /// Word from another engine. A load's end waits for the next step; everything else counts at once.
    pub(super) fn hear(&mut self, now: Time, input: Box<KvInput>) {
        let down = self.down().is_some();
        let Some(kv) = &mut self.kv else { return };
        if down {
            return kv.nobody_is_there(now, *input);
        }
        match *input {
            // What a request's way through the frontend holds back is not its concern.
            KvInput::Received { .. } => {
                let later = self.inbox.iter().rev().take_while(|(at, _)| *at > now).count();
                self.inbox.insert(self.inbox.len() - later, (now, Input::Kv(input)));
            }
            KvInput::Pull(_) | KvInput::Heartbeat(_) | KvInput::Done(_) | KvInput::Refused(_) | KvInput::NotReached => {
                let freed = kv.handle(now, *input);
                self.unpin(now, freed);
            }
        }
    }

    /// The engine goes down: who reads from it learns that, and `fresh`, which comes after it, is not taken for it.
    pub(super) fn leave_peers(&mut self, at: Time, fresh: &mut Engine) {
        fresh.scheduler.never_reuse_loads_of(&self.scheduler);
        if let (Some(before), Some(after)) = (self.kv.take(), &mut fresh.kv) {
            before.go_down(at, after);
        }
    }

    pub(super) fn note_received(&mut self, at: Time, input: KvInput) {
        let KvInput::Received { load, outcome } = input else { unreachable!("all else counted at once") };
        self.received.push(Received { at, load, outcome });
    }

    /// Lets the connector do what is due at `now`; false if nothing is.
    pub(super) fn connector_due(&mut self, now: Time) -> bool {
        let Some(kv) = self.kv.as_mut().filter(|kv| kv.next_event().is_some_and(|at| at <= now)) else { return false };
        let freed = kv.advance(now);
        self.unpin(now, freed);
        true
    }

    fn unpin(&mut self, now: Time, freed: Freed) {
        if freed.is_empty() {
            return;
        }
        freed.into_iter().for_each(|pin| self.scheduler.unpin(pin));
        self.quiet = false;
        // A request may have waited for these blocks in an engine that had nothing else to do.
        if self.plan == Plan::Idle && self.scheduler.has_work() {
            self.plan = Plan::Turn(now.max(self.core_time));
        }
    }

    pub(super) fn hand_over_kv(&mut self, now: Time) {
        if let Some(kv) = &mut self.kv {
            kv.hand_over(now);
        }
    }

    /// What a new request means for scheduler and connector.
    pub(super) fn remote_of(&mut self, now: Time, request: &NewRequest) -> (Remote, OpenKv) {
        match (&mut self.kv, &request.kv) {
            (None, _) | (_, None) => (Remote::None, OpenKv::Nothing),
            (Some(_), Some(KvAsk::Keep(name))) => (Remote::Keep, OpenKv::Keep(Arc::clone(name))),
            (Some(kv), Some(KvAsk::Pull(remote))) => {
                kv.want(now, remote);
                let tokens = remote.blocks.saturating_mul(self.config.cache.block_size);
                (Remote::Prompt(tokens.min(request.prompt.tokens)), OpenKv::Wanted(Arc::clone(remote)))
            }
        }
    }

    /// A request that the engine does not take needs no blocks.
    pub(super) fn refuse_remote(&mut self, now: Time, request: &NewRequest) {
        if let (Some(kv), Some(KvAsk::Pull(remote))) = (&mut self.kv, &request.kv) {
            kv.receive_nothing(now, remote);
        }
    }

    /// A request that ends before its blocks are here: P is told at once, unless they are on their way.
    pub(super) fn leave_remote(&mut self, now: Time, open: &Open) {
        let Some(kv) = &mut self.kv else { return };
        match &open.kv {
            OpenKv::Nothing | OpenKv::Keep(_) => {}
            OpenKv::Wanted(remote) => kv.receive_nothing(now, remote),
            OpenKv::Loading(remote, _) => kv.unwant(remote),
        }
    }

    /// Starts the loads of a step that is launched at `launch`.
    pub(super) fn start_loads(&mut self, start: Time, launch: Time, loads: &[LoadStart], covered: &[(SeqIx, u64)]) {
        let Some(kv) = &mut self.kv else { return };
        for &(ix, _) in covered {
            let Some(open) = &mut self.open[ix.0 as usize] else { continue };
            if let OpenKv::Wanted(remote) = std::mem::take(&mut open.kv) {
                kv.receive_nothing(launch, &remote);
            }
        }
        let before = self.scheduler.holding().count().saturating_sub(loads.len());
        for (place, load) in loads.iter().enumerate() {
            let Some(open) = &mut self.open[load.ix.0 as usize] else { continue };
            let OpenKv::Wanted(remote) = std::mem::take(&mut open.kv) else { continue };
            open.trail.note(start, || EngineFact::Queued {
                reason: QueueReason::RemoteKv,
                position: (before + place) as u32,
                running: self.scheduler.running().len() as u32,
            });
            let (peer, link) = (Arc::clone(&remote.peer), kv.link());
            let fault = self.faults.as_deref_mut().and_then(|faults| faults.kv_transfer(launch));
            open.trail.note(launch, || EngineFact::PullStarted { peer, blocks: load.blocks, link });
            if fault.is_some() {
                open.trail.note(launch, || EngineFact::Fault(FaultKind::KvTransfer));
            }
            let breaks_after = fault.map(|fault| fault.moved(load.blocks));
            kv.receive(launch, load, &remote, breaks_after, open.trail.context());
            open.kv = OpenKv::Loading(remote, *load);
        }
    }

    /// Grants the leases of requests that ended at `now` and says in their ends what is kept.
    pub(super) fn keep_blocks(&mut self, now: Time, pinned: Vec<Pinned>) {
        let Some(kv) = &mut self.kv else { return };
        for Pinned { pin, name, cached_tokens, span, end } in pinned {
            let Some((blocks, tokens)) = self.scheduler.pinned(pin) else { continue };
            let tensor_parallel = self.profile.tensor_parallel;
            let said =
                Kept { request: Arc::clone(&name), blocks: blocks.to_vec(), tokens, cached_tokens, tensor_parallel };
            let request = Request { pin, blocks: said.blocks.len() as u32, span };
            if let Some(before) = kv.keep(now, name, request) {
                self.scheduler.unpin(before);
            }
            if let Some(Output::Finished { kept, .. }) = self.outbox.get_mut(end) {
                *kept = Some(Box::new(said));
            }
        }
    }

    /// Tells scheduler and requests of the loads that ended by `now`.
    pub(super) fn end_loads(&mut self, now: Time) {
        for Received { at, load, outcome } in std::mem::take(&mut self.received) {
            self.quiet = false;
            let Some((ix, arrived)) = self.kv.as_mut().and_then(|kv| kv.received(load, &outcome)) else { continue };
            let slot = &mut self.open[ix.0 as usize];
            let open = slot.as_mut().filter(|o| matches!(&o.kv, OpenKv::Loading(_, start) if start.load == load));
            match outcome {
                Ok(transfer) => {
                    if let Some(open) = open {
                        loaded(open, at, &transfer);
                    }
                    self.scheduler.load_arrived(load);
                }
                Err(error) => {
                    if let Some(open) = open {
                        open.kv = OpenKv::Nothing;
                        open.stats.external_tokens = arrived * self.config.cache.block_size;
                        open.trail.note(at, || EngineFact::PullEnded(Err(error)));
                    }
                    self.fail_load(now, load, arrived);
                }
            }
        }
    }

    pub(super) fn count_external(&mut self, prefix: PrefixStats) {
        if let Some(kv) = &mut self.kv {
            kv.metrics.external_prefix_cache_queries += prefix.external_queries;
            kv.metrics.external_prefix_cache_hits += prefix.external_hits;
        }
    }

    fn fail_load(&mut self, now: Time, load: LoadId, arrived: u32) {
        let Some(ix) = self.scheduler.load_failed(load, arrived) else { return };
        match self.kv.as_ref().map_or(LoadFailurePolicy::Fail, Connector::policy) {
            LoadFailurePolicy::Recompute => {}
            LoadFailurePolicy::Fail => self.fail(now, ix),
        }
    }

    /// Ends a request because its blocks could not be loaded.
    fn fail(&mut self, now: Time, ix: SeqIx) {
        self.scheduler.abort(ix, self.scheduler.tag(ix));
        let Some(open) = self.open[ix.0 as usize].take() else { return };
        self.by_key.remove(&open.key);
        open.trail.note(now, || EngineFact::Failed { error_type: "kv_load_failed", http_status: 500 });
        notes::finished(&open, FinishReason::Error, now);
        count_end(&open, FinishReason::Error, now, &mut self.metrics);
        let (key, stats) = (open.key, Box::new(open.stats));
        self.emit(Output::Finished { key, at: now, reason: FinishReason::Error, stats, kept: None });
    }
}

fn loaded(open: &mut Open, at: Time, transfer: &Transfer) {
    let OpenKv::Loading(_, start) = std::mem::take(&mut open.kv) else { return };
    open.stats.external_tokens = start.tokens;
    let whole = start.local_tokens + start.tokens == open.stats.prompt_tokens;
    open.stats.recomputed_tokens = u32::from(whole);
    open.trail.note(at, || EngineFact::PullEnded(Ok(transfer.into())));
}
