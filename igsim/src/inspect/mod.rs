//! Reading traces back: which there are, how long they took, what is wrong with them, and their trees.

pub mod explain;
mod gist;
mod links;
pub mod render;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use shared::ids::TraceId;
use shared::time::{Dur, Time};
use shared::trace::{Kind, Span, Status, TraceSet};

pub use render::Style;

/// Name of the file of traces in the folder of a run.
pub const TRACES_FILE: &str = "traces.otlp.jsonl";

/// The file of traces that `path` names: itself, or the one in that folder.
pub fn traces_file(path: &Path) -> PathBuf {
    if path.is_dir() { path.join(TRACES_FILE) } else { path.to_path_buf() }
}

/// The traces of a set, each with its spans.
#[derive(Debug)]
pub struct Traces<'a> {
    set: &'a TraceSet,
    by_id: BTreeMap<TraceId, Vec<&'a Span>>,
}

/// One trace at a glance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overview {
    /// Its id.
    pub id: TraceId,
    /// From the first start to the last end.
    pub duration: Dur,
    /// How many spans it has.
    pub spans: usize,
    /// How many service instances took part.
    pub instances: usize,
    /// Whether a span failed.
    pub failed: bool,
}

impl<'a> Traces<'a> {
    /// Sorts the spans of `set` by trace.
    pub fn of(set: &'a TraceSet) -> Traces<'a> {
        let mut by_id: BTreeMap<TraceId, Vec<&Span>> = BTreeMap::new();
        for span in &set.spans {
            by_id.entry(span.trace_id).or_default().push(span);
        }
        Traces { set, by_id }
    }

    /// How many traces there are.
    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    /// All traces, slowest first.
    pub fn slowest(&self) -> Vec<Overview> {
        let mut all: Vec<Overview> = self.by_id.keys().map(|id| self.overview(*id)).collect();
        all.sort_by_key(|o| (std::cmp::Reverse(o.duration), o.id));
        all
    }

    /// Traces that a request caused; others have no span that answers or makes a call.
    pub fn of_requests(&self) -> impl Iterator<Item = TraceId> {
        let by_request = |spans: &[&Span]| spans.iter().any(|s| s.kind != Kind::Internal);
        self.by_id.iter().filter(move |(_, spans)| by_request(spans)).map(|(id, _)| *id)
    }

    /// The name of a trace's root, or of its first span if it has none.
    pub fn root_name(&self, id: TraceId) -> &str {
        let spans = self.spans(id);
        let root = spans.iter().find(|s| s.parent.is_none()).or(spans.first());
        root.map_or("", |s| &s.name)
    }

    /// Traces whose id starts with `prefix` (hexadecimal).
    pub fn starting_with(&self, prefix: &str) -> Vec<TraceId> {
        let prefix = prefix.to_ascii_lowercase();
        self.by_id.keys().copied().filter(|id| id.to_string().starts_with(&prefix)).collect()
    }

    /// The one trace whose id starts with `prefix`, of the file or folder `path`.
    ///
    /// # Errors
    /// If there is none, or more than one.
    pub fn named(&self, prefix: &str, path: &Path) -> Result<TraceId, String> {
        match self.starting_with(prefix).as_slice() {
            [id] => Ok(*id),
            [] => Err(format!("--trace {prefix}: no trace of {} has this id", path.display())),
            many => Err(format!("--trace {prefix}: {} traces start so, give more digits", many.len())),
        }
    }

    /// One trace at a glance.
    pub fn overview(&self, id: TraceId) -> Overview {
        let spans = self.spans(id);
        let start = spans.iter().map(|s| s.start).min().unwrap_or(Time::ZERO);
        let end = spans.iter().map(|s| s.end).max().unwrap_or(Time::ZERO);
        let instances: std::collections::BTreeSet<_> = spans.iter().map(|s| s.instance).collect();
        let failed = spans.iter().any(|s| matches!(s.status, Status::Error(_)));
        Overview { id, duration: end - start, spans: spans.len(), instances: instances.len(), failed }
    }

    /// The spans of one trace.
    pub fn spans(&self, id: TraceId) -> &[&'a Span] {
        self.by_id.get(&id).map_or(&[], Vec::as_slice)
    }

    /// One trace as text: a line about it, then its tree. `findings` is what the tree checks had to say.
    pub fn print(&self, id: TraceId, findings: usize, style: Style) -> String {
        let o = self.overview(id);
        let mut text = String::new();
        let _ = writeln!(
            text,
            "trace {id}  {}  {} spans  {} instances  {findings} findings{}",
            o.duration,
            o.spans,
            o.instances,
            if o.failed { "  failed" } else { "" }
        );
        text.push_str(&render::tree(self.spans(id), |span| self.place(span), style));
        links::write(self, id, &mut text);
        text
    }

    /// Service and instance of a span.
    fn place(&self, span: &Span) -> String {
        match self.set.resources.get(usize::from(span.instance.0)) {
            Some(r) if r.instance_id.is_empty() => r.service_name.to_string(),
            Some(r) => format!("{} {}", r.service_name, r.instance_id),
            None => String::new(),
        }
    }

    /// Where the time of a trace went: share of the whole for named spans, largest first.
    pub fn shares(&self, id: TraceId) -> Vec<(&'static str, f64)> {
        let spans = self.spans(id);
        let whole = self.overview(id).duration.as_nanos().max(1) as f64;
        let sum = |pick: &dyn Fn(&&&Span) -> bool| {
            spans.iter().filter(pick).map(|s| (s.end - s.start).as_nanos()).sum::<u64>() as f64 / whole
        };
        // A decode run says how long its tokens took; a prefill chunk has no such figure, whatever else was in its batch.
        let execute = |s: &Span| s.name == "vllm.executor.execute_model";
        let decodes = |s: &Span| s.get("vllm.token_latency.p50_ms").is_some();
        let decode = sum(&|s| execute(s) && decodes(s));
        let prefill = sum(&|s| execute(s) && !decodes(s));
        let queue = sum(&|s| s.name == "vllm.engine.queue");
        let engine = sum(&|s| s.name == "vllm.engine.request");
        if engine == 0.0 {
            // An engine that records nothing here: what is not the gateway cannot be told apart.
            return Vec::new();
        }
        let mut shares = vec![("decode", decode), ("queue", queue), ("prefill", prefill)];
        shares.push(("gateway and network", (1.0 - engine).max(0.0)));
        shares.sort_by(|a, b| b.1.total_cmp(&a.1));
        shares.retain(|(_, share)| *share >= 0.005);
        shares
    }
}
