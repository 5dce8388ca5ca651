//! The figures in docs/overhead.md are those of the runs that are kept beside it.

use std::path::{Path, PathBuf};
use std::process::Command;

fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs")
}

#[test]
fn published_tables_are_those_of_the_committed_runs() {
    let page = std::fs::read_to_string(docs().join("overhead.md")).unwrap();
    let mut runs: Vec<PathBuf> = std::fs::read_dir(docs().join("overhead"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.to_string_lossy().ends_with(".json.gz"))
        .collect();
    runs.sort();
    assert!(!runs.is_empty(), "no run is published");
    for run in runs {
        let output = Command::new(env!("CARGO_BIN_EXE_igsim")).args(["overhead", "report"]).arg(&run).output().unwrap();
        let table = String::from_utf8(output.stdout).unwrap();
        assert!(table.lines().count() > 10, "{}: {}", run.display(), String::from_utf8_lossy(&output.stderr));
        let missing: Vec<&str> = table.lines().map(str::trim_end).filter(|line| !page.contains(line)).collect();
        let renew = "igsim overhead report FILE prints what the page must hold";
        assert!(missing.is_empty(), "{}: {renew}:\n{}", run.display(), missing.join("\n"));
    }
}
