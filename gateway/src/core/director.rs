//! The director: admits a request and has an endpoint chosen for it, and remembers what was sent where.
//!
//! It judges by the metrics it was given, however old; it never asks an engine.

use std::sync::Arc;

use rustc_hash::FxHashMap;
use shared::rng::Seed;
use shared::time::{Dur, Stage, Stopwatch, Time};

use crate::core::config::{GatewayConfig, SaturationConfig};
use crate::core::gateway::EndpointChange;
use crate::core::pool::{Endpoint, EndpointConfig, EndpointId, Health, Pool};
use crate::core::prefix_index::PrefixIndex;
use crate::core::request::{Rejection, RequestInfo, SessionKey};
use crate::core::scheduler::{Candidate, Scheduler, View};
use crate::spans::GatewayFact;

/// How long a session is remembered (llm-d's `session-id-producer`).
const SESSION_TTL: Dur = Dur::from_secs(300);
/// More sessions than this are not remembered: the expired ones are dropped, then all.
const MAX_SESSIONS: usize = 65_536;

/// Admission and choice.
#[derive(Debug)]
pub(crate) struct Director {
    pub(crate) pool: Pool,
    scheduler: Scheduler,
    prefixes: PrefixIndex,
    sessions: FxHashMap<SessionKey, (EndpointId, Time)>,
    saturation: SaturationConfig,
    objectives: FxHashMap<Arc<str>, i32>,
    matched: Vec<u32>,
}

impl Director {
    pub(crate) fn new(config: &GatewayConfig, endpoints: Vec<EndpointConfig>, seed: Seed) -> Director {
        Director {
            prefixes: PrefixIndex::new(endpoints.len(), config.prefix.lru_blocks_per_endpoint),
            pool: Pool::new(endpoints),
            scheduler: Scheduler::new(&config.profile, seed.stream("gateway/picker")),
            sessions: FxHashMap::default(),
            saturation: config.saturation.clone(),
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

    /// Chooses an endpoint other than those `tried`, or refuses the request.
    pub(crate) fn direct(
        &mut self,
        now: Time,
        info: &RequestInfo,
        tried: &[EndpointId],
        watch: &mut dyn Stopwatch,
    ) -> Result<EndpointId, Rejection> {
        info.trail.note(now, || GatewayFact::Directing);
        let admitted = self.admit(now, info, tried);
        let at = watch.lap(Stage::Admit);
        let chosen = match admitted {
            Ok(()) => self.choose(now, at, info, watch),
            Err(rejection) => Err((rejection, at)),
        };
        match chosen {
            Ok((endpoint, at)) => {
                let config = &self.pool.get(endpoint).config;
                let (name, address) = (&config.name, &config.address);
                info.trail.note(at, || GatewayFact::Directed { endpoint: name.clone(), address: address.clone() });
                self.sent(now, info, endpoint);
                Ok(endpoint)
            }
            Err((rejection, at)) => {
                info.trail.note(at, || GatewayFact::Refused(rejection));
                Err(rejection)
            }
        }
    }

    /// A request left an endpoint.
    pub(crate) fn leave(&mut self, endpoint: EndpointId) {
        let in_flight = &mut self.pool.get_mut(endpoint).in_flight;
        *in_flight = in_flight.checked_sub(1).expect("a request leaves an endpoint once");
    }

    /// Forgets what requests left behind.
    pub(crate) fn forget(&mut self) {
        for i in 0..self.pool.endpoints().len() {
            self.prefixes.clear(EndpointId(i as u32));
        }
        self.sessions.clear();
    }

    pub(crate) fn change(&mut self, change: EndpointChange) {
        match change {
            EndpointChange::Added(config) => {
                self.pool.add(config);
                self.prefixes.add_endpoint();
            }
            EndpointChange::Draining(id) => self.pool.get_mut(id).draining = true,
            EndpointChange::Restarted(id) => {
                let endpoint = self.pool.get_mut(id);
                (endpoint.draining, endpoint.health, endpoint.metrics) = (false, Health::Unknown, None);
                self.prefixes.clear(id);
            }
            EndpointChange::Models(id, models) => self.pool.get_mut(id).config.models = models,
        }
    }

    /// Fills the scheduler's candidates, or refuses.
    fn admit(&mut self, now: Time, info: &RequestInfo, tried: &[EndpointId]) -> Result<(), Rejection> {
        if !self.pool.serves(&info.model) {
            return Err(Rejection::UnknownModel);
        }
        let sheddable = info.priority < 0;
        if sheddable || info.trail.is_recording() {
            let saturation = saturation(&self.saturation, self.pool.endpoints(), now);
            let candidates = self.pool.endpoints().len() as u32;
            info.trail.annotate(now, || GatewayFact::Admission { saturation, candidates });
            if sheddable && saturation >= 1.0 {
                return Err(Rejection::Saturated);
            }
        }
        self.gather(now, info, tried);
        Ok(())
    }

    /// Makes a candidate of every endpoint that serves the model and was not tried.
    fn gather(&mut self, now: Time, info: &RequestInfo, tried: &[EndpointId]) {
        let reads_prefix = self.scheduler.reads_prefix();
        if reads_prefix {
            self.prefixes.matches(&info.prefix, &mut self.matched);
        }
        let last = info.session.and_then(|s| self.sessions.get(&s)).filter(|(_, at)| now.since(*at) < SESSION_TTL);
        let last = last.map(|(endpoint, _)| *endpoint);
        let endpoints = self.pool.endpoints().iter().enumerate();
        self.scheduler.candidates.clear();
        self.scheduler.candidates.extend(endpoints.filter(|(_, e)| e.serves(&info.model)).filter_map(|(i, e)| {
            let id = EndpointId(i as u32);
            let matched_blocks = if reads_prefix { self.matched[i] } else { 0 };
            (!tried.contains(&id)).then(|| candidate(id, e, matched_blocks, last == Some(id)))
        }));
    }

    fn choose(
        &mut self,
        now: Time,
        at: Time,
        info: &RequestInfo,
        watch: &mut dyn Stopwatch,
    ) -> Result<(EndpointId, Time), (Rejection, Time)> {
        let view = View { pool: &self.pool, prefix_blocks: info.prefix.len() as u32 };
        let (chosen, at) = self.scheduler.schedule(now, at, &view, &info.trail, watch);
        chosen.map(|id| (id, at)).ok_or((Rejection::NoEndpoints, at))
    }

    /// Remembers a dispatch: the engine is expected to cache the prompt from now on.
    fn sent(&mut self, now: Time, info: &RequestInfo, endpoint: EndpointId) {
        self.pool.get_mut(endpoint).in_flight += 1;
        if self.scheduler.reads_prefix() {
            self.prefixes.insert(endpoint, &info.prefix);
        }
        let Some(session) = info.session.filter(|_| self.scheduler.reads_session()) else { return };
        if self.sessions.len() >= MAX_SESSIONS && !self.sessions.contains_key(&session) {
            self.sessions.retain(|_, (_, at)| now.since(*at) < SESSION_TTL);
            if self.sessions.len() >= MAX_SESSIONS {
                self.sessions.clear();
            }
        }
        self.sessions.insert(session, (endpoint, now));
    }
}

fn candidate(id: EndpointId, endpoint: &Endpoint, matched_blocks: u32, had_session: bool) -> Candidate {
    // Of a server without metrics only the gateway's own requests are known.
    let unknown = (0, endpoint.in_flight, 0.0);
    let (waiting, running, kv_usage) = endpoint.metrics.map_or(unknown, |m| (m.waiting, m.running, m.kv_usage));
    Candidate {
        id,
        available: endpoint.is_available(),
        role: endpoint.config.role,
        waiting,
        running,
        kv_usage,
        matched_blocks,
        had_session,
    }
}

/// llm-d's `utilization-detector`: the mean over the endpoints of max(waiting / threshold, kv usage / threshold). Stale or
/// missing metrics count 1, no endpoints count 1.
fn saturation(config: &SaturationConfig, endpoints: &[Endpoint], now: Time) -> f64 {
    if endpoints.is_empty() {
        return 1.0;
    }
    let of = |e: &Endpoint| match e.metrics {
        Some(m) if now.since(m.at) <= config.metrics_staleness.get() => {
            let queue = f64::from(m.waiting) / f64::from(config.queue_depth_threshold);
            queue.max(m.kv_usage / config.kv_cache_threshold)
        }
        Some(_) | None => 1.0,
    };
    endpoints.iter().map(of).sum::<f64>() / endpoints.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::pool::EndpointMetrics;

    #[test]
    fn saturation_is_the_mean_load_and_fails_closed() {
        let check = |loads: &[Option<(u32, f64, u64)>], expect: f64| {
            let mut pool = Pool::new(loads.iter().map(|_| EndpointConfig::new("e", "127.0.0.1", 1)).collect());
            for (i, load) in loads.iter().enumerate() {
                if let Some((waiting, kv_usage, ms)) = *load {
                    let at = Time::ZERO + Dur::from_millis(ms);
                    let m = EndpointMetrics { waiting, running: 0, kv_usage, block_size: 16, num_gpu_blocks: 1, at };
                    pool.scraped(EndpointId(i as u32), Ok(m));
                }
            }
            let now = Time::ZERO + Dur::from_millis(1000);
            let found = saturation(&SaturationConfig::default(), pool.endpoints(), now);
            assert!((found - expect).abs() < 1e-12, "{loads:?}: {found}");
        };
        check(&[], 1.0);
        check(&[None], 1.0);
        check(&[Some((0, 0.0, 1000))], 0.0);
        check(&[Some((5, 0.0, 1000))], 1.0);
        check(&[Some((1, 0.8, 1000))], 1.0);
        check(&[Some((0, 0.4, 800)), Some((10, 0.0, 1000))], 1.25);
        check(&[Some((0, 0.0, 799)), Some((0, 0.0, 1000))], 0.5);
    }
}
