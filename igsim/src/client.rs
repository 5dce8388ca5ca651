//! The load client: sends one request over HTTP and watches its answer arrive.
//!
//! It measures what a user would see and keeps nothing of what was said: the next turn of a conversation repeats the filler that
//! our engines answer with.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Uri, header};
use http_body_util::{BodyExt, Full};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client as Legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::Deserialize;
use shared::clock::RunClock;
use shared::ids::{RequestId, TraceId};
use shared::openai::Usage;
use shared::time::{Dur, Time};

use crate::report::Failure;

/// Connections to servers, kept and used again.
pub(crate) type Pool = Legacy<HttpsConnector<HttpConnector>, Full<Bytes>>;

/// A pool for HTTP, and for HTTPS with certificates of the web's authorities.
pub(crate) fn pool() -> Pool {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    connector.enforce_http(false);
    let tls = hyper_rustls::HttpsConnectorBuilder::new()
        .with_provider_and_webpki_roots(rustls::crypto::ring::default_provider())
        .expect("ring supports the default protocol versions")
        .https_or_http()
        .enable_http1()
        .wrap_connector(connector);
    Legacy::builder(TokioExecutor::new()).build(tls)
}

/// The longest reason for a dropped request that is repeated.
const MAX_REASON: usize = 64;

/// Sends requests to one gateway, engine or other OpenAI-compatible server.
#[derive(Clone, Debug)]
pub struct Client {
    pool: Pool,
    clock: RunClock,
    timeout: Duration,
}

/// A request ready to be sent.
#[derive(Clone, Debug)]
pub struct Outgoing {
    /// Where to.
    pub uri: Uri,
    /// Sent as `x-request-id`.
    pub id: RequestId,
    /// The JSON body.
    pub body: Bytes,
    /// Whether the answer is a stream of server-sent events.
    pub streaming: bool,
    /// Further headers.
    pub headers: HeaderMap,
}

/// What the client saw of one request.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// When it was handed to the connection pool.
    pub sent: Time,
    /// First byte of the response's body.
    pub first_byte: Option<Time>,
    /// First token of the answer; for an answer in one piece, that piece.
    pub first_token: Option<Time>,
    /// Latest token of the answer.
    pub last_token: Option<Time>,
    /// The end, good or bad.
    pub done: Time,
    /// Time between consecutive pieces of the answer.
    pub gaps: Vec<Dur>,
    /// Status of the response, if there was one.
    pub status: Option<u16>,
    /// Why there was no complete answer.
    pub failure: Option<Failure>,
    /// Token counts, as far as the server told them.
    pub usage: Option<Usage>,
    /// The endpoint the gateway chose, from its response header.
    pub endpoint: Option<Arc<str>>,
    /// Why the gateway refused it, from its response header.
    pub dropped: Option<Arc<str>>,
    /// The trace of the request, from the `traceresponse` header, and whether it was sampled.
    pub trace: Option<(TraceId, bool)>,
    /// Reason given for the end of the answer.
    pub finish_reason: Option<String>,
}

impl Client {
    /// A client on `clock` that gives up on a request after `timeout`.
    pub fn new(clock: RunClock, timeout: Dur) -> Client {
        Client { pool: pool(), clock, timeout: timeout.to_std() }
    }

    /// Sends a request and reads its answer to the end.
    pub async fn send(&self, request: Outgoing) -> Observed {
        let mut seen = Observed { sent: self.clock.now(), ..Observed::default() };
        let outcome = match tokio::time::timeout(self.timeout, self.exchange(request, &mut seen)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Failure::Timeout),
        };
        seen.failure = outcome.err();
        seen.done = self.clock.now();
        seen
    }

    async fn exchange(&self, request: Outgoing, seen: &mut Observed) -> Result<(), Failure> {
        let streaming = request.streaming;
        let response = self.pool.request(request.into_http()).await.map_err(|_| Failure::Connect)?;
        seen.status = Some(response.status().as_u16());
        seen.read_headers(response.headers());
        let ok = response.status().is_success();
        let mut body = response.into_body();
        let mut whole = Vec::new();
        let mut events = Events::default();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|_| Failure::Disconnected)?;
            let Some(data) = frame.data_ref() else { continue };
            let now = self.clock.now();
            seen.first_byte.get_or_insert(now);
            if ok && streaming {
                events.push(data, |event| seen.event(event, now))?;
            } else {
                whole.extend_from_slice(data);
            }
        }
        match (ok, streaming) {
            (false, _) => Err(Failure::Status(seen.status.unwrap_or_default())),
            (true, true) if events.done => Ok(()),
            (true, true) => Err(Failure::Disconnected),
            (true, false) => seen.whole(&whole, self.clock.now()),
        }
    }
}

impl Outgoing {
    fn into_http(self) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::new(self.body));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.uri;
        *request.headers_mut() = self.headers;
        let headers = request.headers_mut();
        headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
        if let Ok(id) = self.id.as_str().parse() {
            headers.insert("x-request-id", id);
        }
        request
    }
}

impl Observed {
    /// Pieces of the answer that arrived: about its tokens, where no usage was told.
    pub fn pieces(&self) -> u32 {
        self.first_token.map_or(0, |_| 1 + u32::try_from(self.gaps.len()).unwrap_or(u32::MAX - 1))
    }

    fn read_headers(&mut self, headers: &HeaderMap) {
        let text = |name: &str| headers.get(name).and_then(|v| v.to_str().ok());
        self.endpoint = text("x-gateway-destination-endpoint-served").map(Arc::from);
        // Reasons are words of a fixed list; what a stranger sends does not grow the report.
        let reason = text("x-llm-d-request-dropped-reason");
        self.dropped = reason.filter(|r| r.len() <= MAX_REASON).map(Arc::from);
        self.trace = text("traceresponse").and_then(parse_traceresponse);
    }

    fn event(&mut self, event: &[u8], now: Time) -> Result<(), Failure> {
        let chunk: Chunk<'_> = serde_json::from_slice(event).map_err(|_| Failure::Protocol)?;
        if let Some(usage) = chunk.usage {
            self.usage = Some(usage);
        }
        for choice in chunk.choices.iter().take(1) {
            self.piece(choice.piece(), now);
            if let Some(reason) = &choice.finish_reason {
                self.finish_reason = Some(reason.to_string());
            }
        }
        Ok(())
    }

    fn piece(&mut self, text: &str, now: Time) {
        if text.is_empty() {
            return;
        }
        match self.last_token {
            None => self.first_token = Some(now),
            Some(before) => self.gaps.push(now.since(before)),
        }
        self.last_token = Some(now);
    }

    fn whole(&mut self, body: &[u8], now: Time) -> Result<(), Failure> {
        let chunk: Chunk<'_> = serde_json::from_slice(body).map_err(|_| Failure::Protocol)?;
        self.usage = chunk.usage;
        self.first_token = Some(now);
        self.last_token = Some(now);
        let choice = chunk.choices.first().ok_or(Failure::Protocol)?;
        self.finish_reason = choice.finish_reason.as_deref().map(str::to_owned);
        Ok(())
    }
}

/// Cuts a stream of bytes into server-sent events.
#[derive(Debug, Default)]
struct Events {
    partial: Vec<u8>,
    done: bool,
}

impl Events {
    /// The longest event kept in memory.
    const MAX_EVENT: usize = 1 << 20;

    fn push(&mut self, data: &[u8], mut each: impl FnMut(&[u8]) -> Result<(), Failure>) -> Result<(), Failure> {
        self.partial.extend_from_slice(data);
        let mut start = 0;
        while let Some(length) = self.partial[start..].iter().position(|b| *b == b'\n') {
            let line = self.partial[start..start + length].trim_ascii_end();
            start += length + 1;
            match line.strip_prefix(b"data:").map(<[u8]>::trim_ascii) {
                Some(b"[DONE]") => self.done = true,
                Some(event) => each(event)?,
                None => {} // an empty line, a comment or another field
            }
        }
        self.partial.drain(..start);
        if self.partial.len() > Self::MAX_EVENT { Err(Failure::Protocol) } else { Ok(()) }
    }
}

#[derive(Deserialize)]
struct Chunk<'a> {
    #[serde(borrow)]
    choices: Vec<Choice<'a>>,
    #[serde(default)]
    usage: Option<Usage>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(default, borrow)]
    text: Option<Cow<'a, str>>,
    #[serde(default, borrow)]
    delta: Option<Piece<'a>>,
    #[serde(default, borrow)]
    message: Option<Piece<'a>>,
    #[serde(default, borrow)]
    finish_reason: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct Piece<'a> {
    #[serde(default, borrow)]
    content: Option<Cow<'a, str>>,
}

impl Choice<'_> {
    fn piece(&self) -> &str {
        let chat = self.delta.as_ref().or(self.message.as_ref()).and_then(|p| p.content.as_deref());
        self.text.as_deref().or(chat).unwrap_or_default()
    }
}

/// `00-<trace>-<span>-<flags>` of the W3C trace context, level 2.
pub(crate) fn parse_traceresponse(value: &str) -> Option<(TraceId, bool)> {
    let mut parts = value.split('-').skip(1);
    let trace = TraceId::new(u128::from_str_radix(parts.next()?, 16).ok()?)?;
    let flags = u8::from_str_radix(parts.nth(1)?, 16).ok()?;
    Some((trace, flags & 1 == 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_cut_wherever_the_bytes_are() {
        let stream = b"data: {\"a\":1}\r\n\r\n: keep-alive\n\ndata:{\"b\":2}\n\ndata: [DONE]\n\n";
        for size in 1..stream.len() {
            let (mut events, mut seen) = (Events::default(), Vec::new());
            for part in stream.chunks(size) {
                events
                    .push(part, |e| {
                        seen.push(String::from_utf8(e.to_vec()).unwrap());
                        Ok(())
                    })
                    .unwrap();
            }
            assert_eq!((seen, events.done), (vec!["{\"a\":1}".to_owned(), "{\"b\":2}".to_owned()], true));
        }
    }

    #[test]
    fn tokens_are_timed_and_the_role_is_no_token() {
        let mut seen = Observed::default();
        let at = Time::from_nanos;
        seen.event(br#"{"choices":[{"delta":{"role":"assistant","content":""}}]}"#, at(10)).unwrap();
        assert_eq!(seen.first_token, None);
        seen.event(br#"{"choices":[{"delta":{"content":"abc "}}]}"#, at(20)).unwrap();
        seen.event(br#"{"choices":[{"delta":{"content":"def "},"finish_reason":"length"}]}"#, at(35)).unwrap();
        seen.event(br#"{"choices":[{"text":"ghi "}]}"#, at(41)).unwrap();
        seen.event(br#"{"choices":[],"usage":{"prompt_tokens":7,"total_tokens":9,"completion_tokens":2}}"#, at(50))
            .unwrap();
        assert_eq!((seen.first_token, seen.pieces()), (Some(at(20)), 3));
        assert_eq!(seen.gaps, [Dur::from_nanos(15), Dur::from_nanos(6)]);
        assert_eq!(seen.usage.unwrap().completion_tokens, 2);
    }

    #[test]
    fn traceresponse_names_the_trace() {
        let check = |text: &str, expect: Option<(u128, bool)>| {
            assert_eq!(parse_traceresponse(text).map(|(t, s)| (t.get(), s)), expect, "{text}");
        };
        check("00-000000000000000000000000000000ff-00000000000000aa-01", Some((255, true)));
        check("00-000000000000000000000000000000ff-00000000000000aa-00", Some((255, false)));
        check("00-00000000000000000000000000000000-00000000000000aa-00", None);
        check("nonsense", None);
    }
}
