//! The engine without sockets, clocks or threads: scheduler, KV cache, latency model and the loop that joins them.
//!
//! Nothing in here reads a clock or draws a random number; `now` is an argument and the order of everything is fixed.

pub mod block_pool;
pub mod config;
pub mod engine;
pub mod facts;
pub mod faults;
pub mod filler;
pub mod hasher;
pub mod kv_cache;
pub mod kv_events;
pub mod latency;
pub mod metrics;
pub mod residency;
pub mod scheduler;
pub mod sequence;
pub mod step_facts;
pub mod tokenizer;
