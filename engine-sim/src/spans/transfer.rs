//! Folds both sides of a transfer of KV cache: a client span in the record of the request that reads, and a server span that is the
//! sender's own record of the pull, with a link to the request that computed the blocks.

use shared::ids::SpanId;
use shared::time::Time;
use shared::trace::{Cx, Draft, Ending, Fact, Fold, Form, Inner, Kind, LinkTo, Naming};

use crate::core::facts::Pulled;
use crate::core::kv_transfer::{LinkKind, Peer, SendFact, TransferError};

/// The id of the client span of a request's pull: known before the pull is sent, since it travels with it.
pub const fn transfer_span_id(request: SpanId) -> SpanId {
    // Inner spans have the numbers from 0 on.
    request.derive(1 << 32)
}

/// The reader's side, as far as it is known when it starts.
pub(super) fn receive<S: Form>(
    cx: &mut Cx<'_, S>,
    request: SpanId,
    start: Time,
    peer: &Peer,
    blocks: u32,
    link: LinkKind,
) -> S::Draft {
    let id = transfer_span_id(request);
    let new = Inner { name: "vllm.kv_cache.transfer", kind: Kind::Client, parent: request, id, start, end: start };
    let mut span = cx.inner(new);
    span.set("vllm.kv_transfer.direction", "receive")
        .set("vllm.kv_transfer.protocol", link.as_str())
        .set("vllm.kv_transfer.blocks", blocks)
        .set("vllm.kv_transfer.peer", &peer.engine_id)
        .set("server.address", &peer.host)
        .set("server.port", peer.port);
    span
}

/// The reader's side, when it ended.
pub(super) fn received<D: Draft>(span: &mut D, end: Time, outcome: &Result<Pulled, TransferError>) {
    span.set_end(end);
    match outcome {
        Ok(moved) => figures(span, moved),
        Err(error) => {
            span.fail(error.as_str(), "the blocks could not be read");
        }
    }
}

fn figures<D: Draft>(span: &mut D, moved: &Pulled) {
    span.set("vllm.kv_transfer.bytes", moved.bytes)
        .set("vllm.kv_transfer.descriptors", moved.descriptors)
        .set("vllm.kv_transfer.bandwidth_bytes_per_second", moved.bandwidth);
}

impl Fact for SendFact {
    type Fold<S: Form> = SendFold<S::Draft>;

    fn stands_in(naming: Naming) -> bool {
        naming == Naming::Proposal
    }
}

/// The sender's side under construction.
pub struct SendFold<D> {
    span: D,
}

impl<S: Form> Fold<SendFact, S> for SendFold<S::Draft> {
    fn begin(cx: &mut Cx<'_, S>) -> Self {
        SendFold { span: cx.outermost("vllm.kv_cache.transfer", Kind::Server) }
    }

    fn fact(&mut self, _: &mut Cx<'_, S>, _: Time, fact: &SendFact) {
        let span = &mut self.span;
        match fact {
            SendFact::Asked { blocks, link, peer } => {
                span.set("vllm.kv_transfer.direction", "send")
                    .set("vllm.kv_transfer.protocol", link.as_str())
                    .set("vllm.kv_transfer.blocks", *blocks)
                    .set("vllm.kv_transfer.peer", peer)
                    // Whoever asked may be gone before the last block is sent; the sender does not learn of it.
                    .set("vllm.late", true);
            }
            SendFact::Computed(trace_id, span_id) => {
                span.link(&LinkTo { trace_id: *trace_id, span_id: *span_id }, &[]);
            }
            SendFact::Sending(transfer) => figures(span, &transfer.into()),
            SendFact::Failed(error) => {
                span.fail(error.as_str(), "the blocks could not be sent");
            }
        }
    }

    fn end(mut self, cx: &mut Cx<'_, S>, ending: &Ending) {
        self.span.set_end(ending.closed);
        if ending.abandoned && !self.span.failed() {
            self.span.fail("abandoned", "the engine stopped before the last block was sent");
        }
        cx.emit(self.span);
    }
}
