//! The overhead lab: what tracing costs, measured so that a sceptic believes it.

pub mod analysis;
pub mod calibrate;
pub mod distribution;
mod format;
pub mod html;
pub mod model;
pub mod predict;
pub mod stats;
pub mod table;
