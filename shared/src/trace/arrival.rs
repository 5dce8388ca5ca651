//! How requests begin at the edge of a system, and how the services behind it learn what the edge keeps.

use http::HeaderMap;

use crate::ids::TraceId;
use crate::time::Time;
use crate::trace::context::TraceContext;
use crate::trace::edge::{self, Decided, Standing};
use crate::trace::pipeline::{Shared, Started, Tracer, without_telemetry};
use crate::trace::policy::{Keep, Labels};
use crate::trace::record::{Fact, Trail};

impl Tracer {
    /// As [`Tracer::start`], at the edge of a system, where its policy decides on traces that begin there. What a caller says who is
    /// not `trusted` is not read. Where [`Started::is_pending`], the record begins with [`Tracer::decide`].
    pub fn arrive<F: Fact>(&self, headers: &HeaderMap, trusted: bool, now: Time) -> (Option<Started>, Trail<F>) {
        let Some(shared) = &self.shared else { return (None, Trail::off()) };
        if self.service.is_some() {
            return if trusted { self.start(headers, now) } else { self.start(&HeaderMap::new(), now) };
        }
        let caller = if trusted { self.extract(headers) } else { None };
        let forced = trusted && shared.edge.as_ref().is_some_and(|edge| edge.is_forced(headers));
        let started = shared.arrive(caller, forced, None, now);
        let trail = self.open(&started, now);
        (Some(started), trail)
    }

    /// Begins a request that nobody else has seen at the edge, with what the policy's rules match on.
    pub fn begin_at_edge(&self, labels: &Labels<'_>, now: Time) -> Started {
        match &self.shared {
            Some(shared) => shared.arrive(None, false, Some(labels), now),
            None => without_telemetry(None),
        }
    }

    /// Decides on a request that was pending, which is recorded from `now` on, the time at which it began.
    pub fn decide<F: Fact>(&self, started: &mut Started, labels: &Labels<'_>, now: Time) -> Trail<F> {
        if let Some(shared) = &self.shared {
            shared.decide(started, labels, now);
        }
        self.open(started, now)
    }

    /// What the edge keeps for what became of it, if anything.
    pub fn keeps(&self) -> Option<&Keep> {
        self.shared.as_ref()?.edge.as_ref()?.keep()
    }

    /// Whether what a caller does is recorded: its trace is sampled, or may be kept later and is held here.
    pub fn follows(&self, caller: &TraceContext) -> bool {
        caller.sampled || (self.holds() && edge::is_marked(caller.tracestate.as_ref()))
    }

    /// Whether records of candidates are held here.
    pub fn holds(&self) -> bool {
        self.shared.as_ref().is_some_and(|shared| shared.holds)
    }

    /// Releases what this service instance holds of the traces, and what it closes of them later.
    pub fn keep(&self, traces: Vec<TraceId>) {
        if let Some(shared) = self.shared.as_ref().filter(|shared| shared.holds) {
            shared.sink.keep(self.instance, traces);
        }
    }
}

impl Shared {
    /// Begins a request at the edge. Its rules need `labels`; without them it may stay pending.
    fn arrive(&self, caller: Option<TraceContext>, forced: bool, labels: Option<&Labels<'_>>, now: Time) -> Started {
        let (caller, sampler) = (caller.map(edge::unmarked), self.sampler.load());
        let decides = caller.is_none() || !sampler.parent_based;
        let Some(edge) = self.edge.as_ref().filter(|_| decides) else { return self.begin(caller, &sampler) };
        let trace_id = caller.as_ref().map_or_else(|| self.ids.trace_id(), |c| c.trace_id);
        let context = TraceContext {
            trace_id,
            span_id: self.ids.span_id(),
            sampled: false,
            random: caller.as_ref().is_some_and(|c| c.random),
            tracestate: caller.as_ref().and_then(|c| c.tracestate.clone()),
        };
        let parent = caller.map(|c| c.span_id);
        let mut started = Started { context, parent, standing: Standing::Pending { forced }, reason: None };
        match labels {
            Some(labels) => self.decide(&mut started, labels, now),
            None if !edge.needs_labels() || forced => self.decide(&mut started, &Labels::default(), now),
            None => {}
        }
        started
    }

    /// Decides on a request that is pending.
    fn decide(&self, started: &mut Started, labels: &Labels<'_>, now: Time) {
        let (Some(edge), Standing::Pending { forced }) = (&self.edge, started.standing) else { return };
        // Only samplers that ask no caller come here, so that a caller's context stands for its trace state.
        let caller = started.parent.map(|_| &started.context);
        let trace_id = started.context.trace_id;
        let Decided { decision, candidate, reason } =
            edge.decide(&self.sampler.load(), caller, trace_id, (forced, labels, now));
        if started.parent.is_none() {
            self.count_trace(decision.sampled);
        }
        started.context.sampled = decision.sampled;
        started.context.tracestate = decision.tracestate;
        started.standing = if candidate { Standing::Candidate } else { Standing::Decided };
        started.reason = reason;
    }
}
