//! Diagnostics on standard error. The log filter never decides what is traced.

use shared::log::LogFormat;
use tracing_subscriber::EnvFilter;

/// Warnings and errors, and the access log, which nobody writes unless it is asked for.
const DEFAULT: &str = "warn,access=info";

/// Starts logging, or what `RUST_LOG` says. A second call changes nothing.
pub fn init(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(DEFAULT));
    shared::log::init(filter, format);
}
