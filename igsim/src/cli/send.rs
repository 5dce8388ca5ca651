//! `igsim send`.

use shared::rng::Stream;
use shared::trace::config::{ExporterChoice, Layer};
use shared::trace::{Stats, TelemetryConfig, otlp_json};

use super::{Failure, SendArgs};
use crate::inspect::traces_file;
use crate::report::Report;
use crate::run::output::{REPORT_FILE, print};
use crate::send::{SendOptions, send as send_set};

pub(super) fn send(args: &SendArgs) -> Result<(), Failure> {
    let set = otlp_json::read_file(traces_file(&args.path)).map_err(Failure::input)?;
    let run_id = args.run_id.clone().or_else(|| is_virtual(args).then(fresh_run_id));
    let config = only(&args.otlp)?;
    let (spans, stats) = (set.spans.len(), deliver(set, config, args.end_now, run_id.clone())?);
    if let Some(run_id) = &run_id {
        print(&format!("run id {run_id} (repeats these trace ids with --run-id {run_id})\n"));
    }
    print(&format!("{spans} spans read, {}\n", sent(&stats)));
    all_accepted(&stats)
}

/// Fails unless every span was accepted, with the reason.
pub(super) fn all_accepted(stats: &Stats) -> Result<(), Failure> {
    match stats.exporters.iter().find(|e| e.exported < stats.spans_created) {
        None => Ok(()),
        Some(e) => {
            let why = e.last_error.as_deref().unwrap_or("no reason given");
            Err(Failure::run(format!("{}: not every span was accepted: {why}", e.name)))
        }
    }
}

/// The configuration that exports to `url` alone.
fn only(url: &str) -> Result<TelemetryConfig, Failure> {
    let choice = ExporterChoice::Otlp { url: Some(url.to_owned()), protocol: None };
    let layer = Layer { exporters: Some(vec![choice]), ..Layer::default() };
    let env = |key: &str| std::env::var(key).ok();
    let (config, warnings) = TelemetryConfig::resolve(&layer, &Layer::default(), &env).map_err(Failure::input)?;
    for warning in warnings {
        eprintln!("warning: {warning}");
    }
    Ok(config)
}

/// Sends a set to the exporters of `config`.
pub(super) fn deliver(
    set: shared::trace::TraceSet,
    config: TelemetryConfig,
    end_now: bool,
    run_id: Option<String>,
) -> Result<Stats, Failure> {
    // The traces exist; whether new ones would be recorded is no question here.
    let config = TelemetryConfig { disabled: false, ..config };
    send_set(set, config, &SendOptions { end_now, run_id }).map_err(Failure::run)
}

pub(super) fn fresh_run_id() -> String {
    format!("{:08x}", Stream::from_os().next_u64() as u32)
}

fn is_virtual(args: &SendArgs) -> bool {
    let report = std::fs::read_to_string(args.path.join(REPORT_FILE)).ok();
    report.and_then(|text| serde_json::from_str::<Report>(&text).ok()).is_some_and(|r| r.mode == "virtual")
}

pub(super) fn sent(stats: &Stats) -> String {
    let each = stats
        .exporters
        .iter()
        .map(|e| format!("{} accepted and {} dropped by {}", e.exported, e.dropped.total(), e.name));
    each.collect::<Vec<_>>().join(", ")
}
