//! The shipped profiles: made by the commands that their notes name, and as good on unseen steps as they say.

use engine_sim::calibrate::fit::{Calibration, Origin, calibrate};
use engine_sim::calibrate::steps::{read_steps, write_steps};
use engine_sim::calibrate::tables::steps_of;
use engine_sim::core::latency::{Fit, LatencyProfile, ProfileFile, Regime};

use crate::data;

fn calibrated(file: &ProfileFile, folder: &std::path::Path) -> Calibration {
    let rows = steps_of(file, folder).unwrap_or_else(|e| panic!("{}: {e}", file.name));
    // By way of the CSV, as on the command line.
    calibrate(file, &read_steps("steps.csv", &write_steps(&rows)).unwrap())
}

#[test]
fn shipped_profiles_are_what_the_commands_make_of_the_tables() {
    let Some(folder) = data() else { return };
    println!("{:<28} {:<8} {:>6} {:>7} {:>7}", "profile", "steps", "rows", "seen %", "unseen %");
    for name in LatencyProfile::names() {
        let file = ProfileFile::named(name).unwrap();
        if file.source.tables.is_none() {
            continue;
        }
        let found = calibrated(file, &folder);
        let by_hand = file.fit == Fit::default();
        for report in &found.reports {
            let Origin::Fitted(rows) = report.origin else { continue };
            if by_hand {
                let before = 100.0 * report.before.unwrap().mean;
                println!("{name:<28} {:<8} {rows:>6} {before:>7.2}       -  set by hand", report.regime.as_str());
                assert!(before < 10.0, "{name}, {:?}", report.before);
                continue;
            }
            let [seen, unseen] = [report.in_sample, report.held_out].map(|e| 100.0 * e.unwrap().mean);
            println!("{name:<28} {:<8} {rows:>6} {seen:>7.2} {unseen:>7.2}", report.regime.as_str());
        }
        assert!(by_hand || &found.apply(file) == file, "{name} is not what engine-sim calibrate makes of its tables");
    }
}

/// Measured steps on GPUs; the profiles of operator tables are judged by whole engines, in `sweeps` and `requests`.
#[test]
fn unseen_steps_are_within_their_bounds() {
    let Some(folder) = data() else { return };
    let names = [
        "llama-3.1-8b-fp8-h200",
        "llama-3.1-8b-rtxpro6000",
        "llama-3.1-8b-rtxpro6000-tp2",
        "qwen3-32b-rtxpro6000",
        "qwen3-32b-rtxpro6000-tp2",
    ];
    for name in names {
        let found = calibrated(ProfileFile::named(name).unwrap(), &folder);
        for report in found.reports {
            let bound = match report.regime {
                Regime::Decode => 0.06,
                Regime::Prefill | Regime::Mixed => 0.10,
            };
            let Some(errors) = report.held_out else { continue };
            println!("{name:<28} {:<8} {:>6.2} %", report.regime.as_str(), 100.0 * errors.mean);
            assert!(errors.mean < bound, "{name}, {:?}: {errors:?}", report.regime);
        }
    }
}
