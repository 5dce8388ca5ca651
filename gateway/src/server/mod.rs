//! The gateway on sockets: moves data, waits, drains. It decides nothing; that is [`crate::core`]'s part.

mod api;
mod auth;
mod backend;
mod connect;
mod discovery;
mod membership;
mod metrics;
mod observe;
mod opening;
mod patient;
mod proxy;
mod queue;
mod reply;
mod request;
mod routing;
mod runtime;
mod scrape;
mod tls;
mod trust;

#[cfg(test)]
mod tests;

pub use backend::{Backend, BadBackend};
pub use membership::{Endpoints, NameTaken};
pub use runtime::{ServeError, Server, Stats};
