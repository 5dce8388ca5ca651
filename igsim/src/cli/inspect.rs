//! `igsim inspect`.

use std::fmt::Write as _;
use std::io::IsTerminal;

use shared::trace::TraceSet;
use shared::trace::check::{CheckOptions, Finding, check};
use shared::trace::registry::Registry;

use super::{Failure, Format, InspectArgs};
use crate::inspect::{Overview, Style, Traces};
use crate::run::output;

/// Traces printed at most by `--errors`.
const MOST_ERRORS: usize = 20;
/// Lines of the overview.
const MOST_LINES: usize = 20;

pub(super) fn inspect(args: &InspectArgs) -> Result<(), Failure> {
    let set = super::traces::read(&args.path)?;
    let traces = Traces::of(&set);
    let registry = Registry::builtin().map_err(Failure::run)?;
    let findings = check(&set, &CheckOptions { registry: Some(&registry), ..CheckOptions::default() });
    let wanted = select(args, &traces)?;
    output::print(&match args.format {
        Format::Json => format!("{:#}\n", json(&traces, &wanted, &findings)),
        Format::Text => text(args, &traces, &wanted, &findings, &set),
    });
    Ok(())
}

/// The traces whose trees are wanted; none for the overview.
fn select(args: &InspectArgs, traces: &Traces<'_>) -> Result<Vec<Overview>, Failure> {
    if let Some(prefix) = &args.trace {
        let id = traces.named(prefix, &args.path).map_err(Failure::input)?;
        return Ok(vec![traces.overview(id)]);
    }
    let slowest = traces.slowest();
    Ok(match (args.errors, args.slowest) {
        (true, _) => slowest.into_iter().filter(|o| o.failed).take(MOST_ERRORS).collect(),
        (false, Some(n)) => slowest.into_iter().take(n).collect(),
        (false, None) => Vec::new(),
    })
}

fn text(args: &InspectArgs, traces: &Traces<'_>, wanted: &[Overview], findings: &[Finding], set: &TraceSet) -> String {
    let mut out = String::new();
    let colour = std::env::var_os("NO_COLOR").is_none() && std::io::stdout().is_terminal();
    let style = Style { colour, ..Style::PLAIN };
    let count = |o: &Overview| findings.iter().filter(|f| f.trace_id == o.id).count();
    for overview in wanted {
        let _ = writeln!(out, "{}", traces.print(overview.id, count(overview), style));
    }
    for finding in findings.iter().filter(|f| wanted.iter().any(|o| o.id == f.trace_id)).take(MOST_LINES) {
        let _ = writeln!(out, "finding: {finding}");
    }
    if args.errors && wanted.is_empty() {
        let _ = writeln!(out, "no trace has an error ({} traces)", traces.len());
    }
    if wanted.is_empty() && !args.errors {
        overview(&mut out, traces, findings, set);
    }
    out
}

fn overview(out: &mut String, traces: &Traces<'_>, findings: &[Finding], set: &TraceSet) {
    let slowest = traces.slowest();
    let failed = slowest.iter().filter(|o| o.failed).count();
    let _ = writeln!(
        out,
        "{} traces  {} spans  {} with an error  {} findings",
        traces.len(),
        set.spans.len(),
        failed,
        findings.len()
    );
    let _ = writeln!(out, "{:<32}  {:>10}  {:>5}  {:>9}  root", "trace", "duration", "spans", "instances");
    for o in slowest.iter().take(MOST_LINES) {
        let mark = if o.failed { "  error" } else { "" };
        let (duration, root) = (o.duration.to_string(), traces.root_name(o.id));
        let _ = writeln!(out, "{}  {duration:>10}  {:>5}  {:>9}  {root}{mark}", o.id, o.spans, o.instances);
    }
    if slowest.len() > MOST_LINES {
        let more = slowest.len() - MOST_LINES;
        let _ = writeln!(out, "... {more} more; --slowest N prints trees, --trace ID one tree");
    }
    for finding in findings.iter().take(MOST_LINES) {
        let _ = writeln!(out, "finding: {finding}");
    }
}

fn json(traces: &Traces<'_>, wanted: &[Overview], findings: &[Finding]) -> serde_json::Value {
    let shown = if wanted.is_empty() { traces.slowest() } else { wanted.to_vec() };
    let list: Vec<_> = shown
        .iter()
        .map(|o| {
            let found: Vec<String> = findings.iter().filter(|f| f.trace_id == o.id).map(ToString::to_string).collect();
            serde_json::json!({
                "trace_id": o.id.to_string(), "root": traces.root_name(o.id), "duration_ms": o.duration.as_millis_f64(), "spans": o.spans,
                "instances": o.instances, "error": o.failed, "findings": found,
            })
        })
        .collect();
    serde_json::json!({ "traces": list, "count": traces.len(), "findings": findings.len() })
}
