//! `igsim overhead outside`: what tracing costs in a system that is not ours.

use std::path::PathBuf;

use clap::Args;
use shared::units::HumanDur;

use super::lines::Lines;
use super::{Failure, Format, SCENARIO, finish, folder, itself, share};
use crate::overhead::outside::file::OutsideFile;
use crate::overhead::outside::{self, OutsideSpec};
use crate::overhead::plan;
use crate::run::interrupt::Interrupt;
use crate::scenario::Scenario;

#[derive(Debug, Args)]
pub(super) struct OutsideArgs {
    /// File that says how the system is started or switched, and what is sent to it.
    file: PathBuf,
    /// Leave out arms, the last of the file first, until the run takes no longer. Rounds are never left out.
    #[arg(long, value_name = "DURATION")]
    budget: Option<HumanDur>,
    /// Overhead that the intervals are held against; it decides nothing.
    #[arg(long, value_name = "SHARE", default_value = "5%", value_parser = share)]
    target: f64,
    /// Folder for the results and for what the processes say; runs/overhead-TIME if not given.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Rounds; fewer than 20 are too few for intervals.
    #[arg(long, value_name = "N", default_value_t = plan::ROUNDS, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    rounds: u32,
    /// Seed of the order of arms and of prompts.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// What to print on standard output.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

pub(super) fn run(args: &OutsideArgs) -> Result<(), Failure> {
    let file = shared::config::load::<OutsideFile>(&args.file, &[])?.config;
    let scenario = shared::config::load_str::<Scenario>("scenarios/overhead.yaml", SCENARIO, &[])?.config;
    let out = folder(args.out.as_deref())?;
    eprintln!("igsim {}  overhead of {}  seed {}", env!("CARGO_PKG_VERSION"), file.name, args.seed);
    let spec = OutsideSpec {
        binary: itself()?,
        file,
        scenario,
        rounds: args.rounds,
        seed: args.seed,
        budget: args.budget.map(HumanDur::get),
        command: super::command_line(),
        logs: out.clone(),
    };
    let interrupt = Interrupt::listen();
    let outcome = outside::run(&spec, &interrupt, &mut Lines::new()).map_err(Failure::run)?;
    finish(outcome, args.target, &out, args.format)
}
