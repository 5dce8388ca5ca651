//! What all runs have in common: the folder of results, progress, telemetry, and what is said at the end.

pub mod collect;
pub mod interrupt;
pub mod output;
pub mod progress;
pub mod telemetry;
pub mod verdict;
