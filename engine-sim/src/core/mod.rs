//! The engine without sockets, clocks or threads: scheduler, KV cache, latency model and the loop that joins them.
//!
//! Nothing in here reads a clock or draws a random number; `now` is an argument and the order of everything is fixed.

pub mod config;
pub mod latency;
