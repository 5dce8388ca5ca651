//! An inference gateway in the manner of llm-d: it admits requests, picks an engine for each and proxies to it.
//!
//! [`core`] decides and reads neither clock nor socket; [`server`] moves the data; [`spans`] names every span the gateway emits. The engine is known
//! only by what it reports over the wire.

pub mod core;
pub mod epp;
pub mod server;
pub mod spans;
