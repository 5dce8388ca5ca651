//! The KV connector on the wire: `kv_transfer_params` of requests and answers, and the side channel between engines.
//!
//! The side channel stands in for NIXL's: HTTP on an address of its own, which answers tell as `remote_host` and `remote_port`. It
//! has two routes ([`wire`] has the bodies) and carries no cache:
//!
//! - `POST /kv/pull` reads blocks. The answer comes when the last block would be there. `traceparent` is the reader's client span.
//! - `POST /kv/notify` says that blocks are still wanted, or not any more.
//!
//! Decides nothing: what arrives is handed to the engine, and what the engine says is sent.

mod client;
mod params;
mod side_channel;
mod wire;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use shared::clock::RunClock;
use shared::rng::mix64;
use shared::trace::TracerCell;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use super::pacing::EngineHandle;
use crate::core::kv_transfer::{KvInput, KvTransferConfig, PullKey, Transfer, TransferError};

pub(super) use params::{Asked, prompt_tokens};

/// Pulls that may be under way at one sender; vLLM has no limit.
const MAX_PULLS: usize = 4096;

type Outcome = Result<Transfer, TransferError>;

/// An engine among its peers.
#[derive(Debug)]
pub(super) struct Peers {
    engine: EngineHandle,
    tracer: Arc<TracerCell>,
    clock: RunClock,
    /// The engine's name among them.
    engine_id: Arc<str>,
    address: SocketAddr,
    /// Who waits for the end of a pull.
    pulls: Mutex<HashMap<PullKey, oneshot::Sender<Outcome>>>,
    keys: AtomicU64,
}

/// A side channel that is bound and not served yet.
pub(super) struct SideChannel {
    listener: TcpListener,
    pub(super) peers: Arc<Peers>,
}

impl SideChannel {
    /// Binds the configured address. An engine without a name gets one from `salt`, in the form of vLLM's random ones.
    pub(super) async fn bind(
        config: &KvTransferConfig,
        salt: u64,
        engine: EngineHandle,
        tracer: Arc<TracerCell>,
        clock: RunClock,
    ) -> std::io::Result<SideChannel> {
        let extra = &config.kv_connector_extra_config;
        let listener = TcpListener::bind((extra.side_channel_host, extra.side_channel_port)).await?;
        let address = listener.local_addr()?;
        let engine_id = config.engine_id.as_deref().map_or_else(|| uuid(salt), Arc::from);
        let (pulls, keys) = (Mutex::default(), AtomicU64::new(0));
        Ok(SideChannel { listener, peers: Arc::new(Peers { engine, tracer, clock, engine_id, address, pulls, keys }) })
    }

    /// Serves other engines and carries what this one says, until it is dropped.
    pub(super) async fn run(self) {
        let SideChannel { listener, peers } = self;
        let said = peers.engine.listen();
        tokio::join!(side_channel::serve(listener, Arc::clone(&peers)), client::carry(peers, said));
    }
}

/// A version 4 UUID made of `salt`.
fn uuid(salt: u64) -> Arc<str> {
    let (a, b) = (mix64(salt ^ 0x6e69_786c), mix64(salt ^ 0x7065_6572));
    let (a, b) = (a & !0xf000 | 0x4000, b & !(0b11 << 62) | 0b10 << 62);
    format!("{:08x}-{:04x}-{:04x}-{:04x}-{:012x}", a >> 32, a >> 16 & 0xffff, a & 0xffff, b >> 48, b & 0xffff_ffff_ffff)
        .into()
}

impl Peers {
    /// Tells the sender that a request which was refused before the engine had it needs no blocks.
    pub(super) fn refused(&self, asked: &Asked) {
        if let Asked::Pull(remote) = asked {
            self.engine.hear(self.clock.now(), KvInput::Refused(Arc::clone(remote)));
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<PullKey, oneshot::Sender<Outcome>>> {
        self.pulls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A name for a pull and where its end is told; `None` if too many are under way.
    fn await_pull(&self) -> Option<(PullKey, oneshot::Receiver<Outcome>)> {
        let mut pulls = self.lock();
        if pulls.len() >= MAX_PULLS {
            return None;
        }
        let key = PullKey(self.keys.fetch_add(1, Ordering::Relaxed));
        let (sender, receiver) = oneshot::channel();
        pulls.insert(key, sender);
        Some((key, receiver))
    }

    /// The engine stopped: nobody will end these.
    fn end_all_pulls(&self) {
        self.lock().clear();
    }

    fn pull_ended(&self, key: PullKey, outcome: Outcome) {
        if let Some(sender) = self.lock().remove(&key) {
            // A reader that has gone away does not wait.
            let _ = sender.send(outcome);
        }
    }
}
