//! `igsim ladder`.

use std::path::PathBuf;

use clap::Args;

use super::{Failure, Format};
use crate::ladder::{Ladder, LadderError, Published, table};
use crate::run::output::print;
use crate::scenario;

/// Options of `igsim ladder`.
#[derive(Clone, Debug, Args)]
pub(super) struct LadderArgs {
    /// Ladder file.
    ladder: PathBuf,
    /// Published figures to print beside ours (CSV).
    #[arg(long, value_name = "FILE")]
    published: Option<PathBuf>,
    /// Seed of all random choices; the scenario's own if not given.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Replace a value of the ladder: a path and a YAML value; may be given several times.
    #[arg(long = "set", value_name = "PATH=VALUE", value_parser = super::assignment)]
    set: Vec<(String, String)>,
    /// What to print on standard output.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

pub(super) fn run(args: &LadderArgs) -> Result<(), Failure> {
    let ladder = Ladder::load(&args.ladder, &args.set)?;
    let published = match &args.published {
        Some(path) => {
            let model = scenario::load(&ladder.scenario, &[])?.config.model();
            Published::read(path, &model).map_err(Failure::input)?
        }
        None => Published::default(),
    };
    let told = |policy: &str, rung: &crate::ladder::Rung| {
        eprintln!("{policy} at {}/s: {:.0} output tokens/s", rung.rate, rung.output_tokens_per_s);
    };
    let climbs = ladder.climb(args.seed, told).map_err(|error| match error {
        LadderError::Config(errors) => errors.into(),
        LadderError::Replay(error) => Failure::input(error),
    })?;
    match args.format {
        Format::Text => print(&table(&ladder, &climbs, &published)),
        Format::Json => {
            let json = serde_json::to_string_pretty(&climbs).map_err(Failure::run)?;
            print(&format!("{json}\n"));
        }
    }
    Ok(())
}
