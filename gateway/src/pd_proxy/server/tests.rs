//! The sidecar on real sockets, between a caller and engines that do exactly what each test says. Nothing here waits for time to pass
//! except the tests of time limits.

mod failures;
mod harness;
mod passing;

#[allow(dead_code, reason = "the gateway's own tests use the rest")]
#[path = "../../server/tests/harness.rs"]
mod engines;
