//! What the gateway records of a request: facts, without content, of what it decides, sends and receives.

use std::sync::Arc;

use shared::ids::RequestId;
use shared::time::{Dur, Time};
use shared::trace::{LinkTo, Reason};

use super::{Arrived, Dequeued, Hold, KvScored};
use crate::core::config::{FairnessPolicy, OrderingPolicy};
use crate::core::request::Rejection;
use crate::core::scheduler::explain::{Given, Known};
use crate::core::scheduler::{Choice, Verdict};

/// A plugin as spans name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PluginName {
    /// Its type.
    pub kind: &'static str,
    /// The name it was given, or its type.
    pub name: Arc<str>,
}

impl PluginName {
    /// A plugin of type `kind`, with the name it was given.
    pub fn new(kind: &'static str, name: Option<&str>) -> Arc<PluginName> {
        Arc::new(PluginName { kind, name: name.unwrap_or(kind).into() })
    }
}

/// Why a response was not delivered in full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The engine could not be reached.
    Connect,
    /// The engine took too long.
    Timeout,
    /// The engine broke off.
    Reset,
    /// The engine answered with a status that is asked for elsewhere.
    Status(u16),
    /// Another attempt answered first: no error.
    Outrun,
    /// The caller went away: no error.
    Cancelled,
    /// The gateway stopped before the response was complete.
    Abandoned,
}

impl Failure {
    /// The value of `error.type`, and the description of the status; nothing for what is no error.
    pub const fn error(self) -> Option<(&'static str, &'static str)> {
        match self {
            Failure::Connect => Some(("connection_failed", "the engine could not be reached")),
            Failure::Timeout => Some(("timeout", "the engine took too long")),
            Failure::Reset => Some(("connection_reset", "the engine broke off")),
            // The status says it.
            Failure::Outrun | Failure::Cancelled | Failure::Status(_) => None,
            Failure::Abandoned => Some(("abandoned", "the gateway stopped before the response was complete")),
        }
    }
}

impl Failure {
    /// The status of an engine whose answer is not passed on.
    pub(super) const fn status(self) -> Option<u16> {
        match self {
            Failure::Status(status) => Some(status),
            Failure::Connect
            | Failure::Timeout
            | Failure::Reset
            | Failure::Outrun
            | Failure::Cancelled
            | Failure::Abandoned => None,
        }
    }
}

/// What would have become of a request on one endpoint, found by running a copy of that engine on.
#[derive(Clone, Debug, PartialEq)]
pub struct Hindsight {
    /// The endpoint.
    pub endpoint: Arc<str>,
    /// From the client's sending to its first token; `None` if the endpoint would have refused the request.
    pub ttft: Option<Dur>,
    /// Whether the request was sent there.
    pub chosen: bool,
}

impl Hindsight {
    /// The time to first token on the endpoint that was chosen less the shortest on any; `None` if the chosen one has none.
    pub fn regret(all: &[Hindsight]) -> Option<Dur> {
        let chosen = all.iter().find(|h| h.chosen)?.ttft?;
        let least = all.iter().filter_map(|h| h.ttft).min()?;
        Some(chosen - least)
    }
}

/// What is recorded of a sampled request. The core notes what it decides, the driver what it sends and receives.
#[derive(Clone, Debug)]
pub enum GatewayFact {
    /// Driver: the head of a request was read.
    Received {
        /// The HTTP method.
        method: &'static str,
        /// The path, without the query (see [`super::bounded_path`]).
        path: Arc<str>,
        /// The route that matched.
        route: Option<&'static str>,
    },
    /// Driver, finest detail: the headers were judged.
    HeadersRead {
        /// How many there are; `None` where there are none to count, in virtual time.
        count: Option<u32>,
        /// Whether one says how the request is to be treated.
        metadata: bool,
    },
    /// Driver, finest detail: the body was read, or could not be.
    BodyRead {
        /// What came of it.
        arrived: Arrived,
        /// Whether it came whole and could be read.
        parsed: bool,
    },
    /// Driver: the request asks for this model and is sent to another one; comes before [`GatewayFact::Parsed`].
    Rewritten {
        /// The model asked for (see [`super::bounded_name`]).
        asked: Arc<str>,
    },
    /// Core: what the request asks for.
    Parsed {
        /// Its id.
        id: RequestId,
        /// The model it is sent to (see [`super::bounded_name`]).
        model: Arc<str>,
        /// Size of the body in bytes.
        size_bytes: u32,
        /// Priority, after its objective.
        priority: i32,
        /// Whether the response is streamed.
        streaming: bool,
    },
    /// Core: what the caller says of itself.
    Labels {
        /// Its objective.
        objective: Option<Arc<str>>,
        /// Its flow.
        fairness_id: Option<Arc<str>>,
    },
    /// Driver, before [`GatewayFact::Parsed`]: spans say what Langfuse wants to know.
    Langfuse,
    /// Driver: ids of user and session, only where the operator allows them.
    Identity {
        /// The user.
        user: Option<Arc<str>>,
        /// The session.
        session: Option<Arc<str>>,
    },
    /// Core: the pool.
    Pool {
        /// Its name.
        name: Arc<str>,
        /// Its namespace.
        namespace: Arc<str>,
    },
    /// Driver: how soon the caller wants it.
    Objectives {
        /// Time to first token.
        ttft: Option<Dur>,
        /// Time per output token after the first.
        tpot: Option<Dur>,
    },
    /// Core: the director starts; once more for every retry.
    Directing {
        /// Whether requests may wait in the gateway.
        flow_control: bool,
    },
    /// Core: the request is in the gateway's queue, or found no room there.
    Enqueued {
        /// Its flow.
        flow: Arc<str>,
        /// Requests of its flow that wait already; `None` if there was no room.
        position: Option<u32>,
        /// All requests that wait already.
        size: u32,
        /// How long it may wait; `None` is for ever.
        ttl: Option<Dur>,
    },
    /// Core: the request is out of the queue.
    Dequeued {
        /// How long it waited.
        waited: Dur,
        /// How flows share.
        fairness: FairnessPolicy,
        /// The order inside the flow.
        ordering: OrderingPolicy,
        /// Why it left.
        result: Dequeued,
        /// What held it last, if anything did.
        hold: Option<Hold>,
    },
    /// Core: what admission saw.
    Admission {
        /// Saturation of the pool, 1 is full.
        saturation: f64,
        /// Endpoints in the pool.
        candidates: u32,
    },
    /// Core: the index of KV events was asked.
    KvScored(Box<KvScored>),
    /// Driver: a kv-cache-manager was asked, before the director starts.
    KvAsked {
        /// When.
        started: Time,
        /// Its address.
        address: Arc<str>,
        /// Its port.
        port: u16,
        /// The HTTP status of its answer.
        status: Option<u16>,
        /// Why it did not answer.
        failure: Option<Failure>,
    },
    /// Core: a profile starts.
    Scheduling {
        /// The profile.
        profile: Arc<str>,
        /// Candidates before filtering.
        candidates: u32,
    },
    /// Core, finest detail: what is known of the candidates of the profile that starts.
    Known(Box<[Known]>),
    /// Core, finest detail: which endpoints the filter took out that is done next.
    Removed(Box<[Arc<str>]>),
    /// Core, finest detail: what the scorer that is done next gave every candidate.
    Given(Box<[Given]>),
    /// Driver, virtual time and finest detail: what the time to first token would have been on each endpoint.
    Hindsight(Box<[Hindsight]>),
    /// Core: a filter is done.
    Filtered {
        /// The filter.
        plugin: Arc<PluginName>,
        /// Candidates before it.
        before: u32,
        /// Candidates after it.
        after: u32,
    },
    /// Core: a scorer is done.
    Scored {
        /// The scorer.
        plugin: Arc<PluginName>,
        /// Its weight.
        weight: f64,
        /// The lowest score.
        min: f64,
        /// The highest score.
        max: f64,
        /// The mean score.
        avg: f64,
    },
    /// Core: one of the best endpoints, best first, before the pick.
    Top {
        /// The endpoint.
        endpoint: Arc<str>,
        /// Its weighted score.
        score: f64,
    },
    /// Core: the picker is done.
    Picked {
        /// The picker.
        plugin: Arc<PluginName>,
        /// The chosen endpoint.
        endpoint: Arc<str>,
        /// Place of the chosen candidate.
        index: u32,
        /// Others that were as good.
        ties: u32,
    },
    /// Core: the profile is done.
    Scheduled {
        /// How clear the choice was; `None` if no candidate was left.
        choice: Option<Choice>,
        /// Age of the oldest metrics used.
        metrics_age: Option<Dur>,
        /// Candidates after filtering.
        candidates: u32,
    },
    /// Core: it is decided whether another endpoint prefills.
    PdDecided {
        /// When deciding began.
        started: Time,
        /// What was decided.
        verdict: Verdict,
    },
    /// Core, before [`GatewayFact::Directed`]: another endpoint is to prefill.
    PrefillAt {
        /// Its address.
        address: Arc<str>,
        /// Its port.
        port: u16,
    },
    /// Core: an endpoint is chosen.
    Directed {
        /// Its name.
        endpoint: Arc<str>,
        /// Its address.
        address: Arc<str>,
        /// The name of the endpoint that is to prefill.
        prefill: Option<Arc<str>>,
    },
    /// Core: the request is refused.
    Refused(Rejection),
    /// Core: another endpoint is tried.
    Retry {
        /// The new attempt, from 1.
        attempt: u32,
        /// The endpoint that failed.
        failed: Arc<str>,
    },
    /// Core: another endpoint is tried beside the first.
    Hedge {
        /// The new attempt.
        attempt: u32,
        /// The endpoint that has not answered.
        slow: Arc<str>,
    },
    /// Core: no other endpoint is tried because the retry budget is spent.
    RetryRefused,
    /// Driver: the trace begins here; the caller's own is another one. Boxed, as it is rare and large.
    LinkedFrom(Box<LinkTo>),
    /// Driver: before connecting to an endpoint.
    AttemptStarted {
        /// The attempt, from 0.
        attempt: u32,
        /// The endpoint.
        endpoint: Arc<str>,
        /// Its address.
        address: Arc<str>,
        /// Its port.
        port: u16,
    },
    /// Driver: the head of the engine's response was read.
    ResponseHead {
        /// Its HTTP status.
        status: u16,
    },
    /// Driver: the last byte of an engine's response was read, or the attempt failed.
    AttemptEnded {
        /// The attempt, from 0.
        attempt: u32,
        /// Why it failed.
        failure: Option<Failure>,
    },
    /// Driver: the first token of a streamed response was passed on.
    FirstToken,
    /// Driver: what went through.
    Streamed {
        /// Chunks: server-sent events, or body frames without streaming.
        chunks: u32,
        /// Body bytes.
        bytes: u64,
        /// Whether the response came to its end.
        complete: bool,
    },
    /// Driver: token counts that the engine reported.
    Usage {
        /// Tokens of the prompt.
        input: u32,
        /// Tokens generated.
        output: u32,
    },
    /// Driver: why the engine stopped.
    FinishReason(&'static str),
    /// Driver: the model that answered (see [`super::bounded_name`]).
    ResponseModel(Arc<str>),
    /// Driver: why the trace is kept, where no ratio and no caller decided.
    Kept(Reason),
    /// Driver: the caller went away.
    ClientDisconnected,
    /// Driver: the response is over; nothing follows.
    Ended {
        /// The HTTP status sent to the caller; `None` if none was.
        status: Option<u16>,
        /// Why the response was not delivered in full.
        failure: Option<Failure>,
    },
}
