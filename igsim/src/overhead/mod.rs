//! The overhead lab: what tracing costs, measured so that a sceptic believes it.

pub mod allocations;
pub mod analysis;
pub mod attribution;
pub mod awake;
pub mod bench;
pub mod block;
pub mod calibrate;
pub mod cpu;
pub mod distribution;
pub mod fleet;
mod format;
pub mod html;
pub mod lab;
pub mod load;
pub mod model;
pub mod node;
pub mod outside;
pub mod place;
pub mod plan;
pub mod predict;
pub mod probe;
pub mod receiver;
pub mod record;
pub mod soak;
pub mod stats;
pub mod table;
