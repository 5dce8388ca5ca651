//! Bodies kept as they came: in memory, and beyond a bound in a file without a name.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::Range;

/// Bytes kept in memory before the file is used.
pub const MEMORY: usize = 64 << 20;
/// Bytes kept in the file at most.
pub const STORAGE: u64 = 4 << 30;

/// How much is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes in memory; beyond, everything in memory goes to the file.
    pub memory: usize,
    /// Bytes in the file, which has no name and is gone when the process is.
    pub storage: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { memory: MEMORY, storage: STORAGE }
    }
}

/// The bodies.
#[derive(Debug)]
pub(super) struct Spool {
    limits: Limits,
    entries: Vec<Entry>,
    /// What came last.
    memory: Vec<u8>,
    /// What came before.
    file: Option<File>,
    filed: u64,
}

/// Where one body lies: behind the ones before it.
#[derive(Clone, Copy, Debug)]
struct Entry {
    mark: u32,
    gzip: bool,
    length: usize,
}

impl Spool {
    pub(super) fn new(limits: Limits) -> Spool {
        Spool { limits, entries: Vec::new(), memory: Vec::new(), file: None, filed: 0 }
    }

    /// What was kept; the spool is empty then.
    pub(super) fn take(&mut self) -> Spool {
        std::mem::replace(self, Spool::new(self.limits))
    }

    /// Keeps a body.
    ///
    /// # Errors
    /// If there is no room; then nothing of it is kept.
    pub(super) fn push(&mut self, mark: u32, gzip: bool, body: &[u8]) -> io::Result<()> {
        if self.memory.len() + body.len() > self.limits.memory {
            self.spill(body.len())?;
        }
        self.memory.extend_from_slice(body);
        self.entries.push(Entry { mark, gzip, length: body.len() });
        Ok(())
    }

    /// Makes room in memory while nobody waits: a copy of megabytes in the middle of a block would be measured with it.
    ///
    /// # Errors
    /// If there is no room on disk; what was kept stays.
    pub(super) fn settle(&mut self) -> io::Result<()> {
        if self.memory.len() > self.limits.memory / 2 { self.spill(0) } else { Ok(()) }
    }

    /// Makes room for `size` bytes in memory.
    fn spill(&mut self, size: usize) -> io::Result<()> {
        let full = |what: &str| Err(io::Error::new(io::ErrorKind::StorageFull, format!("no room left {what}")));
        if size > self.limits.memory {
            return full("in memory");
        }
        if self.filed + self.memory.len() as u64 > self.limits.storage {
            return full("on disk");
        }
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(tempfile::tempfile()?),
        };
        // A write that broke off has left a part behind: the next one goes over it.
        file.seek(SeekFrom::Start(self.filed))?;
        file.write_all(&self.memory)?;
        self.filed += self.memory.len() as u64;
        self.memory.clear();
        Ok(())
    }

    /// Hands over every body in the order in which they came, with its mark and whether it is compressed.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub(super) fn each(mut self, mut take: impl FnMut(u32, bool, &[u8])) -> io::Result<()> {
        let mut file = match self.file.take() {
            Some(mut file) => {
                file.rewind()?;
                Some(io::BufReader::with_capacity(1 << 20, file))
            }
            None => None,
        };
        let (mut read, mut at, mut body) = (0, 0, Vec::new());
        for Entry { mark, gzip, length } in self.entries {
            // A body lies in one place: what spills is whole.
            match &mut file {
                Some(file) if read < self.filed => {
                    body.resize(length, 0);
                    file.read_exact(&mut body)?;
                    read += length as u64;
                    take(mark, gzip, &body);
                }
                Some(_) | None => {
                    let range: Range<usize> = at..at + length;
                    at = range.end;
                    take(mark, gzip, &self.memory[range]);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(spool: Spool) -> Vec<(u32, bool, Vec<u8>)> {
        let mut all = Vec::new();
        spool.each(|mark, gzip, body| all.push((mark, gzip, body.to_vec()))).unwrap();
        all
    }

    #[test]
    fn what_does_not_fit_is_refused_and_the_rest_stays() {
        let mut spool = Spool::new(Limits { memory: 4, storage: 6 });
        let kept: Vec<bool> = [3, 3, 5, 3, 3, 1].map(|n| spool.push(0, false, &vec![n as u8; n]).is_ok()).to_vec();
        // Three bytes in the file, then three more; the next three would be too many there, one more fits into memory.
        assert_eq!(kept, [true, true, false, true, false, true]);
        assert_eq!(spool.filed, 6);
        let lengths: Vec<_> = read(spool).iter().map(|(_, _, body)| body.len()).collect();
        assert_eq!(lengths, [3, 3, 3, 1]);
    }

    proptest! {
        #[test]
        fn bodies_come_back_as_they_came(
            bodies in proptest::collection::vec((0u32..3, any::<bool>(), proptest::collection::vec(any::<u8>(), 0..40)), 0..60),
            memory in 40usize..400,
        ) {
            let mut spool = Spool::new(Limits { memory, storage: 1 << 20 });
            for (mark, gzip, body) in &bodies {
                spool.push(*mark, *gzip, body).unwrap();
            }
            prop_assert!(spool.memory.len() <= memory);
            prop_assert_eq!(read(spool.take()), bodies);
            prop_assert_eq!(read(spool).len(), 0);
        }
    }
}
