//! Facts of traces of any size: a number of spans with a number of attributes each, a quarter of them static text, text that
//! records share, whole numbers and numbers. Knows neither clocks nor paths.

use std::sync::Arc;

use shared::ids::SpanId;
use shared::time::{Dur, Time};
use shared::trace::{Cx, Draft, Ending, Fact, Fold, Form, Inner, Kind};

/// Attributes of one fact of the second kind.
pub(crate) const QUAD: u32 = 4;

/// What is noted of a made-up request.
#[derive(Clone, Debug)]
pub(crate) enum Made {
    /// The next span below the outermost one begins, and the one before ends.
    Span,
    /// Four attributes of the span that began last.
    Attributes {
        /// Text that many records share.
        shared: Arc<str>,
        /// A whole number.
        count: u32,
        /// A number.
        share: f64,
    },
}

/// The facts of a trace of `spans` spans with `attributes` attributes each, a multiple of [`QUAD`].
pub(crate) fn facts(spans: u32, attributes: u32) -> Vec<(Time, Made)> {
    let shared: Arc<str> = "meta-llama/Llama-3.1-8B".into();
    let mut facts = Vec::new();
    for n in 0..spans {
        let at = Time::from_nanos(1_000_000) + Dur::from_micros(u64::from(n));
        // The outermost span has its own attributes and needs no fact to begin.
        if n > 0 {
            facts.push((at, Made::Span));
        }
        for quad in 0..attributes / QUAD {
            let made = Made::Attributes { shared: shared.clone(), count: 100 * n + quad, share: f64::from(n) / 7.0 };
            facts.push((at, made));
        }
    }
    facts
}

impl Fact for Made {
    type Fold<S: Form> = MadeFold<S::Draft>;

    /// The largest trace fills its record to the brim.
    fn is_final(&self) -> bool {
        true
    }
}

/// The outermost span and the one under construction.
pub(crate) struct MadeFold<D> {
    outermost: D,
    inner: Option<D>,
    begun: usize,
    quad: usize,
}

/// Keys of a span's attributes, four for each fact: as long as those of the registry on average.
const KEYS: [[&str; QUAD as usize]; 4] = [
    ["synthetic.strategy.name", "synthetic.model.name", "synthetic.queue.depth", "synthetic.cache.share"],
    ["synthetic.outcome.kind", "synthetic.endpoint.name", "synthetic.token.count", "synthetic.load.score"],
    ["synthetic.filter.name", "synthetic.tenant.name", "synthetic.block.count", "synthetic.batch.share"],
    ["synthetic.reason.kind", "synthetic.adapter.name", "synthetic.retry.count", "synthetic.wait.share"],
];

impl<S: Form> Fold<Made, S> for MadeFold<S::Draft> {
    fn begin(cx: &mut Cx<'_, S>) -> Self {
        MadeFold { outermost: cx.outermost("synthetic request", Kind::Server), inner: None, begun: 0, quad: 0 }
    }

    fn fact(&mut self, cx: &mut Cx<'_, S>, at: Time, fact: &Made) {
        match fact {
            Made::Span => {
                end_inner(cx, self.inner.take(), at);
                let parent: SpanId = self.outermost.id();
                let id = cx.head.inner_id(self.begun);
                self.inner = Some(cx.inner(Inner {
                    name: "synthetic step",
                    kind: Kind::Internal,
                    parent,
                    id,
                    start: at,
                    end: at,
                }));
                (self.begun, self.quad) = (self.begun + 1, 0);
            }
            Made::Attributes { shared, count, share } => {
                let [text, name, number, part] = KEYS[self.quad % KEYS.len()];
                self.quad += 1;
                let span = self.inner.as_mut().unwrap_or(&mut self.outermost);
                span.set(text, "least_loaded").set(name, shared).set(number, *count).set(part, *share);
            }
        }
    }

    fn end(mut self, cx: &mut Cx<'_, S>, ending: &Ending) {
        end_inner(cx, self.inner.take(), ending.closed);
        self.outermost.set_end(ending.closed);
        cx.emit(self.outermost);
    }
}

fn end_inner<S: Form>(cx: &mut Cx<'_, S>, inner: Option<S::Draft>, at: Time) {
    if let Some(mut inner) = inner {
        inner.set_end(at);
        cx.emit(inner);
    }
}
