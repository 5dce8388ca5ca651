//! Published raw tables as step times.
//!
//! `engine-sim steps` runs [`steps_of`]; a profile's file names its tables ([`Tables`]). No table is part of this project.

mod aiconfigurator;
mod dynamo;
mod grid;
mod llmservingsim;
mod splitwise;

use std::path::{Path, PathBuf};

use super::steps::StepRow;
use super::table::{CsvError, Table, read_text};
use crate::core::latency::{ProfileFile, Tables};

/// Why tables gave no steps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TablesError {
    /// The profile names none.
    NoTables {
        /// Its name.
        profile: String,
    },
    /// A file cannot be read.
    File {
        /// Its path.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// A file is not what it should be.
    Csv(CsvError),
}

impl std::error::Error for TablesError {}

impl std::fmt::Display for TablesError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            TablesError::NoTables { profile } => {
                write!(
                    f,
                    "source.tables: found nothing in profile {profile}, expected the tables that its steps come from"
                )
            }
            TablesError::File { path, why } => {
                write!(f, "{}: found {why}, expected a readable CSV, or the same with .gz", path.display())
            }
            TablesError::Csv(error) => error.fmt(f),
        }
    }
}

impl From<CsvError> for TablesError {
    fn from(error: CsvError) -> TablesError {
        TablesError::Csv(error)
    }
}

/// The steps that the tables of `profile` in the folder `data` amount to.
///
/// # Errors
/// A profile without tables, or a file that is missing or wrong.
pub fn steps_of(profile: &ProfileFile, data: &Path) -> Result<Vec<StepRow>, TablesError> {
    let folder = Folder(data);
    let mut rows = match &profile.source.tables {
        None => return Err(TablesError::NoTables { profile: profile.name.clone() }),
        Some(Tables::LlmServingSim { prefix, all_reduce }) => {
            llmservingsim::steps(profile, prefix, *all_reduce, &folder)?
        }
        Some(Tables::Dynamo { decode, prefill }) => dynamo::steps(&folder.table(decode)?, &folder.table(prefill)?)?,
        Some(Tables::Splitwise { file, model, hardware }) => {
            splitwise::steps(&folder.table(file)?, model, hardware, profile.tensor_parallel)?
        }
        Some(Tables::AiConfigurator(operators)) => aiconfigurator::steps(profile, operators, &folder)?,
    };
    // Grids go beyond what fits into a GPU's memory: such steps never run.
    let most = profile.kv_cache_tokens as f64;
    rows.retain(|r| r.decode_context + r.prefill_past + r.prefill_tokens <= most);
    Ok(rows)
}

/// The folder that paths in [`Tables`] are relative to.
struct Folder<'a>(&'a Path);

impl Folder<'_> {
    fn table(&self, name: &str) -> Result<Table, TablesError> {
        let path = self.0.join(name);
        let text = read_text(&path).map_err(|e| TablesError::File { path: path.clone(), why: e.to_string() })?;
        Ok(Table::read(&path.display().to_string(), &text)?)
    }
}
