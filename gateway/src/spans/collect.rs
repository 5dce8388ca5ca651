//! A scrape of an endpoint's metrics, as a trace of its own: no request causes it.

use std::sync::Arc;

use shared::time::Time;
use shared::trace::{Cx, Draft, Ending, Fact, Fold, Form, Kind, Naming};

use crate::core::pool::{EndpointMetrics, ScrapeError};

/// What is recorded of a scrape.
#[derive(Clone, Debug)]
pub struct ScrapeFact {
    /// The endpoint.
    pub endpoint: Arc<str>,
    /// Its address.
    pub address: Arc<str>,
    /// What it answered.
    pub outcome: Result<EndpointMetrics, ScrapeError>,
}

impl Fact for ScrapeFact {
    type Fold<S: Form> = ScrapeFold<S::Draft>;

    fn stands_in(naming: Naming) -> bool {
        naming == Naming::Proposal
    }
}

/// The span under construction.
pub struct ScrapeFold<D>(D);

impl<S: Form> Fold<ScrapeFact, S> for ScrapeFold<S::Draft> {
    fn begin(cx: &mut Cx<'_, S>) -> Self {
        ScrapeFold(cx.outermost("gateway.metrics.collect", Kind::Internal))
    }

    fn fact(&mut self, cx: &mut Cx<'_, S>, at: Time, fact: &ScrapeFact) {
        let span = &mut self.0;
        span.set("gateway.backend.endpoint.name", &fact.endpoint).set("server.address", &fact.address);
        span.set("gateway.metrics.scrape_duration_ms", at.since(cx.head.opened).as_millis_f64());
        let answered = matches!(fact.outcome, Ok(_) | Err(ScrapeError::NoMetrics));
        span.set("gateway.metrics.success", answered);
        match fact.outcome {
            Ok(metrics) => {
                span.set("gateway.metrics.waiting", metrics.waiting).set("gateway.metrics.running", metrics.running);
                span.set("gateway.metrics.kv_usage", metrics.kv_usage);
            }
            Err(error) => {
                if let Some((kind, description)) = error_of(error) {
                    span.fail(kind, description);
                }
            }
        }
    }

    fn end(self, cx: &mut Cx<'_, S>, ending: &Ending) {
        let ScrapeFold(mut span) = self;
        span.set_end(ending.closed);
        if ending.abandoned && !span.failed() {
            span.fail("abandoned", "nobody finished the scrape");
        }
        cx.emit(span);
    }
}

/// `error.type` and description of a scrape that failed.
const fn error_of(error: ScrapeError) -> Option<(&'static str, &'static str)> {
    match error {
        // A server without metrics is used all the same.
        ScrapeError::NoMetrics => None,
        ScrapeError::Unreachable => Some(("connection_failed", "the engine could not be reached")),
        ScrapeError::TimedOut => Some(("timeout", "the engine took too long")),
        ScrapeError::Status(_) => Some(("bad_status", "the engine answered with an error status")),
        ScrapeError::Malformed => Some(("malformed", "the metrics cannot be read")),
    }
}
