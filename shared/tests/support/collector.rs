//! Collectors in the test's own process, well-behaved and otherwise.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io::Read;
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Request, Response, StatusCode};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, Span};
use prost::Message;
use tonic::codec::CompressionEncoding;

/// What a collector answers.
#[derive(Clone, Debug)]
pub enum Answer {
    /// Everything is fine.
    Accept,
    /// HTTP: this status. gRPC: RESOURCE_EXHAUSTED without a hint to retry, for any status.
    Refuse(u16),
    /// Unavailable so many times, then fine.
    RefuseFirst(u32),
    /// Accepted, with this answer in protobuf.
    Body(Vec<u8>),
}

/// A collector that keeps what it gets.
#[derive(Clone)]
pub struct Collector {
    pub address: SocketAddr,
    kept: Arc<Kept>,
    _runtime: Arc<tokio::runtime::Runtime>,
}

struct Kept {
    answer: Answer,
    seen: AtomicU32,
    spans: Mutex<Vec<ResourceSpans>>,
    headers: Mutex<Vec<http::HeaderMap>>,
    queries: Mutex<Vec<String>>,
}

impl Collector {
    pub fn grpc(answer: Answer) -> Collector {
        Collector::start(answer, |listener, kept| async move {
            let service = TraceServiceServer::new(Grpc(kept)).accept_compressed(CompressionEncoding::Gzip);
            let incoming = tonic::transport::server::TcpIncoming::from(listener);
            let server = tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming);
            server.await.expect("the collector serves");
        })
    }

    pub fn http(answer: Answer) -> Collector {
        Collector::start(answer, |listener, kept| async move {
            loop {
                let (stream, _) = listener.accept().await.expect("the collector accepts");
                let kept = Arc::clone(&kept);
                let service = hyper::service::service_fn(move |request| serve(request, Arc::clone(&kept)));
                let io = hyper_util::rt::TokioIo::new(stream);
                tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(io, service));
            }
        })
    }

    fn start<F: Future<Output = ()> + Send + 'static>(
        answer: Answer,
        serve: impl FnOnce(tokio::net::TcpListener, Arc<Kept>) -> F,
    ) -> Collector {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        listener.set_nonblocking(true).expect("a non-blocking socket");
        let address = listener.local_addr().expect("an address");
        let spans = Mutex::default();
        let (headers, queries) = (Mutex::default(), Mutex::default());
        let kept = Arc::new(Kept { answer, seen: AtomicU32::new(0), spans, headers, queries });
        {
            let _entered = runtime.enter();
            let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
            runtime.spawn(serve(listener, Arc::clone(&kept)));
        }
        Collector { address, kept, _runtime: Arc::new(runtime) }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Requests seen, refused ones included.
    pub fn requests(&self) -> u32 {
        self.kept.seen.load(Ordering::SeqCst)
    }

    pub fn headers(&self) -> Vec<http::HeaderMap> {
        self.kept.headers.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The queries of the URLs that were asked for over HTTP.
    pub fn queries(&self) -> Vec<String> {
        self.kept.queries.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn spans(&self) -> Vec<ResourceSpans> {
        self.kept.spans.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Kept {
    /// Keeps a request or says that it is refused; `None` is accepted.
    fn take(&self, headers: http::HeaderMap, request: ExportTraceServiceRequest) -> Option<u16> {
        self.headers.lock().unwrap_or_else(PoisonError::into_inner).push(headers);
        let before = self.seen.fetch_add(1, Ordering::SeqCst);
        match self.answer {
            Answer::Refuse(status) => return Some(status),
            Answer::RefuseFirst(n) if before < n => return Some(503),
            Answer::Accept | Answer::RefuseFirst(_) | Answer::Body(_) => {}
        }
        self.spans.lock().unwrap_or_else(PoisonError::into_inner).extend(request.resource_spans);
        None
    }
}

struct Grpc(Arc<Kept>);

#[tonic::async_trait]
impl TraceService for Grpc {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        let headers = request.metadata().clone().into_headers();
        match (self.0.take(headers, request.into_inner()), &self.0.answer) {
            (None, Answer::Body(body)) => {
                Ok(tonic::Response::new(ExportTraceServiceResponse::decode(&body[..]).expect("an answer")))
            }
            (None, _) => Ok(tonic::Response::new(ExportTraceServiceResponse::default())),
            (Some(_), Answer::RefuseFirst(_)) => Err(tonic::Status::unavailable("later")),
            (Some(_), _) => Err(tonic::Status::resource_exhausted("full")),
        }
    }
}

async fn serve(request: Request<Incoming>, kept: Arc<Kept>) -> Result<Response<Full<Bytes>>, Infallible> {
    let (head, body) = request.into_parts();
    assert_eq!((head.method.as_str(), head.uri.path()), ("POST", "/v1/traces"));
    kept.queries.lock().unwrap_or_else(PoisonError::into_inner).extend(head.uri.query().map(str::to_owned));
    let mut bytes = body.collect().await.expect("a body").to_bytes().to_vec();
    if head.headers.get("content-encoding").is_some_and(|v| v == "gzip") {
        let mut plain = Vec::new();
        flate2::read::GzDecoder::new(&bytes[..]).read_to_end(&mut plain).expect("gzip");
        bytes = plain;
    }
    let decoded = ExportTraceServiceRequest::decode(&bytes[..]).expect("protobuf");
    let refused = kept.take(head.headers, decoded);
    let body = match &kept.answer {
        Answer::Body(body) => body.clone(),
        // An empty partial success, as Tempo answers.
        Answer::Accept | Answer::Refuse(_) | Answer::RefuseFirst(_) => vec![0x0a, 0x00],
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    if let Some(status) = refused {
        *response.status_mut() = StatusCode::from_u16(status).expect("a status");
    }
    Ok(response)
}

/// The address of a port that nobody listens on.
pub fn closed_port() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address")
}

/// Listens and lets connections pile up without ever answering.
pub fn silent() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    (listener, url)
}

/// Spans by resource, each list in the order of span ids, so that two transports can be compared.
pub fn by_resource(groups: Vec<ResourceSpans>) -> BTreeMap<String, Vec<Span>> {
    let mut all: BTreeMap<String, Vec<Span>> = BTreeMap::new();
    for group in groups {
        let mut resource = group.resource.expect("a resource");
        resource.attributes.sort_by(|a, b| a.key.cmp(&b.key));
        for scope in group.scope_spans {
            let name = scope.scope.map(|s| format!("{} {}", s.name, s.version));
            all.entry(format!("{:?} {name:?}", resource.attributes)).or_default().extend(scope.spans);
        }
    }
    all.values_mut().for_each(|spans| spans.sort_by(|a, b| (&a.trace_id, &a.span_id).cmp(&(&b.trace_id, &b.span_id))));
    all
}
