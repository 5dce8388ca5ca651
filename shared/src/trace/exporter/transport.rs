//! The HTTP client and the gRPC channel to a collector, and the SDK's OTLP exporters on top of them.
//!
//! The SDK's exporters retry by themselves; the caller bounds each export in time. The HTTP client is ours, on the hyper stack
//! the project already has: it counts bytes, reads the collector's partial success, and remembers what went wrong, which the SDK
//! hides. The SDK shows no partial success over gRPC.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use http::response::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_otlp::{
    Compression, Protocol, RetryPolicy, SpanExporter, WithExportConfig, WithHttpConfig, WithTonicConfig,
};
use opentelemetry_sdk::trace::{SpanData, SpanExporter as _};
use tonic::metadata::MetadataMap;
use tonic::transport::{Channel, Endpoint};

use crate::time::Dur;
use crate::trace::config::{OtlpConfig, OtlpEncoding, OtlpProtocol, Signal};
use crate::trace::exporter::grpc::GrpcClient;
use crate::trace::exporter::{sdk, tls};
use crate::trace::otlp_url::{OtlpUrl, OtlpUrlError};
use crate::trace::resource::Resource;
use crate::trace::stats::ExporterCounters;

/// The most bytes of a collector's answer that are read.
const MAX_RESPONSE_BYTES: usize = 4 * 1024 * 1024;
/// The most attempts after the first; with the SDK's back-off of 0.1 to 1.6 s they take about 3 s.
pub(super) const MAX_RETRIES: usize = 5;

type Hyper = Client<HttpsConnector<HttpConnector>, Full<Bytes>>;

/// How to reach a collector, checked.
pub(crate) struct Transport {
    otlp: OtlpConfig,
    headers: HeaderMap,
    timeout: Dur,
    wire: Wire,
    signal: Signal,
}

enum Wire {
    Http(Uri, Arc<rustls::ClientConfig>),
    Grpc(Box<Endpoint>),
}

/// What the exporters of all instances share. Made inside the runtime that drives them.
pub(crate) enum Connection {
    Http(Box<Hyper>, Uri),
    Grpc(Channel),
}

impl Transport {
    pub(crate) fn new(otlp: &OtlpConfig, timeout: Dur) -> Result<Transport, String> {
        OtlpUrl::parse(&otlp.endpoint).map_err(OtlpUrlError::allowed)?;
        let mut headers = HeaderMap::new();
        for (name, value) in &otlp.headers {
            let name: HeaderName = name.parse().map_err(|_| format!("`{name}` is no header name"))?;
            let mut value = HeaderValue::from_str(value).map_err(|_| format!("the value of `{name}` is no header"))?;
            value.set_sensitive(true);
            headers.append(name, value);
        }
        let wire = match otlp.protocol {
            OtlpProtocol::HttpProtobuf => {
                let uri = otlp.endpoint.parse().map_err(|_| "no URL".to_owned())?;
                Wire::Http(uri, Arc::new(tls::client(otlp.ca_file.as_deref())?))
            }
            OtlpProtocol::Grpc => {
                let endpoint = Endpoint::from_shared(otlp.endpoint.clone()).map_err(|e| e.to_string())?;
                let secured = endpoint.uri().scheme_str() == Some("https");
                let config = tls::of_channel(otlp.ca_file.as_deref())?;
                let endpoint = if secured { endpoint.tls_config(config).map_err(|e| e.to_string())? } else { endpoint };
                Wire::Grpc(Box::new(endpoint))
            }
        };
        Ok(Transport { otlp: otlp.clone(), headers, timeout, wire, signal: Signal::Traces })
    }

    /// The same for requests of another signal.
    pub(crate) fn carrying(self, signal: Signal) -> Transport {
        Transport { signal, ..self }
    }

    /// Whether the transport tells how many bytes it sends.
    pub(crate) fn counts_bytes(&self) -> bool {
        match (&self.wire, self.otlp.encoding) {
            (Wire::Http(..), _) | (Wire::Grpc(_), OtlpEncoding::Direct) => true,
            (Wire::Grpc(_), OtlpEncoding::Sdk) => false,
        }
    }

    /// The longest time for one export, with its retries.
    pub(super) fn timeout(&self) -> Dur {
        self.timeout
    }

    /// Whether bodies are compressed.
    pub(super) fn gzip(&self) -> bool {
        self.otlp.gzip
    }

    /// The configured headers, for gRPC.
    fn metadata(&self) -> MetadataMap {
        MetadataMap::from_headers(self.headers.clone())
    }

    /// Sends requests over `channel` with the configured headers.
    pub(super) fn grpc_client(&self, channel: Channel, counters: &Arc<ExporterCounters>) -> GrpcClient {
        GrpcClient::new(channel, self.signal.grpc_method(), self.metadata(), self.otlp.gzip, counters)
    }

    /// Sends requests over `client` with the configured headers.
    pub(super) fn http_sender(&self, client: &Hyper, counters: &Arc<ExporterCounters>) -> HttpSender {
        HttpSender { client: client.clone(), headers: self.headers.clone(), counters: Arc::clone(counters) }
    }

    /// Prepares the connection, which is opened on first use.
    pub(crate) fn connect(&self) -> Connection {
        match &self.wire {
            Wire::Grpc(endpoint) => Connection::Grpc(endpoint.connect_lazy()),
            Wire::Http(uri, tls) => {
                let mut tcp = HttpConnector::new();
                tcp.enforce_http(false);
                tcp.set_nodelay(true);
                let tls = HttpsConnectorBuilder::new().with_tls_config(rustls::ClientConfig::clone(tls));
                let connector = tls.https_or_http().enable_http1().wrap_connector(tcp);
                let client = Client::builder(TokioExecutor::new()).build(connector);
                Connection::Http(Box::new(client), uri.clone())
            }
        }
    }

    /// The exporter of one service instance.
    pub(crate) fn exporter(
        &self,
        connection: &Connection,
        resource: &Resource,
        counters: &Arc<ExporterCounters>,
    ) -> Result<InstanceExporter, String> {
        let retry = RetryPolicy::recommended().with_max_retries(MAX_RETRIES);
        let observed = Arc::new(Observed::default());
        let built = match connection {
            Connection::Http(client, _) => {
                let client = OurClient { sender: self.http_sender(client, counters), observed: Arc::clone(&observed) };
                let builder = SpanExporter::builder().with_http().with_http_client(client);
                let builder = builder.with_endpoint(&self.otlp.endpoint).with_protocol(Protocol::HttpBinary);
                let builder = builder.with_timeout(self.timeout.to_std()).with_retry_policy(retry);
                if self.otlp.gzip { builder.with_compression(Compression::Gzip).build() } else { builder.build() }
            }
            Connection::Grpc(channel) => {
                let builder = SpanExporter::builder().with_tonic().with_channel(channel.clone());
                let builder = builder.with_metadata(self.metadata());
                let builder = builder.with_timeout(self.timeout.to_std()).with_retry_policy(retry);
                if self.otlp.gzip { builder.with_compression(Compression::Gzip).build() } else { builder.build() }
            }
        };
        let mut exporter = built.map_err(|e| e.to_string())?;
        exporter.set_resource(&sdk::resource(resource));
        Ok(InstanceExporter { exporter, observed })
    }
}

/// The SDK exporter of one service instance.
pub(crate) struct InstanceExporter {
    exporter: SpanExporter,
    observed: Arc<Observed>,
}

impl InstanceExporter {
    /// Exports, with retries; returns how many spans the collector says it rejected.
    pub(crate) async fn export(&self, data: Vec<SpanData>) -> Result<usize, String> {
        self.observed.rejected.store(0, Ordering::Relaxed);
        match self.exporter.export(data).await {
            Ok(()) => Ok(self.observed.rejected.load(Ordering::Relaxed)),
            Err(error) => Err(self.trouble().unwrap_or_else(|| error.to_string())),
        }
    }

    /// What the transport last complained about.
    pub(crate) fn trouble(&self) -> Option<String> {
        self.observed.trouble.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// What our HTTP client saw and the SDK does not pass on.
#[derive(Debug, Default)]
struct Observed {
    rejected: AtomicUsize,
    trouble: Mutex<Option<String>>,
}

impl Observed {
    fn trouble(&self, text: Option<String>) {
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = text;
    }
}

/// Sends requests with the configured headers, and counts the bytes of those that are accepted.
#[derive(Debug)]
pub(super) struct HttpSender {
    client: Hyper,
    headers: HeaderMap,
    counters: Arc<ExporterCounters>,
}

impl HttpSender {
    pub(super) async fn send(&self, mut request: Request<Bytes>) -> Result<(Parts, Bytes), HttpError> {
        request.headers_mut().extend(self.headers.clone());
        let size = request.body().len();
        let response = self.client.request(request.map(Full::new)).await?;
        let (head, body) = response.into_parts();
        let body = Limited::new(body, MAX_RESPONSE_BYTES).collect().await?.to_bytes();
        if head.status.is_success() {
            self.counters.sent_bytes(size);
        }
        Ok((head, body))
    }
}

/// Our HTTP client under the SDK's exporter.
#[derive(Debug)]
struct OurClient {
    sender: HttpSender,
    observed: Arc<Observed>,
}

impl OurClient {
    async fn send(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (head, body) = self.sender.send(request).await?;
        if head.status.is_success() {
            self.observed.rejected.store(rejected_spans(&body), Ordering::Relaxed);
            self.observed.trouble(None);
        } else {
            self.observed.trouble(Some(format!("the collector answered {}", head.status)));
        }
        Ok(Response::from_parts(head, body))
    }
}

impl HttpClient for OurClient {
    fn send_bytes<'a, 'b>(
        &'a self,
        request: Request<Bytes>,
    ) -> Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'b>>
    where
        'a: 'b,
        Self: 'b,
    {
        Box::pin(async move {
            let answer = self.send(request).await;
            if let Err(error) = &answer {
                self.observed.trouble(Some(chain(&**error)));
            }
            answer
        })
    }
}

/// An error with its causes.
pub(super) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// `partial_success.rejected_spans` of an `ExportTraceServiceResponse` (fields 1 and 1), 0 if there is none.
pub(super) fn rejected_spans(body: &[u8]) -> usize {
    fn varint(bytes: &mut &[u8]) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (first, rest) = bytes.split_first()?;
            *bytes = rest;
            value |= u64::from(first & 0x7f) << shift;
            if first & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }
    fn read(mut body: &[u8]) -> Option<u64> {
        (varint(&mut body)? == 0x0a).then_some(())?;
        let len = usize::try_from(varint(&mut body)?).ok()?;
        let mut partial = body.get(..len)?;
        (varint(&mut partial)? == 0x08).then_some(())?;
        varint(&mut partial)
    }
    read(body).and_then(|n| usize::try_from(n).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::rejected_spans;

    #[test]
    fn rejected_spans_are_read_from_a_partial_success() {
        for (body, expect) in [
            (&[][..], 0),
            (&[0x0a, 0x00], 0),
            (&[0x0a, 0x02, 0x08, 0x05], 5),
            (&[0x0a, 0x03, 0x08, 0x80, 0x02], 256),
            (&[0x0a, 0x04, 0x08, 0x01, 0x12, 0x00], 1),
            (&[0x0a, 0x02, 0x12, 0x00], 0),
            (&[0x0a, 0x7f], 0),
            (b"<html>", 0),
        ] {
            assert_eq!(rejected_spans(body), expect, "{body:?}");
        }
    }
}
