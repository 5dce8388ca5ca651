//! The director: admits a request and has an endpoint chosen for it, and remembers what was sent where.
//!
//! It judges by the metrics it was given, however old; it never asks an engine.

use std::sync::Arc;

use rustc_hash::FxHashMap;
use shared::rng::Seed;
use shared::time::{Dur, Stage, Stopwatch, Time};

use crate::core::config::{GatewayConfig, OutlierConfig, PrefixConfig, SaturationConfig};
use crate::core::gateway::EndpointChange;
use crate::core::kv_index::events::Batch;
use crate::core::kv_index::{Applied, Found, KvIndex, Match};
use crate::core::outlier::may_eject;
use crate::core::pool::{AdapterState, Endpoint, EndpointConfig, EndpointId, EndpointMetrics, Pool, ScrapeError};
use crate::core::prefix_index::PrefixIndex;
use crate::core::producers::{ColdRequests, InFlight, Placed, Sessions};
use crate::core::request::{Rejection, RequestInfo};
use crate::core::saturation::{Pressure, pressure};
use crate::core::scheduler::registry::Reads;
use crate::core::scheduler::scorers::SessionStrategy;
use crate::core::scheduler::{Candidate, Decision, Run, Scheduler, View, precise};
use crate::spans::{GatewayFact, KvScored};

/// Admission and choice.
#[derive(Debug)]
pub(crate) struct Director {
    pub(crate) pool: Pool,
    namespace: Arc<str>,
    scheduler: Scheduler,
    prefixes: PrefixIndex,
    prefix: PrefixConfig,
    sessions: Sessions,
    cold: ColdRequests,
    in_flight: InFlight,
    saturation: SaturationConfig,
    outliers: OutlierConfig,
    /// How often an endpoint was taken out of the pool for its failures.
    pub(crate) ejections: u64,
    /// Requests at which an endpoint is left out.
    max_active: u32,
    /// Whether another endpoint may prefill.
    staged: bool,
    /// Whether requests wait before they are directed: then nobody is refused for load here.
    flow_control: bool,
    objectives: FxHashMap<Arc<str>, i32>,
    matched: Vec<u32>,
    /// The index of KV events, if some plugin reads it and it is kept here.
    kv: Option<KvIndex>,
    kv_block_tokens: u32,
    kv_matched: Vec<Match>,
}

impl Director {
    pub(crate) fn new(config: &GatewayConfig, endpoints: Vec<EndpointConfig>, seed: Seed) -> Director {
        let ttl = match config.sessions() {
            Some(SessionStrategy::SessionId { ttl, .. }) => ttl,
            Some(SessionStrategy::EncodedEndpointHeader { .. }) | None => Dur::ZERO,
        };
        let scheduler = Scheduler::new(config, seed.stream("gateway/picker"));
        let precise = &config.precise_prefix;
        let here = scheduler.reads().contains(Reads::KV) && precise.manager.is_none();
        Director {
            kv: here.then(|| KvIndex::new(precise, endpoints.len())),
            kv_block_tokens: precise.block_tokens,
            kv_matched: Vec::new(),
            prefixes: PrefixIndex::new(endpoints.len(), config.prefix.lru_blocks_per_endpoint),
            prefix: config.prefix.clone(),
            pool: Pool::new(endpoints),
            namespace: config.pool.namespace.as_str().into(),
            scheduler,
            sessions: Sessions::new(ttl),
            cold: ColdRequests::new(config.cold_requests()),
            in_flight: InFlight::new(config.in_flight.clone()),
            saturation: config.saturation.clone(),
            outliers: config.outlier_ejection.clone(),
            ejections: 0,
            max_active: config.limits.max_active_per_endpoint.unwrap_or(u32::MAX),
            staged: config.disaggregation.is_some(),
            flow_control: config.flow_control.as_ref().is_some_and(|f| f.enabled),
            objectives: config.objectives.iter().map(|(k, v)| (k.as_str().into(), *v)).collect(),
            matched: Vec::new(),
        }
    }

    /// Gives the request the priority of its objective.
    pub(crate) fn prioritise(&self, info: &mut RequestInfo) {
        if let Some(priority) = info.objective.as_ref().and_then(|o| self.objectives.get(o)) {
            info.priority = *priority;
        }
    }

    /// Whether some plugin reads what the first chunk of a response changes.
    pub(crate) fn reads_first_chunks(&self) -> bool {
        self.scheduler.reads().contains(Reads::TOKENS) || self.saturation.reads_tokens()
    }

    /// Whether some plugin reads LoRA adapters.
    pub(crate) const fn reads_adapters(&self) -> bool {
        self.scheduler.reads().contains(Reads::ADAPTERS)
    }

    /// Whether some plugin reads the index of KV events.
    pub(crate) const fn reads_kv_events(&self) -> bool {
        self.scheduler.reads().contains(Reads::KV)
    }

    /// The index of KV events, if it is kept here.
    pub(crate) const fn kv_index(&self) -> Option<&KvIndex> {
        self.kv.as_ref()
    }

    /// Takes a batch of KV events.
    pub(crate) fn kv_events(&mut self, id: EndpointId, model: Option<&str>, batch: &Batch, after_gap: bool) -> Applied {
        let Some(index) = &mut self.kv else { return Applied::Known };
        let first = self.pool.get(id).config.models.first();
        let model = model.or(first.map(|m| &**m)).unwrap_or_default();
        if after_gap {
            index.resume(id, model, batch);
            return Applied::Taken;
        }
        index.apply(id, model, batch)
    }

    /// Finds out which endpoints hold the prompt, by their own word, where a plugin asks; returns when that was done.
    fn look_up(&mut self, now: Time, info: &RequestInfo, watch: &mut dyn Stopwatch) -> Time {
        let Some(index) = &mut self.kv else {
            self.kv_matched.clear();
            self.kv_matched.extend(info.kv.answer.iter().flatten());
            return now;
        };
        let keys = info.kv.keys.len();
        let found = index.walk(now, &info.kv.keys);
        let walked = watch.lap(Stage::KvLookup { blocks: found });
        index.score(&mut self.kv_matched);
        let at = watch.lap(Stage::KvScore { blocks: found, endpoints: self.kv_matched.len() as u32 });
        info.trail.note(at, || {
            let found = Found::of(keys, found, &self.kv_matched);
            GatewayFact::KvScored(Box::new(KvScored { started: now, walked, found }))
        });
        at
    }

    /// Chooses an endpoint other than those `tried`, or refuses the request.
    pub(crate) fn direct(
        &mut self,
        now: Time,
        info: &RequestInfo,
        tried: &[EndpointId],
        watch: &mut dyn Stopwatch,
    ) -> Result<Placed, Rejection> {
        self.note_directing(now, info);
        self.look_up(now, info, watch);
        let admitted = self.admit(now, info, tried);
        let at = watch.lap(Stage::Admit);
        self.settle(now, at, admitted, info, watch)
    }

    /// Whether there is an endpoint beside those `tried` that a request could be sent to.
    pub(crate) fn has_other(&self, now: Time, info: &RequestInfo, tried: &[EndpointId]) -> bool {
        let usable = |e: &Endpoint| e.serves(&info.model) && e.is_available() && !e.outlier.is_ejected(now);
        self.pool.members().any(|(id, e)| !tried.contains(&id) && usable(e))
    }

    /// Begins to direct a request that may have to wait; nobody has to who asks for what no endpoint serves.
    pub(crate) fn receive(&self, now: Time, info: &RequestInfo) -> Result<(), Rejection> {
        self.note_directing(now, info);
        if !self.pool.serves(&info.model) {
            return Err(Rejection::UnknownModel);
        }
        if info.trail.is_recording() {
            self.note_admission(now, info, self.pressure(now).saturation);
        }
        Ok(())
    }

    /// Chooses an endpoint for a request that has waited.
    pub(crate) fn dispatch(
        &mut self,
        now: Time,
        info: &RequestInfo,
        watch: &mut dyn Stopwatch,
    ) -> Result<Placed, Rejection> {
        let at = self.look_up(now, info, watch);
        self.gather(now, info, &[]);
        self.settle(now, at, Ok(()), info, watch)
    }

    /// How full the pool is.
    pub(crate) fn pressure(&self, now: Time) -> Pressure {
        pressure(&self.saturation, self.staged, self.pool.endpoints(), now)
    }

    fn note_directing(&self, now: Time, info: &RequestInfo) {
        let flow_control = self.flow_control;
        info.trail.note(now, || GatewayFact::Directing { flow_control });
    }

    fn note_admission(&self, now: Time, info: &RequestInfo, saturation: f64) {
        let candidates = self.pool.members().count() as u32;
        info.trail.annotate(now, || GatewayFact::Admission { saturation, candidates });
    }

    fn settle(
        &mut self,
        now: Time,
        at: Time,
        admitted: Result<(), Rejection>,
        info: &RequestInfo,
        watch: &mut dyn Stopwatch,
    ) -> Result<Placed, Rejection> {
        let chosen = match admitted {
            Ok(()) => self.choose(now, at, info, watch),
            Err(rejection) => Err((rejection, at)),
        };
        match chosen {
            Ok((decision, at)) => {
                self.note_directed(at, info, &decision);
                Ok(self.sent(now, info, &decision))
            }
            Err((rejection, at)) => {
                info.trail.note(at, || GatewayFact::Refused(rejection));
                Err(rejection)
            }
        }
    }

    fn note_directed(&self, at: Time, info: &RequestInfo, decision: &Decision) {
        let config = |c: &Candidate| &self.pool.get(c.id).config;
        if let Some(prefill) = decision.prefill.as_ref().map(config) {
            info.trail
                .note(at, || GatewayFact::PrefillAt { address: Arc::clone(&prefill.address), port: prefill.port });
        }
        info.trail.note(at, || {
            let target = config(&decision.endpoint);
            GatewayFact::Directed {
                endpoint: Arc::clone(&target.name),
                address: Arc::clone(&target.address),
                prefill: decision.prefill.as_ref().map(|p| Arc::clone(&config(p).name)),
            }
        });
    }

    /// The first chunk of a request's response came.
    pub(crate) fn first_chunk(&mut self, placed: &mut Placed) {
        self.in_flight.first_chunk(&mut self.pool, placed);
        placed.prefill.into_iter().for_each(|id| self.left(id));
    }

    /// A request left where it was.
    pub(crate) fn leave(&mut self, placed: Placed) {
        InFlight::leave(&mut self.pool, placed);
        std::iter::once(placed.endpoint).chain(placed.prefill).for_each(|id| self.left(id));
    }

    /// A draining endpoint leaves with its last request, and what is remembered of it with it.
    fn left(&mut self, id: EndpointId) {
        if self.pool.settle(id) {
            self.forget_endpoint(id);
        }
    }

    fn forget_endpoint(&mut self, id: EndpointId) {
        self.prefixes.clear(id);
        self.sessions.forget(id);
        self.cold.forget(id);
        self.kv.iter_mut().for_each(|index| index.clear(id));
    }

    /// Adds an endpoint to the pool.
    pub(crate) fn join(&mut self, config: EndpointConfig) -> EndpointId {
        let id = self.pool.add(config);
        if id.index() >= self.prefixes.endpoints() {
            self.prefixes.add_endpoint();
            self.kv.iter_mut().for_each(KvIndex::add_endpoint);
        } else {
            self.prefixes.set_capacity(id, self.prefix.lru_blocks_per_endpoint);
        }
        id
    }

    /// An endpoint answered as it should.
    pub(crate) fn succeeded(&mut self, id: EndpointId) {
        self.pool.get_mut(id).outlier.succeeded();
    }

    /// An endpoint failed; too many times in a row, it is left out for a while.
    pub(crate) fn failed(&mut self, now: Time, id: EndpointId) {
        if !self.pool.get_mut(id).outlier.failed(now, &self.outliers) {
            return;
        }
        let (members, out) = self
            .pool
            .members()
            .fold((0, 0), |(members, out), (_, e)| (members + 1, out + usize::from(e.outlier.is_ejected(now))));
        if may_eject(out, members, &self.outliers) {
            self.ejections += 1;
            self.pool.get_mut(id).outlier.eject(now, &self.outliers);
        }
    }

    /// Takes the outcome of a scrape.
    pub(crate) fn scraped(&mut self, id: EndpointId, outcome: Result<EndpointMetrics, ScrapeError>) {
        if let Ok(m) = &outcome
            && self.prefix.auto_tune
            && m.num_gpu_blocks > 0
        {
            self.prefixes.set_capacity(id, m.num_gpu_blocks);
        }
        self.pool.scraped(id, outcome);
    }

    /// Forgets what requests left behind.
    pub(crate) fn forget(&mut self) {
        for i in 0..self.pool.endpoints().len() {
            self.prefixes.clear(EndpointId(i as u32));
        }
        // What engines hold does not depend on what the gateway remembers.
        self.sessions.clear();
        self.cold.clear();
    }

    pub(crate) fn change(&mut self, change: EndpointChange) {
        match change {
            EndpointChange::Added(config) => {
                self.join(config);
            }
            EndpointChange::Draining(id) => {
                if self.pool.drain(id) {
                    self.forget_endpoint(id);
                }
            }
            EndpointChange::Restarted(id) => {
                self.pool.renew(id);
                self.prefixes.clear(id);
                self.kv.iter_mut().for_each(|index| index.clear(id));
            }
            EndpointChange::Models(id, models) => self.pool.get_mut(id).config.models = models,
            EndpointChange::Adapters(id, adapters) => self.pool.get_mut(id).adapters = adapters,
        }
    }

    /// Fills the scheduler's candidates, or refuses.
    fn admit(&mut self, now: Time, info: &RequestInfo, tried: &[EndpointId]) -> Result<(), Rejection> {
        if !self.pool.serves(&info.model) {
            return Err(Rejection::UnknownModel);
        }
        let sheddable = info.priority < 0 && !self.flow_control;
        if sheddable || info.trail.is_recording() {
            let saturation = self.pressure(now).saturation;
            self.note_admission(now, info, saturation);
            if sheddable && saturation >= 1.0 {
                return Err(Rejection::Saturated);
            }
        }
        self.gather(now, info, tried);
        Ok(())
    }

    /// Makes a candidate of every endpoint that serves the model and was not tried.
    fn gather(&mut self, now: Time, info: &RequestInfo, tried: &[EndpointId]) {
        let reads = self.scheduler.reads();
        let prefix = reads.contains(Reads::PREFIX);
        if prefix {
            self.prefixes.matches(&info.prefix, &mut self.matched);
        }
        let bound = if reads.contains(Reads::SESSION) { self.bound(now, info) } else { None };
        let kv = reads.contains(Reads::KV);
        let (cold, adapters) = (reads.contains(Reads::COLD), reads.contains(Reads::ADAPTERS));
        let max_active = self.max_active;
        let candidates = &mut self.scheduler.room.candidates;
        candidates.clear();
        let endpoints = self
            .pool
            .members()
            .filter(|(id, e)| e.serves(&info.model) && e.in_flight < max_active && !tried.contains(id));
        candidates.extend(endpoints.map(|(id, e)| Candidate {
            matched_blocks: if prefix { self.matched[id.index()] } else { 0 },
            kv: if kv { self.kv_matched.get(id.index()).copied().unwrap_or_default() } else { Match::default() },
            had_session: bound == Some(id),
            cold_position: if cold { self.cold.position(id) } else { None },
            adapter: if adapters { e.adapters.state(&info.model) } else { AdapterState::Full },
            ..candidate(now, id, e)
        }));
    }

    /// The endpoint that the request's session is bound to: by its token, or by its id.
    fn bound(&self, now: Time, info: &RequestInfo) -> Option<EndpointId> {
        if let Some(named) = &info.session_endpoint {
            let name = named.strip_prefix(&*self.namespace)?.strip_prefix('/')?;
            return self.pool.members().find(|(_, e)| &*e.config.name == name).map(|(id, _)| id);
        }
        self.sessions.endpoint(info.session?, now)
    }

    fn choose(
        &mut self,
        now: Time,
        at: Time,
        info: &RequestInfo,
        watch: &mut dyn Stopwatch,
    ) -> Result<(Decision, Time), (Rejection, Time)> {
        let view = view(&self.pool, &self.prefix, self.kv_block_tokens, &self.in_flight, info);
        let mut run = Run { now, view, trail: &info.trail, watch };
        let (chosen, at) = self.scheduler.schedule(at, &mut run);
        chosen.map(|decision| (decision, at)).ok_or((Rejection::NoEndpoints, at))
    }

    /// Remembers a dispatch: the engines are expected to cache the prompt from now on.
    fn sent(&mut self, now: Time, info: &RequestInfo, decision: &Decision) -> Placed {
        let reads = self.scheduler.reads();
        let endpoints = std::iter::once(&decision.endpoint).chain(&decision.prefill).map(|c| c.id);
        for endpoint in endpoints {
            if reads.contains(Reads::PREFIX) {
                self.prefixes.insert(endpoint, &info.prefix);
            }
            if let Some(index) = &mut self.kv {
                index.expect(now, endpoint, &info.kv.keys);
            }
            if decision.cold {
                self.cold.sent(endpoint);
            }
        }
        if let Some(session) = info.session.filter(|_| reads.contains(Reads::SESSION)) {
            self.sessions.sent(session, decision.endpoint.id, decision.session_present, now);
        }
        let empty = Pool::default();
        let view = view(&empty, &self.prefix, self.kv_block_tokens, &self.in_flight, info);
        if reads.contains(Reads::KV) && !reads.contains(Reads::PREFIX) {
            let view = precise::view(&view);
            return InFlight::place(&mut self.pool, decision, |c| InFlight::cost(&view, &precise::candidate(c)));
        }
        InFlight::place(&mut self.pool, decision, |c| InFlight::cost(&view, c))
    }
}

/// What plugins see of a request.
fn view<'a>(
    pool: &'a Pool,
    prefix: &PrefixConfig,
    kv_block_tokens: u32,
    in_flight: &InFlight,
    info: &'a RequestInfo,
) -> View<'a> {
    View {
        pool,
        model: &info.model,
        prompt_tokens: info.prompt_tokens_estimate,
        prefix_blocks: info.prefix.len() as u32,
        block_tokens: prefix.block_tokens,
        kv_blocks: info.kv.keys.len() as u32,
        kv_block_tokens,
        output_tokens: in_flight.output_tokens(info.prompt_tokens_estimate, info.max_output_tokens),
        selection: info.selection.as_deref(),
        // Nobody predicts latencies yet.
        predictions: &[],
    }
}

/// What is known of an endpoint whatever the request is.
fn candidate(now: Time, id: EndpointId, endpoint: &Endpoint) -> Candidate {
    // Of a server without metrics only the gateway's own requests are known.
    let unknown = (0, endpoint.in_flight, 0.0);
    let (waiting, running, kv_usage) = endpoint.metrics.map_or(unknown, |m| (m.waiting, m.running, m.kv_usage));
    Candidate {
        id,
        waiting,
        running,
        kv_usage,
        matched_blocks: 0,
        kv: Match::default(),
        in_flight_tokens: endpoint.in_flight_tokens,
        in_flight: endpoint.in_flight,
        cold_position: None,
        role: endpoint.config.role(),
        adapter: AdapterState::Full,
        available: endpoint.is_available() && !endpoint.outlier.is_ejected(now),
        had_session: false,
    }
}
