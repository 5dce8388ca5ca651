//! The simulator: scenarios, workloads, drivers, reports.

pub mod client;
pub mod replay;
pub mod report;
pub mod scenario;
pub mod stats;
pub mod workload;
