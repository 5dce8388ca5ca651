//! OTLP over gRPC for messages that are encoded already: a codec that passes bytes through, and what is retried.
//!
//! Services and methods are those of opentelemetry-proto (`collector/trace/v1/trace_service.proto` and its like for metrics).

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use bytes::{Buf, BufMut, Bytes};
use http::uri::PathAndQuery;
use http_body_util::BodyExt;
use tonic::body::Body;
use tonic::client::{Grpc, GrpcService};
use tonic::codec::{Codec, CompressionEncoding, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::metadata::MetadataMap;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tonic_types::StatusExt;

use crate::trace::exporter::direct::{Again, Refusal};
use crate::trace::exporter::transport::{chain, rejected_spans};
use crate::trace::stats::ExporterCounters;

/// A client of one of a collector's services.
pub(super) struct GrpcClient {
    channel: Channel,
    /// The method that takes requests.
    method: &'static str,
    metadata: MetadataMap,
    gzip: bool,
    counters: Arc<ExporterCounters>,
}

impl GrpcClient {
    pub(super) fn new(
        channel: Channel,
        method: &'static str,
        metadata: MetadataMap,
        gzip: bool,
        counters: &Arc<ExporterCounters>,
    ) -> GrpcClient {
        GrpcClient { channel, method, metadata, gzip, counters: Arc::clone(counters) }
    }

    /// Sends an export request; returns how many spans or series the collector says it rejected.
    pub(super) async fn export(&self, message: Bytes) -> Result<usize, Refusal> {
        let sent = Arc::new(AtomicUsize::new(0));
        let mut grpc = Grpc::new(Counted { channel: self.channel.clone(), sent: Arc::clone(&sent) });
        if self.gzip {
            let gzip = CompressionEncoding::Gzip;
            grpc = grpc.send_compressed(gzip).accept_compressed(gzip);
        }
        grpc.ready().await.map_err(|error| Refusal { text: chain(&error), again: Again::Soon })?;
        let mut request = Request::new(message);
        *request.metadata_mut() = self.metadata.clone();
        let answer = grpc.unary(request, PathAndQuery::from_static(self.method), ReadyBytes).await;
        let rejected = answer.map_err(|status| refused(&status))?.into_inner();
        self.counters.sent_bytes(sent.load(Ordering::Relaxed));
        Ok(rejected)
    }
}

fn refused(status: &Status) -> Refusal {
    let asked = status.get_details_retry_info().and_then(|info| info.retry_delay);
    let again = match (status.code(), asked) {
        (Code::Unavailable | Code::ResourceExhausted, Some(pause)) => Again::After(pause),
        (
            Code::Cancelled
            | Code::DeadlineExceeded
            | Code::Aborted
            | Code::OutOfRange
            | Code::Unavailable
            | Code::DataLoss,
            _,
        ) => Again::Soon,
        _ => Again::Never,
    };
    let cause = std::error::Error::source(status).map(|cause| format!(": {}", chain(cause))).unwrap_or_default();
    Refusal { text: format!("the collector answered {:?}: {}{cause}", status.code(), status.message()), again }
}

/// Counts the bytes of request bodies, frames and compression included.
struct Counted {
    channel: Channel,
    sent: Arc<AtomicUsize>,
}

impl GrpcService<Body> for Counted {
    type ResponseBody = <Channel as GrpcService<Body>>::ResponseBody;
    type Error = <Channel as GrpcService<Body>>::Error;
    type Future = <Channel as GrpcService<Body>>::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        GrpcService::poll_ready(&mut self.channel, cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let sent = Arc::clone(&self.sent);
        let counted = request.map(|body| {
            Body::new(body.map_frame(move |frame| {
                sent.fetch_add(frame.data_ref().map_or(0, Bytes::len), Ordering::Relaxed);
                frame
            }))
        });
        GrpcService::call(&mut self.channel, counted)
    }
}

/// Messages go out as they are; of an answer only the number of rejected spans is read.
#[derive(Clone, Copy)]
struct ReadyBytes;

impl Codec for ReadyBytes {
    type Encode = Bytes;
    type Decode = usize;
    type Encoder = ReadyBytes;
    type Decoder = ReadyBytes;

    fn encoder(&mut self) -> ReadyBytes {
        ReadyBytes
    }
    fn decoder(&mut self) -> ReadyBytes {
        ReadyBytes
    }
}

impl Encoder for ReadyBytes {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, message: Bytes, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        out.reserve(message.len());
        out.put(message);
        Ok(())
    }
}

impl Decoder for ReadyBytes {
    type Item = usize;
    type Error = Status;

    fn decode(&mut self, message: &mut DecodeBuf<'_>) -> Result<Option<usize>, Status> {
        let bytes = message.copy_to_bytes(message.remaining());
        Ok(Some(rejected_spans(&bytes)))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tonic_types::{ErrorDetails, StatusExt};

    use super::*;

    #[test]
    fn what_is_retried_over_grpc() {
        let with_hint =
            |code| Status::with_error_details(code, "", ErrorDetails::with_retry_info(Some(Duration::from_secs(3))));
        let after = Again::After(Duration::from_secs(3));
        for (status, expect) in [
            (Status::unavailable(""), Again::Soon),
            (with_hint(Code::Unavailable), after),
            (Status::resource_exhausted(""), Again::Never),
            (with_hint(Code::ResourceExhausted), after),
            (Status::data_loss(""), Again::Soon),
            (Status::invalid_argument(""), Again::Never),
            (with_hint(Code::InvalidArgument), Again::Never),
            (Status::unauthenticated(""), Again::Never),
        ] {
            assert_eq!(refused(&status).again, expect, "{status:?}");
        }
    }
}
