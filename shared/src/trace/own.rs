//! Traces that no request causes: what a component does for many requests at once, an engine's step or a scrape for example.
//!
//! They are roots with a ratio, ids and counts of their own, so that turning them on changes neither the ids nor the counts of the
//! traces of requests. Whoever starts one pays a draw and a comparison where it is not kept.

use crate::rng::Seed;
use crate::time::Time;
use crate::trace::config::TelemetryConfig;
use crate::trace::eager::{self, Opening};
use crate::trace::id_source::IdSource;
use crate::trace::pipeline::Tracer;
use crate::trace::record::{Fact, Head, Trail};
use crate::trace::sampler::{Ratio, Sampler};

use std::sync::Arc;

/// The detail level from which these traces exist: they say how a component decides, not how a request lives.
const LEVEL: u8 = 2;

/// What a process has decided about them.
#[derive(Debug)]
pub(super) struct OwnConfig {
    /// Share of engine steps.
    pub(super) engine_steps: Ratio,
    /// Share of batches of KV events.
    pub(super) kv_events: Ratio,
    /// Share of scrapes.
    pub(super) scrapes: Ratio,
    /// Of a virtual run.
    pub(super) seed: Option<Seed>,
}

impl OwnConfig {
    /// What is kept of a tracer's whole process.
    pub(super) fn of(config: &TelemetryConfig, seed: Option<Seed>) -> OwnConfig {
        OwnConfig {
            engine_steps: config.engine_steps.clone(),
            kv_events: config.kv_events.clone(),
            scrapes: config.scrapes.clone(),
            seed,
        }
    }

    /// Whether there are any.
    pub(super) fn wanted(&self) -> bool {
        [&self.engine_steps, &self.kv_events, &self.scrapes].into_iter().any(|ratio| ratio.probability() > 0.0)
    }

    /// Ids of the traces called `name` of one instance: a stream each, so that nobody shifts another's draws.
    fn ids(&self, name: &str, tracer: &Tracer) -> IdSource {
        match self.seed {
            Some(seed) => IdSource::seeded_as(seed, &format!("{name}/{}", tracer.instance.0)),
            None => IdSource::live(),
        }
    }
}

/// What a trace is about that no request causes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Step,
    KvEvents,
    Scrape,
}

/// Starts traces of one kind for one service instance.
#[derive(Debug)]
pub struct OwnTraces {
    tracer: Tracer,
    sampler: Sampler,
    ids: IdSource,
    what: What,
}

impl Tracer {
    /// Starts traces of engine steps; `None` where none is ever kept, so that a step costs one branch.
    pub fn engine_steps(&self) -> Option<Arc<OwnTraces>> {
        self.own_traces("engine-step-ids", What::Step, |own| &own.engine_steps)
    }

    /// Starts traces of batches of KV events; `None` where none is ever kept.
    pub fn kv_events(&self) -> Option<Arc<OwnTraces>> {
        self.own_traces("kv-event-ids", What::KvEvents, |own| &own.kv_events)
    }

    /// Starts traces of scrapes; `None` where none is ever kept.
    pub fn scrapes(&self) -> Option<Arc<OwnTraces>> {
        self.own_traces("scrape-ids", What::Scrape, |own| &own.scrapes)
    }

    fn own_traces(&self, stream: &str, what: What, share: fn(&OwnConfig) -> &Ratio) -> Option<Arc<OwnTraces>> {
        let shared = self.shared.as_ref().filter(|s| share(&s.own).probability() > 0.0 && s.detail >= LEVEL)?;
        let sampler = Sampler::parent_based_ratio(share(&shared.own).clone());
        Some(Arc::new(OwnTraces { tracer: self.clone(), sampler, ids: shared.own.ids(stream, self), what }))
    }
}

impl OwnTraces {
    /// Begins a trace at `now` and decides whether it is kept: [`Trail::off`] if not.
    pub fn start<F: Fact>(&self, now: Time) -> Trail<F> {
        let Some(shared) = self.tracer.shared.as_ref().filter(|s| F::stands_in(s.naming)) else {
            return Trail::off();
        };
        let trace_id = self.ids.trace_id();
        let decision = self.sampler.sample(None, trace_id);
        shared.counters.own_started.add(usize::from(self.what == What::Step));
        if !decision.sampled {
            return Trail::off();
        }
        match self.what {
            What::Step => shared.counters.own_sampled.add(1),
            What::Scrape => shared.counters.scrapes_sampled.add(1),
            What::KvEvents => shared.counters.kv_events_sampled.add(1),
        }
        let (span_id, detail, naming) = (self.ids.span_id(), shared.detail, shared.naming);
        if let Some(service) = &self.tracer.own {
            let opening = Opening { caller: Default::default(), ids: (trace_id, span_id), now, detail, naming };
            let (_, slot) = eager::open::<F>(service, opening);
            slot.register(&shared.sink);
            return Trail::eager(slot);
        }
        let (tracestate, instance) = (decision.tracestate, self.tracer.instance);
        let head = Head { trace_id, span_id, parent: None, tracestate, instance, opened: now, detail, naming };
        Trail::open(head, &shared.sink)
    }
}
