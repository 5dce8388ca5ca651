//! After a run: what became of its traces.

use std::path::Path;

use shared::trace::check::{CheckOptions, Finding, Rule, check};
use shared::trace::registry::Registry;
use shared::trace::{Naming, Stats, TraceSet, otlp_json};

use crate::inspect::{Overview, Style, Traces};
use crate::report::{ExporterFigures, LetGo, TraceFigures};

/// The traces a run wrote, looked at.
#[derive(Debug)]
pub struct Looked {
    set: TraceSet,
    findings: Vec<Finding>,
}

impl Looked {
    /// Reads and checks the traces in `file`, whose spans have these names.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn at(file: &Path, naming: Naming) -> Result<Looked, otlp_json::ReadError> {
        let set = otlp_json::read_file(file)?;
        let registry = Registry::builtin().expect("a test proves that the embedded registry is sound");
        let mut findings = check(&set, &CheckOptions { registry: Some(&registry), ..CheckOptions::default() });
        if naming == Naming::LlmD {
            // That is how llm-d's sidecar has it, and no fault of this run; `igsim check` says so.
            findings.retain(|f| !(f.rule == Rule::EndedParent && f.span == "decode"));
        }
        Ok(Looked { set, findings })
    }

    /// The spans.
    pub fn into_set(self) -> TraceSet {
        self.set
    }

    /// What the checks found.
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// The slowest trace: a line on where its time went, and its tree.
    pub fn slowest(&self, style: Style) -> Option<(String, String)> {
        let traces = Traces::of(&self.set);
        let of_requests: std::collections::BTreeSet<_> = traces.of_requests().collect();
        let o: Overview = traces.slowest().into_iter().find(|o| of_requests.contains(&o.id))?;
        let shares: Vec<String> =
            traces.shares(o.id).iter().map(|(name, share)| format!("{:.0} % {name}", share * 100.0)).collect();
        let shares = if shares.is_empty() { String::new() } else { format!(": {}", shares.join(", ")) };
        let line = format!("Slowest    trace {} ({}){shares}", o.id, o.duration);
        let findings = self.findings.iter().filter(|f| f.trace_id == o.id).count();
        Some((line, traces.print(o.id, findings, style)))
    }

    fn count(&self, rules: &[Rule]) -> impl Iterator<Item = &Finding> {
        self.findings.iter().filter(move |f| rules.contains(&f.rule))
    }
}

/// A file by its name: where the folder of a run lies is no figure of it, and equal runs have equal reports (I6).
fn file_name(exporter: &str) -> String {
    let path = exporter.strip_prefix("file ").map(Path::new);
    path.and_then(Path::file_name).map_or_else(|| exporter.to_owned(), |name| format!("file {}", name.display()))
}

/// The figures of a report about traces.
pub fn figures(stats: &Stats, ratio: f64, looked: Option<&Looked>) -> TraceFigures {
    let exporters = stats.exporters.iter().map(|e| {
        let reasons = [
            ("queue_full", e.dropped.queue_full),
            ("export_failed", e.dropped.export_failed),
            ("shutdown", e.dropped.shutdown),
        ];
        ExporterFigures {
            name: file_name(&e.name),
            exported: e.exported,
            dropped: reasons.into_iter().filter(|(_, n)| *n > 0).map(|(k, n)| (k.to_owned(), n)).collect(),
            last_error: e.last_error.clone(),
        }
    });
    let mut figures = TraceFigures {
        ratio,
        decided: stats.traces_started,
        kept: stats.traces_sampled,
        kept_later: stats.traces_kept,
        let_go: LetGo {
            judged: stats.records_discarded,
            expired: stats.records_expired,
            evicted: stats.records_evicted,
        },
        records: stats.records_folded,
        records_dropped: stats.records_dropped,
        records_abandoned: stats.records_abandoned,
        malformed_contexts: stats.malformed_contexts,
        engine_steps: stats.own_traces_sampled,
        scrapes: stats.scrape_traces_sampled,
        kv_events: stats.kv_event_traces_sampled,
        spans_created: stats.spans_created,
        exporters: exporters.collect(),
        ..TraceFigures::default()
    };
    if let Some(looked) = looked {
        const SHAPE: &[Rule] = &[Rule::OneRoot, Rule::Orphan, Rule::Cycle];
        let broken: std::collections::BTreeSet<_> = looked.count(SHAPE).map(|f| f.trace_id).collect();
        figures.checked = Traces::of(&looked.set).of_requests().count() as u64;
        // A trace that was kept and is not there is as incomplete as one can be.
        let missing = (stats.traces_sampled + stats.traces_kept).saturating_sub(figures.checked);
        figures.incomplete = broken.len() as u64 + missing;
        figures.orphans = looked.count(&[Rule::Orphan]).count() as u64;
        figures.findings = looked.findings.len() as u64;
    }
    figures
}
