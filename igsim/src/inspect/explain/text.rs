//! Explanations as text.

use std::fmt::Write as _;

use super::{Decision, Explanation, Hindsight};

/// A regret up to this is none: less than the clock of any client.
const NO_REGRET_MS: f64 = 0.001;

/// Every decision of one request.
pub fn decisions(explanation: &Explanation) -> String {
    let mut out = String::new();
    for (i, decision) in explanation.decisions.iter().enumerate() {
        let _ = writeln!(out, "decision {} of {}  {}", i + 1, explanation.decisions.len(), outcome(decision));
        stages(&mut out, decision);
    }
    hindsight(&mut out, explanation);
    out
}

/// How good the decisions of many requests were.
pub fn summary(all: &[Explanation]) -> String {
    let mut out = String::new();
    let decisions = || all.iter().flat_map(|e| &e.decisions);
    let _ = writeln!(out, "{} requests with {} decisions", all.len(), decisions().count());
    spread(&mut out, "margin", "", decisions().filter_map(|d| d.margin));
    spread(&mut out, "oldest metrics", " ms", decisions().filter_map(|d| d.metrics_age_ms));
    let regrets: Vec<f64> = all.iter().filter_map(|e| e.regret_ms).collect();
    if regrets.is_empty() {
        let _ = writeln!(out, "regret          n/a: known of virtual runs at detail 3 (--mode virtual --detail 3)");
    } else {
        spread(&mut out, "regret", " ms", regrets.iter().copied());
        let best = regrets.iter().filter(|r| **r <= NO_REGRET_MS).count();
        let _ = writeln!(out, "best endpoint   chosen {best} times of {}", regrets.len());
    }
    let regretted = all.iter().filter_map(|e| e.regret_ms.map(|ms| (ms, e)));
    if let Some((_, worst)) = regretted.max_by(|a, b| a.0.total_cmp(&b.0)) {
        let _ = writeln!(out, "largest regret  --trace {}", worst.trace_id);
    }
    out
}

fn spread(out: &mut String, what: &str, unit: &str, values: impl Iterator<Item = f64>) {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    if values.is_empty() {
        return;
    }
    let at = |q: f64| values[((values.len() - 1) as f64 * q).round() as usize];
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let max = at(1.0);
    let (p50, p95) = (at(0.5), at(0.95));
    let _ =
        writeln!(out, "{what:<15} mean {mean:.2}{unit}  p50 {p50:.2}  p95 {p95:.2}  max {max:.2}  of {}", values.len());
}

fn outcome(d: &Decision) -> String {
    let mut line = format!("profile {}  {} candidates, {} left", d.profile, d.candidates.0, d.candidates.1);
    match &d.chosen {
        Some(chosen) => {
            let _ = write!(line, "  -> {chosen}");
        }
        None => line.push_str("  -> nobody"),
    }
    let figures = [("score", d.score), ("next", d.runner_up), ("margin", d.margin)];
    for (name, value) in figures.iter().filter_map(|(name, v)| v.map(|v| (name, v))) {
        let _ = write!(line, "  {name} {value:.3}");
    }
    if let Some(age) = d.metrics_age_ms {
        let _ = write!(line, "  oldest metrics {age:.1} ms");
    }
    line
}

fn stages(out: &mut String, d: &Decision) {
    if !d.known.is_empty() {
        let _ = writeln!(
            out,
            "  {:<20} {:>8} {:>8} {:>7} {:>8} {:>10} {:>12}",
            "candidate", "waiting", "running", "kv use", "matched", "in flight", "metrics age"
        );
    }
    for k in &d.known {
        let age = k.metrics_age_ms.map_or("-".to_owned(), |ms| format!("{ms:.1} ms"));
        let _ = writeln!(
            out,
            "  {:<20} {:>8} {:>8} {:>7.2} {:>8} {:>10} {age:>12}",
            k.endpoint, k.waiting, k.running, k.kv_usage, k.matched_blocks, k.in_flight
        );
    }
    for f in &d.filters {
        let (before, after) = f.candidates;
        let who = if f.removed.is_empty() { String::new() } else { format!("  without {}", f.removed.join(", ")) };
        let _ = writeln!(out, "  filter {}  {before} -> {after}{who}", f.name);
    }
    scores(out, d);
    if let Some(picker) = &d.picker {
        let _ = writeln!(out, "  picker {picker}  {}", ties(d.ties));
    }
}

fn ties(ties: u64) -> String {
    match ties {
        0 => "no tie".to_owned(),
        n => format!("{n} more as good, chance decided"),
    }
}

/// Scores by endpoint, best first, where every endpoint is known; else the range of each scorer and the best endpoints.
fn scores(out: &mut String, d: &Decision) {
    let Some(first) = d.scorers.iter().find(|s| !s.endpoints.is_empty()) else {
        for s in &d.scorers {
            let (min, max) = s.range;
            let _ = writeln!(out, "  scorer {} x {}  {min:.3} to {max:.3}", s.name, s.weight);
        }
        for (endpoint, score) in &d.top {
            let _ = writeln!(out, "  {endpoint:<20} {score:.3}");
        }
        return;
    };
    let mut rows: Vec<(&str, Vec<(f64, f64)>)> =
        first.endpoints.iter().map(|(e, ..)| (e.as_str(), Vec::new())).collect();
    for scorer in &d.scorers {
        for (row, (_, raw, weighted)) in rows.iter_mut().zip(&scorer.endpoints) {
            row.1.push((*raw, *weighted));
        }
    }
    let total = |cells: &[(f64, f64)]| cells.iter().map(|(_, w)| w).sum::<f64>();
    rows.sort_by(|a, b| total(&b.1).total_cmp(&total(&a.1)));
    for (i, s) in d.scorers.iter().enumerate() {
        let _ = writeln!(out, "  scorer {}: {} x {}", letter(i), s.name, s.weight);
    }
    let heads: Vec<String> = (0..d.scorers.len()).map(|i| format!("{:>15}", letter(i))).collect();
    let _ = writeln!(out, "  {:<20}{} {:>8}", "score", heads.concat(), "total");
    for (endpoint, cells) in rows {
        let mark = if d.chosen.as_deref() == Some(endpoint) { "*" } else { "" };
        let shown: Vec<String> = cells.iter().map(|(raw, w)| format!("{:>15}", format!("{raw:.3} = {w:.3}"))).collect();
        let name = format!("{endpoint}{mark}");
        let _ = writeln!(out, "  {name:<20}{} {:>8.3}", shown.concat(), total(&cells));
    }
}

/// A, B, ... Z, then numbers.
fn letter(i: usize) -> String {
    u8::try_from(i).ok().filter(|i| *i < 26).map_or_else(|| i.to_string(), |i| char::from(b'A' + i).to_string())
}

fn hindsight(out: &mut String, explanation: &Explanation) {
    if explanation.hindsight.is_empty() {
        let _ = writeln!(out, "regret n/a: known of virtual runs at detail 3 (--mode virtual --detail 3)");
        return;
    }
    let _ = writeln!(out, "time to first token, had it been sent to");
    let mut all: Vec<&Hindsight> = explanation.hindsight.iter().collect();
    all.sort_by(|a, b| a.ttft_ms.unwrap_or(f64::INFINITY).total_cmp(&b.ttft_ms.unwrap_or(f64::INFINITY)));
    for h in all {
        let ttft = h.ttft_ms.map_or("refused".to_owned(), |ms| format!("{ms:.2} ms"));
        let name = format!("{}{}", h.endpoint, if h.chosen { "*" } else { "" });
        let _ = writeln!(out, "  {name:<20} {ttft:>12}");
    }
    if let Some(regret) = explanation.regret_ms {
        let _ = writeln!(out, "regret {regret:.2} ms");
    }
}
