//! The rules that traces are held against: what each is called in reports, and what usually breaks it.

use serde::Serialize;

/// A rule that a trace breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rule {
    /// A trace has exactly one root, or one local root (a server span whose remote parent is not in the set).
    OneRoot,
    /// A parent is in the set, unless it is a local root's.
    Orphan,
    /// No span is its own ancestor.
    Cycle,
    /// A span id occurs once in its trace.
    UniqueId,
    /// A span ends no earlier than it starts, its events lie within.
    Times,
    /// A child lies within its parent: exactly in one service instance, within the tolerance across; `late` spans are exempt.
    Nesting,
    /// A child does not start after its parent of the same service instance has ended.
    EndedParent,
    /// A child of another service instance that is no longer than its parent does not stick out on one side: their clocks agree.
    ClockSkew,
    /// Success is unset, never `Ok`.
    StatusOk,
    /// A failed span has an `error.type`.
    ErrorType,
    /// No key occurs twice.
    DuplicateKey,
    /// The span's name is registered.
    Name,
    /// The span has a registered kind.
    KindOfSpan,
    /// The span hangs on a registered parent.
    Parent,
    /// The attribute is registered, for this span.
    Attribute,
    /// The attribute has its registered type.
    AttributeType,
    /// A required attribute is present.
    Required,
    /// The event is registered, for this span.
    Event,
    /// A call that was answered has the callee's server span below it.
    ClientWithoutServer,
    /// Every service on the way of a request records it.
    Untraced,
    /// A service that others call starts no trace of its own.
    Severed,
    /// A callee hangs below its caller, not beside it.
    Sibling,
    /// A request that waited in the gateway goes on in the same trace.
    LostInQueue,
    /// All services of a trace decide alike about sampling.
    Sampling,
    /// No canary of content is anywhere in telemetry.
    Content,
    /// A service has a name of its own.
    ServiceName,
    /// A server span's parent is in another service.
    LocalServer,
    /// What is done once has one span.
    Repeated,
}

impl Rule {
    /// The rule's name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Rule::OneRoot => "one-root",
            Rule::Orphan => "orphan",
            Rule::Cycle => "cycle",
            Rule::UniqueId => "unique-id",
            Rule::Times => "times",
            Rule::Nesting => "nesting",
            Rule::EndedParent => "ended-parent",
            Rule::ClockSkew => "clock-skew",
            Rule::StatusOk => "status-ok",
            Rule::ErrorType => "error-type",
            Rule::DuplicateKey => "duplicate-key",
            Rule::Name => "name",
            Rule::KindOfSpan => "kind-of-span",
            Rule::Parent => "parent",
            Rule::Attribute => "attribute",
            Rule::AttributeType => "attribute-type",
            Rule::Required => "required",
            Rule::Event => "event",
            Rule::ClientWithoutServer => "client-without-server",
            Rule::Untraced => "untraced",
            Rule::Severed => "severed",
            Rule::Sibling => "sibling",
            Rule::LostInQueue => "lost-in-queue",
            Rule::Sampling => "sampling",
            Rule::Content => "content",
            Rule::ServiceName => "service-name",
            Rule::LocalServer => "local-server",
            Rule::Repeated => "repeated",
        }
    }

    /// What usually breaks it, in one line.
    pub const fn help(self) -> &'static str {
        match self {
            Rule::OneRoot => "a service on the way started over, or two callers share a trace id",
            Rule::Orphan => {
                "the parent's record was dropped, is not exported yet, or its service does not export at all"
            }
            Rule::Cycle => "ids were rewritten on the way; no tracer makes this",
            Rule::UniqueId => {
                "a batch was stored twice (an exporter that retried, or two of them), or ids are not random"
            }
            Rule::Times => "the span was ended with an event or a start taken from another clock",
            Rule::Nesting => "the work went on after its caller had ended, and the span does not say that it is late",
            Rule::EndedParent => {
                "the context of a finished span was handed to the next stage: start both below the same parent"
            }
            Rule::ClockSkew => "the two hosts' clocks differ: synchronise them, or allow for it with --clock-tolerance",
            Rule::StatusOk => "code sets Ok; OpenTelemetry leaves that to the application's owner",
            Rule::ErrorType => "the status was set to Error by hand, without the attribute",
            Rule::DuplicateKey => "an attribute was set twice, which the SDK does not notice",
            Rule::Name | Rule::Event | Rule::Attribute => "it was renamed, or added without its entry in registry/",
            Rule::KindOfSpan => "the span was started without a kind, or with that of its caller",
            Rule::Parent => "the wrong context was handed to the code that started the span",
            Rule::AttributeType => "a number was recorded as text, or the reverse: queries on it match nothing",
            Rule::Required => "the span ended before the value was known, or somebody filters attributes on the way",
            Rule::ClientWithoutServer => "the callee did not get `traceparent`, or does not trace",
            Rule::Untraced => {
                "the service runs without tracing, exports elsewhere, or is not ours (--uninstrumented NAME)"
            }
            Rule::Severed => {
                "a hop in front of it drops `traceparent`: a proxy, a client library, a handler that starts anew"
            }
            Rule::Sibling => "a stale `traceparent` was sent in addition and the receiver took that one",
            Rule::LostInQueue => "the request was taken out of the queue under another context than it was put in with",
            Rule::Sampling => {
                "a hop cleared the sampled flag, a service does not follow its caller's decision, or records were dropped"
            }
            Rule::Content => "a body, header or token reached an attribute, an event, an error text or a log",
            Rule::ServiceName => "OTEL_SERVICE_NAME is not set",
            Rule::LocalServer => {
                "the kind was set to SERVER inside of a service: service graphs count one request twice"
            }
            Rule::Repeated => "two plugins do the same and both record it",
        }
    }
}
