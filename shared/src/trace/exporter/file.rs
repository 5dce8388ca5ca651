//! Spans to a file of OTLP JSON lines, one line per batch.
//!
//! A line goes out in one write, so that a killed run leaves whole lines; after a failed write the file is cut back to its last
//! whole line. Errors of the disk are counted as lost spans and never reach the caller. The file grows as long as the run does, unless
//! it rotates: then a full file is put aside, between two lines, and the oldest one goes.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::time::Dur;
use crate::trace::config::Rotation;
use crate::trace::exporter::{Batch, Exporter, Settled};
use crate::trace::otlp_json;
use crate::trace::pipeline::TelemetryError;
use crate::trace::stats::{ExporterCounters, Loss};

pub(crate) struct FileExporter {
    file: File,
    path: PathBuf,
    /// Bytes of whole lines.
    written: u64,
    /// The most bytes of a file and how many full ones are kept; `None` if it grows for ever.
    rotation: Option<(u64, u32)>,
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
        Ok(FileExporter { file, path: path.to_owned(), written: 0, rotation: None, line: Vec::new(), counters })
    }

    pub(crate) fn rotating(rotation: &Rotation) -> Result<FileExporter, TelemetryError> {
        let of_size = Some((rotation.max_bytes, rotation.keep));
        Ok(FileExporter { rotation: of_size, ..FileExporter::create(&rotation.path)? })
    }

    /// Puts the file aside if the line has no room in it.
    fn make_room(&mut self) -> std::io::Result<()> {
        let Some((max_bytes, keep)) = self.rotation else { return Ok(()) };
        if self.written == 0 || self.written + self.line.len() as u64 <= max_bytes {
            return Ok(());
        }
        for n in (1..keep).rev() {
            match std::fs::rename(aside(&self.path, n), aside(&self.path, n + 1)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
                Ok(()) | Err(_) => {}
            }
        }
        if keep > 0 {
            std::fs::rename(&self.path, aside(&self.path, 1))?;
        }
        self.file = File::create(&self.path)?;
        self.written = 0;
        Ok(())
    }

    fn write(&mut self, batch: &Batch) -> std::io::Result<()> {
        self.line.clear();
        otlp_json::write(&batch.spans, &batch.resources, batch.anchor, &mut self.line)?;
        self.make_room()?;
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

/// The name of the `n`-th full file, counted from the newest.
fn aside(path: &Path, n: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{n}"));
    name.into()
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
