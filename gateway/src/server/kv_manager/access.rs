//! The access log of a kv-cache-manager: one line for each question and each dispatch that it is told, where it is asked for.

use std::sync::Arc;

use http::{HeaderMap, StatusCode};
use shared::ids::RequestId;
use shared::time::Time;
use shared::trace::Started;

use super::State;
use crate::server::reply::REQUEST_ID;
use crate::spans::bounded_name;

/// What a line says of a request: ids, names and numbers, never a block.
pub(super) struct Line<'r> {
    route: &'static str,
    received: Time,
    started: Option<&'r Started>,
    /// The model that was asked for.
    pub(super) model: Option<Arc<str>>,
    /// The endpoint that a dispatch went to, if it is one of the manager's.
    pub(super) endpoint: Option<Arc<str>>,
    /// How many blocks the request names.
    pub(super) blocks: Option<usize>,
    /// How many of these, from the first on, anybody holds.
    pub(super) found: Option<u32>,
}

impl<'r> Line<'r> {
    pub(super) const fn new(route: &'static str, received: Time, started: Option<&'r Started>) -> Line<'r> {
        Line { route, received, started, model: None, endpoint: None, blocks: None, found: None }
    }
}

impl State {
    /// Writes the line of a request that is answered with `status`.
    pub(super) fn log(&self, line: &Line<'_>, headers: &HeaderMap, status: StatusCode) {
        if !self.access_log {
            return;
        }
        let context = line.started.map(|s| &s.context);
        let id = headers.get(&REQUEST_ID).and_then(|v| Some(RequestId::sanitise(v.to_str().ok()?)));
        let model = line.model.as_ref().map(bounded_name);
        tracing::info!(
            target: "access",
            trace_id = context.map(|c| tracing::field::display(c.trace_id)),
            span_id = context.map(|c| tracing::field::display(c.span_id)),
            sampled = context.map(|c| c.sampled),
            request_id = id.as_ref().map(RequestId::as_str),
            route = line.route,
            status = u64::from(status.as_u16()),
            model = model.as_deref(),
            endpoint = line.endpoint.as_deref(),
            blocks = line.blocks.map(|n| n as u64),
            blocks_found = line.found.map(u64::from),
            duration_ms = self.clock.now().since(line.received).as_millis_f64(),
            "request"
        );
    }
}
