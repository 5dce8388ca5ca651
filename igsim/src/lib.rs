//! igsim
pub mod client;
