//! What happens in a virtual run, and the order of what happens at the same time.

use engine_sim::core::engine::RequestKey as EngineKey;
use engine_sim::core::kv_transfer::KvInput;
use engine_sim::core::sequence::FinishReason;
use gateway::core::kv_index::events::Batch;
use gateway::core::pool::{EndpointMetrics, ScrapeError};
use gateway::core::pools::PoolId;

use super::flight::Leg;
use super::judging::Kept;
use super::loss::{Limit, Loss};
use super::membership::Change;
use super::prefill::PrefillEvent;
use crate::report::Outcome;
use crate::workload::PlannedRequest;

/// What happens. Slots name requests in flight, legs their attempts, numbers name engines.
pub(super) enum Event {
    Send(Box<PlannedRequest>),
    AtGateway(usize),
    /// At the sidecar of the engine.
    AtSidecar(Leg),
    AtEngine(Leg),
    InputsReady(Leg),
    /// A sidecar's call to another engine.
    Prefill(Leg, PrefillEvent),
    /// A sidecar has waited long enough for a further call.
    PrefillAgain(Leg),
    /// The caller has closed the connection of an attempt.
    LeftBy(usize, EngineKey),
    Heard {
        engine: usize,
        input: Box<KvInput>,
    },
    Step {
        engine: usize,
        generation: u64,
    },
    /// Engines that join the pool or are drained.
    Membership(usize, Change),
    Scrape(usize),
    Scraped(usize, Result<EndpointMetrics, ScrapeError>),
    /// A batch of KV events is at the gateway.
    KvEvents(usize, Box<Batch>),
    FirstChunk(Leg),
    Answered {
        leg: Leg,
        reason: FinishReason,
    },
    Refused {
        leg: Leg,
        status: u16,
    },
    /// The gateway learns that an attempt was lost.
    Lost {
        leg: Leg,
        loss: Loss,
    },
    /// A core of the gateway wants to be looked at.
    GatewayDue(PoolId),
    /// An attempt has not answered for so long that a second one may be made.
    HedgeDue(Leg),
    /// The head of an answer is at the gateway.
    Head(Leg),
    /// A time limit of the gateway is reached.
    Overdue {
        slot: usize,
        limit: Limit,
    },
    Done {
        slot: usize,
        outcome: Outcome,
    },
    /// Services learn that a trace is kept.
    Kept(Box<Kept>),
}

/// Simultaneous events: first what arrives, so that a step that starts now has it; then the steps; then what the gateway and
/// the client learn of them.
impl Event {
    pub(super) const fn class(&self) -> u8 {
        match self {
            Event::Send(_) => 0,
            Event::AtGateway(_) => 1,
            Event::AtSidecar(_) | Event::AtEngine(_) => 2,
            Event::InputsReady(_)
            | Event::Prefill(..)
            | Event::PrefillAgain(_)
            | Event::LeftBy(..)
            | Event::Heard { .. } => 3,
            Event::Membership(..) | Event::Scrape(_) => 4,
            Event::Step { .. } => 5,
            Event::Scraped(..) | Event::KvEvents(..) => 6,
            Event::FirstChunk(_) | Event::Head(_) => 7,
            Event::Answered { .. } | Event::Refused { .. } | Event::Lost { .. } => 8,
            Event::GatewayDue(_) => 9,
            Event::HedgeDue(_) | Event::Overdue { .. } => 10,
            Event::Done { .. } => 11,
            Event::Kept(_) => 12,
        }
    }
}
