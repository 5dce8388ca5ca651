//! The plots of the page: overheads by ratio, latency distributions, CPU, and blocks over time.

use super::svg::{Anchor, Plot, Scale};
use crate::overhead::analysis::{ArmAnalysis, Estimate, Judgement, RegimeAnalysis, Role, Statistic};
use crate::overhead::distribution::Distribution;
use crate::overhead::format;
use crate::overhead::model::{Arm, Block, Health, Path, Regime, Run};
use crate::overhead::stats::Interval;
use crate::report::digits;

/// The class of an arm: its colour and the shape of its marks.
fn class(arm: &Arm) -> &'static str {
    match arm {
        Arm::Off | Arm::Control => "off",
        Arm::Traced { path, .. } => path.name(),
        Arm::Delayed { .. } | Arm::Outside { .. } => "other",
    }
}

/// One arm's overhead in a panel.
struct Point<'a> {
    arm: &'a Arm,
    column: usize,
    value: f64,
    interval: Interval,
    tip: String,
}

/// The overhead of one statistic against the ratio; a second panel near the target where the first is too coarse to
/// read it.
pub(super) fn overheads(regime: &RegimeAnalysis, statistic: Statistic, general: f64) -> String {
    let mut columns: Vec<String> = Vec::new();
    let points: Vec<Point<'_>> = regime.arms.iter().filter_map(|a| point(a, statistic, &mut columns)).collect();
    if points.is_empty() {
        return String::new();
    }
    let estimates = || regime.arms.iter().filter_map(|a| a.estimate(statistic));
    let floor = estimates().find_map(|e| e.noise_floor);
    let mut targets = vec![general];
    for below in estimates().filter_map(judged).map(|j| j.target.below) {
        if !targets.contains(&below) {
            targets.push(below);
        }
    }
    let marks = Marks { targets, floor };
    let lows = points.iter().map(|p| p.interval.low).chain(floor.map(|f| -f));
    let low = lows.fold(0.0, f64::min);
    let high = points.iter().map(|p| p.interval.high).fold(general, f64::max);
    let pad = 0.06 * (high - low);
    let name = format!("{}: {}", regime.regime.name(), statistic.name());
    let mut out = panel(&name, &points, &columns, Scale::linear(low - pad, high + pad), &marks);
    if high > 3.0 * general {
        let near = Scale::linear(low.max(-general), 1.6 * general);
        out.push_str(&panel(
            &format!("{name}, near the target; arms beyond left out"),
            &points,
            &columns,
            near,
            &marks,
        ));
    }
    out
}

/// What a panel shows beside the arms, as shares.
struct Marks {
    targets: Vec<f64>,
    floor: Option<f64>,
}

fn judged(estimate: &Estimate) -> Option<Judgement> {
    match estimate.role {
        Role::Primary(judgement) => Some(judgement),
        Role::Control | Role::Secondary(_) => None,
    }
}

fn point<'a>(arm: &'a ArmAnalysis, statistic: Statistic, columns: &mut Vec<String>) -> Option<Point<'a>> {
    let estimate = arm.estimate(statistic)?;
    let (overhead, interval) = format::shown(estimate)?;
    let name = match &arm.arm {
        Arm::Traced { receiver: Health::Healthy, steps, .. } if *steps > 0.0 => "steps".to_owned(),
        Arm::Traced { ratio, receiver: Health::Healthy, .. } if *ratio == 1.0 => "1.0".to_owned(),
        Arm::Traced { ratio, receiver: Health::Healthy, .. } => ratio.to_string(),
        Arm::Traced { receiver: Health::Slow, .. } => "slow".to_owned(),
        Arm::Traced { receiver: Health::Refusing, .. } => "refusing".to_owned(),
        Arm::Traced { receiver: Health::Absent, .. } => "absent".to_owned(),
        Arm::Off | Arm::Control | Arm::Delayed { .. } | Arm::Outside { .. } => format::arm(&arm.arm),
    };
    let column = columns.iter().position(|c| *c == name).unwrap_or_else(|| {
        columns.push(name);
        columns.len() - 1
    });
    let verdict = judged(estimate).map_or_else(String::new, |j| format!(" {}", j.verdict.name()));
    let tip = format!("{}: {}{verdict}", arm.arm, format::percent_in_words(overhead.value, interval));
    Some(Point { arm: &arm.arm, column, value: overhead.value, interval, tip })
}

fn panel(name: &str, points: &[Point<'_>], columns: &[String], y: Scale, marks: &Marks) -> String {
    let x = Scale::linear(-0.5, columns.len() as f64 - 0.5);
    let width = (90.0 + 62.0 * columns.len() as f64).max(380.0);
    let mut plot = Plot::new((width, 300.0), x, y, 0.0, 22.0);
    let [left, right, _, bottom] = plot.edges();
    if let Some(floor) = marks.floor {
        let band = [left, plot.y.at(floor), right, plot.y.at(-floor)];
        plot.rect("band", band, &format!("noise floor {}", format::share(floor)));
    }
    plot.y_axis("% over off", |v| format::signed(100.0 * v, if v.abs() < 0.1 { 1 } else { 0 }));
    let zero = plot.y.at(0.0);
    plot.line("zero", [left, zero, right, zero]);
    for target in marks.targets.iter().filter(|t| y.shows(**t)) {
        let at = plot.y.at(*target);
        plot.line("target", [left, at, right, at]);
        plot.text("faint", Anchor::End, [right, at - 5.0], &format!("target {}", format::share(*target)));
    }
    for (i, column) in columns.iter().enumerate() {
        let x = plot.x.at(i as f64);
        plot.text("", Anchor::Middle, [x, bottom + 16.0], column);
    }
    for point in points {
        interval(&mut plot, point);
    }
    plot.text("faint", Anchor::End, [right, bottom + 34.0], "ratio of sampled traces, or what else differs");
    legend(&mut plot, points.iter().map(|p| p.arm));
    plot.figure(name, "Overhead against tracing off with its 95 % interval; the grey band is the noise floor.")
}

fn interval(plot: &mut Plot, point: &Point<'_>) {
    let shift = match point.arm {
        Arm::Traced { path: Path::Eager, .. } => -0.2,
        Arm::Traced { path: Path::Direct, .. } => 0.2,
        Arm::Traced { path: Path::Deferred, .. } | Arm::Off | Arm::Control | Arm::Delayed { .. } => 0.0,
        Arm::Outside { .. } => 0.0,
    };
    let x = plot.x.at(point.column as f64 + shift);
    let class = class(point.arm);
    // A panel near the target leaves out what lies beyond it.
    if !plot.y.shows(point.interval.low) && !plot.y.shows(point.interval.high) {
        return;
    }
    let (low, high) = (plot.y.at(point.interval.low), plot.y.at(point.interval.high));
    plot.line(&format!("line {class}"), [x, low, x, high]);
    for end in [low, high] {
        plot.line(&format!("line {class}"), [x - 4.0, end, x + 4.0, end]);
    }
    if plot.y.shows(point.value) {
        let y = plot.y.at(point.value);
        plot.mark(class, [x, y], 4.0, &point.tip);
    }
}

/// The paths that occur, below the plot.
fn legend<'a>(plot: &mut Plot, arms: impl Iterator<Item = &'a Arm>) {
    let mut classes: Vec<&str> = arms.map(class).collect();
    classes.sort_unstable();
    classes.dedup();
    let (mut x, y) = (plot.edges()[0], plot.height - 8.0);
    for class in classes {
        plot.mark(class, [x, y - 4.0], 4.0, "");
        plot.text("", Anchor::Start, [x + 9.0, y], class);
        x += 24.0 + 7.0 * class.len() as f64;
    }
}

/// The dashes of an arm: solid at 1.0, ever shorter down to dots at 0 and for the control.
fn dash(arm: &Arm) -> &'static str {
    match arm {
        Arm::Off | Arm::Delayed { .. } | Arm::Outside { .. } => "",
        Arm::Control => "2 4",
        Arm::Traced { ratio, .. } => match *ratio {
            r if r >= 1.0 => "",
            r if r >= 0.1 => "8 3",
            r if r > 0.0 => "4 3",
            _ => "1 3",
        },
    }
}

/// The end-to-end latency distributions of a regime, one line an arm.
pub(super) fn latencies(regime: Regime, distributions: &[Distribution]) -> String {
    let own: Vec<&Distribution> = distributions.iter().filter(|d| d.regime == regime && !d.points.is_empty()).collect();
    let values = || own.iter().flat_map(|d| d.points.iter());
    // The last per mille would squeeze the rest.
    let within = |p: &&(f64, f64)| p.1 <= 0.999;
    let low = values().map(|p| p.0).fold(f64::INFINITY, f64::min);
    let high = values().filter(within).map(|p| p.0).fold(0.0, f64::max);
    if own.is_empty() || high <= 0.0 {
        return String::new();
    }
    let rows = own.len().div_ceil(4) as f64;
    let mut plot = Plot::new(
        (760.0, 330.0 + 18.0 * rows),
        Scale::logarithmic(low, high),
        Scale::linear(0.0, 1.0),
        0.0,
        18.0 * rows,
    );
    plot.y_axis("share of requests", |v| format!("{:.0} %", 100.0 * v));
    plot.x_axis("end to end, us", digits);
    for d in &own {
        let points: Vec<(f64, f64)> =
            d.points.iter().filter(within).map(|(us, share)| (plot.x.at(*us), plot.y.at(*share))).collect();
        let weight = if d.arm == Arm::Off { " heavy" } else { "" };
        plot.polyline(&format!("{}{weight}", class(&d.arm)), dash(&d.arm), &points, &d.arm.to_string());
    }
    let left = plot.edges()[0];
    for (i, d) in own.iter().enumerate() {
        let (x, y) = (left + 170.0 * (i % 4) as f64, plot.height - 18.0 * (rows - (i / 4) as f64) + 10.0);
        plot.polyline(class(&d.arm), dash(&d.arm), &[(x, y - 4.0), (x + 26.0, y - 4.0)], "");
        plot.text("", Anchor::Start, [x + 32.0, y], &format::arm(&d.arm));
    }
    plot.figure(
        &format!("{}: latency distributions", regime.name()),
        "Cumulative share of requests by end-to-end latency, one line for each arm; the last per mille is left out.",
    )
}

/// CPU time per request, stacked, one bar an arm.
pub(super) fn cpu(regime: &RegimeAnalysis) -> String {
    const PARTS: [&str; 4] = ["gateway requests", "gateway exporter", "engine requests", "engine exporter"];
    let parts =
        |a: &ArmAnalysis| [a.cpu.gateway_request, a.cpu.gateway_exporter, a.cpu.engine_request, a.cpu.engine_exporter];
    let n = regime.arms.len() as f64;
    let longest = regime.arms.iter().map(|a| parts(a).iter().sum::<f64>()).fold(0.0, f64::max);
    if longest <= 0.0 {
        return String::new();
    }
    let x = Scale::linear(0.0, longest * 1.08);
    let mut plot = Plot::new((760.0, 120.0 + 24.0 * n), x, Scale::linear(0.0, n), 100.0, 22.0);
    plot.x_axis("us of CPU per request", digits);
    let [left, _, top, _] = plot.edges();
    for (i, arm) in regime.arms.iter().enumerate() {
        let y = top + 24.0 * i as f64 + 3.0;
        plot.text("", Anchor::End, [left - 6.0, y + 13.0], &format::arm(&arm.arm));
        let mut sum = 0.0;
        for (part, value) in parts(arm).into_iter().enumerate() {
            let bar = [plot.x.at(sum), y, plot.x.at(sum + value), y + 18.0];
            plot.rect(&format!("part{part}"), bar, &format!("{}, {}: {} us", arm.arm, PARTS[part], digits(value)));
            sum += value;
        }
        plot.text("faint", Anchor::Start, [plot.x.at(sum) + 5.0, y + 13.0], &digits(sum));
    }
    for (part, name) in PARTS.iter().enumerate() {
        let (x, y) = (left + 150.0 * part as f64, plot.height - 8.0);
        plot.rect(&format!("part{part}"), [x, y - 10.0, x + 12.0, y + 2.0], "");
        plot.text("", Anchor::Start, [x + 17.0, y], name);
    }
    let name = format!("{}: CPU per request", regime.regime.name());
    plot.figure(
        &name,
        "Mean CPU time per request of gateway and engines, threads that serve and threads that export apart.",
    )
}

/// One statistic of every block in the order in which they ran, so that drift and outliers show.
pub(super) fn series(run: &Run, regime: Regime, statistic: Statistic) -> String {
    let mut blocks: Vec<(&Block, f64)> =
        run.blocks.iter().filter(|b| b.regime == regime).filter_map(|b| Some((b, statistic.of(b)?))).collect();
    blocks.sort_by_key(|(b, _)| b.place);
    let Some(last) = blocks.last().map(|(b, _)| b.place) else { return String::new() };
    let low = blocks.iter().map(|(_, v)| *v).fold(f64::INFINITY, f64::min);
    let high = blocks.iter().map(|(_, v)| *v).fold(0.0, f64::max);
    let y = Scale::linear(low - 0.05 * (high - low), high + 0.05 * (high - low));
    let mut plot = Plot::new((1160.0, 260.0), Scale::linear(0.0, f64::from(last)), y, 0.0, 18.0);
    plot.y_axis(statistic.unit().name(), digits);
    plot.x_axis("block", |v| format!("{v:.0}"));
    let off = blocks.iter().filter(|(b, _)| b.arm == Arm::Off);
    let line: Vec<(f64, f64)> = off.map(|(b, v)| (plot.x.at(f64::from(b.place)), plot.y.at(*v))).collect();
    plot.polyline("off", "", &line, "off");
    for (block, value) in &blocks {
        let at = [plot.x.at(f64::from(block.place)), plot.y.at(*value)];
        let repeated = if block.repeated > 0 { format!(", repeated {} times", block.repeated) } else { String::new() };
        let level = format::level(*value, statistic.unit());
        plot.mark(class(&block.arm), at, 2.6, &format!("round {}, {}: {level}{repeated}", block.round, block.arm));
    }
    legend(&mut plot, blocks.iter().map(|(b, _)| &b.arm));
    plot.figure(
        &format!("{}: {} of every block", regime.name(), statistic.name()),
        "Blocks in the order in which they ran; the line joins blocks with tracing off.",
    )
}
