//! Requests for a collector, each of a bounded number of spans, grouped by service instance.
//!
//! The spans of a record are written at the end of its instance's buffer; a request that fills up in the middle of a record takes
//! the first of its spans and leaves the rest to the next request. The spans of one request share one copy of the resource and
//! scope of each instance.

use std::sync::Arc;

use bytes::Bytes;

use crate::ids::InstanceId;
use crate::time::Anchor;
use crate::trace::otlp_bytes::Encoder;
use crate::trace::otlp_json::SCOPE_NAME;
use crate::trace::record::Closed;
use crate::trace::resource::Resource;

use super::wire;

/// `ExportTraceServiceRequest.resource_spans`
const RESOURCE_SPANS: u8 = 0x0a;
/// `ResourceSpans.resource`
const RESOURCE: u8 = 0x0a;
/// `ResourceSpans.scope_spans`
const SCOPE_SPANS: u8 = 0x12;
/// `ScopeSpans.scope`
const SCOPE: u8 = 0x0a;
/// `Resource.attributes`
const ATTRIBUTE: u8 = 0x0a;

/// An `ExportTraceServiceRequest`, ready to be sent.
#[derive(Clone, Debug)]
pub struct Encoded {
    /// The message.
    pub bytes: Bytes,
    /// How many spans it holds.
    pub spans: usize,
}

/// Collects the spans of records into requests.
#[derive(Debug)]
pub struct Requests {
    encoder: Encoder,
    /// `ScopeSpans.scope`, the same for every span.
    scope: Vec<u8>,
    /// `ResourceSpans.resource` of each instance that was in a request; empty until then.
    resources: Vec<Vec<u8>>,
    /// Which group each instance has in the request under way.
    group_of: Vec<Option<usize>>,
    /// The first `used` belong to the request under way; the others keep their buffers for later ones.
    groups: Vec<Group>,
    used: usize,
    /// The group of the last record.
    last: usize,
    /// How long that group was before the record under way.
    before: Option<usize>,
    spans: usize,
}

#[derive(Debug, Default)]
struct Group {
    instance: usize,
    /// `ScopeSpans.spans`
    spans: Vec<u8>,
}

impl Requests {
    /// An empty request; the records' time zero is at `anchor`.
    pub fn new(anchor: Anchor) -> Requests {
        let mut scope = Vec::new();
        wire::message(&mut scope, SCOPE, |out| {
            wire::text(out, 0x0a, SCOPE_NAME);
            wire::text(out, 0x12, env!("CARGO_PKG_VERSION"));
        });
        Requests {
            encoder: Encoder::new(anchor),
            scope,
            resources: Vec::new(),
            group_of: Vec::new(),
            groups: Vec::new(),
            used: 0,
            last: 0,
            before: None,
            spans: 0,
        }
    }

    /// Spans collected and not yet taken.
    pub fn spans(&self) -> usize {
        self.spans
    }

    /// Encodes a record and returns its number of spans. If folding panics, [`Requests::roll_back`] takes back what it wrote.
    pub fn add(&mut self, record: &dyn Closed) -> usize {
        self.last = self.group(record.head().instance);
        let spans = &mut self.groups[self.last].spans;
        self.before = Some(spans.len());
        self.encoder.bounds.clear();
        self.encoder.bounds.push(spans.len());
        std::mem::swap(&mut self.encoder.out, spans);
        record.encode(&mut self.encoder);
        std::mem::swap(&mut self.encoder.out, &mut self.groups[self.last].spans);
        self.before = None;
        let added = self.encoder.bounds.len() - 1;
        self.spans += added;
        added
    }

    /// Takes back what a record wrote whose folding panicked; else does nothing.
    pub fn roll_back(&mut self) {
        if let Some(before) = self.before.take() {
            let spans = &mut self.groups[self.last].spans;
            std::mem::swap(&mut self.encoder.out, spans);
            spans.truncate(before);
            self.encoder.bounds.clear();
        }
    }

    /// Takes the oldest `at_most` spans as a request, at least all but those of the last record; `resources` is indexed by
    /// instance id.
    pub fn take(&mut self, at_most: usize, resources: &[Arc<Resource>]) -> Encoded {
        let (rest, kept) = self.split_off(at_most);
        let instance = self.groups.get(self.last).map(|g| g.instance);
        let spans = self.spans - kept;
        let bytes = self.assemble(resources);
        for group in &mut self.groups[..self.used] {
            self.group_of[group.instance] = None;
            group.spans.clear();
        }
        (self.used, self.last, self.spans) = (0, 0, kept);
        if let Some(instance) = instance.filter(|_| kept > 0) {
            self.last = self.group_at(instance);
            self.groups[self.last].spans.extend_from_slice(&rest);
        }
        Encoded { bytes, spans }
    }

    /// Cuts the spans beyond `at_most`, which all belong to the last record, from its group. Returns them and their number.
    fn split_off(&mut self, at_most: usize) -> (Vec<u8>, usize) {
        let bounds = &mut self.encoder.bounds;
        let of_record = bounds.len().saturating_sub(1);
        let kept = self.spans.saturating_sub(at_most).min(of_record);
        if kept == 0 {
            bounds.clear();
            return (Vec::new(), 0);
        }
        let first = bounds[of_record - kept];
        bounds.drain(..of_record - kept);
        bounds.iter_mut().for_each(|bound| *bound -= first);
        (self.groups[self.last].spans.split_off(first), kept)
    }

    fn group(&mut self, instance: InstanceId) -> usize {
        self.group_at(usize::from(instance.0))
    }

    fn group_at(&mut self, instance: usize) -> usize {
        if self.group_of.len() <= instance {
            self.group_of.resize(instance + 1, None);
        }
        *self.group_of[instance].get_or_insert_with(|| {
            if self.used == self.groups.len() {
                self.groups.push(Group::default());
            }
            self.groups[self.used].instance = instance;
            self.used += 1;
            self.used - 1
        })
    }

    fn assemble(&mut self, resources: &[Arc<Resource>]) -> Bytes {
        for group in &self.groups[..self.used] {
            encode_resource(&mut self.resources, group.instance, resources);
        }
        let filled = || self.groups[..self.used].iter().filter(|g| !g.spans.is_empty());
        let sizes = |group: &Group| {
            let scope_spans = self.scope.len() + group.spans.len();
            let resource = self.resources[group.instance].len();
            (scope_spans, resource + wire::prefix_len(scope_spans) + scope_spans)
        };
        let total = filled().map(|g| sizes(g).1).map(|len| wire::prefix_len(len) + len).sum();
        let mut out = Vec::with_capacity(total);
        for group in filled() {
            let (scope_spans, resource_spans) = sizes(group);
            wire::prefix(&mut out, RESOURCE_SPANS, resource_spans);
            out.extend_from_slice(&self.resources[group.instance]);
            wire::prefix(&mut out, SCOPE_SPANS, scope_spans);
            out.extend_from_slice(&self.scope);
            out.extend_from_slice(&group.spans);
        }
        Bytes::from(out)
    }
}

fn encode_resource(encoded: &mut Vec<Vec<u8>>, instance: usize, resources: &[Arc<Resource>]) {
    if encoded.len() <= instance {
        encoded.resize_with(instance + 1, Vec::new);
    }
    if encoded[instance].is_empty() {
        let attributes = resources.get(instance).map(|r| r.attributes()).unwrap_or_default();
        wire::message(&mut encoded[instance], RESOURCE, |out| {
            attributes.iter().for_each(|(key, value)| wire::owned_attribute(out, ATTRIBUTE, key, value));
        });
    }
}
