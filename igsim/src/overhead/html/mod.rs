//! The lab's result as one HTML page: plots, tables, method, machine. Self-contained: no script, no font, no request to
//! anywhere.

mod plots;
mod svg;

use std::fmt::{self, Write};

use self::svg::escape;
use super::analysis::{Analysis, ArmAnalysis, Estimate, ROUNDS, RegimeAnalysis, Role, SHARE_OF_EAGER, Statistic};
use super::distribution::{Distribution, Distributions};
use super::format;
use super::model::{Arm, Run, Setting};
use crate::report::{digits, thousands};

/// The page.
pub fn page(run: &Run, analysis: &Analysis, distributions: &Distributions) -> String {
    let mut out = String::new();
    // Writing to a String does not fail.
    let _ = write(&mut out, run, analysis, distributions);
    out
}

fn write(out: &mut String, run: &Run, analysis: &Analysis, distributions: &[Distribution]) -> fmt::Result {
    writeln!(
        out,
        r#"<!doctype html><html lang="en"><head><meta charset="utf-8"><title>igsim: overhead of tracing</title>"#
    )?;
    writeln!(out, r#"<meta name="viewport" content="width=device-width, initial-scale=1">"#)?;
    writeln!(
        out,
        r#"<meta name="color-scheme" content="light dark"><style>{}</style></head><body>"#,
        include_str!("style.css")
    )?;
    writeln!(out, "<h1>Overhead of tracing</h1>")?;
    let (version, machine) = (escape(&run.version), escape(&format::machine(&run.machine)));
    writeln!(
        out,
        r#"<p class="faint">igsim {version}, seed {}, {}. {machine}.<br><code>{}</code></p>"#,
        run.seed,
        format::began(run),
        escape(&run.command)
    )?;
    verdicts(out, analysis)?;
    for regime in &analysis.regimes {
        regime_section(out, run, analysis, regime, distributions)?;
    }
    out.write_str(METHOD)?;
    writeln!(out, "</body></html>")
}

const METHOD: &str = r#"<h2>Method</h2>
<p>A block is a fixed number of requests through one arm: state is reset before it, and CPU and bytes count until the
receiver has acknowledged every span. In each round every arm has a block, in random order, with blocks of tracing off
on either side; off means no parsing, no ids and untouched headers. The unit of analysis is the logarithm of the ratio
of an arm's block to the geometric mean of its two nearest off blocks; a round counts once. Intervals are Student's
over rounds, with the bootstrap-t interval beside. There is one look, at the end.</p>
<p>PASS: the upper bound is below the target. FAIL: the lower bound is above it. Otherwise INCONCLUSIVE. Only
statistics named before the run are judged; all others have intervals and p-values adjusted for their number (Holm),
within their regime. The noise floor is the largest overhead, of either sign, in the 95 % interval of a second off arm
against off: whatever is nearer to 0 is below noise floor.</p>
<h2>Threats to validity</h2>
<p>Gateway, engines, client and receiver share one machine, so caches, memory bandwidth and CPUs do too; throughput is
that of the whole box. On a virtual machine other guests are noise: blocks with more than 1 % of steal time, or on
CPUs slower than usual, were repeated. Engines are simulated. Placement decides the denominator of latencies that a gateway alone makes. Peak
memory is that of the run so far and cannot be told apart by arm. At ratio 0.1 a median shows only requests whose
trace is not kept: those with and without are given apart. Intervals speak of this machine and this load and not of
others.</p>
"#;

fn verdicts(out: &mut String, analysis: &Analysis) -> fmt::Result {
    writeln!(
        out,
        r#"<h2>Verdicts</h2><div class="scroll"><table><thead><tr><th>Regime, arm, statistic</th><th>Overhead, 95 % interval</th>"#
    )?;
    writeln!(out, "<th>bootstrap-t</th><th>Target</th><th>Verdict</th><th>Decides</th><th></th></tr></thead><tbody>")?;
    for (regime, arm, estimate, judgement) in analysis.judged() {
        let verdict = judgement.verdict.name();
        writeln!(
            out,
            r#"<tr><td>{}, {}, {}</td><td>{}</td><td>{}</td><td>{}</td><td class="verdict {verdict}">{verdict}</td><td>{}</td><td>{}</td></tr>"#,
            regime.name(),
            escape(&format::arm(arm)),
            estimate.statistic.name(),
            relative(estimate),
            bootstrap(estimate),
            format::share(judgement.target.below),
            if judgement.target.decides { "yes" } else { "no" },
            if estimate.below_noise_floor { "below noise floor" } else { "" },
        )?;
    }
    writeln!(out, "</tbody></table></div>")?;
    for found in &analysis.shares_of_eager {
        let interval = found
            .share
            .interval
            .map_or_else(|| "no bounds".to_owned(), |i| format!("[{:.0}, {:.0}]", 100.0 * i.low, 100.0 * i.high));
        let verdict = found.verdict.name();
        writeln!(
            out,
            r#"<p>In saturation with everything sampled, {} has {:.0} % {interval} of the gateway CPU overhead of eager; at most {:.0} % is aimed at: <span class="verdict {verdict}">{verdict}</span>.</p>"#,
            found.path.name(),
            100.0 * found.share.ratio,
            100.0 * SHARE_OF_EAGER,
        )?;
    }
    Ok(())
}

fn regime_section(
    out: &mut String,
    run: &Run,
    analysis: &Analysis,
    regime: &RegimeAnalysis,
    distributions: &[Distribution],
) -> fmt::Result {
    writeln!(out, "<h2>{}</h2>", regime.regime.name())?;
    if let Some(setting) = run.settings.iter().find(|s| s.regime == regime.regime) {
        settings(out, regime, setting)?;
    }
    let headline = Statistic::headline(regime.regime);
    writeln!(out, r#"<div class="row">"#)?;
    headline.iter().for_each(|s| out.push_str(&plots::overheads(regime, *s, analysis.target)));
    writeln!(out, "</div>\n<h3>Where it goes</h3>\n<div class=\"row\">")?;
    out.push_str(&plots::cpu(regime));
    out.push_str(&plots::latencies(regime.regime, distributions));
    writeln!(out, "</div>")?;
    spans(out, regime)?;
    writeln!(out, "<h3>Blocks</h3>")?;
    headline.iter().take(1).for_each(|s| out.push_str(&plots::series(run, regime.regime, *s)));
    writeln!(out, "<h3>All statistics</h3>")?;
    regime.arms.iter().filter(|a| a.arm != Arm::Off).try_for_each(|arm| all_statistics(out, regime, arm))
}

fn settings(out: &mut String, regime: &RegimeAnalysis, setting: &Setting) -> fmt::Result {
    let left_out = if setting.left_out.is_empty() {
        String::new()
    } else {
        format!(" Left out for lack of time: {}.", escape(&setting.left_out.join(", ")))
    };
    if regime.is_short() {
        writeln!(out, "<p><b>Fewer than {ROUNDS} rounds: intervals and verdicts rest on too few blocks.</b></p>")?;
    }
    writeln!(
        out,
        r#"<p class="faint">{}, {} requests a block; {}; {}. Spans wait at most {} ms for their batch. {} blocks repeated because of a disturbed machine.{left_out}</p>"#,
        format::rounds(regime.rounds),
        thousands(setting.requests),
        escape(&setting.load),
        escape(&setting.placement),
        digits(setting.schedule_delay_ms),
        regime.repeated,
    )
}

fn spans(out: &mut String, regime: &RegimeAnalysis) -> fmt::Result {
    writeln!(
        out,
        r#"<div class="scroll"><table><thead><tr><th>Spans</th><th>per request</th><th>bytes per request</th><th>made</th>"#
    )?;
    writeln!(
        out,
        "<th>sent</th><th>received</th><th>dropped</th><th>records lost</th><th>requests failed</th></tr></thead><tbody>"
    )?;
    for arm in &regime.arms {
        let t = &arm.telemetry;
        writeln!(
            out,
            "<tr><td>{}</td><td>{}</td><td>{}</td>",
            escape(&format::arm(&arm.arm)),
            digits(arm.per_request(t.spans)),
            digits(arm.per_request(t.receiver_bytes))
        )?;
        let counts = [Some(t.spans), Some(t.exported), t.received(), Some(t.dropped), Some(t.records_dropped)];
        for n in counts.into_iter().chain([Some(arm.failed)]) {
            write!(out, "<td>{}</td>", n.map_or_else(|| "-".to_owned(), thousands))?;
        }
        writeln!(out, "</tr>")?;
    }
    writeln!(out, "</tbody></table></div>")?;
    for line in regime.arms.iter().filter_map(|a| format::not_kept(&a.arm, &a.telemetry)) {
        writeln!(out, "<p>{}</p>", escape(&line))?;
    }
    Ok(())
}

fn all_statistics(out: &mut String, regime: &RegimeAnalysis, arm: &ArmAnalysis) -> fmt::Result {
    let name = escape(&arm.arm.to_string());
    writeln!(
        out,
        r#"<details><summary>{name}, {} blocks</summary><div class="scroll"><table><thead><tr><th>Statistic</th><th>off</th><th>{name}</th>"#,
        arm.blocks
    )?;
    writeln!(
        out,
        "<th>Overhead, interval</th><th>bootstrap-t</th><th>Difference, 95 % interval</th><th>p</th><th>Rounds</th></tr></thead><tbody>"
    )?;
    let off = regime.arm(&Arm::Off);
    for e in &arm.estimates {
        let unit = e.statistic.unit();
        let level = |a: Option<&ArmAnalysis>| {
            a.and_then(|a| a.levels.get(&e.statistic)).map_or_else(String::new, |v| format::level(*v, unit))
        };
        let difference = e
            .difference
            .map_or_else(String::new, |d| format!("{} {}", format::difference(d.value, d.interval), unit.name()));
        writeln!(
            out,
            "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{difference}</td><td>{}</td><td>{}</td></tr>",
            e.statistic.name(),
            level(off),
            level(Some(arm)),
            relative(e),
            bootstrap(e),
            p_value(e),
            e.n,
        )?;
    }
    writeln!(out, "</tbody></table></div></details>")
}

fn relative(estimate: &Estimate) -> String {
    format::shown(estimate).map_or_else(|| "-".to_owned(), |(o, i)| format::percent_in_words(o.value, i))
}

fn bootstrap(estimate: &Estimate) -> String {
    let interval = estimate.overhead.and_then(|o| o.bootstrap);
    interval.map_or_else(|| "-".to_owned(), format::percent_interval)
}

/// Holm's where it is one of many.
fn p_value(estimate: &Estimate) -> String {
    let text = |p: f64| if p < 0.001 { "below 0.001".to_owned() } else { format!("{p:.3}") };
    match (estimate.role, estimate.overhead) {
        (Role::Secondary(Some(adjusted)), _) => format!("{} (adjusted)", text(adjusted.p)),
        (Role::Control | Role::Primary(_) | Role::Secondary(None), Some(o)) => text(o.p),
        (Role::Control | Role::Primary(_) | Role::Secondary(None), None) => "-".to_owned(),
    }
}

#[cfg(test)]
mod tests;
