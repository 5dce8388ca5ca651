//! A ladder as a table, with published figures beside ours where they are known.

use std::fmt::Write;

use super::{Climb, Ladder, Published, Rung};

/// The table: every policy on every rung, the knees, and the ratio of the two policies that are compared.
pub fn table(ladder: &Ladder, climbs: &[Climb], published: &Published) -> String {
    let mut out = String::new();
    let beside = !published.is_empty();
    let head = if beside { "  published: tok/s  TTFT mean  p90" } else { "" };
    line(
        &mut out,
        &format!(
            "{:>5}  {:<16}{:>8}{:>11}{:>9}{:>9}{:>8}{:>8}{head}",
            "rate", "policy", "tok/s", "TTFT mean", "p90", "per tok", "cached", "errors"
        ),
    );
    for (i, step) in ladder.rungs.iter().enumerate() {
        for climb in climbs {
            let r = &climb.rungs[i];
            let ours = format!(
                "{:>5}  {:<16}{:>8.0}{:>9.2} s{:>7.2} s{:>6.1} ms{:>7.0}%{:>8}",
                r.rate,
                climb.policy,
                r.output_tokens_per_s,
                r.ttft_mean_s,
                r.ttft_p90_s,
                1e3 * r.per_token_mean_s,
                100.0 * r.cached_share,
                r.errors
            );
            let theirs = named(ladder, climb, published, step.rate).map_or_else(String::new, |l| {
                format!("  {:>15.0}{:>9.2} s{:>5.2} s", l.out_tok_s, l.ttft_mean_s, l.ttft_p90_s)
            });
            line(&mut out, &format!("{ours}{theirs}"));
        }
    }
    knees(&mut out, ladder, climbs, published);
    ratios(&mut out, ladder, climbs, published);
    out
}

fn line(out: &mut String, text: &str) {
    writeln!(out, "{}", text.trim_end()).expect("writing to memory does not fail");
}

fn named<'p>(
    ladder: &Ladder,
    climb: &Climb,
    published: &'p Published,
    rate: f64,
) -> Option<&'p super::published::Line> {
    let policy = ladder.policies.iter().find(|p| p.name == climb.policy)?;
    published.at(policy.published.as_deref()?, rate)
}

/// The first rung at which each policy does not keep up any more.
fn knees(out: &mut String, ladder: &Ladder, climbs: &[Climb], published: &Published) {
    let most = ladder.knee.get().as_secs_f64();
    let rung = |found: Option<f64>| found.map_or_else(|| "none".to_owned(), |rate| format!("{rate}"));
    line(out, &format!("\nknee, the first rate with a mean time to first token above {}:", ladder.knee));
    for climb in climbs {
        let ours = climb.rungs.iter().find(|r| r.ttft_mean_s > most).map(|r| r.rate);
        let theirs =
            ladder.rungs.iter().find(|s| named(ladder, climb, published, s.rate).is_some_and(|l| l.ttft_mean_s > most));
        let known = ladder.rungs.iter().any(|s| named(ladder, climb, published, s.rate).is_some());
        let theirs = if known { format!("  published {}", rung(theirs.map(|s| s.rate))) } else { String::new() };
        line(out, &format!("  {:<16}{:>5}{theirs}", climb.policy, rung(ours)));
    }
}

/// How many times the throughput of the second policy the first one has.
fn ratios(out: &mut String, ladder: &Ladder, climbs: &[Climb], published: &Published) {
    let [first, second] = ladder.compare.each_ref().map(|name| climbs.iter().find(|c| c.policy == *name));
    let (Some(first), Some(second)) = (first, second) else { return };
    line(out, &format!("\nthroughput of {} over that of {}:", first.policy, second.policy));
    for (i, step) in ladder.rungs.iter().enumerate() {
        let of = |climb: &Climb| -> f64 { Rung::clone(&climb.rungs[i]).output_tokens_per_s };
        let ours = of(first) / of(second);
        let theirs = [first, second].map(|c| named(ladder, c, published, step.rate).map(|l| l.out_tok_s));
        let theirs = match theirs {
            [Some(a), Some(b)] => format!("  published {:.2}, ours is {:+.0} %", a / b, 100.0 * (ours * b / a - 1.0)),
            _ => String::new(),
        };
        line(out, &format!("  {:>5}{ours:>7.2}{theirs}", step.rate));
    }
}
