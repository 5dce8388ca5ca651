//! The ROUTER socket at which a subscriber asks for batches it has missed.
//!
//! A request is `[identity, "", first sequence number]`, the number big endian. The answer is one message `[identity, "", topic, number,
//! payload]` for each batch that is still there, then one with the number -1 and no payload (`_service_replay` of vLLM 0.33).

use std::collections::VecDeque;
use std::net::TcpListener;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use shared::time::Dur;
use tokio::task::JoinHandle;
use zeromq::{RouterRecvHalf, RouterSendHalf, RouterSocket, Socket, SocketRecv, SocketSend, ZmqMessage, ZmqResult};

use super::Encoded;

/// Bytes kept at most, beside the number of batches: prompts of full steps would come to a gigabyte.
const MAX_BYTES: usize = 256 << 20;
/// How long a subscriber may take to accept its answer.
const PATIENCE: Dur = Dur::from_secs(5);
/// The sequence number -1.
const END: [u8; 8] = [0xff; 8];

/// The newest batches.
#[derive(Debug)]
pub(super) struct Buffer {
    steps: usize,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    batches: VecDeque<Encoded>,
    bytes: usize,
}

impl Buffer {
    pub(super) fn new(steps: usize) -> Buffer {
        Buffer { steps, kept: Mutex::default() }
    }

    pub(super) fn push(&self, batch: Encoded) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.bytes += batch.payload.len();
        kept.batches.push_back(batch);
        while kept.batches.len() > self.steps || kept.bytes > MAX_BYTES {
            let Some(oldest) = kept.batches.pop_front() else { break };
            kept.bytes -= oldest.payload.len();
        }
    }

    fn since(&self, seq: u64) -> Vec<Encoded> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.batches.iter().filter(|b| b.seq >= seq).cloned().collect()
    }
}

/// Answers requests at `listener` until the task is aborted.
pub(super) async fn serve(listener: TcpListener, buffer: Arc<Buffer>, topic: Bytes) -> std::io::Result<JoinHandle<()>> {
    let mut socket = RouterSocket::new();
    socket.bind_listener(listener).await.map_err(std::io::Error::other)?;
    let (send, receive) = socket.split();
    Ok(tokio::spawn(answer_all(send, receive, buffer, topic)))
}

async fn answer_all(mut send: RouterSendHalf, mut receive: RouterRecvHalf, buffer: Arc<Buffer>, topic: Bytes) {
    loop {
        let request = match receive.recv().await {
            Ok(request) => request.into_vec(),
            Err(error) => {
                // Nobody is connected, or somebody left in the middle of a message.
                tracing::debug!(%error, "a request for KV events was not received");
                tokio::time::sleep(Dur::from_millis(10).to_std()).await;
                continue;
            }
        };
        let [client, _, first] = request.as_slice() else {
            tracing::warn!(frames = request.len(), "a request for lost KV events has three frames");
            continue;
        };
        let Some(first) = number(first) else {
            tracing::warn!(bytes = first.len(), "a sequence number of KV events has at most eight bytes");
            continue;
        };
        let answer = answer(&mut send, client, &topic, buffer.since(first));
        match tokio::time::timeout(PATIENCE.to_std(), answer).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "whoever asked for KV events is gone"),
            Err(_) => tracing::warn!("whoever asked for KV events does not read them"),
        }
    }
}

async fn answer(send: &mut RouterSendHalf, client: &Bytes, topic: &Bytes, batches: Vec<Encoded>) -> ZmqResult<()> {
    let message = |topic: &Bytes, seq: [u8; 8], payload: Bytes| {
        let mut message = ZmqMessage::from(client.clone());
        for frame in [Bytes::new(), topic.clone(), Bytes::copy_from_slice(&seq), payload] {
            message.push_back(frame);
        }
        message
    };
    for batch in batches {
        send.send(message(topic, batch.seq.to_be_bytes(), batch.payload)).await?;
    }
    send.send(message(&Bytes::new(), END, Bytes::new())).await
}

/// An unsigned integer of at most eight bytes, big endian.
fn number(bytes: &[u8]) -> Option<u64> {
    (bytes.len() <= 8).then(|| bytes.iter().fold(0, |n, b| n << 8 | u64::from(*b)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_batches_make_room() {
        let buffer = Buffer::new(3);
        for seq in [0, 1, 2, 4, 5] {
            buffer.push(Encoded { seq, payload: Bytes::from_static(b"12345") });
        }
        let since = |seq| buffer.since(seq).iter().map(|b| b.seq).collect::<Vec<_>>();
        assert_eq!((since(0), since(3), since(5), since(6)), (vec![2, 4, 5], vec![4, 5], vec![5], vec![]));
        assert_eq!(buffer.kept.lock().unwrap().bytes, 15);
    }

    #[test]
    fn numbers_are_big_endian() {
        assert_eq!(number(&258u64.to_be_bytes()), Some(258));
        assert_eq!((number(&[]), number(&[1, 2]), number(&[0; 9])), (Some(0), Some(258), None));
    }
}
