//! Metrics of the HTTP server, with the names, labels and buckets of prometheus_fastapi_instrumentator as vLLM sets it up
//! (`vllm/entrypoints/serve/instrumentator/metrics.py`): a handler is its route's template, a status its class, what no route matches is
//! the handler `none`, and the pages that machines poll are left out.
//!
//! A request counts when its answer is complete, so the time of a stream includes all of it.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::http::header::CONTENT_LENGTH;
use axum::http::{HeaderMap, Method};
use axum::middleware::Next;
use axum::response::Response;
use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use shared::time::{Dur, Time};

use super::page::{Kind, Page};
use crate::server::App;

/// Handlers that contain one of these are left out.
const EXCLUDED: [&str; 7] =
    ["/metrics", "/health", "/load", "/ping", "/version", "/server_info", shared::trace::verdict::KEEP_PATH];
/// Methods that are told apart; others are not counted, so that a caller cannot make labels.
const METHODS: [Method; 7] =
    [Method::GET, Method::POST, Method::PUT, Method::DELETE, Method::HEAD, Method::OPTIONS, Method::PATCH];

/// Bounds in milliseconds of the histogram without labels, and of the one by handler.
const FINE: [u64; 21] = [
    10, 25, 50, 75, 100, 250, 500, 750, 1000, 1500, 2000, 2500, 3000, 3500, 4000, 4500, 5000, 7500, 10_000, 30_000,
    60_000,
];
const COARSE: [u64; 3] = [100, 500, 1000];

/// What was counted so far.
#[derive(Debug, Default)]
pub struct HttpMetrics(Mutex<Counted>);

#[derive(Debug, Default)]
struct Counted {
    /// By handler, in the order of their first request. There are as many as routes.
    handlers: Vec<Handler>,
    fine: Buckets<22>,
}

#[derive(Debug)]
struct Handler {
    name: String,
    methods: Vec<PerMethod>,
    requests: u64,
    request_bytes: u64,
    response_bytes: u64,
}

#[derive(Debug)]
struct PerMethod {
    method: Method,
    /// By the first digit of the status, 1 to 5.
    statuses: [u64; 5],
    coarse: Buckets<4>,
}

#[derive(Debug)]
struct Buckets<const N: usize> {
    counts: [u64; N],
    sum: Dur,
}

impl<const N: usize> Default for Buckets<N> {
    fn default() -> Self {
        Buckets { counts: [0; N], sum: Dur::ZERO }
    }
}

impl<const N: usize> Buckets<N> {
    fn observe(&mut self, bounds: &[u64], time: Dur) {
        let bucket = bounds.iter().position(|&ms| time <= Dur::from_millis(ms)).unwrap_or(bounds.len());
        self.counts[bucket] += 1;
        self.sum += time;
    }

    fn write(&self, name: &str, bounds: &[u64], labels: &[(&str, &str)], page: &mut Page) {
        let mut below = 0;
        let names = bounds.iter().map(|&ms| format!("{:?}", ms as f64 / 1e3)).chain(["+Inf".to_owned()]);
        for (bound, count) in names.zip(&self.counts) {
            below += count;
            let all: Vec<(&str, &str)> = labels.iter().copied().chain([("le", bound.as_str())]).collect();
            page.bare(name, "_bucket", &all, below as f64);
        }
        page.bare(name, "_count", labels, below as f64);
        page.bare(name, "_sum", labels, self.sum.as_secs_f64());
    }
}

/// A request whose answer is under way.
struct Pending {
    app: Arc<App>,
    started: Time,
    handler: Option<MatchedPath>,
    method: Method,
    request_bytes: u64,
    status: u16,
    response_bytes: u64,
}

impl Drop for Pending {
    fn drop(&mut self) {
        let took = self.app.clock.now().since(self.started);
        let handler = self.handler.as_ref().map_or("none", MatchedPath::as_str);
        self.app.http_metrics.count(handler, self, took);
    }
}

/// Counts a request when its answer has been written, or dropped.
pub(in crate::server) async fn count(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let handler = request.extensions().get::<MatchedPath>().cloned();
    let shown = handler.as_ref().map_or(request.uri().path(), MatchedPath::as_str);
    if is_excluded(shown) || !METHODS.contains(request.method()) {
        return next.run(request).await;
    }
    let mut pending = Pending {
        started: app.clock.now(),
        app,
        handler,
        method: request.method().clone(),
        request_bytes: content_length(request.headers()).unwrap_or(0),
        status: 500,
        response_bytes: 0,
    };
    let (head, body) = next.run(request).await.into_parts();
    pending.status = head.status.as_u16();
    pending.response_bytes = content_length(&head.headers).or_else(|| body.size_hint().exact()).unwrap_or(0);
    Response::from_parts(head, Body::new(Watched { body, _pending: pending }))
}

fn is_excluded(handler: &str) -> bool {
    EXCLUDED.iter().any(|part| handler.contains(part))
}

fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// A body whose end counts the request.
struct Watched {
    body: Body,
    _pending: Pending,
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl HttpMetrics {
    fn lock(&self) -> MutexGuard<'_, Counted> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, handler: &str, done: &Pending, took: Dur) {
        let mut counted = self.lock();
        counted.fine.observe(&FINE, took);
        let h = counted.handler(handler);
        h.requests += 1;
        h.request_bytes += done.request_bytes;
        h.response_bytes += done.response_bytes;
        let per_method = h.method(&done.method);
        let class = usize::from(done.status / 100).clamp(1, 5);
        per_method.statuses[class - 1] += 1;
        per_method.coarse.observe(&COARSE, took);
    }

    /// Writes what was counted. As in Python, what has labels and no sample yet is announced only.
    pub fn write(&self, page: &mut Page) {
        let counted = self.lock();
        let rows = || counted.handlers.iter().flat_map(|h| h.methods.iter().map(move |m| (h.name.as_str(), m)));
        page.bare_head("http_requests_total", Kind::Counter);
        for (handler, m) in rows() {
            for (class, n) in (1..).zip(m.statuses).filter(|(_, n)| *n > 0) {
                let status = format!("{class}xx");
                let labels = [("method", m.method.as_str()), ("status", &status), ("handler", handler)];
                page.bare("http_requests_total", "", &labels, n as f64);
            }
        }
        counted.sizes("http_request_size_bytes", |h| h.request_bytes, page);
        counted.sizes("http_response_size_bytes", |h| h.response_bytes, page);
        page.bare_head("http_request_duration_highr_seconds", Kind::Histogram);
        counted.fine.write("http_request_duration_highr_seconds", &FINE, &[], page);
        page.bare_head("http_request_duration_seconds", Kind::Histogram);
        for (handler, m) in rows() {
            let labels = [("method", m.method.as_str()), ("handler", handler)];
            m.coarse.write("http_request_duration_seconds", &COARSE, &labels, page);
        }
    }
}

impl Counted {
    fn sizes(&self, name: &str, bytes: impl Fn(&Handler) -> u64, page: &mut Page) {
        page.bare_head(name, Kind::Summary);
        for h in &self.handlers {
            page.bare(name, "_count", &[("handler", &h.name)], h.requests as f64);
            page.bare(name, "_sum", &[("handler", &h.name)], bytes(h) as f64);
        }
    }

    fn handler(&mut self, name: &str) -> &mut Handler {
        let at = self.handlers.iter().position(|h| h.name == name).unwrap_or_else(|| {
            let (name, methods) = (name.to_owned(), Vec::new());
            self.handlers.push(Handler { name, methods, requests: 0, request_bytes: 0, response_bytes: 0 });
            self.handlers.len() - 1
        });
        &mut self.handlers[at]
    }
}

impl Handler {
    fn method(&mut self, method: &Method) -> &mut PerMethod {
        let at = self.methods.iter().position(|m| m.method == method).unwrap_or_else(|| {
            self.methods.push(PerMethod { method: method.clone(), statuses: [0; 5], coarse: Buckets::default() });
            self.methods.len() - 1
        });
        &mut self.methods[at]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_machines_poll_are_left_out() {
        for (handler, expect) in [
            ("/metrics", true),
            ("/health", true),
            // As in vLLM, which searches the handler for the pattern.
            ("/v1/load_lora_adapter", true),
            ("/v1/completions", false),
            ("/kv_event_sources", false),
        ] {
            assert_eq!(is_excluded(handler), expect, "{handler}");
        }
    }

    #[test]
    fn bounds_are_inclusive() {
        let mut b = Buckets::<4>::default();
        for ms in [0, 100, 101, 1000, 1001] {
            b.observe(&COARSE, Dur::from_millis(ms));
        }
        assert_eq!((b.counts, b.sum), ([2, 1, 1, 1], Dur::from_millis(2202)));
    }
}
