//! The access log: one line for each request that is over, where it is asked for.

use shared::ids::RequestId;
use shared::time::Dur;
use shared::trace::Started;

use crate::server::metrics::Ending;
use crate::spans::{Failure, bounded_name};

/// Writes the line of a request. It holds ids, names and numbers, never content.
pub(crate) fn log(ending: &Ending<'_>, id: &RequestId, started: Option<&Started>, endpoint: Option<&str>) {
    let context = started.map(|s| &s.context);
    let model = (!ending.model.is_empty()).then(|| bounded_name(&ending.model.into()));
    let (usage, first) = (ending.usage, ending.first_token);
    tracing::info!(
        target: "access",
        trace_id = context.map(|c| tracing::field::display(c.trace_id)),
        span_id = context.map(|c| tracing::field::display(c.span_id)),
        sampled = context.map(|c| c.sampled),
        request_id = id.as_str(),
        route = ending.route.template(),
        status = ending.status.map(u64::from),
        error = ending.failure.and_then(Failure::error).map(|(kind, _)| kind),
        model = model.as_deref(),
        endpoint,
        duration_ms = ending.took.as_millis_f64(),
        time_to_first_token_ms = first.map(Dur::as_millis_f64),
        input_tokens = usage.map(|u| u64::from(u.prompt_tokens)),
        output_tokens = usage.map(|u| u64::from(u.completion_tokens)),
        "request"
    );
}
