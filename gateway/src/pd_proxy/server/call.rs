//! Calls to engines: what is sent, and what a failure means.

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName};
use http::uri::PathAndQuery;
use http::{Method, Request, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper_util::client::legacy::{Client, Error};

use crate::pd_proxy::core::{Failure, Target};
use crate::server::connect::Connector;
use crate::server::connect::timed_out;
use crate::server::reply::end_to_end;
use crate::server::routing::PREFILLER;

/// The client to engines. Bodies are sent whole: they were read to be edited.
pub(super) type Upstream = Client<Connector, Full<Bytes>>;

/// The headers of a caller that travel on. None says where a prefill goes: an engine has no use for it.
pub(super) fn forwarded(inbound: &HeaderMap) -> HeaderMap {
    let mut headers = end_to_end(inbound);
    for name in [header::HOST, header::CONTENT_LENGTH, header::EXPECT, PREFILLER] {
        headers.remove(name);
    }
    headers
}

/// Those of a prefill: its answer is read here, and so it must come as it is.
pub(super) fn of_prefill(headers: &HeaderMap) -> HeaderMap {
    const ENCODINGS: [HeaderName; 2] = [header::ACCEPT_ENCODING, header::CONTENT_ENCODING];
    let mut headers = headers.clone();
    ENCODINGS.iter().for_each(|name| drop(headers.remove(name)));
    headers
}

pub(super) fn request(method: Method, uri: Uri, headers: HeaderMap, body: Bytes) -> Request<Full<Bytes>> {
    let mut request = Request::new(Full::new(body));
    (*request.method_mut(), *request.uri_mut(), *request.headers_mut()) = (method, uri, headers);
    request
}

/// The URL of a path at the engine that prefills.
pub(super) fn prefill_uri(target: &Target, path: &PathAndQuery) -> Result<Uri, Failure> {
    let uri = Uri::builder().scheme("http").authority(target.to_string()).path_and_query(path.clone()).build();
    uri.map_err(|_| Failure::Connect)
}

/// Reads an answer of at most `limit` bytes.
pub(super) async fn whole(body: Incoming, limit: u32) -> Result<Bytes, Failure> {
    match Limited::new(body, limit as usize).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(e) if e.is::<http_body_util::LengthLimitError>() => Err(Failure::BadAnswer),
        Err(_) => Err(Failure::Reset),
    }
}

/// What a failed send means.
pub(super) fn failure_of(error: &Error) -> Failure {
    if timed_out(error) {
        return Failure::Timeout;
    }
    if error.is_connect() { Failure::Connect } else { Failure::Reset }
}
