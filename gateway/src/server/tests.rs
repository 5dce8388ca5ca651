//! The gateway on real sockets, between a client and engines that do exactly what each test says. Nothing here waits for time to
//! pass except the tests of time limits.

mod failures;
pub(crate) mod harness;
mod passing;
mod tracing;
mod waiting;
