//! The arrival of a request: its headers, its body (detail 3).

use shared::ids::SpanId;
use shared::time::Time;
use shared::trace::{Cx, Draft, Form, Inner, Kind};

use super::GatewayFold;

/// Keeps the ids of these two apart from those of other inner spans, which are the same at every detail.
const ARRIVAL_SPANS: u64 = 1 << 34;

/// A body as far as it came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arrived {
    /// Pieces.
    pub chunks: u32,
    /// Bytes.
    pub bytes: u64,
}

impl<D: Draft> GatewayFold<D> {
    /// The headers were judged from the request's beginning until `at`.
    pub(super) fn headers_read<S: Form<Draft = D>>(
        &mut self,
        cx: &mut Cx<'_, S>,
        at: Time,
        count: Option<u32>,
        metadata: bool,
    ) {
        let mut span = self.arrival(cx, "gateway.request.headers", 0, at);
        span.set_some("gateway.header.count", count).set("gateway.metadata.extracted", metadata);
        cx.emit(span);
    }

    /// The body was read from then on until `at`.
    pub(super) fn body_read<S: Form<Draft = D>>(
        &mut self,
        cx: &mut Cx<'_, S>,
        at: Time,
        arrived: Arrived,
        parsed: bool,
    ) {
        let mut span = self.arrival(cx, "gateway.request.body", 1, at);
        let bytes = i64::try_from(arrived.bytes).unwrap_or(i64::MAX);
        span.set("gateway.body.chunks", arrived.chunks).set("gateway.body.total_bytes", bytes);
        span.set("gateway.body.parsed", parsed);
        cx.emit(span);
    }

    fn arrival<S: Form<Draft = D>>(&mut self, cx: &mut Cx<'_, S>, name: &'static str, nth: u64, at: Time) -> D {
        let start = std::mem::replace(&mut self.stage, at);
        let (parent, kind) = (self.root.id(), Kind::Internal);
        let id: SpanId = cx.head.span_id.derive(ARRIVAL_SPANS + nth);
        cx.inner(Inner { name, kind, parent, id, start, end: at })
    }
}
