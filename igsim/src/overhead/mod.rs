//! The overhead lab: what tracing costs, measured so that a sceptic believes it.

pub mod load;
pub mod model;
pub mod receiver;
