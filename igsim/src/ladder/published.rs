//! Published figures of a ladder: a CSV with the columns `policy`, `rate_rps`, `out_tok_s`, `ttft_mean_s`, `ttft_p90_s` and `model`.
//! Lines without a rate, and those of other models, are left out.

use std::path::Path;

use serde::Deserialize;

/// A table of published figures.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Published {
    lines: Vec<Line>,
}

/// What was published of one policy at one rate.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(super) struct Line {
    pub(super) policy: String,
    rate_rps: Option<f64>,
    /// Tokens of answers per second.
    pub(super) out_tok_s: f64,
    pub(super) ttft_mean_s: f64,
    pub(super) ttft_p90_s: f64,
    model: String,
}

/// A table that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {error}")]
pub struct PublishedError {
    path: String,
    error: csv::Error,
}

impl Published {
    /// Reads the lines about `model`.
    ///
    /// # Errors
    /// If the file cannot be read or has other columns.
    pub fn read(path: &Path, model: &str) -> Result<Published, PublishedError> {
        let told = |error| PublishedError { path: path.display().to_string(), error };
        let mut reader = csv::Reader::from_path(path).map_err(told)?;
        let lines: Vec<Line> = reader.deserialize().collect::<Result<_, _>>().map_err(told)?;
        Ok(Published { lines: lines.into_iter().filter(|l| l.model == model).collect() })
    }

    /// What was published of a policy at this rate.
    pub(super) fn at(&self, policy: &str, rate: f64) -> Option<&Line> {
        self.lines.iter().find(|l| l.policy == policy && l.rate_rps.is_some_and(|r| (r - rate).abs() < 1e-6))
    }

    /// Whether anything is known.
    pub(super) fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }
}
