//! What a routing sidecar decides: whether a request is prefilled elsewhere, where that may be, and what comes after a failure.
//!
//! It knows no sockets. [`Dance`] is one request; a driver tells it what happened and does what it answers. It keeps the times of a
//! request and notes its facts, so that a live and a virtual run record the same.

mod allowed;
mod body;
mod config;
mod dance;
mod done;

pub use allowed::{Allowed, BadTarget, Target};
pub use body::{NoObject, Object};
pub use config::{Connector, PdProxyConfig, PdProxyLimits, PdProxyTimeouts};
pub use dance::{Asked, Dance, Leg, PrefillEnd, Refusal, Step};
pub use done::{Done, Failure, Reason, Times};
