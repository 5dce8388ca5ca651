//! Asking an engine for batches that were missed.
//!
//! A request is `["", first number]`, big endian; the answer is `["", topic, number, payload]` for each batch that is still kept
//! (without the topic in older vLLM), then one with the number -1.

use std::time::Duration;

use bytes::Bytes;
use zeromq::{DealerSocket, Socket, SocketOptions, SocketRecv, SocketSend, ZmqMessage};

use super::Message;

/// How long connecting may take, and each batch of the answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// More batches than this are not waited for: ten times what an engine keeps.
const MAX_BATCHES: usize = 100_000;
/// The number of the message after the last batch: -1.
const END: u64 = u64::MAX;

/// Hands every batch from number `from` on that `endpoint` still has to `take`. `None` if it could not be asked to the end.
pub(super) async fn ask(endpoint: &str, from: u64, mut take: impl FnMut(Message)) -> Option<usize> {
    let mut options = SocketOptions::default();
    options.connect_timeout(PATIENCE);
    let mut socket = DealerSocket::with_options(options);
    patient(socket.connect(endpoint)).await?;
    let mut request = ZmqMessage::from(Vec::new());
    request.push_back(Bytes::copy_from_slice(&from.to_be_bytes()));
    patient(socket.send(request)).await?;
    for taken in 0..MAX_BATCHES {
        let message = answer(patient(socket.recv()).await?)?;
        if message.seq == END {
            return Some(taken);
        }
        take(message);
    }
    None
}

async fn patient<T, E>(work: impl Future<Output = Result<T, E>>) -> Option<T> {
    tokio::time::timeout(PATIENCE, work).await.ok()?.ok()
}

fn answer(message: ZmqMessage) -> Option<Message> {
    match message.into_vec().as_slice() {
        [_, topic, seq, payload] => Message::of(topic, seq, payload),
        [_, seq, payload] => Message::of(&Bytes::new(), seq, payload),
        _ => None,
    }
}
