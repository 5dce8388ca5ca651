//! Sampling at the edge of a virtual run: what the gateway decides at first and at the end of a request, and how the services that the
//! request was sent to learn of it. It does what the live gateway does (`gateway/src/server/proxy/judging.rs`); what it is told by engines
//! in headers and trailers is known here.

use gateway::spans::{Failure, GatewayFact};
use shared::ids::TraceId;
use shared::time::Time;
use shared::trace::policy::Outcome;
use shared::trace::{Keep, Labels, Started, Trail};

use super::event::Event;
use super::flight::Flight;
use super::world::World;

/// What has to be known of a candidate at its end.
pub(super) struct Candidate {
    keep: Keep,
    received: Time,
    /// The engines that it was sent to, or their sidecars.
    called: Vec<usize>,
    pub(super) preempted: bool,
    /// Whether it is kept.
    kept: bool,
}

/// How a request ended at the gateway.
#[derive(Clone, Copy)]
pub(super) struct End {
    pub(super) status: u16,
    pub(super) failure: Option<Failure>,
    /// Whether a stream ended with an error event.
    pub(super) event: bool,
}

/// A trace that is kept, and the engines that have, or whose sidecars have, a part of it.
pub(super) struct Kept {
    trace: TraceId,
    called: Vec<usize>,
}

impl End {
    /// An answer with this status was passed on or given.
    pub(super) const fn answered(status: u16) -> End {
        End { status, failure: None, event: false }
    }
}

impl Candidate {
    pub(super) fn new(keep: &Keep, received: Time) -> Box<Candidate> {
        Box::new(Candidate { keep: keep.clone(), received, called: Vec::new(), preempted: false, kept: false })
    }

    /// It goes to an engine, and to one that prefills.
    pub(super) fn calls(&mut self, engine: usize, prefill: Option<usize>) {
        for engine in std::iter::once(engine).chain(prefill) {
            if !self.called.contains(&engine) {
                self.called.push(engine);
            }
        }
    }
}

impl Flight {
    /// The gateway is done with the request at `at`, and judges it if that is what it is recorded for.
    pub(super) fn over(&mut self, trail: Trail<GatewayFact>, at: Time, end: End) {
        let End { status, failure, event } = end;
        let reason = self.candidate.as_ref().and_then(|candidate| {
            candidate.keep.judge(&Outcome {
                error: failure.is_some_and(|f| f != Failure::Cancelled) || event || Outcome::is_failure(status),
                took: at.since(candidate.received),
                tokens: u64::from(self.plan.prompt_tokens) + u64::from(self.output_tokens),
                preempted: candidate.preempted,
                retried: self.attempts > 1,
            })
        });
        if let Some(candidate) = &mut self.candidate {
            candidate.kept = reason.is_some();
        }
        if let Some(reason) = reason {
            trail.note(at, || GatewayFact::Kept(reason));
        }
        trail.note(at, || GatewayFact::Ended { status: Some(status), failure });
        trail.judged(at, reason.is_some());
    }
}

impl World<'_> {
    /// Begins the trace of the request in `slot`.
    pub(super) fn begin(&self, slot: usize, now: Time) -> Started {
        let flight = self.flights[slot].as_ref().expect("an event names an open request");
        if let Some(caller) = self.callers.context(flight.plan.index) {
            return self.tracer.begin(Some(caller));
        }
        let tenant = self.tenants.get(usize::from(flight.plan.tenant)).map(|(name, ..)| &**name);
        let labels = Labels {
            model: Some(&flight.model),
            tenant,
            route: Some(self.api),
            objective: flight.plan.objective.as_deref(),
        };
        self.tracer.begin_at_edge(&labels, now)
    }

    /// Tells the services that a request was sent to that its trace is kept, if it is.
    pub(super) fn spread(&mut self, flight: &Flight) {
        if let (Some(candidate), Some(started)) = (&flight.candidate, &flight.started)
            && candidate.kept
        {
            let kept = Kept { trace: started.context.trace_id, called: candidate.called.clone() };
            self.push(self.now + self.engine_delay, Event::Kept(Box::new(kept)));
        }
    }

    /// The services learn it.
    pub(super) fn kept(&self, kept: &Kept) {
        for &engine in &kept.called {
            self.machines[engine].tracer.keep(vec![kept.trace]);
            if let Some(sidecar) = self.sidecars.tracer(engine) {
                sidecar.keep(vec![kept.trace]);
            }
        }
    }
}
