//! The first bytes of a connection, within a time limit: until they tell HTTP/1 from HTTP/2, no other limit holds.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

/// How an HTTP/2 connection begins (RFC 9113, 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A connection whose reads fail once its first bytes are late.
pub(crate) struct Opening<S> {
    stream: S,
    /// `None` once the protocol is known.
    limit: Option<Limit>,
}

struct Limit {
    late: Pin<Box<Sleep>>,
    /// What is missing of the preface, if this is one.
    missing: &'static [u8],
}

impl<S> Opening<S> {
    /// Limits the first bytes of `stream`, from now on.
    pub(crate) fn new(stream: S, limit: Duration) -> Opening<S> {
        Opening { stream, limit: Some(Limit { late: Box::pin(tokio::time::sleep(limit)), missing: PREFACE }) }
    }
}

impl Limit {
    /// Takes the next bytes; whether the protocol is still unknown.
    fn goes_on(&mut self, read: &[u8]) -> bool {
        let both = read.len().min(self.missing.len());
        let (expected, missing) = self.missing.split_at(both);
        self.missing = missing;
        expected == &read[..both] && !missing.is_empty()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Opening<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let read = Pin::new(&mut this.stream).poll_read(cx, buf);
        let Some(limit) = &mut this.limit else { return read };
        if read.is_ready() {
            if !limit.goes_on(&buf.filled()[before..]) {
                this.limit = None;
            }
        } else if limit.late.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Opening<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, data)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// Whether a connection on which no more than `sent` comes is given up.
    async fn check(sent: &[u8], given_up: bool) {
        let (mut caller, server) = tokio::io::duplex(64);
        caller.write_all(sent).await.unwrap();
        let mut opening = Opening::new(server, Duration::from_millis(10));
        opening.read_exact(&mut vec![0; sent.len()]).await.unwrap();
        let next = tokio::time::timeout(Duration::from_millis(100), opening.read_u8()).await;
        let found = next.is_ok_and(|read| read.is_err_and(|e| e.kind() == io::ErrorKind::TimedOut));
        assert_eq!(found, given_up, "{:?}", String::from_utf8_lossy(sent));
    }

    #[tokio::test]
    async fn the_limit_holds_until_the_protocol_is_known() {
        check(b"", true).await;
        check(b"P", true).await;
        check(&PREFACE[..23], true).await;
        check(PREFACE, false).await;
        check(b"PO", false).await;
        check(b"GET / HTTP/1.1\r\n", false).await;
    }
}
