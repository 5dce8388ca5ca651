//! The body of an answer on its way through. Dropped early, it closes the connection to the engine, which aborts.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use hyper::body::{Body as _, Frame, Incoming, SizeHint};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::exchange::Exchange;
use crate::pd_proxy::core::Failure;

type Piece = Option<Result<Frame<Bytes>, axum::BoxError>>;

/// An answer that passes.
pub(super) struct Relay {
    passage: Arc<Mutex<Passage>>,
    /// What ends the passage at the deadline: the server asks for nothing while its caller reads nothing.
    watch: Option<AbortHandle>,
}

/// What is shared with the watch.
struct Passage {
    /// The engine's answer; `None` once it was cut off.
    upstream: Option<Incoming>,
    exchange: Exchange,
    /// Who waits for the next piece.
    reader: Option<Waker>,
}

/// The total time of a request is over.
#[derive(Debug, thiserror::Error)]
#[error("the request took too long")]
struct TookTooLong;

impl Relay {
    pub(super) fn new(upstream: Incoming, exchange: Exchange, deadline: Instant) -> Relay {
        let mut passage = Passage { upstream: Some(upstream), exchange, reader: None };
        let over = passage.end_if_over();
        let passage = Arc::new(Mutex::new(passage));
        let watch = (!over).then(|| tokio::spawn(watch(Arc::downgrade(&passage), deadline)).abort_handle());
        Relay { passage, watch }
    }

    fn passage(&self) -> MutexGuard<'_, Passage> {
        lock(&self.passage)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        if let Some(watch) = &self.watch {
            watch.abort();
        }
    }
}

fn lock(passage: &Mutex<Passage>) -> MutexGuard<'_, Passage> {
    passage.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Cuts a passage off at the deadline, whether or not somebody reads.
async fn watch(passage: Weak<Mutex<Passage>>, deadline: Instant) {
    tokio::time::sleep_until(deadline).await;
    if let Some(passage) = passage.upgrade() {
        lock(&passage).cut_off();
    }
}

impl Passage {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Piece> {
        let Some(upstream) = &mut self.upstream else { return Poll::Ready(Some(Err(TookTooLong.into()))) };
        match Pin::new(upstream).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                if frame.data_ref().is_some_and(|data| !data.is_empty()) {
                    let now = self.exchange.now();
                    self.exchange.dance().first_byte(now);
                }
                self.end_if_over();
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => {
                self.exchange.end(Some(Failure::Reset));
                Poll::Ready(Some(Err(error.into())))
            }
            Poll::Ready(None) => {
                self.exchange.end(None);
                Poll::Ready(None)
            }
            Poll::Pending => {
                self.reader = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    fn is_end(&self) -> bool {
        self.upstream.as_ref().is_some_and(Incoming::is_end_stream)
    }

    /// The server asks for no more after the last byte of a body of known length, so its end is noticed here.
    fn end_if_over(&mut self) -> bool {
        let over = self.is_end();
        if over {
            self.exchange.end(None);
        }
        over
    }

    fn cut_off(&mut self) {
        if self.exchange.dance().is_over() {
            return;
        }
        self.upstream = None;
        self.exchange.end(Some(Failure::Timeout));
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }
}

impl hyper::body::Body for Relay {
    type Data = Bytes;
    type Error = axum::BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Piece> {
        self.passage().poll(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.passage().is_end()
    }

    fn size_hint(&self) -> SizeHint {
        self.passage().upstream.as_ref().map_or_else(SizeHint::default, Incoming::size_hint)
    }
}
