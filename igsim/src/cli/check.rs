//! `igsim check`.

use std::path::{Path, PathBuf};

use clap::Args;
use shared::units::HumanDur;

use super::{Failure, Format};
use crate::check::tempo::{self, Query};
use crate::check::{Checked, Folder, Found, Options, check, text};
use crate::inspect::traces_file;
use crate::run::output;
use crate::scenario::Naming;
use crate::tempo::TempoError;

/// Shorter canaries are found by accident, in characters.
const SHORTEST_CANARY: usize = 4;

#[derive(Clone, Debug, Args)]
pub(super) struct CheckArgs {
    /// Folder of a run, a file of OTLP JSON, or the URL of a Tempo.
    #[arg(required_unless_present = "tempo", conflicts_with = "tempo", value_name = "PATH|URL")]
    source: Option<String>,
    /// Check traces of this Tempo. Headers for it are taken from TEMPO_HEADERS, as those of `query`.
    #[arg(long, value_name = "URL")]
    tempo: Option<String>,
    /// Which traces of a Tempo, in TraceQL.
    #[arg(long, value_name = "TRACEQL")]
    query: Option<String>,
    /// From when on Tempo searches: seconds since 1970, or a time such as 2026-11-28T20:00:00Z.
    #[arg(long, value_name = "TIME", value_parser = seconds)]
    start: Option<u64>,
    /// Until when.
    #[arg(long, value_name = "TIME", value_parser = seconds)]
    end: Option<u64>,
    /// Traces of a Tempo at most.
    #[arg(long, value_name = "N", default_value_t = 100)]
    limit: u32,
    /// Whose names the spans have: those of llm-d's tracing proposal, or of llm-d's own components. What a run was told if not given,
    /// else the proposal's.
    #[arg(long, value_enum)]
    naming: Option<Naming>,
    /// How far clocks of hosts may differ.
    #[arg(long, value_name = "DURATION", default_value = "1ms")]
    clock_tolerance: HumanDur,
    /// A service, endpoint or address that records nothing here; may be given several times.
    #[arg(long, value_name = "NAME")]
    uninstrumented: Vec<String>,
    /// A text that must not be in telemetry, nor in the files of a run; may be given several times.
    #[arg(long, value_name = "TEXT")]
    canary: Vec<String>,
    /// A file of such texts, one a line.
    #[arg(long, value_name = "FILE")]
    canary_file: Option<PathBuf>,
    /// Findings of each rule to print.
    #[arg(long, value_name = "N", default_value_t = 5)]
    examples: usize,
    /// What to print.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

pub(super) fn run(args: &CheckArgs) -> Result<(), Failure> {
    let checked = look(args)?;
    output::print(&match args.format {
        Format::Json => format!("{:#}\n", serde_json::to_value(&checked).unwrap_or_default()),
        Format::Text => text(&checked, args.examples),
    });
    if checked.findings.is_empty() { Ok(()) } else { Err(Failure::Expectation) }
}

fn look(args: &CheckArgs) -> Result<Checked, Failure> {
    let mut options = Options {
        naming: args.naming.map(Into::into),
        clock_tolerance: args.clock_tolerance,
        uninstrumented: args.uninstrumented.clone(),
        canaries: canaries(args)?,
    };
    let source = args.tempo.as_ref().or(args.source.as_ref()).expect("one of the two is required");
    if args.tempo.is_some() || ["http://", "https://"].iter().any(|scheme| source.starts_with(scheme)) {
        return of_tempo(source, args, &options);
    }
    if args.query.is_some() || args.start.is_some() || args.end.is_some() {
        return Err(Failure::input("--query, --start and --end are for a Tempo: give its URL instead of a path"));
    }
    of_path(Path::new(source), &mut options)
}

fn of_tempo(url: &str, args: &CheckArgs, options: &Options) -> Result<Checked, Failure> {
    let Some(traceql) = args.query.clone() else {
        return Err(Failure::input(
            "--query: found none, expected which traces of the Tempo, for example --query '{}'",
        ));
    };
    let query = Query { traceql, start: args.start, end: args.end, limit: args.limit };
    let headers = std::env::var("TEMPO_HEADERS").unwrap_or_default();
    let fetched = tempo::fetch(url, &headers, &query).map_err(|error| match error {
        TempoError::Refused { status: 400, reason, .. } => {
            Failure::input(format!("Tempo refuses the query (400 Bad Request): {reason}"))
        }
        TempoError::Unreachable { url, path, problem } => {
            Failure::run(format!("cannot reach {url}{path}: {problem}\n{}", super::query::NO_TEMPO))
        }
        error => super::query::failure(error),
    })?;
    if fetched.set.spans.is_empty() && fetched.missing.is_empty() {
        return Err(Failure::input(format!(
            "{url}: the query finds no trace (Tempo searches the last minutes without --start)"
        )));
    }
    let mut checked = check(&fetched.set, url.to_owned(), options);
    checked.extend(fetched.missing.into_iter().map(|trace| Found {
        rule: "lost-trace",
        trace: Some(trace),
        span: None,
        name: String::new(),
        service: String::new(),
        detail: "the search finds it, by its id it is not there".to_owned(),
        help: "the backend is still writing it, or has given it up: ask again",
    }));
    Ok(checked)
}

fn of_path(path: &Path, options: &mut Options) -> Result<Checked, Failure> {
    let file = traces_file(path);
    let set = super::traces::read(path)?;
    let folder = path.is_dir().then(|| Folder::open(path));
    if set.spans.is_empty() && !folder.as_ref().is_some_and(Folder::has_report) {
        return Err(Failure::input(format!("{}: found no span, expected traces to check", file.display())));
    }
    if let Some(folder) = &folder {
        options.uninstrumented.extend(folder.foreign_engines());
        options.naming = options.naming.or_else(|| folder.naming());
    }
    let mut checked = check(&set, file.display().to_string(), options);
    if let Some(folder) = &folder {
        checked.extend(folder.against(&set).map_err(Failure::input)?);
        // What the search of spans does not see, a field that nobody reads for example, is in the file all the same.
        let told = checked.findings.iter().any(|f| f.rule == "content");
        checked.extend(folder.content(&options.canaries, told.then_some(&*file)).map_err(Failure::input)?);
    }
    Ok(checked)
}

fn canaries(args: &CheckArgs) -> Result<Vec<String>, Failure> {
    let mut canaries = args.canary.clone();
    if let Some(path) = &args.canary_file {
        let text = std::fs::read_to_string(path).map_err(|e| Failure::input(format!("{}: {e}", path.display())))?;
        canaries.extend(text.lines().map(str::trim_end).filter(|l| !l.is_empty()).map(str::to_owned));
    }
    match canaries.iter().position(|c| c.chars().count() < SHORTEST_CANARY) {
        None => Ok(canaries),
        Some(i) => {
            let n = i + 1;
            Err(Failure::input(format!(
                "canary {n}: found fewer than {SHORTEST_CANARY} characters, which stand anywhere by accident"
            )))
        }
    }
}

fn seconds(text: &str) -> Result<u64, String> {
    let of_time = || text.parse::<jiff::Timestamp>().ok().and_then(|t| u64::try_from(t.as_second()).ok());
    text.parse()
        .ok()
        .or_else(of_time)
        .ok_or_else(|| "expected seconds since 1970, or a time such as 2026-11-28T20:00:00Z".to_owned())
}
