//! The simulator: scenarios, workloads, the live and the virtual driver, reports, traces read back.

pub mod check;
pub mod cli;
pub mod client;
pub mod inspect;
pub mod ladder;
pub mod live;
pub mod log;
pub mod overhead;
pub mod queries;
mod remote;
pub mod replay;
pub mod report;
pub mod run;
pub mod sampling;
pub mod scenario;
pub mod send;
pub mod stats;
pub mod tempo;
pub mod virtual_time;
pub mod workload;
