//! Traces held against the rules: those of a run, of a file, or of a Tempo.
//!
//! The rules of traces are [`shared::trace::check`]; what is found here in addition is what only the folder of a run can tell.
//! Nothing here prints.

mod folder;
pub mod tempo;
mod text;

use serde::Serialize;
use shared::trace::check::{AuditOptions, CheckOptions, Finding, audit};
use shared::trace::registry::Registry;
use shared::trace::{Naming, TraceSet};
use shared::units::HumanDur;

pub use folder::Folder;
pub use text::text;

/// What the user asked for.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Whose names the spans have; `None` leaves that to the folder of the run.
    pub naming: Option<Naming>,
    /// How far clocks of hosts may differ.
    pub clock_tolerance: HumanDur,
    /// Services, endpoints and addresses that record nothing here.
    pub uninstrumented: Vec<String>,
    /// Texts that must not be in telemetry.
    pub canaries: Vec<String>,
}

/// A broken rule, with whose it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Found {
    /// The rule's name.
    pub rule: &'static str,
    /// The trace; absent if a run as a whole is at fault.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace: Option<String>,
    /// The span; absent if the trace as a whole is at fault.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub span: Option<String>,
    /// The span's name.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// Service and instance of the span.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub service: String,
    /// What was found.
    pub detail: String,
    /// What usually causes it.
    pub help: &'static str,
}

/// What was looked at, and what came out.
#[derive(Clone, Debug, Serialize)]
pub struct Checked {
    /// Where the traces came from.
    pub source: String,
    /// How many.
    pub traces: usize,
    /// Their spans.
    pub spans: usize,
    /// Service instances that have spans.
    pub instances: usize,
    /// Whether a file's last line was cut off and left out.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub truncated: bool,
    /// What is wrong, ordered by trace.
    pub findings: Vec<Found>,
}

/// Checks `set`, which came from `source`.
///
/// # Panics
/// If the embedded registry cannot be read, which a test rules out.
pub fn check(set: &TraceSet, source: String, options: &Options) -> Checked {
    let registry = Registry::builtin().expect("a test proves that the embedded registry is sound");
    let options = AuditOptions {
        check: CheckOptions { registry: Some(&registry), clock_tolerance: options.clock_tolerance.get() },
        naming: options.naming.unwrap_or_default(),
        uninstrumented: &options.uninstrumented,
        canaries: &options.canaries,
    };
    let places = Places::of(set);
    let findings = audit(set, &options).into_iter().map(|f| places.found(f)).collect();
    let (traces, instances) = places.counts();
    let truncated = set.truncated;
    Checked { source, traces, spans: set.spans.len(), instances, truncated, findings }
}

/// Which service every span of a set belongs to.
struct Places<'a> {
    set: &'a TraceSet,
    by_id: std::collections::HashMap<(shared::ids::TraceId, shared::ids::SpanId), shared::ids::InstanceId>,
}

impl<'a> Places<'a> {
    fn of(set: &'a TraceSet) -> Places<'a> {
        Places { set, by_id: set.spans.iter().map(|s| ((s.trace_id, s.span_id), s.instance)).collect() }
    }

    fn found(&self, finding: Finding) -> Found {
        let Finding { trace_id, span_id, span, rule, detail } = finding;
        let instance = span_id.and_then(|id| self.by_id.get(&(trace_id, id)));
        let service = instance.and_then(|i| self.set.resource(*i)).map(|r| match r.instance_id.as_str() {
            "" => r.service_name.clone(),
            instance => format!("{} {instance}", r.service_name),
        });
        Found {
            rule: rule.name(),
            trace: Some(trace_id.to_string()),
            span: span_id.map(|id| id.to_string()),
            name: span,
            service: service.unwrap_or_default(),
            detail,
            help: rule.help(),
        }
    }

    /// Traces, and instances that have spans.
    fn counts(&self) -> (usize, usize) {
        let traces: std::collections::HashSet<_> = self.set.spans.iter().map(|s| s.trace_id).collect();
        let instances: std::collections::HashSet<_> = self.set.spans.iter().map(|s| s.instance).collect();
        (traces.len(), instances.len())
    }
}

impl Checked {
    /// Adds what was found elsewhere than in spans.
    pub fn extend(&mut self, more: impl IntoIterator<Item = Found>) {
        self.findings.extend(more);
    }
}
