//! What became of each tenant's requests: who was served, who was turned away, and how fairly.

use std::collections::BTreeMap;
use std::fmt::{self, Write};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::rows::{Outcome, RequestRow};
use super::table::{digits, thousands};
use crate::stats::{Distribution, Quantiles, Unit, rounded};

/// Times to the first token are kept apart for so many tenants: each takes memory of its own.
const MAX_DISTRIBUTIONS: usize = 64;
/// More are not printed; the report has them all.
const MAX_LINES: usize = 12;

/// One tenant's requests.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TenantFigures {
    /// Priority of its requests.
    pub priority: i32,
    /// Requests sent.
    pub sent: u64,
    /// Requests answered in full.
    pub ok: u64,
    /// Requests that were not.
    pub errors: u64,
    /// Of these, refused by the gateway: shed, expired, or without room or endpoints.
    pub dropped: u64,
    /// Its part of all answered requests, 0 to 1.
    pub share: f64,
    /// Its part of the answered requests of its priority, 0 to 1.
    pub share_of_priority: f64,
    /// Time to first token, from sending, in milliseconds; no values beyond the 64th tenant.
    pub ttft_ms: Quantiles,
}

/// Counts of one tenant while a run goes on.
#[derive(Debug, Default)]
struct Tally {
    sent: u64,
    ok: u64,
    dropped: u64,
    ttft: Distribution,
}

/// Counts of all tenants, by index.
#[derive(Debug, Default)]
pub(super) struct Tallies(Vec<Tally>);

impl Tallies {
    pub(super) fn add(&mut self, row: &RequestRow) {
        let index = usize::from(row.tenant);
        if self.0.len() <= index {
            self.0.resize_with(index + 1, Tally::default);
        }
        let tally = &mut self.0[index];
        tally.sent += 1;
        tally.ok += u64::from(row.outcome == Outcome::Ok);
        tally.dropped += u64::from(row.dropped.is_some());
        if let Some(ttft) = row.ttft().filter(|_| row.outcome == Outcome::Ok && index < MAX_DISTRIBUTIONS) {
            tally.ttft.record(ttft);
        }
    }

    /// The figures of `tenants`, given by name and priority in their order.
    pub(super) fn figures(&self, tenants: &[(String, i32)]) -> BTreeMap<String, TenantFigures> {
        let none = Tally::default();
        let tally = |i: usize| self.0.get(i).unwrap_or(&none);
        let ok = |of: Option<i32>| -> u64 {
            let among = tenants.iter().enumerate().filter(|(_, (_, p))| of.is_none_or(|of| of == *p));
            among.map(|(i, _)| tally(i).ok).sum()
        };
        let part = |n: u64, of: u64| if of == 0 { 0.0 } else { rounded(n as f64 / of as f64) };
        let figures = tenants.iter().enumerate().map(|(i, (name, priority))| {
            let t = tally(i);
            let figures = TenantFigures {
                priority: *priority,
                sent: t.sent,
                ok: t.ok,
                errors: t.sent - t.ok,
                dropped: t.dropped,
                share: part(t.ok, ok(None)),
                share_of_priority: part(t.ok, ok(Some(*priority))),
                ttft_ms: t.ttft.summary(Unit::Millis),
            };
            (name.clone(), figures)
        });
        figures.collect()
    }
}

/// Prints them, highest priority first.
pub(super) fn lines(out: &mut String, tenants: &BTreeMap<String, TenantFigures>) -> fmt::Result {
    if tenants.len() < 2 {
        return Ok(());
    }
    let mut all: Vec<(&String, &TenantFigures)> = tenants.iter().collect();
    all.sort_by_key(|(name, t)| (std::cmp::Reverse(t.priority), *name));
    writeln!(
        out,
        "{:<18}{:>9}{:>9}{:>9}{:>9}{:>9}{:>9}{:>9}",
        "Tenants", "priority", "sent", "ok", "dropped", "share %", "ttft p50", "p99"
    )?;
    for (name, t) in all.iter().take(MAX_LINES) {
        write!(out, "  {name:<16}{:>9}{:>9}{:>9}", t.priority, thousands(t.sent), thousands(t.ok))?;
        write!(out, "{:>9}{:>9}", thousands(t.dropped), digits(100.0 * t.share))?;
        writeln!(out, "{:>9}{:>9}", digits(t.ttft_ms.p50), digits(t.ttft_ms.p99))?;
    }
    if all.len() > MAX_LINES {
        writeln!(out, "  and {} more", all.len() - MAX_LINES)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::rows::{Failure, tests::row};
    use super::*;

    #[test]
    fn shares_are_of_what_was_answered() {
        let mut tallies = Tallies::default();
        let mut add = |tenant: u16, ok: u32, dropped: u32| {
            (0..ok).for_each(|i| tallies.add(&RequestRow { tenant, ..row(u64::from(i)) }));
            let (outcome, dropped_by) = (Outcome::Failed(Failure::Status(429)), Some("rejected-ttl-expired".into()));
            let refused = RequestRow { tenant, outcome, dropped: dropped_by, ..row(0) };
            (0..dropped).for_each(|_| tallies.add(&refused));
        };
        add(0, 10, 0);
        add(1, 6, 2);
        add(2, 4, 0);
        let tenants = [("high", 1), ("a", 0), ("b", 0), ("silent", 0)].map(|(n, p)| (n.to_owned(), p));
        let figures = tallies.figures(&tenants);
        let gist = |name: &str| {
            let t = &figures[name];
            (t.sent, t.ok, t.errors, t.dropped, t.share, t.share_of_priority)
        };
        assert_eq!(gist("high"), (10, 10, 0, 0, 0.5, 1.0));
        assert_eq!(gist("a"), (8, 6, 2, 2, 0.3, 0.6));
        assert_eq!(gist("b"), (4, 4, 0, 0, 0.2, 0.4));
        assert_eq!(gist("silent"), (0, 0, 0, 0, 0.0, 0.0));
        let mut out = String::new();
        lines(&mut out, &figures).unwrap();
        insta::assert_snapshot!(out, @"
        Tenants            priority     sent       ok  dropped  share % ttft p50      p99
          high                    1       10       10        0     50.0     40.0     40.0
          a                       0        8        6        2     30.0     40.0     40.0
          b                       0        4        4        0     20.0     40.0     40.0
          silent                  0        0        0        0     0.00     0.00     0.00
        ");
    }
}
