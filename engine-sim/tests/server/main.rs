//! The engine's server on real sockets: shapes, errors, disconnects, traces. Nothing here waits for time to pass; where something
//! happens on another thread, its effect is polled for.

mod adapters;
mod choices;
mod clients;
mod details;
mod disconnects;
mod errors;
mod faults;
mod harness;
mod hostile;
mod kv_events;
mod metrics;
mod options;
mod pages;
mod pauses;
mod shapes;
mod stops;
mod table;
mod tracing;
