//! What `engine-sim` does besides serving: lists, explains and calibrates latency profiles.
//!
//! Results go to standard output or a file, everything else to standard error; 2 is the exit code of bad input.

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};
use engine_sim::calibrate::fit::{Calibration, Errors, Origin, calibrate};
use engine_sim::calibrate::steps::{read_steps, write_steps};
use engine_sim::calibrate::table::read_text;
use engine_sim::calibrate::tables;
use engine_sim::core::latency::{BatchShape, LatencyProfile, ProfileFile, RegimeFit};
use engine_sim::profiles::{self, ProfileError};

#[derive(Debug, Subcommand)]
pub(crate) enum Tool {
    /// List the latency profiles, where they come from and how far off they are
    Profiles,
    /// Print how long steps take under a profile, by cause
    #[command(after_help = "Example: engine-sim latency --decode 32 --context 2000 --prefill 0,512,2048")]
    Latency(LatencyArgs),
    /// Fit a profile to measured step times and say how far off it is, on rows seen and unseen
    #[command(
        after_help = "Example: engine-sim calibrate --profile llama-3.1-8b-h100 --steps steps.csv --out mine.yaml

Columns of the CSV, in any order: decode_seqs, decode_context, prefill_tokens, time_us are required;
prefill_seqs, prefill_past, prefill_pairs, all_reduce_us and kind (step or ttft) are not."
    )]
    Calibrate(CalibrateArgs),
    /// Turn the published tables that a profile names into step times
    #[command(after_help = "Example: engine-sim steps --profile llama-3.1-8b-rtxpro6000 --data DIR --out steps.csv")]
    Steps(StepsArgs),
}

#[derive(Debug, Args)]
pub(crate) struct LatencyArgs {
    /// Latency profile: a built-in name or the path of a .yaml file.
    #[arg(long, default_value = LatencyProfile::DEFAULT_NAME)]
    profile: String,
    /// Requests that decode; several, separated by commas, give a row each.
    #[arg(long, value_delimiter = ',', default_value = "0", value_parser = clap::value_parser!(u32).range(..=1_000_000))]
    decode: Vec<u32>,
    /// Tokens of context of each of them.
    #[arg(long, value_delimiter = ',', default_value = "1024", value_parser = clap::value_parser!(u32).range(..=10_000_000))]
    context: Vec<u32>,
    /// Tokens of a chunk of prefill.
    #[arg(long, value_delimiter = ',', default_value = "0", value_parser = clap::value_parser!(u32).range(..=10_000_000))]
    prefill: Vec<u32>,
    /// Tokens of the prompt before that chunk.
    #[arg(long, value_delimiter = ',', default_value = "0", value_parser = clap::value_parser!(u32).range(..=10_000_000))]
    past: Vec<u32>,
}

#[derive(Debug, Args)]
pub(crate) struct CalibrateArgs {
    /// Profile to start from: its model, sizes and host are kept.
    #[arg(long)]
    profile: String,
    /// Step times, see below.
    #[arg(long, value_name = "FILE")]
    steps: PathBuf,
    /// Write the profile there.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct StepsArgs {
    /// Profile whose `source.tables` names the files.
    #[arg(long)]
    profile: String,
    /// Folder that these paths are relative to.
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Write the CSV there instead of to standard output.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

impl Tool {
    pub(crate) fn run(self) -> ExitCode {
        let done = match self {
            Tool::Profiles => list(),
            Tool::Latency(args) => latency(&args),
            Tool::Calibrate(args) => run_calibrate(&args),
            Tool::Steps(args) => run_steps(&args),
        };
        done.map_or_else(|problem| bad_input(&problem), |()| ExitCode::SUCCESS)
    }
}

/// Says what is wrong with the input.
pub(crate) fn bad_input(problem: &str) -> ExitCode {
    eprintln!("{}{problem}", if problem.starts_with("error: ") { "" } else { "error: " });
    ExitCode::from(2)
}

/// A profile that cannot be found, for a person.
pub(crate) fn profile_problem(error: &ProfileError) -> String {
    match error {
        ProfileError::Unknown { .. } => {
            let hint = error.hint().map(|h| format!("\n  help: {h}")).unwrap_or_default();
            format!("--profile: {error}{hint}")
        }
        ProfileError::File(errors) => errors.to_string().trim_end().to_owned(),
    }
}

fn list() -> Result<(), String> {
    println!(
        "{:<28} {:<34} {:<18} {:>3}  decode prefill mixed: error on unseen steps, %",
        "profile", "model", "gpu", "tp"
    );
    for name in LatencyProfile::names() {
        let file = profiles::find_file(name).map_err(|e| profile_problem(&e))?;
        let error = |fit: Option<RegimeFit>| fit.map_or("-".to_owned(), |f| format!("{:.1}", f.held_out_percent));
        let [d, p, m] = [file.fit.decode, file.fit.prefill, file.fit.mixed].map(error);
        let ProfileFile { model, gpu, tensor_parallel, .. } = &file;
        println!("{name:<28} {model:<34} {gpu:<18} {tensor_parallel:>3}  {d:>6} {p:>7} {m:>5}");
    }
    Ok(())
}

fn latency(args: &LatencyArgs) -> Result<(), String> {
    let profile = profiles::find(&args.profile).map_err(|e| profile_problem(&e))?;
    if args.decode.iter().all(|n| *n == 0) && args.prefill.iter().all(|n| *n == 0) {
        return Err("--decode, --prefill: found no requests, expected some, for example --decode 32".to_owned());
    }
    println!("{}: {} on {} x {}, milliseconds", profile.name, profile.model, profile.tensor_parallel, profile.gpu);
    let heads = [
        "decode",
        "context",
        "prefill",
        "past",
        "step",
        "linear",
        "base",
        "requests",
        "decode-attn",
        "prefill-attn",
        "all-reduce",
    ];
    println!("{}", heads.map(|h| format!("{h:>12}")).concat());
    for (&decode, &context) in args.decode.iter().flat_map(|d| args.context.iter().map(move |c| (d, c))) {
        for (&prefill, &past) in args.prefill.iter().flat_map(|p| args.past.iter().map(move |c| (p, c))) {
            print_step(&profile, decode, context, prefill, past);
        }
    }
    Ok(())
}

fn print_step(profile: &LatencyProfile, decode: u32, context: u32, prefill: u32, past: u32) {
    let (chunk, before) = (u64::from(prefill), u64::from(past));
    let shape = BatchShape {
        decode_seqs: decode,
        decode_context: u64::from(decode) * u64::from(context),
        prefill_seqs: u32::from(prefill > 0),
        prefill_tokens: prefill,
        prefill_past: if prefill > 0 { before } else { 0 },
        prefill_pairs_x2: chunk * (2 * before + chunk),
        ..BatchShape::default()
    };
    let p = profile.step_parts(&shape);
    let times = [p.total(), p.linear, p.base, p.sequences, p.decode_attention, p.prefill_attention, p.all_reduce];
    let cells = times.map(|ps| format!("{:>12.3}", ps as f64 / 1e9)).concat();
    println!("{decode:>12}{context:>12}{prefill:>12}{past:>12}{cells}");
}

fn run_calibrate(args: &CalibrateArgs) -> Result<(), String> {
    let profile = profiles::find_file(&args.profile).map_err(|e| profile_problem(&e))?;
    let text =
        read_text(&args.steps).map_err(|e| format!("{}: found {e}, expected a readable CSV", args.steps.display()))?;
    let rows = read_steps(&args.steps.display().to_string(), &text).map_err(|e| e.to_string())?;
    let found = calibrate(&profile, &rows);
    print_calibration(&found);
    if let Some(out) = &args.out {
        write(out, &found.apply(&profile).to_yaml())?;
    }
    Ok(())
}

fn print_calibration(found: &Calibration) {
    println!(
        "mean absolute error of predicted step times, %; before: of the profile given; unseen: each half by the fit to the other"
    );
    println!("{:<8} {:>6} {:>8} {:>8} {:>8} {:>8} {:>8}", "steps", "rows", "before", "seen", "unseen", "p95", "bias");
    for report in &found.reports {
        let cell =
            |e: Option<Errors>, f: fn(Errors) -> f64| e.map_or("-".to_owned(), |e| format!("{:.2}", 100.0 * f(e)));
        let (rows, note) = match report.origin {
            Origin::Fitted(rows) => (rows, ""),
            Origin::Composed => (0, "  composed of the other two"),
            Origin::Kept => (0, "  as before"),
        };
        let [before, seen] = [report.before, report.in_sample].map(|e| cell(e, |e| e.mean));
        let unseen = [|e: Errors| e.mean, |e: Errors| e.p95, |e: Errors| e.bias].map(|f| cell(report.held_out, f));
        let [mean, p95, bias] = unseen;
        println!("{:<8} {rows:>6} {before:>8} {seen:>8} {mean:>8} {p95:>8} {bias:>8}{note}", report.regime.as_str());
    }
    if let Some(frontend) = found.frontend {
        println!("frontend: {frontend} us from arrival to the engine core");
    }
}

fn run_steps(args: &StepsArgs) -> Result<(), String> {
    let profile = profiles::find_file(&args.profile).map_err(|e| profile_problem(&e))?;
    let rows = tables::steps_of(&profile, &args.data).map_err(|e| e.to_string())?;
    let csv = write_steps(&rows);
    match &args.out {
        Some(out) => write(out, &csv),
        None => {
            print!("{csv}");
            Ok(())
        }
    }
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    let failed = |e: &dyn Display| format!("{}: found {e}, expected a path that can be written", path.display());
    std::fs::write(path, text).map_err(|e| failed(&e))
}
