//! The simulator: scenarios, workloads, drivers, reports.

pub mod client;
pub mod report;
pub mod scenario;
pub mod stats;
