//! The findings as text: one block for each rule, its help first.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::{Checked, Found};

/// What was checked and what came out, with at most `examples` findings of a rule.
pub fn text(checked: &Checked, examples: usize) -> String {
    let Checked { source, traces, spans, instances, truncated, findings } = checked;
    let mut out = format!("{source}: {traces} traces, {spans} spans, {instances} service instances\n");
    if *truncated {
        out.push_str("note: the file's last line is cut off and left out\n");
    }
    if findings.is_empty() {
        out.push_str("no findings\n");
        return out;
    }
    // Rules in the order in which they first come.
    let mut order: Vec<&str> = Vec::new();
    let mut by_rule: BTreeMap<&str, Vec<&Found>> = BTreeMap::new();
    for found in findings {
        let list = by_rule.entry(found.rule).or_default();
        if list.is_empty() {
            order.push(found.rule);
        }
        list.push(found);
    }
    for rule in order {
        let list = &by_rule[rule];
        let _ = writeln!(out, "\n{rule}: {} {}", list.len(), plural(list.len(), "finding"));
        let _ = writeln!(out, "  help: {}", list[0].help);
        for found in list.iter().take(examples) {
            let _ = writeln!(out, "  {}", line(found));
        }
        if list.len() > examples {
            let _ = writeln!(out, "  and {} more (--examples {} shows all)", list.len() - examples, list.len());
        }
    }
    let _ = writeln!(out, "\n{} {} by {} rules", findings.len(), plural(findings.len(), "finding"), by_rule.len());
    out
}

fn line(found: &Found) -> String {
    let mut line = String::new();
    if let Some(trace) = &found.trace {
        let _ = write!(line, "trace {trace} ");
    }
    if let Some(span) = &found.span {
        let _ = write!(line, "span {span} {} ", found.name);
        if !found.service.is_empty() {
            let _ = write!(line, "({}) ", found.service);
        }
    }
    if line.is_empty() {
        return found.detail.clone();
    }
    format!("{}: {}", line.trim_end(), found.detail)
}

fn plural(n: usize, word: &str) -> String {
    if n == 1 { word.to_owned() } else { format!("{word}s") }
}
