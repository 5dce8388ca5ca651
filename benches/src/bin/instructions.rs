//! Instruction counts of the telemetry path's stages under callgrind, compared with a committed baseline: unlike times they
//! repeat on a busy machine, so that a regression shows.
//!
//! `instructions` compares and fails on a stage that needs 5 % more than its baseline; `instructions --update` writes a new
//! baseline; `instructions run STAGE N` is what callgrind runs. Needs valgrind.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use benches::stages::STAGES;

/// Repetitions in the short and the long run: their difference leaves out everything that is done once.
const SHORT: u64 = 200;
const LONG: u64 = 1_200;
/// A stage may need so much more than its baseline.
const TOLERANCE: f64 = 0.05;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["run", stage, times] => run(stage, times),
        [] => compare(),
        ["--update"] => update(),
        _ => Err("usage: instructions [--update | run STAGE N]".to_owned()),
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

fn compare() -> Result<bool, String> {
    let text = std::fs::read_to_string(baseline()).map_err(|e| format!("{}: {e}", baseline().display()))?;
    let before: BTreeMap<String, f64> =
        serde_json::from_str(&text).map_err(|e| format!("{}: {e}", baseline().display()))?;
    let mut good = true;
    println!("{:<28} {:>12} {:>12} {:>8}", "stage", "baseline", "now", "change");
    for stage in STAGES {
        let now = count(stage.name)?;
        match before.get(stage.name) {
            Some(before) => {
                let change = now / before - 1.0;
                let verdict = if change > TOLERANCE { "  MORE" } else { "" };
                good &= change <= TOLERANCE;
                println!("{:<28} {before:>12.0} {now:>12.0} {:>+7.1}%{verdict}", stage.name, 100.0 * change);
            }
            None => println!("{:<28} {:>12} {now:>12.0}", stage.name, "none"),
        }
    }
    Ok(good)
}

fn update() -> Result<bool, String> {
    let counts = STAGES.iter().map(|s| Ok((s.name, count(s.name)?.round())));
    let counts: BTreeMap<&str, f64> = counts.collect::<Result<_, String>>()?;
    let mut text = serde_json::to_string_pretty(&counts).map_err(|e| e.to_string())?;
    text.push('\n');
    std::fs::write(baseline(), &text).map_err(|e| format!("{}: {e}", baseline().display()))?;
    print!("{text}");
    Ok(true)
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
