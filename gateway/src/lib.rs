//! An inference gateway in the manner of llm-d: it admits requests, picks an engine for each and proxies to it.
//!
//! [`core`] decides and reads neither clock nor socket; [`server`] moves the data; [`spans`] names every span the gateway emits. The engine is known
//! only by what it reports over the wire. [`pd_proxy`] is the sidecar in front of an engine that decodes what another one prefilled.

pub mod cli;
pub mod core;
pub mod epp;
pub mod pd_proxy;
pub mod server;
pub mod spans;
