//! Accepts connections and serves them, through all lives of an engine: when it goes down the port closes, when it is back the port
//! opens again.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use shared::time::Dur;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::DRAIN;
use super::condition::Condition;
use crate::core::faults::Down;

/// How long to wait when no connection can be accepted or a port is not to be had again.
const PAUSE: Dur = Dur::from_millis(10);
/// How long a server whose engine core has died may go on with what was open: its answers are short.
const LAST_WORDS: Dur = Dur::from_secs(5);

/// Serves until `shutdown` completes and every open answer is written, for at most [`DRAIN`].
pub(super) async fn serve(
    listener: TcpListener,
    router: Router,
    mut condition: watch::Receiver<Condition>,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    let address = listener.local_addr()?;
    let mut shutdown = std::pin::pin!(shutdown);
    let mut listener = listener;
    loop {
        let mut life = Life::default();
        let down = tokio::select! {
            down = life.serve(&listener, &router, &mut condition) => down,
            () = shutdown.as_mut() => {
                // From here on the system refuses connections.
                drop(listener);
                life.drain(DRAIN).await;
                return Ok(());
            }
        };
        drop(listener);
        life.end(down).await;
        tokio::select! {
            back = come_back(address, &mut condition) => listener = back,
            () = shutdown.as_mut() => return Ok(()),
        }
    }
}

/// How the engine went down, once it has fallen again; `None` if it stopped for good.
async fn fall(condition: &mut watch::Receiver<Condition>, falls: u64) -> Option<Down> {
    let fallen = condition.wait_for(|c| c.falls != falls || c.down.is_some()).await.ok()?;
    Some(fallen.down.unwrap_or(Down::Process))
}

/// Waits until the engine is back, and opens its port again.
async fn come_back(address: SocketAddr, condition: &mut watch::Receiver<Condition>) -> TcpListener {
    if condition.wait_for(|c| c.down.is_none()).await.is_err() {
        // The engine has stopped for good.
        std::future::pending::<()>().await;
    }
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return listener,
            Err(error) => {
                tracing::warn!(%error, %address, "the port is not to be had again yet");
                tokio::time::sleep(PAUSE.to_std()).await;
            }
        }
    }
}

/// The connections of one life of an engine.
#[derive(Default)]
struct Life {
    connections: JoinSet<()>,
    graceful: GracefulShutdown,
    /// Whether connections end with a reset instead of a farewell.
    reset: Arc<AtomicBool>,
}

impl Life {
    /// Serves until the engine goes down.
    async fn serve(
        &mut self,
        listener: &TcpListener,
        router: &Router,
        condition: &mut watch::Receiver<Condition>,
    ) -> Down {
        let falls = condition.borrow().falls;
        let service = TowerToHyperService::new(router.clone());
        let builder = auto::Builder::new(TokioExecutor::new());
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => self.open(&builder, stream, service.clone()),
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a connection");
                        tokio::time::sleep(PAUSE.to_std()).await;
                    }
                },
                Some(_) = self.connections.join_next(), if !self.connections.is_empty() => {}
                // One whose engine stops for good goes on and says so to whoever asks.
                Some(down) = fall(condition, falls) => return down,
            }
        }
    }

    fn open(
        &mut self,
        builder: &auto::Builder<TokioExecutor>,
        stream: TcpStream,
        service: TowerToHyperService<Router>,
    ) {
        // Tokens are small and late ones are wrong ones: no waiting for more to send.
        let _ = stream.set_nodelay(true);
        let stream = Resettable { stream, reset: Arc::clone(&self.reset) };
        let connection = builder.serve_connection(TokioIo::new(stream), service).into_owned();
        let connection = self.graceful.watch(connection);
        self.connections.spawn(async move {
            // Callers that go away are noticed where their request is.
            let _ = connection.await;
        });
    }

    /// Ends as the engine did.
    async fn end(mut self, down: Down) {
        match down {
            Down::Core => self.drain(LAST_WORDS).await,
            Down::Process => {
                self.reset.store(true, Ordering::Relaxed);
                self.connections.shutdown().await;
            }
        }
    }

    /// Lets open answers be written, for a while.
    async fn drain(self, patience: Dur) {
        let Life { mut connections, graceful, .. } = self;
        let _ = tokio::time::timeout(patience.to_std(), graceful.shutdown()).await;
        connections.shutdown().await;
    }
}

/// A connection that can be reset instead of closed.
struct Resettable {
    stream: TcpStream,
    reset: Arc<AtomicBool>,
}

impl Drop for Resettable {
    fn drop(&mut self) {
        if self.reset.load(Ordering::Relaxed) {
            let _ = rustix::net::sockopt::set_socket_linger(&self.stream, Some(std::time::Duration::ZERO));
        }
    }
}

impl AsyncRead for Resettable {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Resettable {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
