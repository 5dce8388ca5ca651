//! The engine's server on real sockets: shapes, errors, disconnects, traces. Nothing here waits for time to pass; where something
//! happens on another thread, its effect is polled for.

mod disconnects;
mod errors;
mod faults;
mod harness;
mod kv_events;
mod metrics;
mod pages;
mod shapes;
mod stops;
mod tracing;
