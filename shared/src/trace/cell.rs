//! A tracer that can be exchanged while requests are served.

use std::sync::Arc;

use arc_swap::ArcSwap;

use crate::trace::pipeline::Tracer;

/// Holds the tracer of a running server. A request takes the tracer once, when its head was read, and keeps it to its end.
#[derive(Debug)]
pub struct TracerCell(ArcSwap<Tracer>);

impl TracerCell {
    /// A cell that holds `tracer`.
    pub fn new(tracer: Tracer) -> Arc<TracerCell> {
        Arc::new(TracerCell(ArcSwap::from_pointee(tracer)))
    }

    /// The tracer of a request that begins now.
    #[inline]
    pub fn load(&self) -> Arc<Tracer> {
        self.0.load_full()
    }

    /// Exchanges the tracer, for requests that begin from now on.
    pub fn store(&self, tracer: Tracer) {
        self.0.store(Arc::new(tracer));
    }
}
