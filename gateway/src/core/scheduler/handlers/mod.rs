//! Profile handlers: which profiles run for a request, and what their choices mean together.

mod disaggregated;
mod single;

use shared::time::Time;

use crate::core::config::GatewayConfig;
use crate::core::scheduler::handlers::disaggregated::Disaggregated;
use crate::core::scheduler::handlers::single::Single;
use crate::core::scheduler::profile::Chosen;
use crate::core::scheduler::registry::Reads;
use crate::core::scheduler::{Candidate, Room, Run};

/// What is done with a request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Decision {
    /// Where it is sent: the endpoint that decodes.
    pub(crate) endpoint: Candidate,
    /// The endpoint that is to prefill it, if it is another's task.
    pub(crate) prefill: Option<Candidate>,
    /// Whether nobody had a block of its prompt, where that is of interest.
    pub(crate) cold: bool,
    /// Whether the endpoint of its session could have been chosen.
    pub(crate) session_present: bool,
}

/// A profile handler.
#[derive(Debug)]
pub(crate) enum Handler {
    /// `single-profile-handler`
    Single(Single),
    /// `disagg-profile-handler`
    Disaggregated(Disaggregated),
}

impl Handler {
    /// The handler of a valid configuration.
    pub(crate) fn new(config: &GatewayConfig) -> Handler {
        match &config.disaggregation {
            None => Handler::Single(Single::new(&config.profile)),
            Some(disaggregation) => Handler::Disaggregated(Disaggregated::new(&config.profile, disaggregation)),
        }
    }

    pub(crate) fn reads(&self) -> Reads {
        match self {
            Handler::Single(h) => h.reads(),
            Handler::Disaggregated(h) => h.reads(),
        }
    }

    pub(crate) fn schedule(&mut self, at: Time, room: &mut Room, run: &mut Run<'_>) -> (Option<Decision>, Time) {
        match self {
            Handler::Single(h) => h.schedule(at, room, run),
            Handler::Disaggregated(h) => h.schedule(at, room, run),
        }
    }
}

impl Decision {
    /// One endpoint does it all.
    const fn alone(chosen: Chosen) -> Decision {
        let Chosen { candidate, cold, session_present } = chosen;
        Decision { endpoint: candidate, prefill: None, cold: matches!(cold, Some(true)), session_present }
    }
}
