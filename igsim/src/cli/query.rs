//! `igsim query`.

use clap::Args;
use serde::Serialize;
use shared::time::Dur;
use shared::trace::tree::value_text;
use shared::units::HumanDur;

use super::{Failure, Format, assignment};
use crate::queries::{self, QUERIES, Query, Shape};
use crate::run::output::print;
use crate::tempo::{self, DEFAULT_URL, Found, Series, Tempo, TempoError, Window};

/// What to do where nobody listens.
pub(super) const NO_TEMPO: &str =
    "help: deploy/tempo/start.sh starts a Tempo, --tempo names another one (docs/tempo.md)";

/// How far back a query looks unless told otherwise.
const LOOK_BACK: Dur = Dur::from_secs(3600);
/// The widest that a column of a table gets; what is longer is cut.
const MAX_COLUMN: usize = 48;

#[derive(Clone, Debug, Args)]
pub(super) struct QueryArgs {
    /// Name of the query, as --list shows it.
    #[arg(required_unless_present = "list")]
    name: Option<String>,
    /// List the queries.
    #[arg(long, conflicts_with = "name")]
    list: bool,
    /// Print the TraceQL and ask nobody.
    #[arg(long)]
    print: bool,
    /// Set a parameter of the query; may be given several times.
    #[arg(long = "set", value_name = "NAME=VALUE", value_parser = assignment)]
    set: Vec<(String, String)>,
    /// A further condition on every span, in TraceQL, for example 'resource.service.namespace = "staging"'.
    #[arg(long = "where", value_name = "CONDITION")]
    only: Option<String>,
    /// Base address of Tempo. Headers for it, credentials among them, are taken from TEMPO_HEADERS (NAME=VALUE with commas between).
    #[arg(long, value_name = "URL", env = "TEMPO_URL", default_value = DEFAULT_URL)]
    tempo: String,
    /// From when on: how long ago (1h), a date with time and zone (2026-11-28T19:00:00Z), or Unix seconds; an hour before the end if
    /// not given.
    #[arg(long, value_name = "TIME")]
    start: Option<String>,
    /// Until when, as --start; now if not given.
    #[arg(long, value_name = "TIME")]
    end: Option<String>,
    /// Most traces to ask for; Tempo does not say which it leaves out.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    limit: u32,
    /// What to print.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

pub(super) fn query(args: &QueryArgs) -> Result<(), Failure> {
    let Some(name) = args.name.as_deref().filter(|_| !args.list) else {
        print(&list(args.format)?);
        return Ok(());
    };
    let query = queries::named(name).ok_or_else(|| {
        Failure::input(format!("{name}: found no such query; igsim query --list shows what there is"))
    })?;
    let traceql = query.render(&args.set, args.only.as_deref()).map_err(Failure::input)?;
    if args.print {
        print(&format!("{traceql}\n"));
        return Ok(());
    }
    let window = window(args)?;
    let headers = std::env::var("TEMPO_HEADERS").unwrap_or_default();
    let tempo = Tempo::new(&args.tempo, &headers).map_err(failure)?;
    let answer = match query.shape() {
        Shape::Spans => Answer::Traces(tempo.search(&traceql, window, args.limit as usize).map_err(failure)?),
        Shape::Figures => Answer::Series(tempo.metrics(&traceql, window).map_err(failure)?),
    };
    print(&match args.format {
        Format::Text => text(query, &traceql, &answer, args.limit),
        Format::Json => document(&Document { query: query.name, traceql: &traceql, window, answer: &answer })?,
    });
    Ok(())
}

pub(super) fn failure(error: TempoError) -> Failure {
    match error {
        error if error.is_bad_input() => Failure::input(error),
        error @ TempoError::Unreachable { .. } => Failure::run(format!("{error}\n{NO_TEMPO}")),
        error => Failure::run(error),
    }
}

#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
enum Answer {
    Traces(Vec<Found>),
    Series(Vec<Series>),
}

#[derive(Serialize)]
struct Document<'a> {
    query: &'a str,
    traceql: &'a str,
    #[serde(flatten)]
    window: Window,
    #[serde(flatten)]
    answer: &'a Answer,
}

#[derive(Serialize)]
struct Listed {
    name: &'static str,
    question: &'static str,
    traceql: &'static str,
    parameters: Vec<ListedParameter>,
}

#[derive(Serialize)]
struct ListedParameter {
    name: &'static str,
    default: String,
    meaning: &'static str,
}

fn document(value: &impl Serialize) -> Result<String, Failure> {
    Ok(serde_json::to_string_pretty(value).map_err(Failure::run)? + "\n")
}

fn list(format: Format) -> Result<String, Failure> {
    if format == Format::Text {
        let width = QUERIES.iter().map(|q| q.name.len()).max().unwrap_or(0);
        return Ok(QUERIES.iter().map(|q| format!("{:width$}  {}\n", q.name, q.question)).collect());
    }
    let listed = |q: &Query| Listed {
        name: q.name,
        question: q.question,
        traceql: q.traceql,
        parameters: (q.parameters.iter())
            .map(|p| ListedParameter { name: p.name, default: p.default.to_string(), meaning: p.meaning })
            .collect(),
    };
    document(&QUERIES.iter().map(listed).collect::<Vec<_>>())
}

fn window(args: &QueryArgs) -> Result<Window, Failure> {
    let moment = |option: &str, text: &str| {
        moment(text, tempo::now()).ok_or_else(|| {
            Failure::input(format!(
                "{option}: found {text:?}, expected how long ago (1h), a date such as 2026-11-28T19:00:00Z, or Unix seconds"
            ))
        })
    };
    // The present second belongs to it.
    let end = args.end.as_deref().map_or(Ok(tempo::now() + 1), |text| moment("--end", text))?;
    let back = LOOK_BACK.as_nanos() / 1_000_000_000;
    let start = args.start.as_deref().map_or(Ok(end.saturating_sub(back)), |text| moment("--start", text))?;
    if start >= end {
        return Err(Failure::input(format!("--start: found {start}, which is not before the end ({end})")));
    }
    Ok(Window { start, end })
}

/// Seconds since the Unix epoch.
fn moment(text: &str, now: u64) -> Option<u64> {
    if let Ok(ago) = text.parse::<HumanDur>() {
        return Some(now.saturating_sub(ago.get().as_nanos() / 1_000_000_000));
    }
    if let Ok(seconds) = text.parse::<u64>() {
        // Tempo reads 32 bits.
        return Some(seconds).filter(|s| u32::try_from(*s).is_ok());
    }
    u64::try_from(text.parse::<jiff::Timestamp>().ok()?.as_second()).ok()
}

fn text(query: &Query, traceql: &str, answer: &Answer, limit: u32) -> String {
    let (summary, table) = match answer {
        Answer::Traces(found) => {
            let spans: u64 = found.iter().map(|f| f.matched).sum();
            let more = if found.len() as u64 >= u64::from(limit) { ", there may be more (--limit)" } else { "" };
            (format!("{} traces, {spans} spans{more}", found.len()), of_traces(found))
        }
        Answer::Series(series) => (format!("{} series", series.len()), of_series(series)),
    };
    format!("{}\n{traceql}\n\n{}{summary}. {}\n", query.question, lay_out(&table), query.reads)
}

/// One row for each span that matches; what a trace says of itself stands in its first row.
fn of_traces(found: &[Found]) -> Vec<Vec<String>> {
    let mut keys: Vec<&str> = Vec::new();
    for (key, _) in found.iter().flat_map(|f| &f.spans).flat_map(|s| &s.attributes) {
        if !keys.contains(&key.as_str()) {
            keys.push(key);
        }
    }
    keys.sort_unstable();
    let head = ["trace", "root", "duration", "span", "took"];
    let mut rows = vec![head.iter().chain(&keys).map(|h| (*h).to_owned()).collect::<Vec<_>>()];
    for trace in found {
        for (i, span) in trace.spans.iter().enumerate() {
            let mut row = match i {
                0 => vec![trace.trace_id.to_string(), trace.root_name.clone(), format!("{} ms", trace.duration_ms)],
                _ => vec![String::new(); 3],
            };
            row.push(span.name.clone());
            row.push(Dur::from_nanos(span.duration_nanos).to_string());
            for key in &keys {
                let value = span.attributes.iter().find(|(k, _)| k == key);
                row.push(value.map(|(_, v)| value_text(v)).unwrap_or_default());
            }
            rows.push(row);
        }
        if trace.matched > trace.spans.len() as u64 {
            rows.push(vec![format!("  and {} more spans", trace.matched - trace.spans.len() as u64)]);
        }
    }
    rows
}

fn of_series(series: &[Series]) -> Vec<Vec<String>> {
    let labels = series.first().map(|s| s.labels.as_slice()).unwrap_or_default();
    let mut rows = vec![labels.iter().map(|(k, _)| k.clone()).chain(["value".to_owned()]).collect::<Vec<_>>()];
    for one in series {
        let labels = one.labels.iter().map(|(_, v)| value_text(v));
        rows.push(
            labels
                .chain([format!("{:.6}", one.value).trim_end_matches('0').trim_end_matches('.').to_owned()])
                .collect(),
        );
    }
    rows
}

/// Columns as wide as they need to be; the first row is the head. Nothing for a table without rows.
fn lay_out(rows: &[Vec<String>]) -> String {
    if rows.len() < 2 {
        return String::new();
    }
    let cut = |text: &str| match text.char_indices().nth(MAX_COLUMN) {
        Some((at, _)) => format!("{}~", &text[..at]),
        None => text.to_owned(),
    };
    let rows: Vec<Vec<String>> = rows.iter().map(|r| r.iter().map(|c| cut(c)).collect()).collect();
    let columns = rows[0].len();
    let width = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|t| t.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut out = String::new();
    for row in &rows {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(text, width)| format!("{text:width$}")).collect();
        out.push_str(cells.join("  ").trim_end());
        out.push('\n');
    }
    out.push('\n');
    out
}

#[cfg(test)]
mod tests {
    use shared::ids::{SpanId, TraceId};
    use shared::trace::Value;

    use super::*;
    use crate::tempo::FoundSpan;

    #[test]
    fn moments_are_ages_dates_or_seconds() {
        let now = 1_800_000_000;
        let check = |text: &str, expect: Option<u64>| assert_eq!(moment(text, now), expect, "{text}");
        check("1h", Some(now - 3600));
        check("90s", Some(now - 90));
        check("1767225600", Some(1_767_225_600));
        check("2026-01-01T00:00:00Z", Some(1_767_225_600));
        check("2026-01-01T01:00:00+01:00", Some(1_767_225_600));
        check("9999999999999", None);
        check("yesterday", None);
    }

    #[test]
    fn answers_are_tables() {
        let span = |id: u64, attributes: &[(&str, Value)]| FoundSpan {
            span_id: SpanId::new(id).unwrap(),
            name: "vllm.engine.queue".to_owned(),
            start_unix_nanos: id,
            duration_nanos: 5_960_000,
            attributes: attributes.iter().map(|(k, v)| ((*k).to_owned(), v.clone())).collect(),
        };
        let found = Found {
            trace_id: TraceId::new(0x1f).unwrap(),
            root_service: "inference-gateway".to_owned(),
            root_name: "gateway.request".to_owned(),
            duration_ms: 449,
            spans: vec![
                span(1, &[("vllm.queue.position", Value::Int(3)), ("vllm.queue.reason", "capacity".into())]),
                span(2, &[("vllm.queue.reason", "preempted".into())]),
            ],
            matched: 5,
        };
        insta::assert_snapshot!(lay_out(&of_traces(&[found])), @r"
        trace                             root             duration  span               took     vllm.queue.position  vllm.queue.reason
        0000000000000000000000000000001f  gateway.request  449 ms    vllm.engine.queue  5.96 ms  3                    capacity
                                                                     vllm.engine.queue  5.96 ms                       preempted
          and 3 more spans
        ");
        let series = |name: &str, value| Series { labels: vec![("name".to_owned(), name.to_owned().into())], value };
        insta::assert_snapshot!(lay_out(&of_series(&[series("a", 2.5), series("b", 3.0)])), @r"
        name  value
        a     2.5
        b     3
        ");
        assert_eq!(lay_out(&of_series(&[])), "");
    }
}
