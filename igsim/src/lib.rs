//! The simulator: scenarios, workloads, drivers, reports.

pub mod report;
pub mod stats;
