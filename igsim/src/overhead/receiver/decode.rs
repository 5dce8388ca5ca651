//! What was received, read back: how many spans, and whether traces are whole.
//!
//! Decoding is done by `opentelemetry-proto`, which shares no code with the encoders under test. Knows ids and parents only:
//! what spans say is looked at by the checks of trace files.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{self, Read};

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use serde::{Deserialize, Serialize};

use super::spool::Spool;

/// The largest body behind its compression.
const MAX_PLAIN: u64 = 256 << 20;

/// What was received since the last time it was asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decoded {
    /// By mark; marks in which nothing came are left out.
    pub marks: BTreeMap<u32, Marked>,
}

/// What came in one interval. A trace counts where its first span came, with everything that came later.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marked {
    /// Spans, as often as they came.
    pub spans: u64,
    /// Spans that had not come before: fewer than `spans` if something was sent twice.
    pub distinct: u64,
    /// Traces.
    pub traces: u64,
    /// Of these, traces without exactly one root or with a span whose parent is missing.
    pub incomplete: u64,
    /// How many traces have how many spans.
    pub spans_per_trace: BTreeMap<u32, u64>,
    /// Spans without a valid trace or span id.
    pub invalid: u64,
    /// Bodies that could not be decoded.
    pub malformed: u64,
}

impl Decoded {
    /// All marks together.
    pub fn total(&self) -> Marked {
        let mut total = Marked::default();
        for marked in self.marks.values() {
            total.add(marked);
        }
        total
    }
}

impl Marked {
    fn add(&mut self, other: &Marked) {
        let Marked { spans, distinct, traces, incomplete, spans_per_trace, invalid, malformed } = other;
        self.spans += spans;
        self.distinct += distinct;
        self.traces += traces;
        self.incomplete += incomplete;
        self.invalid += invalid;
        self.malformed += malformed;
        for (spans, traces) in spans_per_trace {
            *self.spans_per_trace.entry(*spans).or_default() += traces;
        }
    }
}

/// A trace so far: 16 bytes a span, which is what a run needs in memory.
#[derive(Debug)]
struct Trace {
    /// Where its first span came.
    mark: u32,
    /// Ids and parents; a parent of 0 is none.
    spans: Vec<(u64, u64)>,
}

/// Decodes all of it.
pub(super) fn decode(spool: Spool) -> io::Result<Decoded> {
    let (mut decoded, mut traces) = (Decoded::default(), HashMap::new());
    spool.each(|mark, gzip, body| {
        let marked = decoded.marks.entry(mark).or_default();
        match request(gzip, body) {
            Some(request) => {
                let groups = request.resource_spans.into_iter().flat_map(|r| r.scope_spans);
                for span in groups.flat_map(|s| s.spans) {
                    marked.spans += 1;
                    marked.invalid += u64::from(add(&mut traces, mark, &span).is_none());
                }
            }
            None => marked.malformed += 1,
        }
    })?;
    // A trace of a mark is added to that mark: the order in which the map gives them shows nowhere.
    for (_, trace) in traces {
        decoded.marks.entry(trace.mark).or_default().count(trace);
    }
    Ok(decoded)
}

fn request(gzip: bool, body: &[u8]) -> Option<ExportTraceServiceRequest> {
    let plain = if gzip {
        let mut plain = Vec::new();
        flate2::read::GzDecoder::new(body).take(MAX_PLAIN).read_to_end(&mut plain).ok()?;
        Cow::Owned(plain)
    } else {
        Cow::Borrowed(body)
    };
    ExportTraceServiceRequest::decode(&plain[..]).ok()
}

/// Adds a span to its trace; `None` if it has no valid ids (OTLP: 16 and 8 bytes, not all zero; a parent may be empty).
fn add(traces: &mut HashMap<u128, Trace>, mark: u32, span: &Span) -> Option<()> {
    let trace = u128::from_be_bytes(span.trace_id.as_slice().try_into().ok()?);
    let id = u64::from_be_bytes(span.span_id.as_slice().try_into().ok()?);
    let parent = match span.parent_span_id.as_slice() {
        [] => 0,
        bytes => u64::from_be_bytes(bytes.try_into().ok()?),
    };
    if trace == 0 || id == 0 {
        return None;
    }
    traces.entry(trace).or_insert_with(|| Trace { mark, spans: Vec::new() }).spans.push((id, parent));
    Some(())
}

impl Marked {
    fn count(&mut self, trace: Trace) {
        let mut spans = trace.spans;
        spans.sort_unstable();
        spans.dedup_by_key(|(id, _)| *id);
        let ids: HashSet<u64> = spans.iter().map(|(id, _)| *id).collect();
        let roots = spans.iter().filter(|(_, parent)| *parent == 0).count();
        let orphans = spans.iter().filter(|(_, parent)| *parent != 0 && !ids.contains(parent)).count();
        self.distinct += spans.len() as u64;
        self.traces += 1;
        self.incomplete += u64::from(roots != 1 || orphans != 0);
        *self.spans_per_trace.entry(u32::try_from(spans.len()).unwrap_or(u32::MAX)).or_default() += 1;
    }
}

#[cfg(test)]
mod tests {
    use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans};

    use super::super::spool::Limits;
    use super::*;

    /// A body of spans (trace, id, parent).
    fn body(spans: &[(u128, u64, u64)]) -> Vec<u8> {
        let spans = spans.iter().map(|(trace, id, parent)| Span {
            trace_id: trace.to_be_bytes().to_vec(),
            span_id: id.to_be_bytes().to_vec(),
            parent_span_id: if *parent == 0 { Vec::new() } else { parent.to_be_bytes().to_vec() },
            ..Span::default()
        });
        let scope = ScopeSpans { spans: spans.collect(), ..ScopeSpans::default() };
        let resource = ResourceSpans { scope_spans: vec![scope], ..ResourceSpans::default() };
        ExportTraceServiceRequest { resource_spans: vec![resource] }.encode_to_vec()
    }

    fn decoded(bodies: &[(u32, Vec<u8>)]) -> BTreeMap<u32, Marked> {
        let mut spool = Spool::new(Limits::default());
        for (mark, body) in bodies {
            spool.push(*mark, false, body).unwrap();
        }
        decode(spool).unwrap().marks
    }

    /// (spans, distinct, traces, incomplete) of mark 0.
    fn check(spans: &[(u128, u64, u64)], expect: (u64, u64, u64, u64)) {
        let m = &decoded(&[(0, body(spans))])[&0];
        assert_eq!((m.spans, m.distinct, m.traces, m.incomplete), expect, "{spans:?}");
        assert_eq!((m.invalid, m.malformed), (0, 0));
    }

    #[test]
    fn a_trace_is_whole_with_one_root_and_every_parent() {
        check(&[(1, 1, 0), (1, 2, 1), (1, 3, 2)], (3, 3, 1, 0));
        check(&[(1, 3, 2), (1, 2, 1), (1, 1, 0)], (3, 3, 1, 0));
        // A parent is missing; it is there in another trace.
        check(&[(1, 1, 0), (1, 3, 2), (2, 2, 0)], (3, 3, 2, 1));
        // No root, two roots.
        check(&[(1, 2, 1)], (1, 1, 1, 1));
        check(&[(1, 1, 0), (1, 2, 0)], (2, 2, 1, 1));
        // Sent twice is there once.
        check(&[(1, 1, 0), (1, 2, 1), (1, 2, 1)], (3, 2, 1, 0));
    }

    #[test]
    fn what_is_no_otlp_is_counted() {
        let invalid = body(&[(0, 1, 0), (1, 0, 0), (1, 1, 0)]);
        let marks = decoded(&[(0, invalid), (0, vec![0xff; 9]), (3, Vec::new())]);
        assert_eq!((marks[&0].spans, marks[&0].invalid, marks[&0].malformed, marks[&0].traces), (3, 2, 1, 1));
        assert_eq!(marks[&3], Marked::default(), "an empty request is a request without spans");
    }

    #[test]
    fn a_trace_belongs_where_it_began_and_spans_where_they_came() {
        let bodies = [(0, body(&[(1, 1, 0), (2, 9, 8)])), (1, body(&[(1, 2, 1), (3, 4, 0)]))];
        let marks = decoded(&bodies);
        let short = |m: &Marked| (m.spans, m.distinct, m.traces, m.incomplete);
        assert_eq!((short(&marks[&0]), short(&marks[&1])), ((2, 3, 2, 1), (2, 1, 1, 0)));
        assert_eq!(marks[&0].spans_per_trace, BTreeMap::from([(1, 1), (2, 1)]));
        let total = Decoded { marks }.total();
        assert_eq!((short(&total), total.spans_per_trace), ((4, 4, 3, 1), BTreeMap::from([(1, 2), (2, 1)])));
    }
}
