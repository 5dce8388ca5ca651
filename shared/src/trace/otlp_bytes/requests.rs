//! Requests for a collector, each of a bounded number of spans, grouped by service instance.
//!
//! The spans of a record are written at the end of its instance's buffer; a request that fills up in the middle of a record takes
//! the first of its spans and leaves the rest to the next request. The spans of one request share one copy of the resource and
//! scope of each instance.

use std::sync::{Arc, Mutex, PoisonError};

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

/// Room before the spans of a group for what stands before them in a request of one instance: resource, scope, lengths. A larger
/// resource costs a copy of the spans.
const ROOM: usize = 1024;
/// The most buffers that are kept for later requests.
const MOST_BUFFERS: usize = 8;

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
    buffers: Arc<Buffers>,
}

#[derive(Debug, Default)]
struct Group {
    instance: usize,
    /// `ScopeSpans.spans`, behind [`ROOM`] bytes.
    spans: Vec<u8>,
}

impl Group {
    fn encoded(&self) -> &[u8] {
        self.spans.get(ROOM..).unwrap_or_default()
    }
}

/// Buffers of requests that were sent. A hundred kilobytes are more than the allocator keeps at hand: it would take them from the
/// system, and give them back, with every request.
#[derive(Debug, Default)]
struct Buffers(Mutex<Vec<Vec<u8>>>);

impl Buffers {
    /// An empty buffer, behind [`ROOM`] bytes.
    fn take(&self) -> Vec<u8> {
        let mut buffer = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        buffer.clear();
        buffer.resize(ROOM, 0);
        buffer
    }

    fn keep(&self, buffer: Vec<u8>) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < MOST_BUFFERS {
            kept.push(buffer);
        }
    }

    /// The bytes of a buffer from `start` on, which is kept when they are needed no more.
    fn lend(self: &Arc<Self>, buffer: Vec<u8>, start: usize) -> Bytes {
        Bytes::from_owner(Lent { buffer, buffers: Arc::clone(self) }).slice(start..)
    }
}

/// A buffer while its request is sent.
struct Lent {
    buffer: Vec<u8>,
    buffers: Arc<Buffers>,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.buffer
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.buffers.keep(std::mem::take(&mut self.buffer));
    }
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
            buffers: Arc::default(),
        }
    }

    /// Spans collected and not yet taken.
    pub fn spans(&self) -> usize {
        self.spans
    }

    /// Moves the time zero of the records to come: not every service's clock is right.
    pub fn set_anchor(&mut self, anchor: Anchor) {
        self.encoder.anchor = anchor;
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
            group.spans.truncate(ROOM);
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
        bounds.iter_mut().for_each(|bound| *bound = *bound - first + ROOM);
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
            let group = &mut self.groups[self.used];
            group.instance = instance;
            if group.spans.is_empty() {
                group.spans = self.buffers.take();
            }
            self.used += 1;
            self.used - 1
        })
    }

    fn assemble(&mut self, resources: &[Arc<Resource>]) -> Bytes {
        for group in &self.groups[..self.used] {
            encode_resource(&mut self.resources, group.instance, resources);
        }
        let mut filled = (0..self.used).filter(|i| !self.groups[*i].encoded().is_empty());
        match (filled.next(), filled.next()) {
            (None, _) => Bytes::new(),
            (Some(only), None) => self.in_place(only),
            (Some(_), Some(_)) => self.copied(),
        }
    }

    /// What stands before the spans of a group.
    fn head(&self, group: &Group) -> Vec<u8> {
        let (resource, spans) = (&self.resources[group.instance], group.encoded().len());
        let scope_spans = self.scope.len() + spans;
        let mut head = Vec::with_capacity(resource.len() + self.scope.len() + 32);
        wire::prefix(&mut head, RESOURCE_SPANS, resource.len() + wire::prefix_len(scope_spans) + scope_spans);
        head.extend_from_slice(resource);
        wire::prefix(&mut head, SCOPE_SPANS, scope_spans);
        head.extend_from_slice(&self.scope);
        head
    }

    /// The request of a single group: its head is written into the room before its spans.
    fn in_place(&mut self, only: usize) -> Bytes {
        let head = self.head(&self.groups[only]);
        let Some(start) = ROOM.checked_sub(head.len()) else { return self.copied() };
        let mut buffer = std::mem::take(&mut self.groups[only].spans);
        buffer[start..ROOM].copy_from_slice(&head);
        self.buffers.lend(buffer, start)
    }

    fn copied(&self) -> Bytes {
        let mut out = self.buffers.take();
        for group in self.groups[..self.used].iter().filter(|g| !g.encoded().is_empty()) {
            out.extend_from_slice(&self.head(group));
            out.extend_from_slice(group.encoded());
        }
        self.buffers.lend(out, ROOM)
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
