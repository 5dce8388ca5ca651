//! The lab's receiver of spans: OTLP/HTTP protobuf and OTLP/gRPC on one loopback port, acknowledged and counted without being
//! decoded.
//!
//! Decoding costs more than receiving, so it waits until the run is over: bodies are kept as they came (`spool`) and read back
//! by [`Receiver::decode`]. How the receiver behaves is switched while it runs. It knows nothing of arms and blocks: whoever
//! asks for counts draws a line, and gets a number for it.

mod decode;
mod grpc;
mod spool;

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use serde::{Deserialize, Serialize};
use shared::time::Dur;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

use super::model::Health;
pub use decode::{Decoded, Marked};
use spool::Spool;
pub use spool::{Limits, MEMORY, STORAGE};

/// How long a slow receiver takes to acknowledge.
pub const SLOW: Dur = Dur::from_secs(1);
/// The largest body; that of opentelemetry-otlp's own client.
const MAX_BODY: usize = 64 << 20;
/// The most connections; further ones wait in the operating system's queue.
const MAX_CONNECTIONS: usize = 64;
const BACKLOG: u32 = 64;
/// How long to wait when no connection can be accepted.
const ACCEPT_PAUSE: Dur = Dur::from_millis(10);

/// A receiver on a port of its own. Dropping it closes the port.
#[derive(Debug)]
pub struct Receiver {
    address: SocketAddr,
    kept: Arc<Mutex<Kept>>,
    orders: mpsc::Sender<Order>,
}

/// What came between two calls of [`Receiver::take`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Taken {
    /// The number of this interval, from 0: [`Decoded::marks`] has its spans.
    pub mark: u32,
    /// Export requests acknowledged.
    pub requests: u64,
    /// Bytes of their bodies, as they came.
    pub bytes: u64,
    /// Export requests answered with 503.
    pub refused: u64,
    /// Acknowledged requests whose bodies are not kept because there was no room: their spans will be missing.
    pub not_kept: u64,
}

/// A change of health, acknowledged when it has taken effect.
type Order = (Health, oneshot::Sender<io::Result<()>>);

#[derive(Debug)]
struct Kept {
    current: Taken,
    spool: Spool,
}

impl Receiver {
    /// Listens on `address`, which must be a loopback address; port 0 takes a free one. Serves on the runtime it is called on.
    ///
    /// # Errors
    /// If the address cannot be bound or is not a loopback address.
    pub fn start(address: SocketAddr, limits: Limits) -> io::Result<Receiver> {
        if !address.ip().is_loopback() {
            return Err(io::Error::new(io::ErrorKind::AddrNotAvailable, "the receiver listens on loopback only"));
        }
        // Bound and not listening: keeps the port from being given away while the receiver is absent.
        let reserved = bind(address)?;
        let address = reserved.local_addr()?;
        let listener = listen(address)?;
        let kept = Arc::new(Mutex::new(Kept { current: Taken::default(), spool: Spool::new(limits) }));
        let (orders, receiver) = mpsc::channel(1);
        let (health, _) = watch::channel(Health::Healthy);
        let port = Port { address, health, kept: Arc::clone(&kept), connections: JoinSet::new(), _reserved: reserved };
        tokio::spawn(port.run(listener, receiver));
        Ok(Receiver { address, kept, orders })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What an exporter is given as endpoint.
    pub fn traces_url(&self) -> String {
        format!("http://{}/v1/traces", self.address)
    }

    /// Changes how export requests are answered from now on; done when it has taken effect. An absent receiver breaks off its
    /// connections and comes back on the same port.
    ///
    /// # Errors
    /// If the port cannot be had again.
    pub async fn set_health(&self, health: Health) -> io::Result<()> {
        let gone = || io::Error::other("the receiver has stopped");
        let (done, answer) = oneshot::channel();
        self.orders.send((health, done)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Counts since the last call, and draws a line: what comes from now on belongs to the next mark. May move what was kept to
    /// disk, which takes up to tens of milliseconds: to be called between blocks.
    pub fn take(&self) -> Taken {
        let mut kept = lock(&self.kept);
        if let Err(error) = kept.spool.settle() {
            tracing::warn!(%error, "spans stay in memory, and the next ones may not be kept");
        }
        let next = Taken { mark: kept.current.mark + 1, ..Taken::default() };
        std::mem::replace(&mut kept.current, next)
    }

    /// Reads back what was kept and forgets it. Takes seconds of CPU for millions of spans: not while something is measured.
    ///
    /// # Errors
    /// If what was kept on disk cannot be read. A body that is no OTLP is counted, not an error.
    pub fn decode(&self) -> io::Result<Decoded> {
        let spool = lock(&self.kept).spool.take();
        decode::decode(spool)
    }
}

fn lock(kept: &Mutex<Kept>) -> MutexGuard<'_, Kept> {
    kept.lock().unwrap_or_else(PoisonError::into_inner)
}

fn bind(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // Two sockets on one port, of which one listens; and a port whose old connections linger can be had again.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    bind(address)?.listen(BACKLOG)
}

/// The socket and its connections.
struct Port {
    address: SocketAddr,
    health: watch::Sender<Health>,
    kept: Arc<Mutex<Kept>>,
    connections: JoinSet<()>,
    _reserved: TcpSocket,
}

impl Port {
    /// Serves until nobody gives orders any more.
    async fn run(mut self, listener: TcpListener, mut orders: mpsc::Receiver<Order>) {
        let mut listener = Some(listener);
        loop {
            tokio::select! {
                accepted = accept(listener.as_ref()), if self.connections.len() < MAX_CONNECTIONS => match accepted {
                    Ok(stream) => self.serve(stream),
                    Err(error) => {
                        tracing::warn!(%error, "the receiver cannot accept a connection");
                        tokio::time::sleep(ACCEPT_PAUSE.to_std()).await;
                    }
                },
                Some(_) = self.connections.join_next(), if !self.connections.is_empty() => {}
                order = orders.recv() => match order {
                    // Whoever gave the order has given up waiting.
                    Some((health, done)) => drop(done.send(self.turn(health, &mut listener).await)),
                    None => return,
                },
            }
        }
    }

    async fn turn(&mut self, health: Health, listener: &mut Option<TcpListener>) -> io::Result<()> {
        match health {
            Health::Absent => {
                *listener = None;
                self.connections.shutdown().await;
            }
            Health::Healthy | Health::Slow | Health::Refusing => {
                if listener.is_none() {
                    *listener = Some(listen(self.address)?);
                }
            }
        }
        self.health.send_replace(health);
        Ok(())
    }

    fn serve(&mut self, stream: tokio::net::TcpStream) {
        // Without it an answer may wait for an acknowledgement.
        let _ = stream.set_nodelay(true);
        let (health, kept) = (self.health.subscribe(), Arc::clone(&self.kept));
        self.connections.spawn(async move {
            let service = service_fn(move |request| {
                let (health, kept) = (*health.borrow(), Arc::clone(&kept));
                async move { Ok::<_, Infallible>(answer(request, health, &kept).await) }
            });
            // A connection that breaks has lost what was not acknowledged, which its exporter counts.
            let _ = auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

/// The next connection; never, without a listener.
async fn accept(listener: Option<&TcpListener>) -> io::Result<tokio::net::TcpStream> {
    match listener {
        Some(listener) => listener.accept().await.map(|(stream, _)| stream),
        None => std::future::pending().await,
    }
}

/// An answer: gRPC ends with trailers, HTTP with its body.
type Answer = Response<UnsyncBoxBody<Bytes, Infallible>>;

async fn answer(request: Request<Incoming>, health: Health, kept: &Mutex<Kept>) -> Answer {
    let (head, body) = request.into_parts();
    let named = |name: &str| head.headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let grpc = match (&head.method, head.uri.path()) {
        (&Method::POST, "/v1/traces") => false,
        (&Method::POST, grpc::EXPORT) => true,
        _ => return status(StatusCode::NOT_FOUND),
    };
    let (kind, encoding) =
        if grpc { ("application/grpc", "grpc-encoding") } else { ("application/x-protobuf", "content-encoding") };
    if !named("content-type").starts_with(kind) {
        return status(StatusCode::UNSUPPORTED_MEDIA_TYPE);
    }
    let gzip = match named(encoding) {
        "" | "identity" => false,
        "gzip" => true,
        _ => return status(StatusCode::UNSUPPORTED_MEDIA_TYPE),
    };
    let Ok(body) = Limited::new(body, MAX_BODY).collect().await else { return status(StatusCode::PAYLOAD_TOO_LARGE) };
    match health {
        // A request that was on its way when the receiver left is refused: its connection is broken off anyway.
        Health::Refusing | Health::Absent => {
            lock(kept).current.refused += 1;
            return if grpc { grpc::ended(grpc::UNAVAILABLE) } else { status(StatusCode::SERVICE_UNAVAILABLE) };
        }
        Health::Slow => tokio::time::sleep(SLOW.to_std()).await,
        Health::Healthy => {}
    }
    let body = body.to_bytes();
    if !grpc {
        lock(kept).keep(&body, gzip);
        return acknowledgement();
    }
    let Some((compressed, message)) = grpc::message(&body) else { return grpc::ended(grpc::INVALID_ARGUMENT) };
    lock(kept).keep(message, gzip && compressed);
    grpc::acknowledgement()
}

fn status(code: StatusCode) -> Answer {
    let mut response = Response::new(Full::default().boxed_unsync());
    *response.status_mut() = code;
    response
}

/// An `ExportTraceServiceResponse` without a partial success: no bytes at all.
fn acknowledgement() -> Answer {
    let mut response = status(StatusCode::OK);
    let protobuf = header::HeaderValue::from_static("application/x-protobuf");
    response.headers_mut().insert(header::CONTENT_TYPE, protobuf);
    response
}

impl Kept {
    fn keep(&mut self, body: &[u8], gzip: bool) {
        self.current.requests += 1;
        self.current.bytes += body.len() as u64;
        if let Err(error) = self.spool.push(self.current.mark, gzip, body) {
            self.current.not_kept += 1;
            // Once per mark is enough.
            if self.current.not_kept == 1 {
                tracing::warn!(%error, "spans are counted and not kept");
            }
        }
    }
}

#[cfg(test)]
mod tests;
