//! The folder of a run: everything is written below it, files appear whole or not at all.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use shared::time::Anchor;

use crate::inspect::TRACES_FILE;
use crate::report::{RequestRow, RowWriter};

/// Name of the report in the folder of a run.
pub const REPORT_FILE: &str = "report.json";
/// Name of the table of requests.
pub const REQUESTS_FILE: &str = "requests.csv";
/// Name of the scenario as resolved.
pub const SCENARIO_FILE: &str = "scenario.yaml";

/// The folder of a run.
#[derive(Debug)]
pub struct Output {
    dir: PathBuf,
}

/// Why a folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    /// It holds something already.
    #[error(
        "{0}: found a folder that is not empty, expected a new or empty one; --overwrite writes into it all the same"
    )]
    NotEmpty(PathBuf),
    /// The system says no.
    #[error("{path}: {error}")]
    Io {
        /// What was written.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
}

impl Output {
    /// Uses `dir`, made if need be. What an earlier run left there goes, so that nobody takes its traces for those of this one.
    ///
    /// # Errors
    /// If it is not empty and `overwrite` is false, or cannot be made.
    pub fn open(dir: &Path, overwrite: bool) -> Result<Output, OutputError> {
        let fail = |error| OutputError::Io { path: dir.to_path_buf(), error };
        fs::create_dir_all(dir).map_err(fail)?;
        if !overwrite && fs::read_dir(dir).map_err(fail)?.next().is_some() {
            return Err(OutputError::NotEmpty(dir.to_path_buf()));
        }
        for name in [REPORT_FILE, REQUESTS_FILE, SCENARIO_FILE, TRACES_FILE] {
            let path = dir.join(name);
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(OutputError::Io { path, error }),
                Ok(()) | Err(_) => {}
            }
        }
        Ok(Output { dir: dir.to_path_buf() })
    }

    /// `runs/NAME-TIME`, with a number behind it where that exists.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn fresh(runs: &Path, name: &str, anchor: Anchor) -> Result<Output, OutputError> {
        let stamp = stamp(anchor);
        for n in 1..10_000 {
            let tail = if n == 1 { String::new() } else { format!("-{n}") };
            let dir = runs.join(format!("{name}-{stamp}{tail}"));
            match Output::open(&dir, false) {
                Err(OutputError::NotEmpty(_)) => {}
                other => return other,
            }
        }
        Err(OutputError::NotEmpty(runs.join(format!("{name}-{stamp}"))))
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A file in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Writes a whole file: first beside its name, then under it, so that no reader sees half of it.
    ///
    /// # Errors
    /// What the system says.
    pub fn write(&self, name: &str, text: &str) -> Result<(), OutputError> {
        let (path, partial) = (self.path(name), self.path(&format!(".{name}.partial")));
        let done = fs::write(&partial, text).and_then(|()| fs::rename(&partial, &path));
        done.map_err(|error| OutputError::Io { path, error })
    }

    /// Starts the table of requests.
    ///
    /// # Errors
    /// What the system says.
    pub fn rows(&self) -> Result<Rows, OutputError> {
        let path = self.path(REQUESTS_FILE);
        let start = || -> io::Result<_> { Ok(RowWriter::new(BufWriter::new(File::create(&path)?))?) };
        match start() {
            Ok(writer) => Ok(Rows { path, writer }),
            Err(error) => Err(OutputError::Io { path, error }),
        }
    }
}

/// The table of requests while it is written.
pub struct Rows {
    path: PathBuf,
    writer: RowWriter<BufWriter<File>>,
}

impl Rows {
    /// Adds a request.
    ///
    /// # Errors
    /// What the system says.
    pub fn write(&mut self, row: &RequestRow) -> Result<(), OutputError> {
        self.writer.write(row).map_err(|error| OutputError::Io { path: self.path.clone(), error: error.into() })
    }

    /// Writes what is left.
    ///
    /// # Errors
    /// What the system says.
    pub fn finish(self) -> Result<(), OutputError> {
        self.writer.finish().map_err(|error| OutputError::Io { path: self.path, error })
    }
}

impl std::fmt::Debug for Rows {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Rows({})", self.path.display())
    }
}

/// `20261120-1842` in local time, or UTC where the system does not say.
fn stamp(anchor: Anchor) -> String {
    let unix = anchor.unix_nanos(shared::time::Time::ZERO) / 1_000_000_000;
    let at = jiff::Timestamp::from_second(unix as i64).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    at.to_zoned(jiff::tz::TimeZone::try_system().unwrap_or(jiff::tz::TimeZone::UTC)).strftime("%Y%m%d-%H%M").to_string()
}

/// Prints to standard output; a reader that has gone away (`| head`) is no error.
pub fn print(text: &str) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_with_something_in_it_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let output = Output::open(dir.path(), false).unwrap();
        output.write(REPORT_FILE, "{}").unwrap();
        assert!(matches!(Output::open(dir.path(), false), Err(OutputError::NotEmpty(_))));
        let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["report.json"], "no partial file stays behind");
        fs::write(dir.path().join("notes.txt"), "mine").unwrap();
        Output::open(dir.path(), true).unwrap();
        let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["notes.txt"], "of the earlier run nothing is left, of the user's own everything");
    }

    #[test]
    fn two_runs_of_one_minute_get_two_folders() {
        let dir = tempfile::tempdir().unwrap();
        let fresh = || Output::fresh(dir.path(), "q", Anchor::VIRTUAL).unwrap();
        let first = fresh();
        first.write(REPORT_FILE, "{}").unwrap();
        assert_ne!(fresh().dir(), first.dir());
    }
}
