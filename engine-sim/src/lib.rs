//! A vLLM v1 engine emulator: scheduler, KV cache, latency model, OpenAI server.
//!
//! [`core`] decides and is driven by events; a server or a virtual driver moves data and time. This crate does not know the
//! gateway.

pub mod calibrate;
pub mod core;
pub mod profiles;
pub mod server;
pub mod spans;
