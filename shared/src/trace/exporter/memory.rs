//! Spans kept in memory, for tests and for reports of virtual runs.

use std::sync::{Arc, Mutex, PoisonError};

use crate::time::{Anchor, Dur};
use crate::trace::exporter::{Batch, Exporter, Settled};
use crate::trace::set::TraceSet;
use crate::trace::stats::ExporterCounters;

/// A handle on spans in memory: one copy in the configuration, another with whoever reads them.
#[derive(Clone, Debug, Default)]
pub struct MemorySpans(Arc<Mutex<Option<TraceSet>>>);

impl MemorySpans {
    /// Takes what was exported so far.
    pub fn take(&self) -> TraceSet {
        let mut set = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        set.take().unwrap_or_else(|| TraceSet::new(Anchor::VIRTUAL))
    }
}

pub(crate) struct MemoryExporter {
    spans: MemorySpans,
    counters: Arc<ExporterCounters>,
}

impl MemoryExporter {
    pub(crate) fn new(spans: MemorySpans) -> MemoryExporter {
        MemoryExporter { spans, counters: Arc::new(ExporterCounters::new("memory".to_owned(), false)) }
    }
}

impl Exporter for MemoryExporter {
    fn export(&mut self, batch: &Arc<Batch>) {
        let mut set = self.spans.0.lock().unwrap_or_else(PoisonError::into_inner);
        let set = set.get_or_insert_with(|| TraceSet::new(batch.anchor));
        set.resources = batch.resources.iter().map(|r| (**r).clone()).collect();
        set.spans.extend_from_slice(&batch.spans);
        self.counters.exported(batch.len);
    }
    fn flush(&mut self, _: Settled) {}
    fn stop(&mut self, _: Dur) {}
    fn join(&mut self) {}
    fn counters(&self) -> &Arc<ExporterCounters> {
        &self.counters
    }
}
