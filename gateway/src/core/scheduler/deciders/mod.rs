//! Deciders: whether the prefill of a request is worth another endpoint.

mod always;
mod prefix_based;

pub use always::Always;
pub use prefix_based::PrefixBased;
