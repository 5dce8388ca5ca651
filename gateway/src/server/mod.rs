//! The gateway on sockets: moves data, waits, drains. It decides nothing; that is [`crate::core`]'s part.

mod api;
mod backend;
mod connect;
mod kv_events;
mod kv_manager;
mod metrics;
mod observe;
mod opening;
mod proxy;
mod queue;
mod reply;
mod request;
mod routing;
mod runtime;
mod scrape;

#[cfg(test)]
mod tests;

pub use backend::{Backend, BadBackend};
pub use kv_manager::KvManager;
pub use runtime::{ServeError, Server, Stats};
