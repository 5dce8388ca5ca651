//! The gateway on real sockets, between a client and engines that do exactly what each test says. Nothing here waits for time to
//! pass except the tests of time limits.

mod arrival;
mod discovery;
mod edge;
mod failures;
pub(crate) mod harness;
mod hedging;
mod identity;
mod kv_manager;
mod membership;
mod metrics;
mod passing;
mod pools;
mod resilience;
mod sampling;
mod tracing;
mod trust;
mod waiting;
