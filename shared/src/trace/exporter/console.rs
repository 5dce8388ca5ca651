//! Spans as trees on a terminal, one tree when the root of a trace arrives.
//!
//! A trace whose root does not come is printed when too many traces wait, or at the end.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};

use crate::ids::TraceId;
use crate::time::Dur;
use crate::trace::exporter::{Batch, Exporter, Settled};
use crate::trace::resource::Resource;
use crate::trace::span::Span;
use crate::trace::stats::{ExporterCounters, Loss};
use crate::trace::tree::{Forest, Show};

/// The most traces that wait for their root.
const MAX_WAITING: usize = 256;

/// Where trees are printed.
#[derive(Clone)]
pub enum ConsoleTarget {
    /// Standard output.
    Stdout,
    /// Standard error, which leaves standard output to results.
    Stderr,
    /// Something else.
    Writer(Arc<Mutex<dyn Write + Send>>),
}

impl fmt::Debug for ConsoleTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ConsoleTarget::Stdout => "stdout",
            ConsoleTarget::Stderr => "stderr",
            ConsoleTarget::Writer(_) => "writer",
        })
    }
}

pub(crate) struct ConsoleExporter {
    target: ConsoleTarget,
    waiting: BTreeMap<TraceId, Vec<Span>>,
    resources: Arc<Vec<Arc<Resource>>>,
    counters: Arc<ExporterCounters>,
}

impl ConsoleExporter {
    pub(crate) fn new(target: ConsoleTarget) -> ConsoleExporter {
        let counters = Arc::new(ExporterCounters::new(format!("console {target:?}"), true));
        ConsoleExporter { target, waiting: BTreeMap::new(), resources: Arc::default(), counters }
    }

    fn print_all(&mut self) {
        for (_, spans) in std::mem::take(&mut self.waiting) {
            self.print(&spans);
        }
    }

    fn print(&self, spans: &[Span]) {
        let service = |span: &Span| match self.resources.get(usize::from(span.instance.0)) {
            Some(r) if r.instance_id.is_empty() => r.service_name.clone(),
            Some(r) => format!("{}/{}", r.service_name, r.instance_id),
            None => String::new(),
        };
        let tree = Forest::new(spans).text(Show { details: true, times: true, service: Some(&service) });
        let text = spans.first().map(|s| format!("trace {}\n{tree}\n", s.trace_id)).unwrap_or_default();
        match self.write(text.as_bytes()) {
            Ok(()) => {
                self.counters.exported(spans.len());
                self.counters.sent_bytes(text.len());
            }
            Err(error) => {
                self.counters.lost(Loss::ExportFailed, spans.len());
                self.counters.error(error.to_string());
            }
        }
    }

    fn write(&self, text: &[u8]) -> std::io::Result<()> {
        match &self.target {
            ConsoleTarget::Stdout => std::io::stdout().lock().write_all(text),
            ConsoleTarget::Stderr => std::io::stderr().lock().write_all(text),
            ConsoleTarget::Writer(writer) => writer.lock().unwrap_or_else(PoisonError::into_inner).write_all(text),
        }
    }
}

impl Exporter for ConsoleExporter {
    fn export(&mut self, batch: &Arc<Batch>) {
        self.resources = Arc::clone(&batch.resources);
        let mut complete = Vec::new();
        for span in &batch.spans {
            if span.parent.is_none() {
                complete.push(span.trace_id);
            }
            self.waiting.entry(span.trace_id).or_default().push(span.clone());
        }
        for trace_id in complete {
            if let Some(spans) = self.waiting.remove(&trace_id) {
                self.print(&spans);
            }
        }
        if self.waiting.len() > MAX_WAITING {
            self.print_all();
        }
    }
    fn flush(&mut self, _: Settled) {
        self.print_all();
    }
    fn stop(&mut self, _: Dur) {
        self.print_all();
    }
    fn join(&mut self) {}
    fn counters(&self) -> &Arc<ExporterCounters> {
        &self.counters
    }
}
