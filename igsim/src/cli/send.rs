//! `igsim send`.

use shared::rng::Stream;
use shared::trace::config::{ExporterChoice, ExporterConfig, Layer, OtlpChoice, OtlpConfig, OtlpEncoding};
use shared::trace::stats::ExporterStats;
use shared::trace::{TelemetryConfig, TraceSet};

use super::{Failure, SendArgs};
use crate::report::Report;
use crate::run::output::{REPORT_FILE, print};
use crate::send::{SendOptions, send as send_set};

pub(super) fn send(args: &SendArgs) -> Result<(), Failure> {
    let set = super::traces::read(&args.path)?;
    let run_id = args.run_id.clone().or_else(|| is_virtual(args).then(fresh_run_id));
    let endpoint = endpoint(&args.otlp)?;
    let spans = set.spans.len() as u64;
    let stats = send_set(set, &endpoint, &SendOptions { end_now: args.end_now, run_id: run_id.clone() });
    let stats = stats.map_err(Failure::run)?;
    if let Some(run_id) = &run_id {
        print(&format!("run id {run_id} (repeats these trace ids with --run-id {run_id})\n"));
    }
    print(&format!("{spans} spans read, {}\n", sent(&stats)));
    all_accepted(&stats, spans)
}

/// Sends the traces of a virtual run that has just ended, as if it ended now.
pub(super) fn deliver(set: TraceSet, endpoint: &OtlpConfig, run_id: &str) -> Result<(), Failure> {
    let spans = set.spans.len() as u64;
    let options = SendOptions { end_now: true, run_id: Some(run_id.to_owned()) };
    let stats = send_set(set, endpoint, &options).map_err(Failure::run)?;
    eprintln!("sent: {}, run id {run_id}", sent(&stats));
    all_accepted(&stats, spans)
}

/// Fails unless every span was accepted, with the reason.
fn all_accepted(stats: &ExporterStats, spans: u64) -> Result<(), Failure> {
    if stats.exported >= spans {
        return Ok(());
    }
    let why = stats.last_error.as_deref().unwrap_or("no reason given");
    Err(Failure::run(format!("{}: not every span was accepted: {why}", stats.name)))
}

/// The endpoint at `url`, with what the environment says about it.
fn endpoint(url: &str) -> Result<OtlpConfig, Failure> {
    let choice = ExporterChoice::Otlp(OtlpChoice { encoding: Some(OtlpEncoding::Sdk), ..OtlpChoice::to(url) });
    let layer = Layer { exporters: Some(vec![choice]), ..Layer::default() };
    let env = |key: &str| std::env::var(key).ok();
    let (config, warnings) = TelemetryConfig::resolve(&layer, &Layer::default(), &env).map_err(Failure::input)?;
    for warning in warnings {
        eprintln!("warning: {warning}");
    }
    match config.exporters.into_iter().next() {
        Some(ExporterConfig::Otlp(otlp)) => Ok(otlp),
        Some(
            ExporterConfig::File(_)
            | ExporterConfig::RotatingFile(_)
            | ExporterConfig::Console(_)
            | ExporterConfig::Memory(_),
        )
        | None => Err(Failure::input(format!("--otlp {url}: found no OTLP endpoint"))),
    }
}

pub(super) fn fresh_run_id() -> String {
    format!("{:08x}", Stream::from_os().next_u64() as u32)
}

fn is_virtual(args: &SendArgs) -> bool {
    let report = std::fs::read_to_string(args.path.join(REPORT_FILE)).ok();
    report.and_then(|text| serde_json::from_str::<Report>(&text).ok()).is_some_and(|r| r.mode == "virtual")
}

fn sent(stats: &ExporterStats) -> String {
    format!("{} accepted and {} dropped by {}", stats.exported, stats.dropped.total(), stats.name)
}
