//! A request's time in the gateway's queue: entering it, and waiting in it until it is taken out.

use shared::time::{Dur, Time};
use shared::trace::{Cx, Draft, Form, Inner, Kind};

use super::GatewayFold;
use crate::core::config::{FairnessPolicy, OrderingPolicy};

/// Why a request left the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dequeued {
    /// It was its turn.
    Dispatched,
    /// It waited as long as it may.
    Timeout,
    /// Its caller went away.
    Cancelled,
    /// The gateway stopped.
    ShutDown,
}

impl Dequeued {
    const fn as_str(self) -> &'static str {
        match self {
            Dequeued::Dispatched => "dispatched",
            Dequeued::Timeout => "timeout",
            Dequeued::Cancelled => "cancelled",
            Dequeued::ShutDown => "shutdown",
        }
    }
}

/// A pool that was too full.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hold {
    /// How full it was.
    pub saturation: f64,
    /// How full it may be.
    pub ceiling: f64,
}

/// What a fact says of a request that was taken out.
pub(super) struct Out<'f> {
    pub(super) waited: Dur,
    pub(super) fairness: FairnessPolicy,
    pub(super) ordering: OrderingPolicy,
    pub(super) result: Dequeued,
    pub(super) hold: Option<&'f Hold>,
}

impl<D: Draft> GatewayFold<D> {
    pub(super) fn enqueued<S: Form<Draft = D>>(
        &mut self,
        cx: &mut Cx<'_, S>,
        at: Time,
        flow: &std::sync::Arc<str>,
        position: Option<u32>,
        size: u32,
        ttl: Option<Dur>,
    ) {
        if let Some(director) = &mut self.director {
            director.set("gateway.queue.size", size);
        }
        let (priority, size_bytes) = self.asked;
        self.queue_span(cx, "gateway.flowcontrol.enqueue", at, |s| {
            s.set("gateway.flow_control.flow_id", flow).set("gateway.flow_control.priority_band", priority);
            s.set_some("gateway.queue.position", position).set("gateway.request.size_bytes", size_bytes);
            s.set_some("gateway.flow_control.ttl_ms", ttl.map(Dur::as_millis_f64));
        });
    }

    pub(super) fn dequeued<S: Form<Draft = D>>(&mut self, cx: &mut Cx<'_, S>, at: Time, out: &Out<'_>) {
        self.waited = out.waited;
        self.queue_span(cx, "gateway.flowcontrol.dispatch", at, |s| {
            s.set("gateway.flow_control.fairness_policy", out.fairness.name());
            s.set("gateway.flow_control.ordering_policy", out.ordering.name());
            s.set("gateway.queue.wait_ms", out.waited.as_millis_f64());
            s.set("gateway.flow_control.result", out.result.as_str());
            s.set_some("gateway.saturation", out.hold.map(|h| h.saturation));
            s.set_some("gateway.flow_control.ceiling", out.hold.map(|h| h.ceiling));
        });
    }

    /// A stage of the director, from the end of the stage before it until `at`; of level 2.
    fn queue_span<S: Form<Draft = D>>(
        &mut self,
        cx: &mut Cx<'_, S>,
        name: &'static str,
        at: Time,
        fill: impl FnOnce(&mut D),
    ) {
        let start = self.stage.min(at);
        self.stage = at;
        self.drawn += 1;
        if cx.head.detail < 2 {
            return;
        }
        let parent = self.director.as_ref().map_or(self.root.id(), D::id);
        let id = cx.head.inner_id(self.drawn - 1);
        let mut span = cx.inner(Inner { name, kind: Kind::Internal, parent, id, start, end: at });
        fill(&mut span);
        cx.emit(span);
    }
}
