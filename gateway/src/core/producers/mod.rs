//! What outlives a request and plugins read: which endpoint got what, and what is still under way. The prefix index is one of them,
//! in [`crate::core::prefix_index`].

mod cold_requests;
mod in_flight;
mod sessions;

pub(crate) use cold_requests::ColdRequests;
pub(crate) use in_flight::{InFlight, Placed};
pub(crate) use sessions::Sessions;
