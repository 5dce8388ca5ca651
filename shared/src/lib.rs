//! What the gateway, the engine and the simulator have in common: time, ids, seeded randomness,
//! token and block identity, OpenAI wire types, configuration errors and the one telemetry path.
//!
//! This crate knows neither the gateway nor the engine. Apart from [`clock`], nothing here reads a clock.

pub mod block_hash;
pub mod clock;
pub mod config;
pub mod ids;
pub mod log;
pub mod metrics;
pub mod open_files;
pub mod openai;
pub mod rng;
pub mod time;
pub mod tokens;
pub mod trace;
pub mod units;
