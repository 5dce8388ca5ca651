//! Requests that are ready to be sent, to a collector: over HTTP or gRPC, with retries.
//!
//! What is retried and when is what the OTLP specification asks for (OTLP/HTTP "Retryable Response Codes" and "OTLP/HTTP
//! Throttling", OTLP/gRPC "Failures"), with the back-off of the SDK's exporter: 0.1 s doubling to 1.6 s, and up to 0.1 s more so
//! that many senders do not come back at once.

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_ENCODING, CONTENT_TYPE, RETRY_AFTER, USER_AGENT};
use http::response::Parts;
use http::{HeaderValue, Request, StatusCode, Uri};
use tokio::time::{sleep, timeout_at};

use crate::rng::mix64;
use crate::time::Dur;
use crate::trace::exporter::Batch;
use crate::trace::exporter::grpc::GrpcClient;
use crate::trace::exporter::otlp::Books;
use crate::trace::exporter::transport::{Connection, HttpSender, MAX_RETRIES, Transport, chain, rejected_spans};
use crate::trace::stats::ExporterCounters;

const FIRST_DELAY: Duration = Duration::from_millis(100);
const MAX_DELAY: Duration = Duration::from_millis(1_600);
const MAX_JITTER_MS: u64 = 100;
/// The longest pause that a collector may ask for.
const MAX_THROTTLE: Duration = Duration::from_secs(30);

/// Sends batches, one at a time.
pub(super) struct Direct {
    sender: Sender,
    books: Books,
}

/// Sends requests, with retries within a time limit.
pub(crate) struct Sender {
    wire: Wire,
    timeout: Dur,
}

enum Wire {
    Http(Box<Http>),
    Grpc(GrpcClient),
}

struct Http {
    sender: HttpSender,
    uri: Uri,
    gzip: bool,
}

/// Why an attempt failed, and whether to try again.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) text: String,
    pub(super) again: Again,
}

/// Whether to try again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Again {
    Never,
    /// After a pause of our own choice.
    Soon,
    /// After a pause that the collector asks for.
    After(Duration),
}

impl Direct {
    /// To be called inside the runtime that will drive the connection.
    pub(super) fn new(transport: &Transport, books: Books) -> Direct {
        Direct { sender: Sender::new(transport, &books.counters), books }
    }

    /// Sends a batch's request, with retries within the timeout; its spans are settled at the end.
    pub(super) async fn export(&self, batch: &Batch) {
        let settle = self.books.open(batch.len);
        match self.sender.send(batch.request.clone()).await {
            Ok(rejected) => settle.done(rejected),
            Err(why) => settle.failed(why),
        }
    }
}

impl Sender {
    /// To be called inside the runtime that will drive the connection.
    pub(crate) fn new(transport: &Transport, counters: &Arc<ExporterCounters>) -> Sender {
        let wire = match transport.connect() {
            Connection::Http(client, uri) => {
                let sender = transport.http_sender(&client, counters);
                Wire::Http(Box::new(Http { sender, uri, gzip: transport.gzip() }))
            }
            Connection::Grpc(channel) => Wire::Grpc(transport.grpc_client(channel, counters)),
        };
        Sender { wire, timeout: transport.timeout() }
    }

    /// Sends a request, with retries within the timeout; returns how many spans or series the collector says it rejected.
    pub(crate) async fn send(&self, request: Bytes) -> Result<usize, String> {
        let deadline = sleep(self.timeout.to_std()).deadline();
        let mut trouble = None;
        match timeout_at(deadline, self.deliver(request, deadline, &mut trouble)).await {
            Ok(answer) => answer,
            Err(_) => Err(trouble.unwrap_or_else(|| format!("no answer within {}", self.timeout))),
        }
    }

    /// `trouble` keeps what the last attempt ran into.
    async fn deliver(
        &self,
        request: Bytes,
        deadline: tokio::time::Instant,
        trouble: &mut Option<String>,
    ) -> Result<usize, String> {
        let body = self.wire.body(request)?;
        let mut backoff = Backoff::new(&body);
        loop {
            let refusal = match self.wire.attempt(body.clone()).await {
                Ok(rejected) => return Ok(rejected),
                Err(refusal) => refusal,
            };
            let Some(pause) = backoff.next(refusal.again).map(sleep).filter(|p| p.deadline() < deadline) else {
                return Err(refusal.text);
            };
            *trouble = Some(refusal.text);
            pause.await;
        }
    }
}

impl Wire {
    /// What goes over the wire; gRPC compresses messages itself.
    fn body(&self, request: Bytes) -> Result<Bytes, String> {
        match self {
            Wire::Http(http) if http.gzip => {
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
                encoder.write_all(&request).map_err(|e| e.to_string())?;
                encoder.finish().map(Bytes::from).map_err(|e| e.to_string())
            }
            Wire::Http(_) | Wire::Grpc(_) => Ok(request),
        }
    }

    async fn attempt(&self, body: Bytes) -> Result<usize, Refusal> {
        match self {
            Wire::Grpc(client) => client.export(body).await,
            Wire::Http(http) => {
                let (head, body) = http
                    .sender
                    .send(post(&http.uri, http.gzip, body))
                    .await
                    .map_err(|error| Refusal { text: chain(&*error), again: Again::Soon })?;
                if head.status.is_success() { Ok(rejected_spans(&body)) } else { Err(refused(&head)) }
            }
        }
    }
}

fn post(uri: &Uri, gzip: bool, body: Bytes) -> Request<Bytes> {
    let mut request = Request::new(body);
    *request.method_mut() = http::Method::POST;
    *request.uri_mut() = uri.clone();
    let headers = request.headers_mut();
    headers.insert(USER_AGENT, HeaderValue::from_static(concat!("igsim/", env!("CARGO_PKG_VERSION"))));
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/x-protobuf"));
    if gzip {
        headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    }
    request
}

fn refused(head: &Parts) -> Refusal {
    let seconds = |v: &HeaderValue| v.to_str().ok()?.trim().parse().ok();
    let asked = head.headers.get(RETRY_AFTER).and_then(seconds).map(Duration::from_secs);
    let again = match (head.status, asked) {
        (StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE, Some(pause)) => Again::After(pause),
        (
            StatusCode::TOO_MANY_REQUESTS
            | StatusCode::BAD_GATEWAY
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT,
            _,
        ) => Again::Soon,
        _ => Again::Never,
    };
    Refusal { text: format!("the collector answered {}", head.status), again }
}

/// The pauses between the attempts of one request.
struct Backoff {
    delay: Duration,
    left: usize,
    jitter: u64,
}

impl Backoff {
    /// Trace ids are random, so a request's bytes make its jitter.
    fn new(body: &[u8]) -> Backoff {
        let end = &body[body.len().saturating_sub(4_096)..];
        Backoff { delay: FIRST_DELAY, left: MAX_RETRIES, jitter: xxhash_rust::xxh3::xxh3_64(end) }
    }

    /// The next pause; `None` means that it is time to give up.
    fn next(&mut self, again: Again) -> Option<Duration> {
        let asked = match again {
            Again::Never => return None,
            Again::Soon => Duration::ZERO,
            Again::After(pause) => pause.min(MAX_THROTTLE),
        };
        self.left = self.left.checked_sub(1)?;
        self.jitter = mix64(self.jitter);
        let pause = self.delay.max(asked) + Duration::from_millis(self.jitter % (MAX_JITTER_MS + 1));
        self.delay = (self.delay.max(asked) * 2).min(MAX_DELAY.max(asked));
        Some(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(status: u16, retry_after: Option<&str>) -> Parts {
        let mut response = http::Response::builder().status(status);
        if let Some(value) = retry_after {
            response = response.header(RETRY_AFTER, value);
        }
        response.body(()).unwrap().into_parts().0
    }

    #[test]
    fn what_is_retried_over_http() {
        let after = |s| Again::After(Duration::from_secs(s));
        for (status, retry_after, expect) in [
            (400, None, Again::Never),
            (400, Some("1"), Again::Never),
            (404, None, Again::Never),
            (429, None, Again::Soon),
            (429, Some("3"), after(3)),
            (429, Some("soon"), Again::Soon),
            (500, None, Again::Never),
            (502, None, Again::Soon),
            (502, Some("3"), Again::Soon),
            (503, Some(" 7 "), after(7)),
            (504, None, Again::Soon),
        ] {
            assert_eq!(refused(&head(status, retry_after)).again, expect, "{status} {retry_after:?}");
        }
    }

    #[test]
    fn pauses_double_and_end() {
        let after = |s| Again::After(Duration::from_secs(s));
        let mut backoff = Backoff::new(b"a request");
        let mut least = FIRST_DELAY;
        for _ in 0..MAX_RETRIES {
            let pause = backoff.next(Again::Soon).unwrap();
            assert!((least..=least + Duration::from_millis(MAX_JITTER_MS)).contains(&pause), "{pause:?}");
            least = (least * 2).min(MAX_DELAY);
        }
        assert_eq!(backoff.next(Again::Soon), None);
        assert_eq!(Backoff::new(b"").next(Again::Never), None);
        assert!(Backoff::new(b"").next(after(2)).unwrap() >= Duration::from_secs(2));
        assert!(Backoff::new(b"").next(after(900)).unwrap() <= MAX_THROTTLE + Duration::from_millis(MAX_JITTER_MS));
    }
}
