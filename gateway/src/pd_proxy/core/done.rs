//! What became of a request, and how long its parts took.

use shared::time::{Dur, Time};

/// Whether a request was prefilled elsewhere, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// The gateway named an engine that prefills.
    PrefillHeader,
    /// It named none: the engine that decodes does it all.
    NoPrefillHeader,
    /// The engine that prefilled did not say where its cache is: the one that decodes computes the prompt again.
    NoTransferParams,
    /// The named engine is outside of the pool.
    ForbiddenTarget,
    /// The header names no engine.
    BadTarget,
    /// The body cannot be sent in two variants.
    BadBody,
    /// The request ended before anything was decided.
    Undecided,
}

impl Reason {
    /// The attribute's value.
    pub const fn as_str(self) -> &'static str {
        match self {
            Reason::PrefillHeader => "prefill_header",
            Reason::NoPrefillHeader => "no_prefill_header",
            Reason::NoTransferParams => "no_transfer_params",
            Reason::ForbiddenTarget => "forbidden_target",
            Reason::BadTarget => "bad_target",
            Reason::BadBody => "bad_body",
            Reason::Undecided => "undecided",
        }
    }

    /// Whether another engine's cache is used.
    pub const fn disaggregates(self) -> bool {
        match self {
            Reason::PrefillHeader => true,
            Reason::NoPrefillHeader
            | Reason::NoTransferParams
            | Reason::ForbiddenTarget
            | Reason::BadTarget
            | Reason::BadBody
            | Reason::Undecided => false,
        }
    }
}

/// What went wrong with a call, or with a whole request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The engine could not be reached.
    Connect,
    /// The engine took too long.
    Timeout,
    /// The engine broke off.
    Reset,
    /// The answer to a prefill is too large, or no JSON object.
    BadAnswer,
    /// The caller went away: no error.
    Cancelled,
    /// The proxy stopped before the answer was complete.
    Abandoned,
}

impl Failure {
    /// The status that stands for it towards the caller.
    pub const fn status(self) -> u16 {
        match self {
            Failure::Connect | Failure::Reset | Failure::BadAnswer | Failure::Cancelled | Failure::Abandoned => 502,
            Failure::Timeout => 504,
        }
    }

    /// Whether a further attempt may help.
    pub(super) const fn may_pass(self) -> bool {
        match self {
            Failure::Connect | Failure::Timeout | Failure::Reset => true,
            Failure::BadAnswer | Failure::Cancelled | Failure::Abandoned => false,
        }
    }

    /// The value of `error.type`, and the description of the status; nothing for what is no error.
    pub const fn error(self) -> Option<(&'static str, &'static str)> {
        match self {
            Failure::Connect => Some(("connection_failed", "the engine could not be reached")),
            Failure::Timeout => Some(("timeout", "the engine took too long")),
            Failure::Reset => Some(("connection_reset", "the engine broke off")),
            Failure::BadAnswer => Some(("bad_answer", "the answer to the prefill is not to be read")),
            Failure::Cancelled => None,
            Failure::Abandoned => Some(("abandoned", "the proxy stopped before the answer was complete")),
        }
    }
}

/// How long the parts of a request took, as far as it got.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    /// From arrival to the end.
    pub total: Dur,
    /// The prefill, all its attempts and pauses.
    pub prefill: Option<Dur>,
    /// From the start of the decode to its end.
    pub decode: Option<Dur>,
    /// From arrival to the first byte of an answer's body that is passed on: the true time to first token.
    pub first_byte: Option<Dur>,
    /// From arrival to the start of the decode, without the time in which an engine had the prefill: what coordination costs.
    pub coordination: Option<Dur>,
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// Where it was prefilled, and why.
    pub reason: Reason,
    /// Attempts at a prefill.
    pub prefill_attempts: u32,
    /// Whether the prefill failed for good.
    pub prefill_failed: bool,
    /// The status of the answer.
    pub status: Option<u16>,
    /// What went wrong, the prefill included.
    pub failure: Option<Failure>,
    /// How long it took.
    pub times: Times,
}

/// When the parts of a request began and ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clocking {
    pub(super) arrived: Time,
    pub(super) prefill: Option<(Time, Option<Time>)>,
    /// In calls of the prefill.
    pub(super) calling: Dur,
    pub(super) decode: Option<Time>,
    pub(super) first_byte: Option<Time>,
}

impl Clocking {
    pub(super) const fn from(arrived: Time) -> Clocking {
        Clocking { arrived, prefill: None, calling: Dur::ZERO, decode: None, first_byte: None }
    }

    /// The times of a request that ends at `end`.
    pub(super) fn times(&self, end: Time) -> Times {
        Times {
            total: end.since(self.arrived),
            prefill: self.prefill.map(|(from, to)| to.unwrap_or(end).since(from)),
            decode: self.decode.map(|from| end.since(from)),
            first_byte: self.first_byte.map(|at| at.since(self.arrived)),
            coordination: self.decode.map(|from| from.since(self.arrived) - self.calling),
        }
    }
}
