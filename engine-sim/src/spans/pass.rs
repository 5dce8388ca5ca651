//! What the spans of a request and those of a step say alike of a scheduling pass.

use shared::trace::Draft;

/// Blocks of a pass, for `vllm.scheduler.allocate_blocks`.
pub(super) struct Allocation {
    pub(super) allocated: u32,
    pub(super) freed: u32,
    pub(super) evicted: u32,
    pub(super) hit: u32,
}

impl Allocation {
    pub(super) fn tell(&self, span: &mut impl Draft) {
        span.set("vllm.allocation.blocks_allocated", self.allocated)
            .set("vllm.allocation.blocks_freed", self.freed)
            .set("vllm.allocation.blocks_evicted", self.evicted)
            .set("vllm.prefix_cache.hit", self.hit > 0)
            .set("vllm.prefix_cache.blocks_reused", self.hit);
    }
}

/// What a batch is made of, for `vllm.scheduler.create_batch`.
pub(super) struct Composition {
    pub(super) prefill_seqs: u32,
    pub(super) decode_seqs: u32,
    pub(super) prefill_tokens: u32,
}

impl Composition {
    pub(super) fn tell(&self, span: &mut impl Draft) {
        span.set("vllm.batch.size", self.prefill_seqs + self.decode_seqs)
            .set("vllm.batch.total_tokens", self.prefill_tokens + self.decode_seqs)
            .set("vllm.batch.prefill_tokens", self.prefill_tokens)
            .set("vllm.batch.decode_tokens", self.decode_seqs);
    }
}
