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

    /// Finishes the table and hands the figures over, with what went wrong with the table: the figures are good all the same.
    pub fn finish(self) -> (Summary, Option<OutputError>) {
        self.progress.finish();
        let failed = self.failed.or_else(|| self.rows.and_then(|rows| rows.finish().err()));
        (self.summary, failed)
    }
}
