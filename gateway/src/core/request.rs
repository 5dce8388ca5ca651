//! What the gateway's core is told of a request, and what it may answer. No prompt, no body: lengths and hashes only.

use std::sync::Arc;

use shared::ids::RequestId;
use shared::time::Dur;
use shared::trace::Trail;

use crate::core::kv_index::KvPrompt;
use crate::core::pool::EndpointId;
use crate::spans::GatewayFact;

/// Names an open request; chosen by the driver, unique while the request is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestKey(pub u64);

/// A session, by the hash of its id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionKey(pub u64);

/// A parsed request.
#[derive(Debug)]
pub struct RequestInfo {
    /// Names it while it is open.
    pub key: RequestKey,
    /// Its id in spans and logs.
    pub id: RequestId,
    /// The model asked for.
    pub model: Arc<str>,
    /// Whether the response is streamed.
    pub streaming: bool,
    /// Size of the body in bytes.
    pub size_bytes: u32,
    /// Priority; negative means sheddable. A configured objective overrides it.
    pub priority: i32,
    /// The objective named by the caller.
    pub objective: Option<Arc<str>>,
    /// The flow the caller belongs to.
    pub fairness_id: Option<Arc<str>>,
    /// The session it belongs to.
    pub session: Option<SessionKey>,
    /// The endpoint that its session token names, as `namespace/name`.
    pub session_endpoint: Option<Arc<str>>,
    /// The endpoints its caller allows (`test-epp-endpoint-selection`), where a filter looks at that.
    pub selection: Option<Arc<str>>,
    /// Length of the prompt in tokens, four bytes each.
    pub prompt_tokens_estimate: u32,
    /// The most tokens the caller wants, if it says so.
    pub max_output_tokens: Option<u32>,
    /// How soon its caller wants it.
    pub deadlines: Deadlines,
    /// Hashes of the prompt's blocks (see [`crate::core::prefix_index`]).
    pub prefix: Vec<u64>,
    /// What the index of KV events is asked for the prompt.
    pub kv: KvPrompt,
    /// Where its facts are recorded.
    pub trail: Trail<GatewayFact>,
}

/// How soon a caller wants its request, as far as it says so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Deadlines {
    /// Objective for the time to first token (`x-llm-d-slo-ttft-ms`).
    pub ttft: Option<Dur>,
    /// Objective for the time per output token after the first (`x-llm-d-slo-tpot-ms`).
    pub tpot: Option<Dur>,
    /// How long it may wait in the gateway's queue (`x-llm-d-inference-ttl`); never longer than the gateway allows.
    pub ttl: Option<Dur>,
}

/// Why a request is not sent to any endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rejection {
    /// The pool is saturated and the request is sheddable.
    Saturated,
    /// The gateway's queue has no room for it.
    QueueFull,
    /// It waited as long as it may, and the pool had endpoints.
    TtlExpired,
    /// It waited as long as it may for a pool without endpoints.
    NoEndpointsInTime,
    /// Its caller went away while it waited.
    Cancelled,
    /// No endpoint is left after filtering.
    NoEndpoints,
    /// No endpoint serves the model.
    UnknownModel,
    /// Every endpoint that was tried could not be reached.
    Unreachable,
    /// The gateway is draining.
    ShuttingDown,
}

impl Rejection {
    /// The HTTP status of the answer.
    pub const fn status(self) -> u16 {
        match self {
            Rejection::Saturated | Rejection::QueueFull | Rejection::TtlExpired => 429,
            Rejection::NoEndpoints | Rejection::NoEndpointsInTime | Rejection::Cancelled | Rejection::ShuttingDown => {
                503
            }
            Rejection::UnknownModel => 404,
            Rejection::Unreachable => 502,
        }
    }

    /// llm-d's name for it, the value of `x-llm-d-request-dropped-reason`; `None` for what llm-d does not call a drop.
    pub const fn dropped(self) -> Option<&'static str> {
        match self {
            Rejection::Saturated
            | Rejection::QueueFull
            | Rejection::TtlExpired
            | Rejection::Cancelled
            | Rejection::NoEndpoints
            | Rejection::NoEndpointsInTime
            | Rejection::ShuttingDown => Some(self.reason()),
            Rejection::UnknownModel | Rejection::Unreachable => None,
        }
    }

    /// The value of `gateway.admission.reason`.
    pub const fn reason(self) -> &'static str {
        match self {
            Rejection::Saturated | Rejection::QueueFull => "rejected-saturated",
            Rejection::TtlExpired => "rejected-ttl-expired",
            Rejection::Cancelled => "rejected-context-cancelled",
            Rejection::NoEndpoints | Rejection::NoEndpointsInTime => "rejected-no-endpoints",
            Rejection::UnknownModel => "rejected-unknown-model",
            Rejection::Unreachable => "rejected-unreachable",
            Rejection::ShuttingDown => "rejected-shutting-down",
        }
    }
}

/// What the core wants done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// Send the request to an endpoint.
    Dispatch {
        /// The request.
        key: RequestKey,
        /// Where to.
        endpoint: EndpointId,
        /// The endpoint that is to prefill it, if that is another one's task.
        prefill: Option<EndpointId>,
        /// 0 for the first attempt.
        attempt: u32,
        /// How long it may take to answer before [`crate::core::gateway::Input::Late`] is of use; `None` is for ever.
        hedge_after: Option<Dur>,
    },
    /// The request stays where it is.
    Stay {
        /// The request.
        key: RequestKey,
    },
    /// Answer the request with an error; it is no longer open.
    Reject {
        /// The request.
        key: RequestKey,
        /// Why.
        rejection: Rejection,
    },
}

impl Output {
    /// The request it is about.
    pub const fn key(&self) -> RequestKey {
        match self {
            Output::Dispatch { key, .. } | Output::Stay { key } | Output::Reject { key, .. } => *key,
        }
    }
}
