//! Comments in a stream that is quiet, so that nobody on the way takes it for dead (`--sse-keep-alive-interval`).

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame};
use shared::time::Dur;
use tokio::time::Sleep;

/// A stream that says `: keep-alive` whenever it had nothing to say for an interval.
pub(super) struct KeepAlive<B> {
    stream: B,
    every: Dur,
    quiet: Pin<Box<Sleep>>,
}

impl<B> KeepAlive<B> {
    pub(super) fn new(stream: B, every: Dur) -> KeepAlive<B> {
        KeepAlive { stream, every, quiet: Box::pin(tokio::time::sleep(every.to_std())) }
    }
}

impl<B: Body<Data = Bytes, Error = Infallible> + Unpin> Body for KeepAlive<B> {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = &mut *self;
        let mut frame = Pin::new(&mut this.stream).poll_frame(cx);
        if frame.is_pending() {
            if this.quiet.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            frame = Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b": keep-alive\n\n")))));
        }
        this.quiet.as_mut().set(tokio::time::sleep(this.every.to_std()));
        if let Poll::Ready(Some(_)) = &frame {
            // The timer has to be asked again before it wakes this stream.
            let _ = this.quiet.as_mut().poll(cx);
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.stream.is_end_stream()
    }
}
