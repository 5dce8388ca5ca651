//! The traces that a path on the command line names.

use std::path::Path;

use shared::trace::{TraceSet, otlp_json};

use super::Failure;
use crate::inspect::traces_file;
use crate::report::Report;
use crate::run::output::REPORT_FILE;

/// Reads the traces of a file, or of the folder of a run.
///
/// # Errors
/// If they cannot be read. A run against a gateway that ran already has none: then it is said where they are.
pub(super) fn read(path: &Path) -> Result<TraceSet, Failure> {
    let file = traces_file(path);
    otlp_json::read_file(&file).map_err(|error| match against(path).filter(|_| !file.exists()) {
        Some(url) => Failure::input(format!(
            "{error}\nhelp: the run only sent requests, to {url}: its traces are where that sends them (igsim query, or igsim check URL)"
        )),
        None => Failure::input(error),
    })
}

/// The gateway that a run was sent to, if it ran already.
fn against(path: &Path) -> Option<String> {
    let report = std::fs::read_to_string(path.join(REPORT_FILE)).ok()?;
    let report: Report = serde_json::from_str(&report).ok()?;
    report.gateway.map(|gateway| gateway.url)
}
