//! `igsim sampling`.

use std::path::PathBuf;

use clap::Args;

use super::{Failure, Format, Overrides};
use crate::run::output::print;
use crate::sampling::{self, SamplingError, table};
use crate::scenario;

/// Options of `igsim sampling`.
#[derive(Clone, Debug, Args)]
pub(super) struct SamplingArgs {
    /// Scenario file.
    scenario: PathBuf,
    /// Seed of all random choices; the scenario's own if not given.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    #[command(flatten)]
    overrides: Overrides,
    /// What to print on standard output.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

pub(super) fn run(args: &SamplingArgs) -> Result<(), Failure> {
    let mut set = args.overrides.all();
    set.push(("mode".to_owned(), "virtual".to_owned()));
    if let Some(seed) = args.seed {
        set.push(("seed".to_owned(), seed.to_string()));
    }
    let scenario = scenario::load(&args.scenario, &set)?.config;
    super::warn(&scenario);
    let compared = sampling::compare(&scenario).map_err(|error| match error {
        SamplingError::Replay(error) => Failure::input(error),
        SamplingError::Telemetry(error) => Failure::run(error),
    })?;
    match args.format {
        Format::Text => print(&table(&compared)),
        Format::Json => {
            let json = serde_json::to_string_pretty(&compared).map_err(Failure::run)?;
            print(&format!("{json}\n"));
        }
    }
    Ok(())
}
