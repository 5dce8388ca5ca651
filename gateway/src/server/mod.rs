//! The gateway on sockets: moves data, waits, drains. It decides nothing; that is [`crate::core`]'s part.

pub(crate) mod api;
mod backend;
pub(crate) mod connect;
mod kv_events;
mod kv_manager;
mod metrics;
mod observe;
pub(crate) mod opening;
mod proxy;
mod queue;
pub(crate) mod reply;
pub(crate) mod request;
pub(crate) mod routing;
mod runtime;
mod scrape;

#[cfg(test)]
pub(crate) mod tests;

pub use backend::{Backend, BadBackend};
pub use kv_manager::KvManager;
pub use runtime::{ServeError, Server, Stats};
