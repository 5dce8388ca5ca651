//! The files of a run of the lab: raw blocks, report, page. What is read back is analysed as if it had just been measured.

use std::fs::{self, File};
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use serde::{Deserialize, Serialize};

use super::analysis::Analysis;
use super::distribution::Distributions;
use super::model::Run;
use super::predict::Fit;

/// Raw blocks, compressed.
pub const RUN_FILE: &str = "run.json.gz";
/// Blocks and what they say.
pub const REPORT_FILE: &str = "report.json";
/// The same for people.
pub const PAGE_FILE: &str = "report.html";
/// The largest file that is read: a run of an hour has a few megabytes.
const MAX_BYTES: u64 = 256 << 20;

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recorded {
    /// Blocks and what is needed to read them.
    #[serde(flatten)]
    pub run: Run,
    /// Latencies end to end, for the page.
    #[serde(default)]
    pub distributions: Distributions,
}

/// What was measured and what it says.
#[derive(Debug, Serialize)]
pub struct Report<'a> {
    /// Blocks.
    pub run: &'a Run,
    /// What they say.
    pub analysis: &'a Analysis,
}

/// A file that cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {problem}")]
pub struct RecordError {
    path: PathBuf,
    problem: String,
}

impl RecordError {
    fn of(path: &Path, problem: impl ToString) -> RecordError {
        RecordError { path: path.to_path_buf(), problem: problem.to_string() }
    }
}

/// Makes the folder of a run; one that holds something other than an earlier run's files is left alone.
///
/// # Errors
/// If it holds something, or cannot be made.
pub fn prepare(dir: &Path) -> Result<(), RecordError> {
    fs::create_dir_all(dir).map_err(|e| RecordError::of(dir, e))?;
    match fs::read_dir(dir).map_err(|e| RecordError::of(dir, e))?.next() {
        Some(_) => Err(RecordError::of(dir, "found a folder that is not empty, expected a new or empty one")),
        None => Ok(()),
    }
}

/// Writes the raw blocks.
///
/// # Errors
/// What the system says.
pub fn write_run(dir: &Path, recorded: &Recorded) -> Result<(), RecordError> {
    let path = dir.join(RUN_FILE);
    let mut gzip = GzEncoder::new(Vec::new(), Compression::best());
    serde_json::to_writer(&mut gzip, recorded).map_err(|e| RecordError::of(&path, e))?;
    let bytes = gzip.finish().map_err(|e| RecordError::of(&path, e))?;
    write_whole(&path, &bytes)
}

/// Writes report and page.
///
/// # Errors
/// What the system says.
pub fn write_report(dir: &Path, report: &Report<'_>, page: &str) -> Result<(), RecordError> {
    let path = dir.join(REPORT_FILE);
    let text = serde_json::to_string_pretty(report).map_err(|e| RecordError::of(&path, e))?;
    write_whole(&path, text.as_bytes())?;
    write_whole(&dir.join(PAGE_FILE), page.as_bytes())
}

/// Under another name first, so that no reader sees half a file.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), RecordError> {
    let partial = path.with_extension("partial");
    let written = File::create(&partial).and_then(|mut file| file.write_all(bytes));
    written.and_then(|()| fs::rename(&partial, path)).map_err(|e| RecordError::of(path, e))
}

/// Reads a run: its folder, the file of its raw blocks, compressed or not, or its report.
///
/// # Errors
/// If there is none, or it is not one.
pub fn read(path: &Path) -> Result<Recorded, RecordError> {
    let file = if path.is_dir() { path.join(RUN_FILE) } else { path.to_path_buf() };
    let bad = |e: serde_json::Error| RecordError::of(&file, format!("this is no run of the lab: {e}"));
    let bytes = plain(&file).map_err(|e| RecordError::of(&file, e))?;
    let mut value: serde_json::Value = serde_json::from_slice(&bytes).map_err(bad)?;
    // A report has the run inside.
    let inner = value.get_mut("run").map(serde_json::Value::take);
    serde_json::from_value(inner.unwrap_or(value)).map_err(bad)
}

/// Reads a fit, if the file is one.
pub fn read_fit(path: &Path) -> Option<Fit> {
    serde_json::from_slice(&plain(path).ok()?).ok()
}

fn plain(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = BufReader::new(File::open(path)?);
    let mut bytes = Vec::new();
    if path.extension().is_some_and(|e| e == "gz") {
        GzDecoder::new(file).take(MAX_BYTES).read_to_end(&mut bytes)?;
    } else {
        file.by_ref().take(MAX_BYTES).read_to_end(&mut bytes)?;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::overhead::model::Machine;

    #[test]
    fn a_run_is_read_back_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        prepare(dir.path()).unwrap();
        let run = Run {
            version: "1".into(),
            command: "igsim overhead".into(),
            seed: 3,
            began: 4,
            machine: Machine::default(),
            settings: Vec::new(),
            blocks: Vec::new(),
        };
        let recorded = Recorded { run, distributions: Vec::new() };
        write_run(dir.path(), &recorded).unwrap();
        assert_eq!(read(dir.path()).unwrap(), recorded);
        assert_eq!(read(&dir.path().join(RUN_FILE)).unwrap(), recorded);
        assert!(prepare(dir.path()).is_err(), "what an earlier run left is kept");
        let other = dir.path().join("other.json");
        std::fs::write(&other, "{}").unwrap();
        let problem = read(&other).unwrap_err().to_string();
        assert!(problem.contains("other.json: this is no run of the lab: missing field"), "{problem}");
    }
}
