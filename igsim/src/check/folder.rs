//! What the folder of a run tells beside its traces: which traces it should have, who decided about them, which engines are somebody
//! else's, and what else was written there.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use shared::trace::{Naming, TraceSet};

use super::Found;
use crate::report::Report;
use crate::run::output::{REPORT_FILE, REQUESTS_FILE, SCENARIO_FILE};
use crate::scenario::Scenario;
use crate::stats::binomial_99;

/// Larger files are not searched for content, in bytes.
const MOST_BYTES: u64 = 1 << 30;

/// The folder of a run.
#[derive(Debug)]
pub struct Folder {
    dir: PathBuf,
    report: Option<Report>,
}

impl Folder {
    /// The folder `dir`; it need not be complete.
    pub fn open(dir: &Path) -> Folder {
        let report = std::fs::read_to_string(dir.join(REPORT_FILE)).ok();
        let report = report.and_then(|text| serde_json::from_str(&text).ok());
        Folder { dir: dir.to_path_buf(), report }
    }

    /// Whether it says how the run went, so that there is something to check even where no trace was kept.
    pub fn has_report(&self) -> bool {
        self.report.is_some()
    }

    /// Whose names the spans have, if the scenario says so.
    pub fn naming(&self) -> Option<Naming> {
        let loaded = shared::config::load::<Scenario>(&self.dir.join(SCENARIO_FILE), &[]).ok()?;
        loaded.config.tracing.naming.map(Into::into)
    }

    /// Engines of the scenario that are real servers: what they record is not in this folder.
    pub fn foreign_engines(&self) -> Vec<String> {
        let Ok(loaded) = shared::config::load::<Scenario>(&self.dir.join(SCENARIO_FILE), &[]) else {
            return Vec::new();
        };
        let groups = loaded.config.engines.iter().flat_map(|g| (0..g.count).map(move |_| g.url.is_some()));
        groups.enumerate().filter(|(_, foreign)| *foreign).map(|(i, _)| format!("engine-{i}")).collect()
    }

    /// Requests whose trace was to be kept and is not there, and callers who decided about all too many.
    ///
    /// # Errors
    /// If the table of requests is not what a run writes.
    pub fn against(&self, set: &TraceSet) -> Result<Vec<Found>, String> {
        let Some(report) = &self.report else { return Ok(Vec::new()) };
        let mut found: Vec<Found> = callers(report).into_iter().collect();
        let there: HashSet<String> = set.spans.iter().map(|s| s.trace_id.to_string()).collect();
        for trace in self.sampled()?.into_iter().filter(|trace| !there.contains(trace)) {
            found.push(Found {
                rule: "lost-trace",
                trace: Some(trace),
                span: None,
                name: String::new(),
                service: String::new(),
                detail: format!("the request was recorded ({REQUESTS_FILE}), its trace is not there"),
                help: "records or spans were dropped (the report counts them), or the file was cut",
            });
        }
        Ok(found)
    }

    /// Traces of requests that were recorded, by the table of requests.
    fn sampled(&self) -> Result<Vec<String>, String> {
        let path = self.dir.join(REQUESTS_FILE);
        let Ok(mut reader) = csv::Reader::from_path(&path) else { return Ok(Vec::new()) };
        let bad = |e: csv::Error| format!("{}: {e}", path.display());
        let headers = reader.headers().map_err(bad)?.clone();
        let column = |name: &str| headers.iter().position(|h| h == name);
        let (Some(trace), Some(sampled)) = (column("trace_id"), column("sampled")) else { return Ok(Vec::new()) };
        let mut traces = Vec::new();
        for record in reader.records() {
            let record = record.map_err(bad)?;
            if record.get(sampled) == Some("true") {
                traces.extend(record.get(trace).filter(|t| !t.is_empty()).map(str::to_owned));
            }
        }
        traces.sort();
        traces.dedup();
        Ok(traces)
    }

    /// Canaries in files: whatever is written into the folder is for other eyes, too. Files whose spans were searched already are left
    /// out with `but`.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn content(&self, canaries: &[String], but: Option<&Path>) -> Result<Vec<Found>, String> {
        let mut found = Vec::new();
        if canaries.is_empty() {
            return Ok(found);
        }
        let fail = |path: &Path, e: std::io::Error| format!("{}: {e}", path.display());
        let entries = std::fs::read_dir(&self.dir).map_err(|e| fail(&self.dir, e))?;
        let mut files: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
        files.sort();
        for path in files.iter().filter(|p| Some(p.as_path()) != but) {
            let plain = std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.len() <= MOST_BYTES);
            if !plain {
                continue;
            }
            let bytes = std::fs::read(path).map_err(|e| fail(path, e))?;
            for (i, _) in
                canaries.iter().enumerate().filter(|(_, c)| memchr::memmem::find(&bytes, c.as_bytes()).is_some())
            {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                found.push(in_file(i, &name));
            }
        }
        Ok(found)
    }
}

fn in_file(canary: usize, file: &str) -> Found {
    Found {
        rule: shared::trace::check::Rule::Content.name(),
        trace: None,
        span: None,
        name: String::new(),
        service: String::new(),
        detail: format!("canary {} is in the file {file}", canary + 1),
        help: shared::trace::check::Rule::Content.help(),
    }
}

/// Callers who bring a trace decide about it: where that changes how many are kept, their decision is not the run's.
fn callers(report: &Report) -> Option<Found> {
    let traces = &report.traces;
    let followed = report.sent.checked_sub(traces.decided).filter(|n| *n > 0)?;
    let (low, high) = binomial_99(report.sent, traces.ratio);
    let kept = traces.checked;
    (kept < low).then(|| Found {
        rule: "unsampled-caller",
        trace: None,
        span: None,
        name: String::new(),
        service: String::new(),
        detail: format!(
            "{followed} of {} requests came with a trace, whose sampling is the caller's decision; {kept} traces are kept where {low} \
             to {high} are expected",
            report.sent
        ),
        help: "callers send `traceparent` with flag 00, which suppresses the whole trace: let them sample, or gateway.trust_inbound: link",
    })
}
