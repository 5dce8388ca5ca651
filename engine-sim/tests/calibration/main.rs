//! The latency model against measurements: how far off it is on data that it was not fitted to, printed and bounded.
//!
//! Needs `IGSIM_DATA`, a folder with the published tables that `docs/latency.md` names; without it each test says so and passes.
//!
//!     IGSIM_DATA=DIR cargo test -p engine-sim --test calibration -- --nocapture

mod load;
mod profiles;
mod requests;
mod sweeps;

use std::path::PathBuf;

/// The folder with the data; `None`, said aloud, where there is none.
fn data() -> Option<PathBuf> {
    let folder = std::env::var_os("IGSIM_DATA").map(PathBuf::from);
    if folder.is_none() {
        println!("skipped: IGSIM_DATA is not set");
    }
    folder
}

/// The table at `path` below the folder.
fn table(folder: &std::path::Path, path: &str) -> engine_sim::calibrate::table::Table {
    let path = folder.join(path);
    let text = engine_sim::calibrate::table::read_text(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    engine_sim::calibrate::table::Table::read(&path.display().to_string(), &text).unwrap()
}

fn mean(values: impl IntoIterator<Item = f64>) -> f64 {
    let values: Vec<f64> = values.into_iter().collect();
    values.iter().sum::<f64>() / values.len() as f64
}
