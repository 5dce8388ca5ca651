//! Processors that do not sleep while something is measured.
//!
//! A processor that finds nothing to do halts, and to wake it takes longer than a hop through a gateway: tens of microseconds on a
//! virtual machine, where the hypervisor is asked, and different from one moment to the next. Whoever sends to a halted processor
//! pays for waking it, so that an arm which keeps another process busy looks cheap. Linux lets a process ask for none of that
//! (kernel documentation, `power/pm_qos_interface`): processors are kept awake for as long as a file is held open.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

/// Where the longest time to wake up, in microseconds, is asked for.
const LATENCY: &str = "/dev/cpu_dma_latency";

/// Keeps all processors awake until it is dropped, where the system allows it.
#[derive(Debug)]
pub struct Awake(Option<File>);

impl Awake {
    /// Asks the system. It may refuse: mostly it allows root only.
    pub fn hold() -> Awake {
        Awake(ask(Path::new(LATENCY)).ok())
    }

    /// Whether the system agreed.
    pub const fn is_held(&self) -> bool {
        self.0.is_some()
    }
}

fn ask(path: &Path) -> io::Result<File> {
    let mut file = File::options().write(true).open(path)?;
    file.write_all(&0i32.to_ne_bytes())?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_time_to_wake_up_is_asked_for() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let held = Awake(ask(file.path()).ok());
        assert!(held.is_held());
        assert_eq!(std::fs::read(file.path()).expect("what was asked"), [0; 4]);
        assert!(!Awake(ask(Path::new("/nonexistent/latency")).ok()).is_held());
    }
}
