//! The sidecar on sockets: moves data, waits, drains. It decides nothing; that is [`super::core`]'s part.
//!
//! Requests for inference are recorded; whatever else comes, health and metrics pages above all, passes through as it is.

mod answer;
mod call;
mod exchange;
mod metrics;
mod relay;
mod runtime;

#[cfg(test)]
mod tests;

pub use runtime::{BindError, DoneHook, Server};
