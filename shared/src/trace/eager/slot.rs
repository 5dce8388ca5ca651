//! A request as the eager recorder sees it: its fold under way, with the facts that may still be amended.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use opentelemetry::Context;
use opentelemetry::trace::TraceContextExt as _;

use super::{Sdk, Service};
use crate::ids::{SpanId, TraceId};
use crate::time::Time;
use crate::trace::context::TraceContext;
use crate::trace::edge::Standing;
use crate::trace::fold::{Cx, Fold};
use crate::trace::naming::Naming;
use crate::trace::pipeline::Started;
use crate::trace::record::{Closed, Ending, Fact, Head, Open, Sink, Ticket};

/// What a request begins with.
pub(crate) struct Opening {
    pub(crate) caller: Context,
    /// Drawn ids: those of the outermost span, and of the trace if it begins here.
    pub(crate) ids: (TraceId, SpanId),
    pub(crate) now: Time,
    pub(crate) detail: u8,
    pub(crate) naming: Naming,
}

/// Begins a request: its outermost span starts, which decides whether it is recorded.
pub(crate) fn open<F: Fact>(service: &Arc<Service>, opening: Opening) -> (Started, Arc<EagerSlot<F>>) {
    let Opening { caller, ids, now, detail, naming } = opening;
    let parent = caller.has_active_span().then(|| caller.span().span_context().clone());
    let trace_id = parent.as_ref().and_then(|p| TraceId::new(u128::from_be_bytes(p.trace_id().to_bytes())));
    let head = Head {
        trace_id: trace_id.unwrap_or(ids.0),
        span_id: ids.1,
        parent: parent.as_ref().and_then(|p| SpanId::new(u64::from_be_bytes(p.span_id().to_bytes()))),
        tracestate: None,
        instance: service.instance,
        opened: now,
        detail,
        naming,
    };
    let mut form = Sdk::new(Arc::clone(service), caller);
    let fold = F::Fold::<Sdk>::begin(&mut Cx::new(&head, &mut form));
    assert!(form.spans > 0, "a fold starts its outermost span when it begins");
    let root = form.root();
    let (recording, state) = (root.is_sampled(), root.trace_state().header());
    let context = TraceContext {
        trace_id: head.trace_id,
        span_id: head.span_id,
        sampled: recording,
        random: false,
        tracestate: (!state.is_empty()).then(|| state.into()),
    };
    let started = Started { standing: Standing::Decided, reason: None, context, parent: head.parent };
    let state = State { head, form, fold, held: Vec::new(), last: now, taken: 0, cut: 0 };
    let ids = (state.head.trace_id, state.head.span_id);
    (
        started,
        Arc::new(EagerSlot {
            state: Mutex::new(Some(state)),
            recording,
            detail,
            ids,
            opened: now,
            place: OnceLock::new(),
        }),
    )
}

/// A request's fold, shared by all who note its facts.
pub(crate) struct EagerSlot<F: Fact> {
    /// Gone once it is closed.
    state: Mutex<Option<State<F>>>,
    recording: bool,
    detail: u8,
    ids: (TraceId, SpanId),
    opened: Time,
    /// Its place among the open records, to be given back.
    place: OnceLock<(Arc<dyn Sink>, Ticket)>,
}

struct State<F: Fact> {
    head: Head,
    form: Sdk,
    fold: F::Fold<Sdk>,
    /// Facts that later notes may amend, not folded yet.
    held: Vec<(Time, F)>,
    last: Time,
    taken: usize,
    cut: u32,
}

impl<F: Fact> State<F> {
    fn note(&mut self, at: Time, fact: F) {
        self.last = at;
        if self.taken >= fact.room() {
            self.cut += 1;
            return;
        }
        self.taken += 1;
        if fact.is_amendable() {
            self.held.push((at, fact));
            return;
        }
        if fact.settles() {
            self.settle();
        }
        self.fold.fact(&mut Cx::new(&self.head, &mut self.form), at, &fact);
    }

    fn settle(&mut self) {
        for (at, fact) in self.held.drain(..) {
            self.fold.fact(&mut Cx::new(&self.head, &mut self.form), at, &fact);
        }
    }
}

impl<F: Fact> EagerSlot<F> {
    /// Puts it among the open records of `sink`, where an abandoned one is found, for as long as anybody holds it.
    pub(crate) fn register(self: &Arc<Self>, sink: &Arc<dyn Sink>) {
        let open: Arc<dyn Open> = self.clone();
        let ticket = sink.opened(Arc::downgrade(&open));
        self.place.get_or_init(|| (Arc::clone(sink), ticket));
    }

    /// Whether its spans are recorded.
    pub(crate) fn is_recording(&self) -> bool {
        self.recording
    }

    /// How much is folded.
    pub(crate) fn detail(&self) -> u8 {
        self.detail
    }

    /// The trace and the outermost span, while it is open.
    pub(crate) fn ids(&self) -> Option<(TraceId, SpanId)> {
        self.lock().as_ref().map(|_| self.ids)
    }

    #[inline(never)]
    pub(crate) fn note(&self, at: Time, fact: F) {
        if let Some(state) = self.lock().as_mut() {
            state.note(at, fact);
        }
    }

    /// Changes the newest held fact that `pick` accepts, or notes a new one.
    pub(crate) fn amend<R>(&self, at: Time, pick: impl FnMut(&mut F) -> Option<R>, fact: impl FnOnce() -> F) {
        let mut state = self.lock();
        let Some(state) = state.as_mut() else { return };
        if state.held.iter_mut().rev().map(|(_, f)| f).find_map(pick).is_none() {
            state.note(at, fact());
        }
    }

    /// Ends all spans; later notes by other holders are ignored.
    pub(crate) fn close(&self, now: Time, abandoned: bool) {
        let Some(mut state) = self.lock().take() else { return };
        state.settle();
        let State { head, mut form, fold, cut, .. } = state;
        fold.end(&mut Cx::new(&head, &mut form), &Ending { closed: now, abandoned, cut });
        if self.recording {
            let counters = &form.service.counters;
            counters.closed.add(1);
            counters.folded.add(1);
            counters.abandoned.add(usize::from(abandoned));
            counters.cut.add(cut as usize);
            counters.spans.add(form.spans);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<State<F>>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<F: Fact> Open for EagerSlot<F> {
    fn abandon(&self, now: Time) -> Option<Box<dyn Closed>> {
        self.close(now, true);
        None
    }
    fn opened(&self) -> Option<Time> {
        self.lock().as_ref().map(|_| self.opened)
    }
}

impl<F: Fact> Drop for EagerSlot<F> {
    fn drop(&mut self) {
        // The last holder went away without finishing: a cancelled task, a crashed engine.
        let last = self.lock().as_ref().map(|state| state.last);
        if let Some(at) = last {
            self.close(at, true);
        }
        if let Some((sink, ticket)) = self.place.get() {
            sink.closed(*ticket);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::any::Any;
    use std::sync::Weak;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use crate::ids::InstanceId;
    use crate::time::Anchor;
    use crate::trace::config::TelemetryConfig;
    use crate::trace::eager::Eager;
    use crate::trace::fold::Form;
    use crate::trace::resource::Resource;
    use crate::trace::span::Kind;

    use super::*;

    struct Nothing;

    impl Fact for Nothing {
        type Fold<S: Form> = Only<S::Draft>;
    }

    struct Only<D>(D);

    impl<S: Form> Fold<Nothing, S> for Only<S::Draft> {
        fn begin(cx: &mut Cx<'_, S>) -> Self {
            Only(cx.outermost("only", Kind::Server))
        }
        fn fact(&mut self, _: &mut Cx<'_, S>, _: Time, _: &Nothing) {}
        fn end(self, cx: &mut Cx<'_, S>, _: &Ending) {
            cx.emit(self.0);
        }
    }

    #[derive(Default)]
    struct Counting {
        opened: AtomicUsize,
        closed: AtomicUsize,
    }

    impl Sink for Counting {
        fn accept(&self, _: Box<dyn Closed>) {}
        fn opened(&self, _: Weak<dyn Open>) -> Ticket {
            self.opened.fetch_add(1, Ordering::Relaxed);
            Ticket::NONE
        }
        fn closed(&self, _: Ticket) {
            self.closed.fetch_add(1, Ordering::Relaxed);
        }
        fn spare(&self, _: std::any::TypeId) -> Option<Box<dyn Any + Send>> {
            None
        }
    }

    #[test]
    fn every_place_among_the_open_records_is_given_back_once() {
        let config = TelemetryConfig::default();
        let eager = Eager::new(&config, Anchor::VIRTUAL, Arc::default(), &Arc::default()).unwrap();
        let (service, _) = eager.service(&Resource::new("test", "one"), InstanceId(0));
        let counting = Arc::new(Counting::default());
        let sink: Arc<dyn Sink> = counting.clone();
        let count = || (counting.opened.load(Ordering::Relaxed), counting.closed.load(Ordering::Relaxed));
        for n in 1..=3 {
            let ids = (TraceId::new(n).unwrap(), SpanId::new(1).unwrap());
            let opening = Opening { caller: Context::new(), ids, now: Time::ZERO, detail: 2, naming: Naming::Proposal };
            let (_, slot) = open::<Nothing>(&service, opening);
            slot.register(&sink);
            assert_eq!(count(), (n as usize, n as usize - 1));
            // Finished, abandoned by the worker, or dropped: the place is free once nobody holds it.
            match n {
                1 => slot.close(Time::ZERO, false),
                2 => drop(slot.abandon(Time::ZERO)),
                _ => {}
            }
            drop(slot);
            assert_eq!(count(), (n as usize, n as usize));
        }
    }
}
