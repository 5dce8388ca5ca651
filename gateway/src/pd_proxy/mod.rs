//! The routing sidecar in front of an engine that decodes: it has another engine prefill first, and tells its own where the cache is.
//!
//! What llm-d's `pd-sidecar` does with its connector `nixlv2`. [`core`] decides and reads neither clock nor socket, [`server`] moves
//! the data, [`spans`] names every span of the service `pd-proxy`.

pub mod core;
pub mod server;
pub mod spans;
