//! A set of spans with the resources they belong to: what a file holds and what checks look at.

use crate::ids::{InstanceId, SpanId, TraceId};
use crate::time::Anchor;
use crate::trace::resource::Resource;
use crate::trace::span::Span;

/// Spans of one or many traces.
#[derive(Clone, Debug, PartialEq)]
pub struct TraceSet {
    /// The service instances; a span's [`InstanceId`] is an index into this.
    pub resources: Vec<Resource>,
    /// The spans, in the order in which they were exported.
    pub spans: Vec<Span>,
    /// Where the spans' time zero lies on the wall clock.
    pub anchor: Anchor,
    /// Spans whose status was `Ok`, which our own code never sets; [`Span`] shows them as unset.
    pub ok_statuses: Vec<(TraceId, SpanId)>,
    /// Spans whose flags say that their trace is not sampled, which our own code never writes.
    pub unsampled: Vec<(TraceId, SpanId)>,
    /// Whether spans have flags, which say whether a parent is remote. Some senders and backends leave them out.
    pub flags_known: bool,
    /// Whether the last line of the file was cut off and left out: its writer was killed or the disk full.
    pub truncated: bool,
}

impl TraceSet {
    /// An empty set.
    pub fn new(anchor: Anchor) -> TraceSet {
        TraceSet {
            resources: Vec::new(),
            spans: Vec::new(),
            anchor,
            ok_statuses: Vec::new(),
            unsampled: Vec::new(),
            flags_known: true,
            truncated: false,
        }
    }

    /// The service instance that emitted `span`.
    pub fn resource(&self, instance: InstanceId) -> Option<&Resource> {
        self.resources.get(usize::from(instance.0))
    }

    /// The service name of `instance`, empty if the set does not have it.
    pub fn service(&self, instance: InstanceId) -> &str {
        self.resource(instance).map_or("", |r| &r.service_name)
    }
}
