//! What a server has to know of its engine's faults: whether it is down, what its metrics page is like, which connection breaks.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tokio::sync::{mpsc, oneshot};

use super::pacing::Delivery;
use crate::core::engine::Engine;
use crate::core::faults::{Down, FaultKind, PageFault};

/// An engine as its server sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Condition {
    /// How often it went down so far: it may be back between two looks.
    pub falls: u64,
    /// How it is down now.
    pub down: Option<Down>,
    /// What is wrong with its metrics page.
    pub page: Option<PageFault>,
}

impl Condition {
    /// Looks at the engine again; whether anything changed.
    pub(super) fn follow(&mut self, engine: &Engine) -> bool {
        let Some(faults) = engine.faults() else { return false };
        let falls = faults.counts().of(FaultKind::Crash) + faults.counts().of(FaultKind::EngineDead);
        let seen = Condition { falls, down: faults.down(), page: faults.page() };
        std::mem::replace(self, seen) != seen
    }
}

/// Tells the server that a request's connection is to break.
#[derive(Debug)]
pub(super) struct Doom(oneshot::Sender<UnboundedSender>);

type UnboundedSender = mpsc::UnboundedSender<Delivery>;

/// The other end of a `Doom`; nothing once the request has ended otherwise, while further choices of its answer may go on.
#[derive(Debug)]
pub struct Doomed(Option<oneshot::Receiver<UnboundedSender>>);

impl Doom {
    pub(super) fn new() -> (Doom, Doomed) {
        let (sender, receiver) = oneshot::channel();
        (Doom(sender), Doomed(Some(receiver)))
    }

    /// The connection breaks. The request's channel goes along, so that its end is not taken for an engine that says it is dead.
    pub(super) fn come(self, channel: UnboundedSender) {
        // Whoever is gone does not need to be told.
        let _ = self.0.send(channel);
    }
}

impl Doomed {
    /// Completes when the connection is to break; never if the request ends otherwise.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<UnboundedSender> {
        let Some(receiver) = &mut self.0 else { return Poll::Pending };
        let Poll::Ready(came) = Pin::new(receiver).poll(cx) else { return Poll::Pending };
        self.0 = None;
        came.map_or(Poll::Pending, Poll::Ready)
    }
}

/// The response of a request whose connection may break before or while it is written.
pub(super) async fn guard(respond: impl Future<Output = Response>, doomed: Option<Doomed>) -> Response {
    let Some(mut doomed) = doomed else { return respond.await };
    let response = tokio::select! {
        biased;
        response = respond => Some(response),
        channel = std::future::poll_fn(|cx| doomed.poll(cx)) => {
            drop(channel);
            None
        }
    };
    match response {
        Some(response) => response.map(|body| Body::new(Guarded { body, doomed, broken: Broken::Not })),
        None => Response::new(Body::new(Guarded { body: Body::empty(), doomed, broken: Broken::Now })),
    }
}

/// The body of a response until its connection breaks.
struct Guarded {
    body: Body,
    doomed: Doomed,
    broken: Broken,
}

enum Broken {
    Not,
    /// What was written before is on its way to the socket.
    Soon(#[expect(dead_code, reason = "held, so that the request's channel stays open")] UnboundedSender),
    Now,
}

/// A connection breaks in the middle of an answer: the server drops it.
#[derive(Debug, thiserror::Error)]
#[error("an injected fault breaks the connection")]
struct BrokenOff;

impl http_body::Body for Guarded {
    type Data = Bytes;
    type Error = axum::BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::BoxError>>> {
        match Pin::new(&mut self.body).poll_frame(cx) {
            // A body that is at its end is at its end.
            Poll::Ready(frame) if !matches!(self.broken, Broken::Now) => {
                return Poll::Ready(frame.map(|frame| frame.map_err(Into::into)));
            }
            Poll::Ready(_) | Poll::Pending => {}
        }
        match self.broken {
            Broken::Now => Poll::Ready(Some(Err(BrokenOff.into()))),
            Broken::Soon(_) => {
                self.broken = Broken::Now;
                self.poll_frame(cx)
            }
            Broken::Not => {
                if let Poll::Ready(channel) = self.doomed.poll(cx) {
                    // The server flushes when it finds nothing to write: asked again, it has done so.
                    self.broken = Broken::Soon(channel);
                    cx.waker().wake_by_ref();
                }
                Poll::Pending
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self.broken, Broken::Not) && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        match self.broken {
            Broken::Not | Broken::Soon(_) => self.body.size_hint(),
            Broken::Now => SizeHint::default(),
        }
    }
}
