//! As much of gRPC over HTTP/2 as a unary call needs: one message behind five bytes, and a status behind the answer.
//!
//! After "gRPC over HTTP2" (grpc/grpc, doc/PROTOCOL-HTTP2.md). By hand and not by a framework, so that nothing is decoded while
//! something is measured, and both protocols share a port. Knows nothing of spans.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, header};
use http_body_util::{BodyExt, Full};

use super::Answer;

/// The path of the call that delivers spans.
pub(super) const EXPORT: &str = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";
/// Status of a call that cannot be read.
pub(super) const INVALID_ARGUMENT: &str = "3";
/// Status of a server that does not do its part.
pub(super) const UNAVAILABLE: &str = "14";

const CONTENT_TYPE: HeaderValue = HeaderValue::from_static("application/grpc");
/// An empty message: not compressed, no bytes.
const EMPTY: &[u8] = &[0; 5];

/// The message of a call, and whether it is compressed; nothing if there is not exactly one.
pub(super) fn message(body: &[u8]) -> Option<(bool, &[u8])> {
    let (compressed, rest) = body.split_first()?;
    let (length, message) = rest.split_first_chunk()?;
    (*compressed <= 1 && u32::from_be_bytes(*length) as usize == message.len()).then_some((*compressed == 1, message))
}

/// The call is done, and its answer says nothing.
pub(super) fn acknowledgement() -> Answer {
    let trailers =
        HeaderMap::from_iter([(header::HeaderName::from_static("grpc-status"), HeaderValue::from_static("0"))]);
    let body = Full::new(Bytes::from_static(EMPTY)).with_trailers(std::future::ready(Some(Ok(trailers))));
    let mut response = Response::new(body.boxed_unsync());
    response.headers_mut().insert(header::CONTENT_TYPE, CONTENT_TYPE);
    response
}

/// The call ends with `status` and no answer.
pub(super) fn ended(status: &'static str) -> Answer {
    let mut response = Response::new(Full::default().boxed_unsync());
    response.headers_mut().insert(header::CONTENT_TYPE, CONTENT_TYPE);
    response.headers_mut().insert("grpc-status", HeaderValue::from_static(status));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_has_exactly_one_message() {
        let check = |body: &[u8], expect: Option<(bool, &[u8])>| assert_eq!(message(body), expect, "{body:?}");
        check(&[0, 0, 0, 0, 2, 7, 8], Some((false, &[7, 8])));
        check(&[1, 0, 0, 0, 1, 9], Some((true, &[9])));
        check(&[0, 0, 0, 0, 0], Some((false, &[])));
        check(&[0, 0, 0, 0, 2, 7], None);
        check(&[0, 0, 0, 0, 1, 7, 8], None);
        check(&[2, 0, 0, 0, 0], None);
        check(&[0, 0, 0], None);
        check(&[], None);
    }
}
