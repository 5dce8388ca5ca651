//! The gateway on sockets: moves data, waits, drains. It decides nothing; that is [`crate::core`]'s part.

mod access;
pub(crate) mod api;
mod auth;
mod backend;
pub(crate) mod connect;
mod discovery;
mod kv_events;
mod kv_manager;
mod membership;
mod metrics;
mod observe;
pub(crate) mod opening;
mod patient;
mod pool;
mod pool_metrics;
mod proxy;
mod queue;
pub(crate) mod reply;
pub(crate) mod request;
pub(crate) mod routing;
mod runtime;
mod scrape;
mod tail;
mod tls;
mod trust;
mod verdicts;

#[cfg(test)]
pub(crate) mod tests;

pub use backend::{Backend, BadBackend};
pub use kv_manager::KvManager;
pub use membership::{CannotJoin, Endpoints};
pub use runtime::{ServeError, Server, Stats};
