//! The overhead lab: what tracing costs, measured so that a sceptic believes it.

pub mod analysis;
pub mod distribution;
pub mod model;
pub mod stats;
