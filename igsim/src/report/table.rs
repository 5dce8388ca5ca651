//! The report as a table for people: plain text that reads well in a terminal and in a CI log.

use std::fmt::{self, Write};

use super::figures::{GatewayFigures, LetGo, Report, Routing, TraceFigures};
use super::tenants;
use crate::stats::Quantiles;

impl Report {
    /// The table, lines ended, without colour.
    pub fn table(&self) -> String {
        let mut out = String::new();
        // Writing to a String does not fail.
        let _ = self.write(&mut out);
        out
    }

    fn write(&self, out: &mut String) -> fmt::Result {
        for reason in &self.invalid {
            writeln!(out, "WARNING    {reason}: latency figures are not valid")?;
        }
        if self.interrupted {
            writeln!(out, "WARNING    the run was interrupted: figures are of what was done")?;
        }
        self.requests(out)?;
        self.latency(out)?;
        tenants::lines(out, &self.tenants)?;
        self.routing(out)?;
        self.prefills(out)?;
        self.faults(out)?;
        self.pacing(out)?;
        match &self.gateway {
            None => tracing(out, &self.traces)?,
            Some(gateway) => traced_elsewhere(out, gateway, self.sent)?,
        }
        self.expected(out)
    }

    /// What sidecars had prefilled elsewhere.
    fn prefills(&self, out: &mut String) -> fmt::Result {
        let pd = &self.engines.pd;
        if pd.requests == 0 {
            return Ok(());
        }
        write!(out, "P/D        {} of {} prefilled elsewhere", thousands(pd.disaggregated), thousands(pd.requests))?;
        if pd.prefill_ms.count > 0 {
            let (p50, p99) = (digits(pd.prefill_ms.p50), digits(pd.prefill_ms.p99));
            write!(
                out,
                "  prefill p50/p99 {p50}/{p99} ms  coordination p50 {} us",
                digits(pd.coordination_ms.p50 * 1e3)
            )?;
        }
        for (what, n) in [
            ("retries", pd.prefill_retries),
            ("failed", pd.prefill_failed),
            ("without parameters", pd.no_transfer_params),
            ("refused", pd.refused),
        ] {
            if n > 0 {
                write!(out, "  {what} {}", thousands(n))?;
            }
        }
        writeln!(out)
    }

    /// What went wrong because it should.
    fn faults(&self, out: &mut String) -> fmt::Result {
        let told = self.engines.faults.told();
        if told.is_empty() {
            return Ok(());
        }
        let told: Vec<String> = told.iter().map(|(name, n)| format!("{name} {}", thousands(*n))).collect();
        writeln!(out, "Faults     {}", told.join("  "))
    }

    /// How late client and engines were against their plans: in real time only.
    fn pacing(&self, out: &mut String) -> fmt::Result {
        let (client, engines) = (&self.pacing.lateness_ms, &self.engines);
        if client.p99 > 0.0 || engines.planned_moments > 0 {
            let (p50, p99) = (digits(client.p50 * 1e3), digits(client.p99 * 1e3));
            write!(out, "Pacing     late by p50/p99 us: requests {p50}/{p99}")?;
            if engines.planned_moments > 0 {
                write!(out, ", engine steps {}/{}", digits(engines.late_p50_us), digits(engines.late_p99_us))?;
            }
            writeln!(out)?;
        }
        Ok(())
    }

    /// Where requests went, as far as it is known.
    fn routing(&self, out: &mut String) -> fmt::Result {
        let (routing, theirs) = (&self.routing, self.gateway.is_some());
        write!(out, "Routing    ")?;
        if theirs && routing.endpoints.is_empty() {
            write!(out, "no answer names its engine")?;
        } else {
            shares(out, routing)?;
        }
        if theirs && self.tokens.cached == 0 {
            write!(out, "  no prefix hits told")?;
        } else {
            write!(out, "  prefix hits {:.0} % of prompt tokens", 100.0 * routing.prefix_hit_ratio)?;
        }
        if !theirs {
            write!(out, "  preemptions {}", thousands(self.engines.preemptions))?;
        }
        if routing.retries > 0 {
            write!(out, "  retries {}", thousands(routing.retries))?;
        }
        writeln!(out)
    }

    fn requests(&self, out: &mut String) -> fmt::Result {
        let t = &self.throughput;
        writeln!(
            out,
            "Requests   {} sent  {} ok  {} failed   {} req/s   {} output tok/s   {} s",
            thousands(self.sent),
            thousands(self.ok),
            thousands(self.errors),
            digits(t.requests_per_s),
            thousands(t.output_tokens_per_s.round() as u64),
            digits(self.duration_s),
        )?;
        if self.errors_by_kind.is_empty() {
            return Ok(());
        }
        let kinds: Vec<String> =
            self.errors_by_kind.iter().map(|(kind, n)| format!("{kind} {}", thousands(*n))).collect();
        writeln!(out, "Errors     {}", kinds.join("  "))?;
        if self.dropped_by_reason.is_empty() {
            return Ok(());
        }
        let reasons: Vec<String> =
            self.dropped_by_reason.iter().map(|(reason, n)| format!("{reason} {}", thousands(*n))).collect();
        writeln!(out, "Dropped    {}", reasons.join("  "))
    }

    fn latency(&self, out: &mut String) -> fmt::Result {
        writeln!(out, "{:<18}{:>9}{:>9}{:>9}{:>9}{:>9}", "Latency", "mean", "p50", "p90", "p95", "p99")?;
        // With flow control it is time in the queue.
        let added = if self.gateway_added_us.p99 < 1e5 { ("gateway (us)", 1.0) } else { ("gateway (ms)", 1e-3) };
        let rows: [(&str, &Quantiles, f64); 5] = [
            ("TTFT (ms)", &self.ttft_ms, 1.0),
            ("per token (ms)", &self.per_token_ms, 1.0),
            ("inter-token (ms)", &self.inter_token_ms, 1.0),
            ("end to end (s)", &self.e2e_ms, 1e-3),
            (added.0, &self.gateway_added_us, added.1),
        ];
        for (name, q, scale) in rows.iter().filter(|(_, q, _)| q.count > 0) {
            write!(out, "  {name:<16}")?;
            for value in [q.mean, q.p50, q.p90, q.p95, q.p99] {
                write!(out, "{:>9}", digits(value * scale))?;
            }
            writeln!(out)?;
        }
        Ok(())
    }

    fn expected(&self, out: &mut String) -> fmt::Result {
        if self.expectations.is_empty() {
            return Ok(());
        }
        let passed = self.expectations.iter().filter(|v| v.pass).count();
        writeln!(out, "Expected   {passed} of {} hold", self.expectations.len())?;
        for v in &self.expectations {
            let verdict = if v.pass { "pass" } else { "FAIL" };
            let value = v.value.map_or("no such figure".to_owned(), figure);
            writeln!(out, "  {verdict}  {}  {value}  ({})", v.path, v.bound)?;
        }
        Ok(())
    }
}

/// How requests were spread over engines.
fn shares(out: &mut String, routing: &Routing) -> fmt::Result {
    match routing.endpoints.len() {
        0 => write!(out, "no request reached an engine"),
        1..=8 => {
            let shares: Vec<String> = routing.endpoints.iter().map(|e| format!("{:.0}", 100.0 * e.share)).collect();
            write!(out, "share {} %", shares.join("/"))
        }
        n => {
            let share = |pick: fn(f64, f64) -> f64| {
                100.0 * routing.endpoints.iter().map(|e| e.share).reduce(pick).unwrap_or_default()
            };
            write!(out, "share {:.2} to {:.2} % over {n} engines", share(f64::min), share(f64::max))
        }
    }
}

/// What answers of a gateway that ran already say of its traces.
fn traced_elsewhere(out: &mut String, gateway: &GatewayFigures, sent: u64) -> fmt::Result {
    match gateway.traces_named {
        0 => writeln!(out, "Tracing    the gateway's own: no answer names a trace"),
        n => {
            writeln!(out, "Tracing    the gateway's own: {} of {} answers name a trace", thousands(n), thousands(sent))
        }
    }
}

fn tracing(out: &mut String, t: &TraceFigures) -> fmt::Result {
    if t.decided == 0 && t.spans_created == 0 {
        return writeln!(out, "Tracing    off");
    }
    let surprise = if (t.expected_low..=t.expected_high).contains(&t.kept) { "" } else { ", UNEXPECTED" };
    let expected = if t.by_policy {
        "by policy".to_owned()
    } else {
        format!("expected {} to {}{surprise}", thousands(t.expected_low), thousands(t.expected_high))
    };
    writeln!(
        out,
        "Tracing    {} of {} traces kept ({expected})  {} records  {} spans  {} orphans  {} findings",
        thousands(t.kept),
        thousands(t.decided),
        thousands(t.records),
        thousands(t.spans_created),
        thousands(t.orphans),
        thousands(t.findings),
    )?;
    if t.kept_later + t.let_go.judged > 0 {
        let LetGo { judged, expired, evicted } = t.let_go;
        write!(out, "  later    {} traces kept for what became of their requests", thousands(t.kept_later))?;
        let held = [judged + expired, evicted].map(thousands);
        writeln!(out, "  records let go {}  evicted {}", held[0], held[1])?;
    }
    if t.engine_steps > 0 {
        writeln!(out, "  steps    {} engine steps traced on their own", thousands(t.engine_steps))?;
    }
    if t.kv_events > 0 {
        writeln!(out, "  events   {} batches of KV events traced on their own", thousands(t.kv_events))?;
    }
    if t.scrapes > 0 {
        writeln!(out, "  scrapes  {} scrapes of engines traced on their own", thousands(t.scrapes))?;
    }
    if t.records_dropped + t.records_abandoned > 0 {
        let (dropped, abandoned) = (thousands(t.records_dropped), thousands(t.records_abandoned));
        writeln!(out, "  records  {dropped} dropped  {abandoned} abandoned")?;
    }
    for e in &t.exporters {
        let total = e.dropped_total();
        let (created, exported) = (thousands(t.spans_created), thousands(e.exported));
        write!(out, "  {:<8} {created} created = {exported} exported + {} dropped", e.name, thousands(total))?;
        if total > 0 {
            let reasons: Vec<String> = e.dropped.iter().map(|(r, n)| format!("{r} {}", thousands(*n))).collect();
            write!(out, " ({})", reasons.join(", "))?;
        }
        writeln!(out, "{}", e.last_error.as_deref().map(|e| format!("  last error: {e}")).unwrap_or_default())?;
    }
    Ok(())
}

/// About three significant digits: `7.91`, `48.1`, `112`, `12,345`.
pub(crate) fn digits(value: f64) -> String {
    match value {
        v if !v.is_finite() => "-".to_owned(),
        v if v.abs() >= 99.95 => thousands(v.round() as u64),
        v if v.abs() >= 9.995 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

/// A figure of unknown unit: whole numbers as such.
fn figure(value: f64) -> String {
    if value.fract() == 0.0 && (0.0..1e15).contains(&value) { thousands(value as u64) } else { digits(value) }
}

/// Digits in groups of three.
pub(crate) fn thousands(n: u64) -> String {
    let text = n.to_string();
    let mut out = String::new();
    for (i, c) in text.chars().enumerate() {
        if i > 0 && (text.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::rows::tests::row;
    use super::super::{Bound, EngineFigures, ExporterFigures, Failure, Outcome, RequestRow, RunFacts, Summary};
    use super::*;
    use std::collections::BTreeMap;

    fn facts() -> RunFacts {
        let bound = |max| Bound { min: None, max: Some(max) };
        let exporter = ExporterFigures { name: "file".into(), exported: 812, ..ExporterFigures::default() };
        RunFacts {
            scenario: "quickstart".into(),
            mode: "live".into(),
            seed: 42,
            engines: EngineFigures { preemptions: 0, steps: 9000, ..EngineFigures::default() },
            traces: TraceFigures {
                ratio: 0.1,
                decided: 300,
                kept: 30,
                records: 60,
                spans_created: 812,
                exporters: vec![exporter],
                checked: 30,
                ..TraceFigures::default()
            },
            expectations: BTreeMap::from([("errors".into(), bound(0.0)), ("ttft_ms.p99".into(), bound(500.0))]),
            ..RunFacts::default()
        }
    }

    #[test]
    fn a_good_run_reads_well() {
        let mut summary = Summary::new();
        (0..300).for_each(|i| summary.add(&row(i)));
        insta::assert_snapshot!(summary.finish(facts()).table(), @r"
        Requests   300 sent  300 ok  0 failed   70.1 req/s   2,244 output tok/s   4.28 s
        Latency                mean      p50      p90      p95      p99
          TTFT (ms)            40.0     40.0     40.0     40.0     40.0
          per token (ms)       8.00     8.00     8.00     8.00     8.00
          end to end (s)       0.29     0.29     0.29     0.29     0.29
          gateway (us)          120      120      120      120      120
        Routing    share 25/25/25/25 %  prefix hits 42 % of prompt tokens  preemptions 0
        Pacing     late by p50/p99 us: requests 50.0/50.0
        Tracing    30 of 300 traces kept (expected 17 to 44)  60 records  812 spans  0 orphans  0 findings
          file     812 created = 812 exported + 0 dropped
        Expected   2 of 2 hold
          pass  errors  0  (at most 0)
          pass  ttft_ms.p99  40.0  (at most 500)
        ");
    }

    #[test]
    fn a_bad_run_says_what_went_wrong() {
        let mut summary = Summary::new();
        (0..1200).for_each(|i| summary.add(&row(i)));
        for i in 0..12 {
            let outcome = Outcome::Failed(if i < 10 { Failure::Status(503) } else { Failure::Connect });
            summary.add(&RequestRow { outcome, endpoint: None, attempts: 2, ..row(2000 + i) });
        }
        let mut facts = facts();
        facts.interrupted = true;
        facts.engines.fell_behind = true;
        facts.engines.late_step_share = 0.02;
        facts.traces.kept = 90;
        facts.traces.records_dropped = 3;
        facts.traces.orphans = 1;
        facts.traces.exporters.push(ExporterFigures {
            name: "otlp".into(),
            exported: 0,
            dropped: BTreeMap::from([("export_failed".into(), 812)]),
            last_error: Some("collector refused the connection".into()),
        });
        facts.expectations.insert("no.such".into(), Bound { min: Some(1.0), max: None });
        insta::assert_snapshot!(summary.finish(facts).table(), @r"
        WARNING    engine fell behind: 2.0 % of steps ended more than 20 ms late: latency figures are not valid
        WARNING    the run was interrupted: figures are of what was done
        Requests   1,212 sent  1,200 ok  12 failed   56.1 req/s   1,795 output tok/s   21.4 s
        Errors     connect 2  http_503 10
        Latency                mean      p50      p90      p95      p99
          TTFT (ms)            40.0     40.0     40.0     40.0     40.0
          per token (ms)       8.00     8.00     8.00     8.00     8.00
          end to end (s)       0.29     0.29     0.29     0.29     0.29
          gateway (us)          120      120      120      120      120
        Routing    share 25/25/25/25 %  prefix hits 42 % of prompt tokens  preemptions 0  retries 12
        Pacing     late by p50/p99 us: requests 50.0/50.0
        Tracing    90 of 300 traces kept (expected 17 to 44, UNEXPECTED)  60 records  812 spans  1 orphans  0 findings
          records  3 dropped  0 abandoned
          file     812 created = 812 exported + 0 dropped
          otlp     812 created = 0 exported + 812 dropped (export_failed 812)  last error: collector refused the connection
        Expected   1 of 3 hold
          FAIL  errors  12  (at most 0)
          FAIL  no.such  no such figure  (at least 1)
          pass  ttft_ms.p99  40.0  (at most 500)
        ");
    }

    /// A client knows nothing of engines and traces of others.
    #[test]
    fn of_a_gateway_that_ran_already_only_what_was_seen_is_told() {
        let check = |cached_tokens: u32, endpoint: Option<&str>, sampled: bool| {
            let mut summary = Summary::new();
            let endpoint = endpoint.map(std::sync::Arc::from);
            (0..3).for_each(|i| {
                summary.add(&RequestRow { cached_tokens, endpoint: endpoint.clone(), sampled, added: None, ..row(i) });
            });
            let facts = RunFacts { gateway: Some("http://g".into()), ..RunFacts::default() };
            let report = summary.finish(facts);
            let known: serde_json::Value = serde_json::from_str(&report.to_json()).unwrap();
            for unseen in ["/engines", "/traces", "/gateway_added_us", "/routing/retries"] {
                assert_eq!(known.pointer(unseen), None, "{unseen}");
            }
            assert_eq!(serde_json::from_value::<super::super::Report>(known).unwrap(), report);
            let table = report.table();
            table
                .lines()
                .filter(|l| ["Routing", "Tracing"].iter().any(|k| l.starts_with(k)))
                .collect::<Vec<_>>()
                .join("\n")
        };
        insta::assert_snapshot!(check(208, Some("pod-a"), true), @r"
        Routing    share 100 %  prefix hits 42 % of prompt tokens
        Tracing    the gateway's own: 3 of 3 answers name a trace
        ");
        insta::assert_snapshot!(check(0, None, false), @r"
        Routing    no answer names its engine  no prefix hits told
        Tracing    the gateway's own: no answer names a trace
        ");
    }

    #[test]
    fn nothing_at_all_is_a_table_too() {
        insta::assert_snapshot!(Summary::new().finish(RunFacts::default()).table(), @r"
        Requests   0 sent  0 ok  0 failed   0.00 req/s   0 output tok/s   0.00 s
        Latency                mean      p50      p90      p95      p99
        Routing    no request reached an engine  prefix hits 0 % of prompt tokens  preemptions 0
        Tracing    off
        ");
    }

    #[test]
    fn numbers_have_sensible_digits() {
        let check = |v, text: &str| assert_eq!(digits(v), text);
        check(0.0, "0.00");
        check(7.914, "7.91");
        check(48.13, "48.1");
        check(112.4, "112");
        check(12_345.6, "12,346");
        check(9.999, "10.0");
        check(99.97, "100");
    }
}
