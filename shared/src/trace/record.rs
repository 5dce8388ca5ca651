//! Records: the facts of one sampled request in one service, until they are folded into spans.
//!
//! A record is bounded and owns no content. It is shared between the parts of a service that see the request (core, server
//! task) and a table of open records, so that an abandoned one can be folded as far as it got.

use std::any::{Any, TypeId};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::ids::{InstanceId, SpanId, TraceId};
use crate::time::Time;
use crate::trace::context::TraceContext;
use crate::trace::eager::EagerSlot;
use crate::trace::fold::{self, Fold, Form};
use crate::trace::naming::Naming;
use crate::trace::otlp_bytes::Encoder;
use crate::trace::span::Span;

/// The most facts a record holds; further ones are counted on the root span.
pub const MAX_FACTS: usize = 256;
/// The most bytes of facts a record holds. Facts own no heap data but shared names, so this bounds their size; at the finest detail some own
/// a list with a bound of its own.
pub const MAX_BYTES: usize = 16 * 1024;

/// Room kept for facts that say how a request ended.
const RESERVED: usize = 16;

/// Facts of one component. Its [`Fold`] is the one place where that component's span names and attributes are set.
pub trait Fact: Sized + Send + 'static {
    /// The fold of these facts, into any form.
    type Fold<S: Form>: Fold<Self, S> + Send + 'static;

    /// Whether spans are made of these facts under a naming; if not, they are not recorded under it.
    fn stands_in(_: Naming) -> bool {
        true
    }

    /// Whether the fact says how the request ended: such facts find room in a record that is otherwise full.
    fn is_final(&self) -> bool {
        false
    }

    /// Whether later notes may amend the fact ([`Trail::amend`]): a recorder that folds at once holds it back meanwhile.
    fn is_amendable(&self) -> bool {
        false
    }

    /// Whether no note after this fact amends one from before it.
    fn settles(&self) -> bool {
        false
    }

    /// How many facts a record may have already for this one to find room.
    fn room(&self) -> usize {
        let reserved = if self.is_final() { 0 } else { RESERVED };
        Record::<Self>::CAPACITY - reserved
    }
}

/// What a record knows from the start.
#[derive(Clone, Debug)]
pub struct Head {
    /// The trace.
    pub trace_id: TraceId,
    /// The id of the service's outermost span, drawn before anything is sent.
    pub span_id: SpanId,
    /// The caller's span, if there is one.
    pub parent: Option<SpanId>,
    /// The W3C trace state.
    pub tracestate: Option<Arc<str>>,
    /// The service instance.
    pub instance: InstanceId,
    /// When the outermost span starts.
    pub opened: Time,
    /// How much to fold: 1 lifecycle, 2 decisions, 3 fine.
    pub detail: u8,
    /// Whose names its spans have.
    pub naming: Naming,
}

impl Head {
    /// The id of the `n`-th inner span; `n` starts at 0.
    pub fn inner_id(&self, n: usize) -> SpanId {
        self.span_id.derive(n as u64)
    }
}

/// The facts of one request, in the order in which they were noted.
#[derive(Debug)]
pub struct Record<F> {
    /// Identity of the record.
    pub head: Head,
    /// Facts with their times.
    pub facts: Vec<(Time, F)>,
    /// How many facts did not fit.
    pub cut: u32,
    /// When the record was closed.
    pub closed: Time,
    /// Whether nobody finished it: deadline, shutdown, panic or crash.
    pub abandoned: bool,
    /// Whether it is worth nothing before the edge has judged.
    pub candidate: bool,
}

impl<F: Fact> Record<F> {
    /// An open record, in the room of an emptied one if there is one.
    fn begin(head: Head, candidate: bool, spare: Option<Box<dyn Any + Send>>) -> Box<Record<F>> {
        match spare.and_then(|spare| spare.downcast::<Record<F>>().ok()) {
            Some(mut record) => {
                let facts = std::mem::take(&mut record.facts);
                *record = Record { closed: head.opened, head, facts, cut: 0, abandoned: false, candidate };
                record
            }
            None => {
                let facts = Vec::with_capacity(32);
                Box::new(Record { closed: head.opened, head, facts, cut: 0, abandoned: false, candidate })
            }
        }
    }
}

impl<F> Record<F> {
    /// How it ended.
    pub fn ending(&self) -> Ending {
        Ending { closed: self.closed, abandoned: self.abandoned, cut: self.cut }
    }

    const CAPACITY: usize = {
        let fit = MAX_BYTES / size_of::<(Time, F)>();
        if fit < MAX_FACTS { fit } else { MAX_FACTS }
    };
}

/// How a record ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ending {
    /// When it was closed.
    pub closed: Time,
    /// Whether nobody finished it.
    pub abandoned: bool,
    /// How many facts did not fit.
    pub cut: u32,
}

/// A closed record of any component, ready to be folded.
pub trait Closed: Send {
    /// Its identity.
    fn head(&self) -> &Head;
    /// How it ended.
    fn ending(&self) -> Ending;
    /// Folds it into spans.
    fn fold(&self, out: &mut Vec<Span>);
    /// Folds it into OTLP protobuf.
    fn encode(&self, out: &mut Encoder);
    /// The record without its facts, for [`Sink::spare`].
    fn emptied(self: Box<Self>) -> Box<dyn Any + Send>;
    /// Whether it is held until the edge has judged.
    fn is_candidate(&self) -> bool {
        false
    }
    /// What it takes in memory, without what few facts own besides.
    fn bytes(&self) -> usize {
        MAX_BYTES
    }
}

impl<F: Fact> Closed for Record<F> {
    fn head(&self) -> &Head {
        &self.head
    }
    fn ending(&self) -> Ending {
        Record::ending(self)
    }
    fn fold(&self, out: &mut Vec<Span>) {
        fold::fold(self, out);
    }
    fn encode(&self, out: &mut Encoder) {
        fold::fold(self, out);
    }
    fn emptied(mut self: Box<Self>) -> Box<dyn Any + Send> {
        self.facts.clear();
        self
    }
    fn is_candidate(&self) -> bool {
        self.candidate
    }
    fn bytes(&self) -> usize {
        size_of::<Record<F>>() + self.facts.capacity() * size_of::<(Time, F)>()
    }
}

/// An open record of any component, as the table of open records sees it.
pub trait Open: Send + Sync {
    /// Closes it as abandoned; `None` if it was closed meanwhile.
    fn abandon(&self, now: Time) -> Option<Box<dyn Closed>>;
    /// When it was opened; `None` if it was closed meanwhile.
    fn opened(&self) -> Option<Time>;
}

/// Where closed records go. Nothing here blocks.
pub trait Sink: Send + Sync {
    /// Takes a closed record, or drops and counts it.
    fn accept(&self, record: Box<dyn Closed>);
    /// Registers an open record for the clean-up of stale ones. It cannot be upgraded before this returns.
    fn opened(&self, record: Weak<dyn Open>) -> Ticket;
    /// Takes back the registration of a record that was closed.
    fn closed(&self, ticket: Ticket);
    /// Takes a closed record of a candidate on which the edge has judged: that it is kept, or that nobody wants it.
    fn judged(&self, record: Box<dyn Closed>, kept: bool) {
        if kept {
            self.accept(record);
        }
    }
    /// Releases what the service instance holds of these traces, and what it closes of them later.
    fn keep(&self, _instance: InstanceId, _traces: Vec<TraceId>) {}
    /// An emptied record of the type `kind`, if one was kept.
    fn spare(&self, _kind: TypeId) -> Option<Box<dyn Any + Send>> {
        None
    }
}

/// The registration of an open record with its [`Sink`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket(u32);

impl Ticket {
    /// Of a sink that registers nothing.
    pub const NONE: Ticket = Ticket(u32::MAX);

    /// The ticket with this index.
    pub(crate) fn of(index: usize) -> Ticket {
        Ticket(u32::try_from(index).unwrap_or(u32::MAX))
    }

    pub(crate) const fn index(self) -> usize {
        self.0 as usize
    }
}

struct Slot<F: Fact> {
    detail: u8,
    candidate: bool,
    record: Mutex<Option<Box<Record<F>>>>,
    sink: Arc<dyn Sink>,
    ticket: Ticket,
}

impl<F: Fact> Slot<F> {
    fn lock(&self) -> MutexGuard<'_, Option<Box<Record<F>>>> {
        // A panic while a fact is noted leaves the record as it was before: still worth folding.
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self, now: Time, abandoned: bool) -> Option<Box<Record<F>>> {
        let mut record = self.lock().take()?;
        self.sink.closed(self.ticket);
        record.closed = now;
        record.abandoned = abandoned;
        Some(record)
    }
}

impl<F: Fact> Open for Slot<F> {
    fn abandon(&self, now: Time) -> Option<Box<dyn Closed>> {
        Some(self.close(now, true)?)
    }
    fn opened(&self) -> Option<Time> {
        self.lock().as_ref().map(|r| r.head.opened)
    }
}

impl<F: Fact> Drop for Slot<F> {
    fn drop(&mut self) {
        // The last holder went away without finishing: a cancelled task, a crashed engine.
        let last = self.lock().as_ref().map(|r| r.facts.last().map_or(r.head.opened, |(at, _)| *at));
        if let Some(record) = last.and_then(|at| self.close(at, true)) {
            self.sink.accept(record);
        }
    }
}

/// A handle on a request's record, or nothing at all for a request whose facts nobody wants. Clones share the record.
pub struct Trail<F: Fact>(Recorder<F>);

/// How a request's facts are recorded.
enum Recorder<F: Fact> {
    Off,
    Deferred(Arc<Slot<F>>),
    Eager(Arc<EagerSlot<F>>),
}

impl<F: Fact> Trail<F> {
    /// The trail of a request that is not recorded.
    pub const fn off() -> Trail<F> {
        Trail(Recorder::Off)
    }

    /// Opens a record that will be closed into `sink`.
    pub fn open(head: Head, sink: &Arc<dyn Sink>) -> Trail<F> {
        Trail::begin(head, false, sink)
    }

    /// Opens a record that is worth nothing before the edge has judged ([`Trail::judged`], [`Sink::keep`]).
    pub fn open_candidate(head: Head, sink: &Arc<dyn Sink>) -> Trail<F> {
        Trail::begin(head, true, sink)
    }

    fn begin(head: Head, candidate: bool, sink: &Arc<dyn Sink>) -> Trail<F> {
        let detail = head.detail;
        let record = Record::begin(head, candidate, sink.spare(TypeId::of::<Record<F>>()));
        let slot = Arc::new_cyclic(|slot: &Weak<Slot<F>>| {
            let ticket = sink.opened(slot.clone());
            Slot { detail, candidate, record: Mutex::new(Some(record)), sink: Arc::clone(sink), ticket }
        });
        Trail(Recorder::Deferred(slot))
    }

    /// The trail of a request that the SDK's spans follow.
    pub(crate) fn eager(slot: Arc<EagerSlot<F>>) -> Trail<F> {
        Trail(Recorder::Eager(slot))
    }

    /// Whether notes have an effect. True for every request of the eager recorder, whose spans exist without being recorded.
    #[inline]
    pub const fn is_on(&self) -> bool {
        !matches!(self.0, Recorder::Off)
    }

    /// Whether what is noted will be seen: whether it is worth working for.
    #[inline]
    pub fn is_recording(&self) -> bool {
        match &self.0 {
            Recorder::Off => false,
            Recorder::Deferred(_) => true,
            Recorder::Eager(slot) => slot.is_recording(),
        }
    }

    /// Whether what is noted is held until the edge has judged.
    pub fn is_candidate(&self) -> bool {
        matches!(&self.0, Recorder::Deferred(slot) if slot.candidate)
    }

    /// How much is folded, 1 to 3, or 0 if nothing is: whether a fact that only a finer level shows is worth noting.
    #[inline]
    pub fn detail(&self) -> u8 {
        match &self.0 {
            Recorder::Off => 0,
            Recorder::Deferred(slot) => slot.detail,
            Recorder::Eager(slot) => slot.detail(),
        }
    }

    /// Records a fact; the closure runs only if [`Trail::is_on`].
    // All of an unrecorded request's sites: a comparison and a branch, whatever the compiler thinks of the rest.
    #[inline(always)]
    pub fn note(&self, at: Time, fact: impl FnOnce() -> F) {
        if self.is_on() {
            self.noted(at, fact);
        }
    }

    /// Records a fact that adds to spans and makes none; the closure runs only if [`Trail::is_recording`].
    #[inline(always)]
    pub fn annotate(&self, at: Time, fact: impl FnOnce() -> F) {
        if self.is_on() {
            self.annotated(at, fact);
        }
    }

    /// Changes the newest fact that `pick` accepts, or records a new one: how runs of tokens stay one fact.
    #[inline(always)]
    pub fn amend<R>(&self, at: Time, pick: impl FnMut(&mut F) -> Option<R>, fact: impl FnOnce() -> F) {
        if self.is_on() {
            self.amended(at, pick, fact);
        }
    }

    #[inline(never)]
    fn noted(&self, at: Time, fact: impl FnOnce() -> F) {
        match &self.0 {
            Recorder::Off => {}
            Recorder::Deferred(slot) => note(slot, at, fact()),
            Recorder::Eager(slot) => slot.note(at, fact()),
        }
    }

    #[inline(never)]
    fn annotated(&self, at: Time, fact: impl FnOnce() -> F) {
        if self.is_recording() {
            self.noted(at, fact);
        }
    }

    #[inline(never)]
    fn amended<R>(&self, at: Time, pick: impl FnMut(&mut F) -> Option<R>, fact: impl FnOnce() -> F) {
        let slot = match &self.0 {
            Recorder::Off => return,
            Recorder::Deferred(slot) => slot,
            Recorder::Eager(slot) => return slot.amend(at, pick, fact),
        };
        let found =
            slot.lock().as_mut().is_some_and(|r| r.facts.iter_mut().rev().map(|(_, f)| f).find_map(pick).is_some());
        if !found {
            note(slot, at, fact());
        }
    }

    /// The trace and the outermost span, if recorded and still open.
    pub fn ids(&self) -> Option<(TraceId, SpanId)> {
        match &self.0 {
            Recorder::Off => None,
            Recorder::Deferred(slot) => slot.lock().as_ref().map(|r| (r.head.trace_id, r.head.span_id)),
            Recorder::Eager(slot) => slot.ids(),
        }
    }

    /// What a call made for this request carries, but for the span: the outermost one stands in its place. `None` if the request
    /// is not recorded, or closed.
    pub fn context(&self) -> Option<TraceContext> {
        let of = |trace_id, span_id, tracestate| TraceContext {
            trace_id,
            span_id,
            sampled: !self.is_candidate(),
            random: false,
            tracestate,
        };
        match &self.0 {
            Recorder::Off => None,
            Recorder::Deferred(slot) => {
                slot.lock().as_ref().map(|r| of(r.head.trace_id, r.head.span_id, r.head.tracestate.clone()))
            }
            Recorder::Eager(slot) => slot.ids().filter(|_| slot.is_recording()).map(|(t, s)| of(t, s, None)),
        }
    }

    /// The facts noted so far, while the record is open: for tests and benches. The eager recorder keeps none.
    pub fn facts(&self) -> Vec<(Time, F)>
    where
        F: Clone,
    {
        match &self.0 {
            Recorder::Deferred(slot) => slot.lock().as_ref().map(|r| r.facts.clone()).unwrap_or_default(),
            Recorder::Off | Recorder::Eager(_) => Vec::new(),
        }
    }

    /// Closes the record at `now` and hands it to the pipeline. Later notes by other holders are ignored.
    pub fn finish(self, now: Time) {
        match &self.0 {
            Recorder::Off => {}
            Recorder::Deferred(slot) => {
                if let Some(record) = slot.close(now, false) {
                    slot.sink.accept(record);
                }
            }
            Recorder::Eager(slot) => slot.close(now, false),
        }
    }
}

impl<F: Fact> Trail<F> {
    /// Closes the record of a candidate at its edge: it goes to the pipeline if it is kept, and nowhere else. One of a request that
    /// is sampled goes there in any case.
    pub fn judged(self, now: Time, kept: bool) {
        let candidate = match &self.0 {
            Recorder::Deferred(slot) if slot.candidate => slot,
            Recorder::Off | Recorder::Deferred(_) | Recorder::Eager(_) => return self.finish(now),
        };
        if let Some(mut record) = candidate.close(now, false) {
            record.candidate = false;
            candidate.sink.judged(record, kept);
        }
    }
}

fn note<F: Fact>(slot: &Slot<F>, at: Time, fact: F) {
    if let Some(record) = slot.lock().as_mut() {
        if record.facts.len() < fact.room() {
            record.facts.push((at, fact));
        } else {
            record.cut += 1;
        }
    }
}

impl<F: Fact> Clone for Trail<F> {
    fn clone(&self) -> Self {
        Trail(match &self.0 {
            Recorder::Off => Recorder::Off,
            Recorder::Deferred(slot) => Recorder::Deferred(Arc::clone(slot)),
            Recorder::Eager(slot) => Recorder::Eager(Arc::clone(slot)),
        })
    }
}

impl<F: Fact> Default for Trail<F> {
    fn default() -> Self {
        Trail::off()
    }
}

impl<F: Fact> std::fmt::Debug for Trail<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Trail({:?})", self.ids())
    }
}

/// A sink for tests: folds every record at once and keeps the spans.
#[derive(Default)]
pub struct Folded(Mutex<Vec<Span>>);

impl Folded {
    /// The spans folded so far.
    pub fn take(&self) -> Vec<Span> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Sink for Folded {
    fn accept(&self, record: Box<dyn Closed>) {
        record.fold(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
    fn opened(&self, _: Weak<dyn Open>) -> Ticket {
        Ticket::NONE
    }
    fn closed(&self, _: Ticket) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::fold::{Cx, Draft};
    use crate::trace::span::Kind;

    struct Tick(u32);
    impl Tick {
        const FINAL: u32 = 999_999;
    }
    impl Fact for Tick {
        type Fold<S: Form> = Ticks;
        fn is_final(&self) -> bool {
            self.0 == Tick::FINAL
        }
    }
    struct Ticks {
        count: u32,
        last: Option<u32>,
    }
    impl<S: Form> Fold<Tick, S> for Ticks {
        fn begin(_: &mut Cx<'_, S>) -> Ticks {
            Ticks { count: 0, last: None }
        }
        fn fact(&mut self, _: &mut Cx<'_, S>, _: Time, fact: &Tick) {
            self.count += 1;
            self.last = Some(fact.0);
        }
        fn end(self, cx: &mut Cx<'_, S>, ending: &Ending) {
            let mut root = cx.outermost("root", Kind::Server);
            root.set_end(ending.closed);
            root.set("facts", self.count).set("cut", ending.cut).set("abandoned", ending.abandoned);
            root.set_some("last", self.last);
            cx.emit(root);
        }
    }

    fn head() -> Head {
        let ids = (TraceId::new(1).unwrap(), SpanId::new(2).unwrap());
        let opened = Time::from_nanos(10);
        Head {
            trace_id: ids.0,
            span_id: ids.1,
            parent: None,
            tracestate: None,
            instance: InstanceId(0),
            opened,
            detail: 2,
            naming: Naming::Proposal,
        }
    }

    fn run(work: impl FnOnce(Trail<Tick>)) -> Vec<Span> {
        let folded = Arc::new(Folded::default());
        let sink: Arc<dyn Sink> = folded.clone();
        work(Trail::open(head(), &sink));
        folded.take()
    }

    #[test]
    fn a_finished_record_is_folded_once() {
        let spans = run(|t| {
            let other = t.clone();
            t.note(Time::from_nanos(11), || Tick(7));
            t.finish(Time::from_nanos(12));
            other.note(Time::from_nanos(13), || Tick(8));
            other.finish(Time::from_nanos(14));
        });
        assert_eq!(spans.len(), 1);
        assert_eq!((spans[0].end, spans[0].get("last")), (Time::from_nanos(12), Some(&Value::Int(7))));
    }

    #[test]
    fn a_dropped_record_is_abandoned_at_its_last_fact() {
        let spans = run(|t| t.note(Time::from_nanos(11), || Tick(7)));
        assert_eq!((spans[0].end, spans[0].get("abandoned")), (Time::from_nanos(11), Some(&Value::Bool(true))));
    }

    #[test]
    fn a_record_is_bounded_and_counts_what_is_cut() {
        let spans = run(|t| {
            (0..1000).for_each(|i| t.note(Time::from_nanos(11), || Tick(i)));
            t.finish(Time::from_nanos(12));
        });
        assert_eq!(spans[0].get("facts"), Some(&Value::Int(240)));
        assert_eq!(spans[0].get("cut"), Some(&Value::Int(760)));
    }

    #[test]
    fn a_full_record_still_learns_how_the_request_ended() {
        let spans = run(|t| {
            (0..1000).for_each(|i| t.note(Time::from_nanos(11), || Tick(i)));
            t.note(Time::from_nanos(12), || Tick(Tick::FINAL));
            t.finish(Time::from_nanos(12));
        });
        assert_eq!(spans[0].get("last"), Some(&Value::Int(i64::from(Tick::FINAL))));
    }

    #[test]
    fn an_unrecorded_request_builds_no_fact() {
        Trail::<Tick>::off().note(Time::ZERO, || unreachable!("the closure must not run"));
    }

    use crate::trace::span::Value;
}
