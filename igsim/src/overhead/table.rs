//! The lab's result for a terminal: one line an arm, every figure with its interval, verdicts last.

use std::fmt::{self, Write};

use super::analysis::{
    Analysis, ArmAnalysis, Estimate, Judgement, ROUNDS, RegimeAnalysis, Role, SHARE_OF_EAGER, Statistic, Unit, Verdict,
};
use super::format;
use super::model::{Arm, Path, Regime, Run, Setting};
use super::stats::Interval;
use crate::report::{digits, thousands};

/// The whole text, lines ended, without colour.
pub fn text(run: &Run, analysis: &Analysis) -> String {
    let mut out = String::new();
    // Writing to a String does not fail.
    let _ = write(&mut out, run, analysis);
    out
}

fn write(out: &mut String, run: &Run, analysis: &Analysis) -> fmt::Result {
    writeln!(out, "igsim {}  overhead of tracing  seed {}  {}", run.version, run.seed, format::began(run))?;
    writeln!(out, "{}", format::machine(&run.machine))?;
    writeln!(out, "{}", run.command)?;
    for regime in &analysis.regimes {
        writeln!(out)?;
        if let Some(setting) = run.settings.iter().find(|s| s.regime == regime.regime) {
            header(out, regime, setting)?;
        }
        regime_text(out, regime)?;
    }
    writeln!(out)?;
    verdicts(out, analysis)
}

fn header(out: &mut String, regime: &RegimeAnalysis, setting: &Setting) -> fmt::Result {
    writeln!(
        out,
        "{}  {}, {} requests a block; {}; {}",
        regime.regime.name().to_uppercase(),
        format::rounds(regime.rounds),
        thousands(setting.requests),
        setting.load,
        setting.placement
    )?;
    let delay = digits(setting.schedule_delay_ms);
    write!(
        out,
        "  spans wait at most {delay} ms for their batch; {} blocks repeated because of a disturbed machine",
        regime.repeated
    )?;
    if !setting.left_out.is_empty() {
        write!(out, "; left out: {}", setting.left_out.join(", "))?;
    }
    writeln!(out)?;
    if regime.is_short() {
        writeln!(out, "  WARNING  fewer than {ROUNDS} rounds: intervals and verdicts rest on too few blocks")?;
    }
    Ok(())
}

fn regime_text(out: &mut String, regime: &RegimeAnalysis) -> fmt::Result {
    let names: Vec<String> = regime.arms.iter().map(|a| format::arm(&a.arm)).collect();
    let width = names.iter().map(|n| n.chars().count()).max().unwrap_or(0).max(14) + 2;
    let headline = Statistic::headline(regime.regime);
    table(out, regime, &names, width, headline, ("% over off, 95 % interval", JUDGED))?;
    resolution(out, regime)?;
    let measured = |s: &Statistic| regime.arms.iter().any(|a| a.estimate(*s).is_some());
    let others: Vec<Statistic> =
        SECONDARY.into_iter().filter(|s| measured(s) && !headline.contains(s)).take(ROOM).collect();
    writeln!(out)?;
    table(out, regime, &names, width, &others, ("%, adjusted interval", ADJUSTED))?;
    writeln!(out)?;
    cpu(out, regime, &names, width)?;
    let memory = format::level(regime.peak_rss_kib as f64, Unit::Kib);
    writeln!(out, "  the gateway's memory peaked at {memory} by the end of the regime")?;
    spans(out, regime, &names, width)?;
    failures(out, regime, &names)
}

/// Secondary statistics that a terminal has room for, the most telling first; the page shows all.
const SECONDARY: [Statistic; 7] = [
    Statistic::Allocations,
    Statistic::E2eP99,
    Statistic::UnsampledE2eP50,
    Statistic::SampledE2eP50,
    Statistic::Throughput,
    Statistic::E2eMean,
    Statistic::TtftMean,
];

/// Columns of secondary statistics.
const ROOM: usize = 4;

/// Width of a column of judged overheads.
const JUDGED: usize = 31;

/// Width of a column of secondary overheads.
const ADJUSTED: usize = 26;

fn table(
    out: &mut String,
    regime: &RegimeAnalysis,
    names: &[String],
    width: usize,
    columns: &[Statistic],
    (title, cell): (&str, usize),
) -> fmt::Result {
    let mut line = format!("  {title:<w$}", w = width.max(title.len() + 2));
    let indent = line.len();
    columns.iter().for_each(|c| line.push_str(&format!("{:<cell$}", c.name())));
    writeln!(out, "{}", line.trim_end())?;
    for (arm, name) in regime.arms.iter().zip(names) {
        let mut line = format!("  {name:<w$}", w = indent - 2);
        columns.iter().for_each(|c| line.push_str(&format!("{:<cell$}", overhead(arm, *c))));
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

/// The level for `off`, otherwise the overhead, its interval and verdict.
fn overhead(arm: &ArmAnalysis, statistic: Statistic) -> String {
    if arm.arm == Arm::Off {
        return arm.levels.get(&statistic).map_or_else(String::new, |v| format::level(*v, statistic.unit()));
    }
    let Some(estimate) = arm.estimate(statistic) else { return "-".to_owned() };
    let Some((found, interval)) = format::shown(estimate) else { return "-".to_owned() };
    let noise = if estimate.below_noise_floor { format::BELOW_NOISE } else { "" };
    let mark = match estimate.role {
        Role::Control => String::new(),
        Role::Primary(judgement) => format!(" {}", format::verdict(judgement)),
        Role::Secondary(Some(adjusted)) if adjusted.p < 0.05 => " *".to_owned(),
        Role::Secondary(_) => String::new(),
    };
    format!("{noise}{}{mark}", format::percent(found.value, interval))
}

/// What two equal arms differ by, and what could have been told from each target: of the arm that tells least.
fn resolution(out: &mut String, regime: &RegimeAnalysis) -> fmt::Result {
    for statistic in Statistic::headline(regime.regime) {
        let estimates: Vec<&Estimate> = regime.arms.iter().filter_map(|a| a.estimate(*statistic)).collect();
        if let Some(floor) = estimates.iter().find_map(|e| e.noise_floor) {
            writeln!(out, "  {}: noise floor {}", statistic.name(), format::share(floor))?;
        }
        for (below, told) in least_told(&estimates) {
            let (low, high) = (format::signed(100.0 * told.low, 1), format::signed(100.0 * told.high, 1));
            let (name, below) = (statistic.name(), format::share(below));
            writeln!(out, "  {name}: with 80 % power, up to {low} % is PASS against {below}, from {high} % on FAIL")?;
        }
    }
    Ok(())
}

/// Each target of judged estimates, highest first, and the widest range around it that could not be told from it.
fn least_told(estimates: &[&Estimate]) -> Vec<(f64, Interval)> {
    let mut widest: Vec<(f64, Interval)> = Vec::new();
    for estimate in estimates {
        let Role::Primary(Judgement { target, could_tell: Some(told), .. }) = estimate.role else { continue };
        match widest.iter_mut().find(|(below, _)| *below == target.below) {
            Some((_, known)) if known.half() < told.half() => *known = told,
            Some(_) => {}
            None => widest.push((target.below, told)),
        }
    }
    widest.sort_by(|(a, _), (b, _)| b.total_cmp(a));
    widest
}

fn cpu(out: &mut String, regime: &RegimeAnalysis, names: &[String], width: usize) -> fmt::Result {
    let title = format!("  {:<width$}", "us CPU/request");
    writeln!(
        out,
        "{title}{:>8} {:>8}  {:<24}{:>8} {:>8}  {:<24}{:>8} {:>8}",
        "gateway", "exporter", "both against off", "engine", "exporter", "both against off", "client", "receiver"
    )?;
    for (arm, name) in regime.arms.iter().zip(names) {
        let difference = |s| arm.estimate(s).and_then(|e| e.difference);
        let against = |s| difference(s).map_or_else(String::new, |d| format::difference(d.value, d.interval));
        writeln!(
            out,
            "  {name:<width$}{:>8} {:>8}  {:<24}{:>8} {:>8}  {:<24}{:>8} {:>8}",
            digits(arm.cpu.gateway_request),
            digits(arm.cpu.gateway_exporter),
            against(Statistic::GatewayCpu),
            digits(arm.cpu.engine_request),
            digits(arm.cpu.engine_exporter),
            against(Statistic::EngineCpu),
            digits(arm.cpu.client),
            digits(arm.cpu.receiver),
        )?;
    }
    Ok(())
}

/// What became of the spans, for arms that made any.
fn spans(out: &mut String, regime: &RegimeAnalysis, names: &[String], width: usize) -> fmt::Result {
    let made: Vec<_> = regime.arms.iter().zip(names).filter(|(a, _)| a.telemetry.any()).collect();
    if made.is_empty() {
        return Ok(());
    }
    let columns = ["spans/req", "bytes/req", "made", "sent", "received", "dropped", "lost records"];
    let line = |cells: [String; 7]| cells.iter().map(|c| format!(" {c:>13}")).collect::<String>();
    writeln!(out, "\n  {:<width$}{}", "spans", line(columns.map(str::to_owned)))?;
    for (arm, name) in &made {
        let t = &arm.telemetry;
        let [made, sent, dropped, records] = [t.spans, t.exported, t.dropped, t.records_dropped].map(thousands);
        let received = t.received().map_or_else(|| "-".to_owned(), thousands);
        let (per, bytes) = (digits(arm.per_request(t.spans)), digits(arm.per_request(t.receiver_bytes)));
        writeln!(out, "  {name:<width$}{}", line([per, bytes, made, sent, received, dropped, records]))?;
    }
    for line in made.iter().filter_map(|(arm, _)| format::not_kept(&arm.arm, &arm.telemetry)) {
        writeln!(out, "  {line}")?;
    }
    Ok(())
}

fn failures(out: &mut String, regime: &RegimeAnalysis, names: &[String]) -> fmt::Result {
    for (arm, name) in regime.arms.iter().zip(names).filter(|(a, _)| a.failed > 0) {
        let (failed, answered) = (thousands(arm.failed), thousands(arm.answered));
        writeln!(out, "  WARNING  {name}: {failed} requests failed, {answered} were answered")?;
    }
    Ok(())
}

/// The headlines, in the order of the method: what the standard path costs, then whether lean ones reach their targets.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Headline {
    Standard,
    Lean,
    Other,
}

impl Headline {
    fn of(arm: &Arm, judgement: Judgement) -> Headline {
        match arm {
            Arm::Traced { path: Path::Eager, .. } => Headline::Standard,
            _ if judgement.target.decides => Headline::Lean,
            Arm::Traced { .. } | Arm::Off | Arm::Control | Arm::Delayed { .. } | Arm::Outside { .. } => Headline::Other,
        }
    }

    fn title(self) -> &'static str {
        match self {
            Headline::Standard => "Standard path, without a target",
            Headline::Lean => "Lean paths, with targets",
            Headline::Other => "Others, without a target",
        }
    }
}

fn verdicts(out: &mut String, analysis: &Analysis) -> fmt::Result {
    for headline in [Headline::Standard, Headline::Lean, Headline::Other] {
        let mut lines = analysis.judged().filter(|(_, arm, _, j)| Headline::of(arm, *j) == headline).peekable();
        if lines.peek().is_some() {
            writeln!(out, "{}", headline.title())?;
        }
        for (regime, arm, estimate, judgement) in lines {
            writeln!(out, "{}", verdict_line(regime, arm, estimate, judgement))?;
        }
    }
    shares(out, analysis)?;
    let deciding = || analysis.judged().filter(|(_, _, _, j)| j.target.decides);
    let count = |v| deciding().filter(|(_, _, _, j)| j.verdict == v).count();
    let (pass, fail, open) = (count(Verdict::Pass), count(Verdict::Fail), count(Verdict::Inconclusive));
    writeln!(out, "{pass} PASS, {fail} FAIL, {open} INCONCLUSIVE of the primary statistics with targets")?;
    writeln!(
        out,
        "(...) decides nothing; {} below noise floor; * differs from off, adjusted for the number of comparisons",
        format::BELOW_NOISE
    )
}

/// `  PASS 5 %  realistic deferred 0.1 e2e mean  +0.3 % [-0.2, +0.8]  bootstrap-t [-0.2, +0.8]`.
fn verdict_line(regime: Regime, arm: &Arm, estimate: &Estimate, judgement: Judgement) -> String {
    let name = format!("{} {} {}", regime.name(), format::arm(arm), estimate.statistic.name());
    let figure = estimate.overhead.map_or_else(
        || "one round has no interval".to_owned(),
        |o| {
            let boot = o.bootstrap.map(|b| format!("  bootstrap-t {}", format::percent_interval(b)));
            format::percent_in_words(o.value, o.interval) + &boot.unwrap_or_default()
        },
    );
    let noise = if estimate.below_noise_floor { "  below noise floor" } else { "" };
    let verdict = format!("{} {}", judgement.verdict.name(), format::share(judgement.target.below));
    format!("  {verdict:<18}  {name:<38}  {figure}{noise}")
}

fn shares(out: &mut String, analysis: &Analysis) -> fmt::Result {
    for found in &analysis.shares_of_eager {
        let interval = found.share.interval.map_or_else(
            || "no bounds: eager's overhead cannot be told from 0".to_owned(),
            |i| format!("[{:.0}, {:.0}]", 100.0 * i.low, 100.0 * i.high),
        );
        writeln!(
            out,
            "  {:<18}  saturation {} 1.0: {:.0} % {interval} of the gateway CPU overhead of eager 1.0, at most {:.0} %",
            found.verdict.name(),
            found.path.name(),
            100.0 * found.share.ratio,
            100.0 * SHARE_OF_EAGER,
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::analysis::TARGET;
    use super::super::analysis::synthetic::{Noise, run};
    use super::super::model::{Block, Health};
    use super::*;

    fn arms() -> Vec<Arm> {
        let mut arms = vec![
            Arm::Control,
            Arm::Traced { path: Path::Deferred, ratio: 0.1, receiver: Health::Refusing, steps: 0.0 },
        ];
        arms.extend([0.1, 1.0].map(|r| Arm::traced(Path::Eager, r)));
        arms.extend([0.0, 0.1, 1.0].map(|r| Arm::traced(Path::Deferred, r)));
        arms
    }

    fn truth(arm: &Arm) -> f64 {
        match arm {
            Arm::Traced { path: Path::Eager, .. } => 1.12,
            Arm::Traced { ratio, .. } => 1.0 + 0.02 * ratio,
            Arm::Off | Arm::Control | Arm::Delayed { .. } | Arm::Outside { .. } => 1.0,
        }
    }

    fn shown(regime: Regime) -> String {
        let run = run(regime, 20, &arms(), &Noise { sd: 0.01, drift: 0.1 }, 5, truth);
        text(&run, &Analysis::of(&run, TARGET))
    }

    #[test]
    fn spans_that_were_not_kept_do_not_look_lost() {
        let mut run = run(Regime::Floor, 20, &arms(), &Noise { sd: 0.01, drift: 0.1 }, 5, truth);
        let full = |b: &&mut Block| b.arm == Arm::traced(Path::Eager, 1.0) && b.round > 10;
        for block in run.blocks.iter_mut().filter(full) {
            (block.telemetry.receiver_not_kept, block.telemetry.receiver_spans) = (40, 500);
        }
        let text = text(&run, &Analysis::of(&run, TARGET));
        let said: Vec<&str> = text.lines().filter(|l| l.starts_with("  eager 1.0") && l.contains("480,000")).collect();
        assert!(said.len() == 1 && said[0].contains("480,000             -"), "{said:?}");
        assert!(
            text.contains(
                "eager 1.0: received is not known: all 940 export requests were acknowledged, 360 were not kept"
            ),
            "{text}"
        );
    }

    #[test]
    fn a_regime_reads_well() {
        insta::assert_snapshot!(shown(Regime::Floor), @r"
        igsim 0.0.0  overhead of tracing  seed 5  2026-11-18 11:06 UTC
        2 x Test CPU (virtual), 8,192 MiB, Linux 6.1
        igsim overhead --quick

        FLOOR  20 rounds, 1,000 requests a block; one request at a time, 2000 per second; gateway on CPU 0, the rest on CPU 1
          spans wait at most 50.0 ms for their batch; 0 blocks repeated because of a disturbed machine; left out: direct 1.0
          % over off, 95 % interval  e2e p50                        e2e mean
          off                        104 us                         114 us
          off'                       ~-0.1 [-0.6, +0.5]             ~-0.1 [-0.6, +0.5]
          eager 0.1                  +12.2 [+11.7, +12.7] (FAIL)    +12.2 [+11.7, +12.7] (FAIL)
          eager 1.0                  +12.1 [+11.4, +12.8] (FAIL)    +12.1 [+11.4, +12.8] (FAIL)
          deferred 0                 ~-0.3 [-0.9, +0.2] PASS        ~-0.3 [-0.9, +0.2] PASS
          deferred 0.1               ~-0.4 [-0.8, +0.1] PASS        ~-0.4 [-0.8, +0.1] PASS
          deferred 1.0               +2.0 [+1.5, +2.5] (PASS)       +2.0 [+1.5, +2.5] (PASS)
          deferred 0.1, refusing     ~-0.1 [-0.6, +0.4] PASS        ~-0.1 [-0.6, +0.4] PASS
          e2e p50: noise floor 0.64 %
          e2e p50: with 80 % power, up to +4.1 % is PASS against 5 %, from +5.9 % on FAIL
          e2e p50: with 80 % power, up to +0.7 % is PASS against 1.5 %, from +2.3 % on FAIL
          e2e mean: noise floor 0.64 %
          e2e mean: with 80 % power, up to +4.1 % is PASS against 5 %, from +5.9 % on FAIL
          e2e mean: with 80 % power, up to +0.7 % is PASS against 1.5 %, from +2.3 % on FAIL

          %, adjusted interval    e2e p99                   unsampled e2e p50         sampled e2e p50           throughput
          off                     312 us                    104 us                                              9,631 req/s
          off'                    ~-0.1 [-0.6, +0.5]        ~-0.1 [-0.6, +0.5]        -                         ~+0.1 [-0.5, +0.6]
          eager 0.1               +12.2 [+11.1, +13.2] *    +12.2 [+11.1, +13.3] *    +12.2 [+11.1, +13.3] *    -10.9 [-11.7, -10.0] *
          eager 1.0               +12.1 [+10.8, +13.4] *    -                         +12.1 [+10.8, +13.4] *    -10.8 [-11.8, -9.7] *
          deferred 0              ~-0.3 [-1.4, +0.8]        ~-0.3 [-1.4, +0.8]        -                         ~+0.3 [-0.7, +1.4]
          deferred 0.1            ~-0.4 [-1.1, +0.4]        ~-0.4 [-1.1, +0.4]        -0.4 [-1.1, +0.4]         ~+0.4 [-0.4, +1.2]
          deferred 1.0            +2.0 [+1.1, +3.0] *       -                         +2.0 [+1.1, +2.9] *       -2.0 [-2.9, -1.0] *
          deferred 0.1, refusing  ~-0.1 [-1.1, +0.8]        ~-0.1 [-1.1, +0.8]        -0.1 [-1.1, +0.8]         ~+0.1 [-0.8, +1.1]

          us CPU/request           gateway exporter  both against off          engine exporter  both against off          client receiver
          off                         20.8     0.00                              31.2     0.00                              41.6     0.00
          off'                        20.8     0.00  -0.02 [-0.14, +0.09]        31.2     0.00  -0.03 [-0.20, +0.14]        41.6     0.00
          eager 0.1                   23.3     1.20  +3.73 [+3.61, +3.86]        35.0     0.00  +3.80 [+3.61, +4.00]        46.6     0.00
          eager 1.0                   23.3     12.0  +14.51 [+14.39, +14.64]     35.0     0.00  +3.77 [+3.58, +3.96]        46.6     0.00
          deferred 0                  20.7     0.00  -0.07 [-0.18, +0.05]        31.1     0.00  -0.10 [-0.27, +0.08]        41.4     0.00
          deferred 0.1                20.7     1.20  +1.12 [+1.03, +1.21]        31.1     0.00  -0.12 [-0.25, +0.01]        41.4     0.00
          deferred 1.0                21.2     12.0  +12.42 [+12.31, +12.52]     31.8     0.00  +0.62 [+0.47, +0.78]        42.4     0.00
          deferred 0.1, refusing      20.7     1.20  +1.17 [+1.06, +1.28]        31.1     0.00  -0.04 [-0.20, +0.12]        41.5     0.00
          the gateway's memory peaked at 19.7 MiB by the end of the regime

          spans                        spans/req     bytes/req          made          sent      received       dropped  lost records
          eager 0.1                         2.40           432        48,000        48,000        48,000             0             0
          eager 1.0                         24.0         4,320       480,000       480,000       480,000             0             0
          deferred 0.1                      2.40           432        48,000        48,000        48,000             0             0
          deferred 1.0                      24.0         4,320       480,000       480,000       480,000             0             0
          deferred 0.1, refusing            2.40           432        48,000        48,000        48,000             0             0

        Standard path, without a target
          FAIL 5 %            floor eager 0.1 e2e mean                +12.2 % [+11.7, +12.7]  bootstrap-t [+11.6, +12.7]
          FAIL 5 %            floor eager 0.1 e2e p50                 +12.2 % [+11.7, +12.7]  bootstrap-t [+11.7, +12.7]
          FAIL 5 %            floor eager 1.0 e2e mean                +12.1 % [+11.4, +12.8]  bootstrap-t [+11.4, +12.8]
          FAIL 5 %            floor eager 1.0 e2e p50                 +12.1 % [+11.4, +12.8]  bootstrap-t [+11.4, +12.7]
        Lean paths, with targets
          PASS 1.5 %          floor deferred 0 e2e mean               -0.3 % [-0.9, +0.2]  bootstrap-t [-0.8, +0.3]  below noise floor
          PASS 1.5 %          floor deferred 0 e2e p50                -0.3 % [-0.9, +0.2]  bootstrap-t [-0.9, +0.3]  below noise floor
          PASS 5 %            floor deferred 0.1 e2e mean             -0.4 % [-0.8, +0.1]  bootstrap-t [-0.8, +0.1]  below noise floor
          PASS 5 %            floor deferred 0.1 e2e p50              -0.4 % [-0.8, +0.1]  bootstrap-t [-0.8, +0.1]  below noise floor
          PASS 5 %            floor deferred 0.1, refusing e2e mean   -0.1 % [-0.6, +0.4]  bootstrap-t [-0.7, +0.3]  below noise floor
          PASS 5 %            floor deferred 0.1, refusing e2e p50    -0.1 % [-0.6, +0.4]  bootstrap-t [-0.8, +0.3]  below noise floor
        Others, without a target
          PASS 5 %            floor deferred 1.0 e2e mean             +2.0 % [+1.5, +2.5]  bootstrap-t [+1.5, +2.5]
          PASS 5 %            floor deferred 1.0 e2e p50              +2.0 % [+1.5, +2.5]  bootstrap-t [+1.5, +2.5]
        6 PASS, 0 FAIL, 0 INCONCLUSIVE of the primary statistics with targets
        (...) decides nothing; ~ below noise floor; * differs from off, adjusted for the number of comparisons
        ");
    }

    #[test]
    fn lines_fit_a_terminal() {
        for regime in Regime::ALL {
            let text = shown(regime);
            let long: Vec<&str> = text.lines().filter(|l| l.chars().count() > 130).collect();
            assert!(long.is_empty(), "{long:#?}");
        }
    }
}
