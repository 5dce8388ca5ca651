//! The gateway's decisions, without input or output: driven by a socket or by an event queue, repeatable from a seed.

pub mod config;
mod director;
mod flow_control;
pub mod gateway;
mod hedge;
pub mod kv_index;
pub mod outlier;
pub mod pool;
pub mod pools;
pub mod prefix_index;
mod producers;
pub mod request;
mod retry_budget;
pub mod rewrite;
mod role;
mod saturation;
pub mod scheduler;
