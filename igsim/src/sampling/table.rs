//! A comparison for people.

use std::fmt::Write;

use super::{Compared, Interesting, Kept};

/// The comparison as a table: a line for each strategy.
pub fn table(compared: &Compared) -> String {
    let Compared { scenario, seed, requests, interesting: all, slow_ms, expensive_tokens, strategies } = compared;
    let mut out = String::new();
    line(
        &mut out,
        &format!(
            "igsim {}  seed {seed}  scenario {scenario} (virtual)  {requests} requests",
            env!("CARGO_PKG_VERSION")
        ),
    );
    let Interesting { failed, slow, expensive, disturbed } = all;
    let slow_s = slow_ms / 1e3;
    line(
        &mut out,
        &format!(
            "Of these   {failed} failed  {slow} slow (over {slow_s:.2} s, p99)  {expensive} expensive (over \
             {expensive_tokens} tokens, p99)  {disturbed} preempted or retried\n"
        ),
    );
    line(
        &mut out,
        &format!(
            "{:<28}{:>9}{:>9}{:>9}{:>8}{:>11}{:>11}{:>10}{:>11}",
            "strategy", "recorded", "traces", "failed", "slow", "expensive", "disturbed", "spans", "OTLP"
        ),
    );
    strategies.iter().for_each(|kept| line(&mut out, &row(kept, all)));
    line(
        &mut out,
        "\nShares are of the requests of that kind whose traces are kept; recorded is what costs the request time.",
    );
    out
}

fn row(kept: &Kept, all: &Interesting) -> String {
    let Kept { strategy, recorded, traces, interesting, spans, bytes } = kept;
    let share = |part: u64, whole: u64| match whole {
        0 => "-".to_owned(),
        whole => format!("{:.0} %", 100.0 * part as f64 / whole as f64),
    };
    format!(
        "{strategy:<28}{recorded:>9}{traces:>9}{:>9}{:>8}{:>11}{:>11}{spans:>10}{:>11}",
        share(interesting.failed, all.failed),
        share(interesting.slow, all.slow),
        share(interesting.expensive, all.expensive),
        share(interesting.disturbed, all.disturbed),
        mebibytes(*bytes),
    )
}

fn mebibytes(bytes: u64) -> String {
    let kib = bytes as f64 / 1024.0;
    if kib < 1024.0 { format!("{kib:.0} KiB") } else { format!("{:.1} MiB", kib / 1024.0) }
}

fn line(out: &mut String, text: &str) {
    writeln!(out, "{}", text.trim_end()).expect("writing to memory does not fail");
}
