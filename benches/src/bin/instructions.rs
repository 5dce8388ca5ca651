//! Instructions under callgrind and allocations of the telemetry path's stages, compared with a committed baseline: unlike times
//! they repeat on a busy machine, so that a regression shows.
//!
//! `instructions` compares and fails on a stage that needs 5 % more instructions or one allocation more than its baseline;
//! `instructions --update` writes a new baseline; `instructions allocations` compares allocations only, which needs no valgrind;
//! `instructions run STAGE N` is what callgrind runs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use benches::stages::{STAGES, Stage};
use serde::{Deserialize, Serialize};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

#[global_allocator]
static COUNTING: &StatsAlloc<std::alloc::System> = &INSTRUMENTED_SYSTEM;

/// Repetitions in the short and the long run: their difference leaves out everything that is done once.
const SHORT: u64 = 200;
const LONG: u64 = 1_200;
/// A stage may need so many more instructions than its baseline.
const TOLERANCE: f64 = 0.05;
/// A stage may need so many more allocations: less than one, more than what buffers that grow make.
const MORE: f64 = 0.5;

/// What one repetition of a stage needs.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Needs {
    instructions: f64,
    /// Growing ones included.
    allocations: f64,
}

type Baseline = BTreeMap<String, Needs>;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["run", stage, times] => run(stage, times),
        [] => compare(),
        ["allocations"] => compare_allocations(),
        ["--update"] => update(),
        _ => Err("usage: instructions [--update | allocations | run STAGE N]".to_owned()),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}

fn run(stage: &str, times: &str) -> Result<bool, String> {
    let times: u64 = times.parse().map_err(|e| format!("{times}: {e}"))?;
    let stage = STAGES.iter().find(|s| s.name == stage).ok_or_else(|| format!("no stage is called {stage}"))?;
    let mut work = (stage.prepare)();
    (0..times).for_each(|_| work());
    Ok(true)
}

fn baseline() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("instructions.json")
}

fn read() -> Result<Baseline, String> {
    let wrong = |e: &dyn std::fmt::Display| format!("{}: {e}", baseline().display());
    let text = std::fs::read_to_string(baseline()).map_err(|e| wrong(&e))?;
    serde_json::from_str(&text).map_err(|e| wrong(&e))
}

fn compare() -> Result<bool, String> {
    let before = read()?;
    let mut good = true;
    println!("{:<28} {:>12} {:>12} {:>8} {:>22}", "stage", "baseline", "instructions", "change", "allocations");
    for stage in STAGES {
        let (now, allocated) = (count(stage.name)?, allocations(stage));
        let Some(before) = before.get(stage.name) else {
            println!("{:<28} {:>12} {now:>12.0} {:>8} {allocated:>22.1}", stage.name, "none", "");
            continue;
        };
        let change = now / before.instructions - 1.0;
        let fine = change <= TOLERANCE && allocated <= before.allocations + MORE;
        good &= fine;
        let verdict = if fine { "" } else { "  MORE" };
        let (name, was, share) = (stage.name, before.instructions, 100.0 * change);
        let allocated = format!("{:.1} -> {allocated:.1}", before.allocations);
        println!("{name:<28} {was:>12.0} {now:>12.0} {share:>+7.1}% {allocated:>22}{verdict}");
    }
    Ok(good)
}

fn compare_allocations() -> Result<bool, String> {
    let before = read()?;
    let mut good = true;
    println!("{:<28} {:>12} {:>12}", "stage", "baseline", "allocations");
    for stage in STAGES {
        let (was, now) = (before.get(stage.name).map(|b| b.allocations), allocations(stage));
        let fine = was.is_none_or(|was| now <= was + MORE);
        good &= fine;
        let (was, verdict) = (was.map_or("none".to_owned(), |n| format!("{n:.1}")), if fine { "" } else { "  MORE" });
        println!("{:<28} {was:>12} {now:>12.1}{verdict}", stage.name);
    }
    Ok(good)
}

fn update() -> Result<bool, String> {
    let needs =
        |s: &Stage| Ok::<_, String>(Needs { instructions: count(s.name)?.round(), allocations: allocations(s) });
    let counts: Baseline = STAGES.iter().map(|s| Ok((s.name.to_owned(), needs(s)?))).collect::<Result<_, String>>()?;
    let mut text = serde_json::to_string_pretty(&counts).map_err(|e| e.to_string())?;
    text.push('\n');
    std::fs::write(baseline(), &text).map_err(|e| format!("{}: {e}", baseline().display()))?;
    print!("{text}");
    Ok(true)
}

fn allocations(stage: &Stage) -> f64 {
    stage.allocations(|| {
        let stats = COUNTING.stats();
        stats.allocations + stats.reallocations
    })
}

/// Instructions of one repetition.
fn count(stage: &str) -> Result<f64, String> {
    Ok((total(stage, LONG)? - total(stage, SHORT)?) / (LONG - SHORT) as f64)
}

fn total(stage: &str, times: u64) -> Result<f64, String> {
    let own = std::env::current_exe().map_err(|e| e.to_string())?;
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]).arg(own);
    let output = valgrind.args(["run", stage, &times.to_string()]).output();
    let output = output.map_err(|e| format!("valgrind cannot be run ({e}): install it, or leave this to CI"))?;
    let text = String::from_utf8_lossy(&output.stderr);
    let collected = text.lines().find_map(|l| l.split_once("Collected :")?.1.trim().parse().ok());
    collected.ok_or_else(|| format!("valgrind says:\n{text}"))
}
