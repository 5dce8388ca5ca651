//! Takes in requests as they end: figures, the table of requests, progress.

use shared::clock::RunClock;
use shared::time::Dur;

use super::output::{OutputError, Rows};
use super::progress::Progress;
use crate::report::{RequestRow, Summary};

/// Takes in requests as they end.
#[derive(Debug)]
pub struct Collector {
    summary: Summary,
    rows: Option<Rows>,
    progress: Progress,
    wall: RunClock,
    failed: Option<OutputError>,
}

impl Collector {
    /// Writes rows to `rows` and shows progress on the clock `wall`.
    pub fn new(rows: Rows, progress: Progress, wall: RunClock) -> Collector {
        Collector { summary: Summary::new(), rows: Some(rows), progress, wall, failed: None }
    }

    /// Takes in a request that ended.
    pub fn request(&mut self, row: &RequestRow, gaps: &[Dur]) {
        self.summary.add(row);
        gaps.iter().for_each(|gap| self.summary.gap(*gap));
        if let Some(Err(error)) = self.rows.as_mut().map(|rows| rows.write(row)) {
            // The run goes on without the table; the error is told once, at the end.
            self.failed = Some(error);
            self.rows = None;
        }
        self.progress.show(self.wall.now(), &self.summary);
    }

    /// Finishes the table and hands the figures over.
    ///
    /// # Errors
    /// If the table could not be written.
    pub fn finish(self) -> Result<Summary, OutputError> {
        self.progress.finish();
        if let Some(error) = self.failed {
            return Err(error);
        }
        self.rows.map_or(Ok(()), Rows::finish)?;
        Ok(self.summary)
    }
}
