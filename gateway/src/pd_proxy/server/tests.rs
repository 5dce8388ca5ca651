//! The sidecar on real sockets, between a caller and engines that do exactly what each test says. Nothing here waits for time to pass
//! except the tests of time limits.

mod failures;
mod harness;
mod passing;

use crate::server::tests::harness as engines;
