//! Figures of the lab as people read them, the same in the terminal and on the page.

use super::analysis::{Estimate, Judgement, Relative, Role, Unit, Verdict};
use super::model::{Arm, Health, Machine, Run, Telemetry};
use super::stats::Interval;
use crate::report::{digits, thousands};

/// Behind an overhead that is nearer to 0 than the noise floor, where there is no room for words.
pub(super) const BELOW_NOISE: &str = "~";

/// An arm's name, short enough for a column.
pub(super) fn arm(arm: &Arm) -> String {
    match arm {
        Arm::Traced { receiver: Health::Slow | Health::Refusing | Health::Absent, .. } => {
            arm.to_string().replace(" receiver", "")
        }
        Arm::Traced { receiver: Health::Healthy, .. }
        | Arm::Off
        | Arm::Control
        | Arm::Delayed { .. }
        | Arm::Outside { .. } => arm.to_string(),
    }
}

/// A share in per cent, as exact as its uncertainty lets it be: `0.31`, `12.1`, `150`.
fn percent_digits(half: f64) -> usize {
    match 100.0 * half {
        h if h < 0.2 => 2,
        h if h < 25.0 => 1,
        _ => 0,
    }
}

/// `+0.31 [-0.20, +0.82]`, in per cent.
pub(super) fn percent(value: f64, interval: Interval) -> String {
    let value = signed(100.0 * value, percent_digits(interval.half()));
    format!("{value} {}", percent_interval(interval))
}

/// `[-0.20, +0.82]`, in per cent.
pub(super) fn percent_interval(interval: Interval) -> String {
    let p = |v: f64| signed(100.0 * v, percent_digits(interval.half()));
    format!("[{}, {}]", p(interval.low), p(interval.high))
}

/// `+0.31 % [-0.20, +0.82]`.
pub(super) fn percent_in_words(value: f64, interval: Interval) -> String {
    percent(value, interval).replacen(" [", " % [", 1)
}

/// `+12.1 [+11.2, +13.0]`, in the statistic's unit.
pub(super) fn difference(value: f64, interval: Interval) -> String {
    let d = match interval.half().min(value.abs()) {
        size if size < 1.0 => 2,
        size if size < 10.0 => 1,
        _ => 0,
    };
    format!("{} [{}, {}]", signed(value, d), signed(interval.low, d), signed(interval.high, d))
}

/// With a sign, except for what rounds to nothing.
pub(super) fn signed(value: f64, decimals: usize) -> String {
    let text = format!("{value:+.decimals$}");
    if text.chars().all(|c| matches!(c, '+' | '-' | '0' | '.')) { text[1..].to_owned() } else { text }
}

/// A share without sign in per cent: `5 %`, `1.5 %`, `0.62 %`.
pub(super) fn share(value: f64) -> String {
    let p = 100.0 * value;
    let text = format!("{p:.2}");
    format!("{} %", text.trim_end_matches('0').trim_end_matches('.'))
}

/// A level with its unit: `66.3 us`, `34.2 MiB`.
pub(super) fn level(value: f64, unit: Unit) -> String {
    match unit {
        Unit::Micros if value >= 1e6 => format!("{} s", digits(value / 1e6)),
        Unit::Micros if value >= 1e4 => format!("{} ms", digits(value / 1e3)),
        Unit::Kib => format!("{} MiB", digits(value / 1024.0)),
        Unit::Micros | Unit::PerSecond | Unit::Count => format!("{} {}", digits(value), unit.name()),
    }
}

/// The unadjusted overhead of a primary statistic, the adjusted one of a secondary one.
pub(super) fn shown(estimate: &Estimate) -> Option<(Relative, Interval)> {
    let overhead = estimate.overhead?;
    let interval = match estimate.role {
        Role::Secondary(Some(adjusted)) => adjusted.interval,
        Role::Control | Role::Primary(_) | Role::Secondary(None) => overhead.interval,
    };
    Some((overhead, interval))
}

/// A verdict for a column; in brackets where it decides nothing.
pub(super) fn verdict(judgement: Judgement) -> String {
    let word = match judgement.verdict {
        Verdict::Pass | Verdict::Fail => judgement.verdict.name(),
        Verdict::Inconclusive => "INCONCL",
    };
    if judgement.target.decides { word.to_owned() } else { format!("({word})") }
}

/// `1 round`, `20 rounds`.
pub(super) fn rounds(n: usize) -> String {
    if n == 1 { "1 round".to_owned() } else { format!("{n} rounds") }
}

/// Why an arm has no count of received spans, if it has none.
pub(super) fn not_kept(of: &Arm, telemetry: &Telemetry) -> Option<String> {
    let Telemetry { receiver_not_kept: lost, receiver_requests: all, .. } = telemetry;
    let (missing, all) = (thousands(*lost), thousands(*all));
    (*lost > 0).then(|| {
        let name = arm(of);
        format!("{name}: received is not known: all {all} export requests were acknowledged, {missing} were not kept")
    })
}

/// The machine on one line.
pub(super) fn machine(machine: &Machine) -> String {
    let kind = if machine.virtual_machine { " (virtual)" } else { "" };
    let memory = thousands(machine.memory_mib);
    let awake = if machine.awake { "; processors kept awake" } else { "" };
    format!("{} x {}{kind}, {memory} MiB, Linux {}{awake}", machine.cpus, machine.cpu, machine.kernel)
}

/// When a run began, in UTC.
pub(super) fn began(run: &Run) -> String {
    let second = i64::try_from(run.began).ok().and_then(|s| jiff::Timestamp::from_second(s).ok());
    second.map_or_else(|| "-".to_owned(), |t| t.strftime("%Y-%m-%d %H:%M UTC").to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_as_exact_as_they_are_sure() {
        let percent =
            |value, low, high, expect: &str| assert_eq!(percent_in_words(value, Interval { low, high }), expect);
        percent(0.003, -0.002, 0.008, "+0.3 % [-0.2, +0.8]");
        percent(0.0031, 0.0016, 0.0046, "+0.31 % [+0.16, +0.46]");
        percent(1.5, 1.1, 1.9, "+150 % [+110, +190]");
        percent(-0.00001, -0.01, 0.01, "0.0 % [-1.0, +1.0]");
        let difference =
            |value, low, high, expect: &str| assert_eq!(super::difference(value, Interval { low, high }), expect);
        difference(0.4, 0.1, 0.7, "+0.40 [+0.10, +0.70]");
        difference(12.14, 11.0, 13.28, "+12.1 [+11.0, +13.3]");
        difference(1234.0, 1200.0, 1268.0, "+1234 [+1200, +1268]");
        assert_eq!([share(0.05), share(0.015), share(0.00623)], ["5 %", "1.5 %", "0.62 %"]);
        assert_eq!(level(66.31, Unit::Micros), "66.3 us");
        assert_eq!(level(1_720_000.0, Unit::Micros), "1.72 s");
        assert_eq!(level(35_020.8, Unit::Kib), "34.2 MiB");
    }
}
