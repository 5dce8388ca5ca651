//! Live and virtual runs of a scenario without races give the same span trees (I11).
//!
//! One client that thinks longer than three scrape intervals: every decision is made on settled figures in both modes. What may
//! differ is listed in `parity_exempt.txt`, one attribute key a line.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use igsim::inspect::{TRACES_FILE, Traces};
use shared::trace::tree::value_text;
use shared::trace::{Span, TraceSet, otlp_json};

fn exempt() -> BTreeSet<&'static str> {
    let lines = include_str!("parity_exempt.txt").lines();
    lines.map(|l| l.split('#').next().unwrap_or_default().trim()).filter(|l| !l.is_empty()).collect()
}

fn run(mode: &str, dir: &Path) -> TraceSet {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_igsim"))
        .current_dir(root)
        .env_clear()
        .args(["run", "scenarios/parity.yaml", "--mode", mode, "--out"])
        .arg(dir)
        .args(["--set", "requests=12", "--set", "listen.gateway=127.0.0.1:0", "--set", "listen.engines=127.0.0.1:0"])
        .args(["--set", "expectations={}"])
        .output()
        .expect("the program runs");
    assert!(output.status.success(), "{mode}: {}", String::from_utf8_lossy(&output.stderr));
    otlp_json::read_file(dir.join(TRACES_FILE)).expect("the traces can be read")
}

/// The trees of a set, in the order of the requests' ids, without ids, times and what is exempt.
fn trees(set: &TraceSet) -> Vec<String> {
    let traces = Traces::of(set);
    let mut trees: Vec<(u64, String)> = Vec::new();
    for overview in traces.slowest() {
        let spans = traces.spans(overview.id);
        let root = spans.iter().find(|s| s.parent.is_none()).expect("a root");
        let id = root.get("gateway.request.id").and_then(|v| v.as_str()).expect("an id");
        let number = id.trim_start_matches("req-").parse().expect("the client's ids are numbered");
        let mut text = String::new();
        write_tree(set, spans, root, 0, &mut text);
        trees.push((number, text));
    }
    trees.sort();
    trees.into_iter().map(|(n, text)| format!("request {n}\n{text}")).collect()
}

fn write_tree(set: &TraceSet, spans: &[&Span], span: &Span, depth: usize, out: &mut String) {
    let exempt = exempt();
    let resource = set.resource(span.instance).expect("a resource");
    let pad = "  ".repeat(depth);
    let _ = writeln!(
        out,
        "{pad}{} {:?} {:?} {} {}",
        span.name, span.kind, span.status, resource.service_name, resource.instance_id
    );
    let mut attributes: Vec<_> = span.attrs.iter().filter(|(k, _)| !exempt.contains(&**k)).collect();
    attributes.sort_by(|a, b| a.0.cmp(&b.0));
    for (key, value) in attributes {
        let _ = writeln!(out, "{pad}  {key}={}", value_text(value));
    }
    for event in &span.events {
        let _ = writeln!(out, "{pad}  event {}", event.name);
    }
    let mut children: Vec<&&Span> = spans.iter().filter(|s| s.parent == Some(span.span_id)).collect();
    children.sort_by(|a, b| (a.start, &a.name, a.end).cmp(&(b.start, &b.name, b.end)));
    // Spans that start together are ordered by name, and only then by what they carry.
    for child in children {
        write_tree(set, spans, child, depth + 1, out);
    }
}

#[test]
fn live_and_virtual_runs_give_the_same_trees() {
    let dir = tempfile::tempdir().unwrap();
    let (live, virtual_time) = (run("live", &dir.path().join("live")), run("virtual", &dir.path().join("virtual")));
    let (live, virtual_time) = (trees(&live), trees(&virtual_time));
    assert_eq!(live.len(), 12, "every request is traced");
    assert_eq!(live.len(), virtual_time.len());
    for (a, b) in live.iter().zip(&virtual_time) {
        if a != b {
            let different: Vec<String> = a
                .lines()
                .zip(b.lines())
                .filter(|(x, y)| x != y)
                .map(|(x, y)| format!("  live    {x}\n  virtual {y}"))
                .collect();
            panic!("the trees differ:\n{}\n\nlive:\n{a}\nvirtual:\n{b}", different.join("\n"));
        }
    }
}
