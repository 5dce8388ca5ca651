//! Spans to a file of OTLP JSON lines, one line per batch.
//!
//! A line goes out in one write, so that a killed run leaves whole lines; after a failed write the file is cut back to its last
//! whole line. Errors of the disk are counted as lost spans and never reach the caller. The file grows as long as the run does.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::time::Dur;
use crate::trace::exporter::{Batch, Exporter, Settled};
use crate::trace::otlp_json;
use crate::trace::pipeline::TelemetryError;
use crate::trace::stats::{ExporterCounters, Loss};

pub(crate) struct FileExporter {
    file: File,
    path: PathBuf,
    /// Bytes of whole lines.
    written: u64,
    line: Vec<u8>,
    counters: Arc<ExporterCounters>,
}

impl FileExporter {
    pub(crate) fn create(path: &Path) -> Result<FileExporter, TelemetryError> {
        let fail = |source| TelemetryError::File { path: path.to_owned(), source };
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(fail)?;
        }
        let file = File::create(path).map_err(fail)?;
        let counters = Arc::new(ExporterCounters::new(format!("file {}", path.display()), true));
        Ok(FileExporter { file, path: path.to_owned(), written: 0, line: Vec::new(), counters })
    }

    fn write(&mut self, batch: &Batch) -> std::io::Result<()> {
        self.line.clear();
        otlp_json::write(&batch.spans, &batch.resources, batch.anchor, &mut self.line)?;
        if let Err(error) = self.file.write_all(&self.line) {
            // A device or pipe cannot be cut back; then the reader drops the unfinished line.
            let _ = self.file.set_len(self.written);
            let _ = self.file.seek(SeekFrom::Start(self.written));
            return Err(error);
        }
        self.written += self.line.len() as u64;
        Ok(())
    }
}

impl Exporter for FileExporter {
    fn export(&mut self, batch: &Arc<Batch>) {
        match self.write(batch) {
            Ok(()) => {
                self.counters.exported(batch.len);
                self.counters.sent_bytes(self.line.len());
            }
            Err(error) => {
                self.counters.lost(Loss::ExportFailed, batch.len);
                self.counters.error(format!("{}: {error}", self.path.display()));
            }
        }
    }
    fn flush(&mut self, _: Settled) {}
    fn stop(&mut self, _: Dur) {}
    fn join(&mut self) {}
    fn counters(&self) -> &Arc<ExporterCounters> {
        &self.counters
    }
}
