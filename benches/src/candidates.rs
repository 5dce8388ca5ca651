//! What it costs to keep traces for what becomes of their requests: one request through gateway and engine, recorded as a candidate and
//! held at the engine, beside one that nobody records and one that was sampled. The telemetry works on the calling thread, so that what
//! the worker does of it is in the figure. Not counted in instructions: what goes from the ring depends on what is in it.

use engine_sim::core::facts::EngineFact;
use gateway::spans::{GatewayFact, proxy_span_id};
use http::HeaderMap;
use shared::ids::TraceId;
use shared::rng::Seed;
use shared::time::{Anchor, Dur, Time};
use shared::trace::sampler::{Root, Sampler};
use shared::trace::{Keep, Policy, Resource, Telemetry, TelemetryConfig, Tracer};

use crate::stages::Stage;
use crate::{Facts, one_traced_request};

/// The same request four times, and what becomes of its trace.
pub const STAGES: &[Stage] = &[
    Stage { name: "candidate/unsampled", prepare: unsampled },
    Stage { name: "candidate/let_go", prepare: let_go },
    Stage { name: "candidate/kept", prepare: kept },
    Stage { name: "candidate/sampled", prepare: sampled },
];

/// A request ends so often: the ring fills to its 64 MiB before its minute is over, and one record goes for each that comes.
const EVERY: Dur = Dur::from_millis(1);

/// A gateway and an engine in one process.
struct System {
    telemetry: Telemetry,
    gateway: Tracer,
    engine: Tracer,
    facts: Facts,
    now: Time,
    headers: HeaderMap,
}

impl System {
    fn new(root: Root, keep: Option<Keep>) -> System {
        let config = TelemetryConfig {
            sampler: Sampler { parent_based: true, root },
            hold: keep.as_ref().map(Keep::hold),
            policy: Policy { keep, ..Policy::default() },
            ..TelemetryConfig::default()
        };
        let telemetry = Telemetry::inline(config, Anchor::VIRTUAL, Seed(1)).expect("no exporter can fail");
        let gateway = telemetry.tracer(Resource::new("gateway", "gateway-0"));
        let engine = telemetry.tracer(Resource::new("vllm", "engine-0"));
        let facts = one_traced_request();
        let now = facts.end;
        System { telemetry, gateway, engine, facts, now, headers: HeaderMap::new() }
    }

    /// Nothing is sampled, and some traces are kept later.
    fn keeping() -> System {
        System::new(Root::Off, Some(Keep::default()))
    }

    /// One request; the gateway judges it at its end.
    fn request(&mut self, kept: bool) -> TraceId {
        self.now += EVERY;
        let facts = &self.facts;
        let (started, trail) = self.gateway.arrive::<GatewayFact>(&HeaderMap::new(), true, facts.gateway[0].0);
        let context = started.expect("telemetry is on").context;
        facts.gateway.iter().for_each(|(at, fact)| trail.note(*at, || fact.clone()));
        self.gateway.inject(&context.child(proxy_span_id(context.span_id, 0)), &mut self.headers);
        let (_, behind) = self.engine.start::<EngineFact>(&self.headers, facts.engine[0].0);
        facts.engine.iter().for_each(|(at, fact)| behind.note(*at, || fact.clone()));
        behind.finish(self.now);
        trail.judged(self.now, kept);
        context.trace_id
    }

    /// One request that is kept, and the engine learns it.
    fn kept(&mut self) {
        let trace = self.request(true);
        self.engine.keep(vec![trace]);
    }

    /// One request that is not kept for what became of it.
    fn not_kept(&mut self) {
        self.request(false);
    }

    /// Repeats a request of which so many records and spans are made.
    fn repeat(mut self, once: fn(&mut System), records: u64, spans: u64) -> Box<dyn FnMut()> {
        once(&mut self);
        let made = self.telemetry.stats();
        assert_eq!((made.records_opened, made.spans_created), (records, spans), "it does what its name says");
        Box::new(move || once(&mut self))
    }
}

/// Not recorded, and not held.
fn unsampled() -> Box<dyn FnMut()> {
    System::new(Root::Off, None).repeat(System::not_kept, 0, 0)
}

/// Recorded by both, dropped by the gateway at once and by the engine when its record leaves the ring.
fn let_go() -> Box<dyn FnMut()> {
    System::keeping().repeat(System::not_kept, 2, 0)
}

/// Recorded by both, held at the engine until it is told, and folded by both.
fn kept() -> Box<dyn FnMut()> {
    System::keeping().repeat(System::kept, 2, 24)
}

/// Recorded and folded by both at once.
fn sampled() -> Box<dyn FnMut()> {
    System::new(Root::On, None).repeat(System::not_kept, 2, 24)
}
