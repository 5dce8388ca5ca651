//! The PUB socket: bound, or connected to a subscriber that is bound and may come and go.

use std::net::TcpListener;

use bytes::Bytes;
use shared::time::Dur;
use tokio::sync::mpsc::Receiver;
use zeromq::{PubSocket, Socket, SocketEvent, SocketOptions, SocketSend, ZmqMessage};

use super::Encoded;

/// How often an idle publisher looks whether its subscriber is still there; libzmq reconnects after 100 ms.
const LOOK: Dur = Dur::from_millis(100);
/// How long one attempt to connect may take.
const PATIENCE: Dur = Dur::from_secs(1);

/// A PUB socket.
pub(super) struct Publishing {
    socket: PubSocket,
    /// Where it connects to; a bound one has none.
    peer: Option<String>,
}

impl Publishing {
    pub(super) async fn bind(listener: TcpListener) -> std::io::Result<Publishing> {
        let mut socket = PubSocket::new();
        socket.bind_listener(listener).await.map_err(std::io::Error::other)?;
        Ok(Publishing { socket, peer: None })
    }

    pub(super) fn connect(endpoint: &str) -> Publishing {
        let mut options = SocketOptions::default();
        options.connect_timeout(PATIENCE.to_std());
        Publishing { socket: PubSocket::with_options(options), peer: Some(endpoint.to_owned()) }
    }

    /// Sends what comes until the encoder is gone.
    pub(super) async fn run(mut self, mut encoded: Receiver<Encoded>, topic: Bytes) {
        match self.peer.take() {
            None => {
                while let Some(batch) = encoded.recv().await {
                    self.send(batch, &topic).await;
                }
            }
            Some(peer) => self.run_connected(&peer, &mut encoded, &topic).await,
        }
    }

    async fn run_connected(&mut self, peer: &str, encoded: &mut Receiver<Encoded>, topic: &Bytes) {
        let mut events = self.socket.monitor();
        let mut connected = false;
        loop {
            while let Ok(event) = events.try_recv() {
                connected &= !matches!(event, SocketEvent::Disconnected(_));
            }
            if !connected {
                connected = self.socket.connect(peer).await.is_ok();
                // A name that cannot be resolved fails at once.
                if !connected {
                    tokio::time::sleep(LOOK.to_std()).await;
                }
                if encoded.is_closed() {
                    return;
                }
                continue;
            }
            match tokio::time::timeout(LOOK.to_std(), encoded.recv()).await {
                Ok(Some(batch)) => self.send(batch, topic).await,
                Ok(None) => return,
                Err(_) => {}
            }
        }
    }

    async fn send(&mut self, batch: Encoded, topic: &Bytes) {
        let mut message = ZmqMessage::from(topic.clone());
        message.push_back(Bytes::copy_from_slice(&batch.seq.to_be_bytes()));
        message.push_back(batch.payload);
        // The socket queues or, without a subscriber, discards: it has no other errors.
        if let Err(error) = self.socket.send(message).await {
            tracing::debug!(%error, "a batch of KV events was not sent");
        }
    }
}
