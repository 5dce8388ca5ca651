//! Metrics on their way to collectors: what arrives is what was counted, by OpenTelemetry's own types.

mod support;

use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Request, Response};
use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_server::{
    MetricsService, MetricsServiceServer,
};
use opentelemetry_proto::tonic::collector::metrics::v1::{ExportMetricsServiceRequest, ExportMetricsServiceResponse};
use opentelemetry_proto::tonic::common::v1::any_value;
use opentelemetry_proto::tonic::metrics::v1::number_data_point::Value as Number;
use opentelemetry_proto::tonic::metrics::v1::{AggregationTemporality, Metric, exemplar, metric};
use prost::Message;
use shared::clock::RunClock;
use shared::ids::{SpanId, TraceId};
use shared::metrics::{Def, Family, Histogram, Key, Kind, Place, Point, Pusher, Source, otlp};
use shared::time::{Anchor, Dur, Time};
use shared::trace::config::{MetricsConfig, OtlpConfig, OtlpProtocol};
use shared::trace::{Resource, Telemetry};
use support::collector::{Answer, Collector, closed_port};

const DONE: Def = Def::new(Kind::Counter, "test.done", "{request}", "Requests done.");
const OPEN: Def = Def::new(Kind::UpDownCounter, "test.open", "{request}", "Requests open.");
const SHARE: Def = Def::new(Kind::Gauge, "test.share", "1", "A share.");
const TIME: Def = Def::new(Kind::Histogram, "test.time", "s", "Time.");
const ROUTE: Key = Key::called("http.route", "route");

fn place() -> Place {
    Place { trace_id: TraceId::new(0xabc).expect("not zero"), span_id: SpanId::new(0xdef).expect("not zero") }
}

fn families() -> Vec<Family> {
    let time = Histogram::seconds(&[0.5, 1.0]);
    time.record(Dur::from_millis(750), Some((place(), Time::from_nanos(7))));
    time.record(Dur::from_secs(2), None);
    vec![
        DONE.family(vec![Point::with(ROUTE, "/a", 3u64), Point::with(ROUTE, "/b", u64::MAX)]),
        OPEN.alone(-2i64),
        SHARE.alone(0.25),
        TIME.alone(time.read()),
    ]
}

/// The only resource's attributes as text, its scope's name, and its metrics.
fn taken_apart(request: ExportMetricsServiceRequest) -> (Vec<String>, String, Vec<Metric>) {
    let [group] = <[_; 1]>::try_from(request.resource_metrics).expect("one resource");
    let attributes = group.resource.expect("a resource").attributes.into_iter().map(|kv| {
        let Some(any_value::Value::StringValue(text)) = kv.value.and_then(|v| v.value) else { panic!("no text") };
        format!("{}={text}", kv.key)
    });
    let attributes = attributes.collect();
    let [scope] = <[_; 1]>::try_from(group.scope_metrics).expect("one scope");
    (attributes, scope.scope.expect("a scope").name, scope.metrics)
}

#[test]
fn what_is_encoded_decodes() {
    let anchor = Anchor::from_unix_nanos(1_000);
    let bytes = otlp::encode(&families(), &Resource::new("gateway", "0"), anchor, Time::from_nanos(50));
    let request = ExportMetricsServiceRequest::decode(&bytes[..]).expect("OTLP");
    let (attributes, scope, metrics) = taken_apart(request);
    assert_eq!(attributes[..2], ["service.name=gateway", "service.instance.id=0"]);
    assert!(!scope.is_empty());
    let names: Vec<_> = metrics.iter().map(|m| (m.name.as_str(), m.unit.as_str(), m.description.as_str())).collect();
    let expect = [DONE, OPEN, SHARE, TIME].map(|d| (d.name, d.unit, d.brief));
    assert_eq!(names, expect);

    let cumulative = AggregationTemporality::Cumulative as i32;
    let Some(metric::Data::Sum(done)) = &metrics[0].data else { panic!("{:?}", metrics[0]) };
    assert_eq!((done.aggregation_temporality, done.is_monotonic, done.data_points.len()), (cumulative, true, 2));
    let point = &done.data_points[0];
    assert_eq!(
        (point.start_time_unix_nano, point.time_unix_nano, &point.value),
        (1_000, 1_050, &Some(Number::AsInt(3)))
    );
    assert_eq!(point.attributes[0].key, "http.route");
    assert_eq!(done.data_points[1].value, Some(Number::AsInt(i64::MAX)), "what does not fit is the largest number");
    let Some(metric::Data::Sum(open)) = &metrics[1].data else { panic!("{:?}", metrics[1]) };
    assert_eq!((open.is_monotonic, &open.data_points[0].value), (false, &Some(Number::AsInt(-2))));
    let Some(metric::Data::Gauge(share)) = &metrics[2].data else { panic!("{:?}", metrics[2]) };
    assert_eq!(share.data_points[0].value, Some(Number::AsDouble(0.25)));

    let Some(metric::Data::Histogram(time)) = &metrics[3].data else { panic!("{:?}", metrics[3]) };
    assert_eq!(time.aggregation_temporality, cumulative);
    let point = &time.data_points[0];
    assert_eq!((point.count, point.sum), (2, Some(2.75)));
    assert_eq!((&point.bucket_counts[..], &point.explicit_bounds[..]), (&[0, 1, 1][..], &[0.5, 1.0][..]));
    let [exemplar] = &point.exemplars[..] else { panic!("{:?}", point.exemplars) };
    assert_eq!((exemplar.time_unix_nano, &exemplar.value), (1_007, &Some(exemplar::Value::AsDouble(0.75))));
    let ids = (0xabcu128.to_be_bytes().to_vec(), 0xdefu64.to_be_bytes().to_vec());
    assert_eq!((exemplar.trace_id.clone(), exemplar.span_id.clone()), ids);
}

/// Keeps what is pushed to it.
#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Vec<(http::HeaderMap, ExportMetricsServiceRequest)>>>);

impl Kept {
    fn push(&self, headers: http::HeaderMap, request: ExportMetricsServiceRequest) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push((headers, request));
    }
    fn take(&self) -> Vec<(http::HeaderMap, ExportMetricsServiceRequest)> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[tonic::async_trait]
impl MetricsService for Kept {
    async fn export(
        &self,
        request: tonic::Request<ExportMetricsServiceRequest>,
    ) -> Result<tonic::Response<ExportMetricsServiceResponse>, tonic::Status> {
        let headers = request.metadata().clone().into_headers();
        self.push(headers, request.into_inner());
        Ok(tonic::Response::new(ExportMetricsServiceResponse::default()))
    }
}

async fn http(request: Request<Incoming>, kept: Kept) -> Result<Response<Full<Bytes>>, Infallible> {
    let (head, body) = request.into_parts();
    assert_eq!((head.method.as_str(), head.uri.path()), ("POST", "/v1/metrics"));
    let body = body.collect().await.expect("a body").to_bytes();
    kept.push(head.headers, ExportMetricsServiceRequest::decode(&body[..]).expect("OTLP"));
    Ok(Response::new(Full::default()))
}

/// A collector of metrics, by protocol; it ends with the runtime.
fn collector(runtime: &tokio::runtime::Runtime, protocol: OtlpProtocol) -> (Kept, OtlpConfig) {
    let kept = Kept::default();
    let _entered = runtime.enter();
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    let theirs = kept.clone();
    match protocol {
        OtlpProtocol::Grpc => {
            let incoming = tonic::transport::server::TcpIncoming::from(listener);
            let server = tonic::transport::Server::builder().add_service(MetricsServiceServer::new(theirs));
            runtime.spawn(async move { server.serve_with_incoming(incoming).await });
        }
        OtlpProtocol::HttpProtobuf => {
            runtime.spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    let kept = theirs.clone();
                    let service = hyper::service::service_fn(move |request| http(request, kept.clone()));
                    let io = hyper_util::rt::TokioIo::new(stream);
                    tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(io, service));
                }
            });
        }
    }
    let endpoint = match protocol {
        OtlpProtocol::Grpc => url,
        OtlpProtocol::HttpProtobuf => format!("{url}/v1/metrics"),
    };
    (kept, OtlpConfig { endpoint, ..support::otlp(protocol, "") })
}

fn pushing(otlp: Vec<OtlpConfig>, source: Source, interval: Dur) -> Pusher {
    let config = MetricsConfig { otlp, interval, ..MetricsConfig::default() };
    let pusher = Pusher::start(&config, Resource::new("gateway", "0"), RunClock::start(), source);
    pusher.expect("a pusher").expect("there are collectors")
}

#[test]
fn the_last_push_comes_at_the_end_over_either_protocol_to_all_endpoints() {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let (grpc, to_grpc) = collector(&runtime, OtlpProtocol::Grpc);
    let (http, to_http) = collector(&runtime, OtlpProtocol::HttpProtobuf);
    let with_key = |otlp| OtlpConfig { headers: vec![("x-key".to_owned(), "secret".to_owned())], ..otlp };
    let pusher = pushing(vec![with_key(to_grpc), with_key(to_http)], Arc::new(families), Dur::from_secs(3_600));
    let stats = pusher.stop();
    assert!(stats.iter().all(|s| (s.exported, s.dropped.total(), s.batches) == (5, 0, 1)), "{stats:#?}");
    let (mut grpc, mut http) = (grpc.take(), http.take());
    assert_eq!((grpc.len(), http.len()), (1, 1));
    for (headers, request) in [grpc.remove(0), http.remove(0)] {
        assert_eq!(headers["x-key"], "secret");
        assert_eq!(taken_apart(request).2.len(), 4);
    }
}

#[test]
fn pushes_repeat_and_count_on() {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let (kept, to) = collector(&runtime, OtlpProtocol::HttpProtobuf);
    let asked = Arc::new(AtomicU64::new(0));
    let (counts, three) = (Arc::clone(&asked), Arc::new(tokio::sync::Notify::new()));
    let reached = Arc::clone(&three);
    let source: Source = Arc::new(move || {
        let n = counts.fetch_add(1, Ordering::SeqCst) + 1;
        if n == 3 {
            reached.notify_one();
        }
        vec![DONE.alone(n)]
    });
    let pusher = pushing(vec![to], source, Dur::from_millis(1));
    runtime.block_on(three.notified());
    let stats = pusher.stop();
    let values = kept.take().into_iter().map(|(_, request)| {
        let (_, _, metrics) = taken_apart(request);
        let Some(metric::Data::Sum(sum)) = &metrics[0].data else { panic!("{metrics:?}") };
        sum.data_points[0].value
    });
    let values: Vec<_> = values.collect();
    assert!(values.len() >= 4, "{values:?}");
    let expect: Vec<_> = (1..=values.len()).map(|n| Some(Number::AsInt(n as i64))).collect();
    assert_eq!((values, stats[0].exported), (expect, asked.load(Ordering::SeqCst)));
}

#[test]
fn a_collector_that_is_not_there_costs_the_series_only() {
    let closed = OtlpConfig {
        endpoint: format!("http://{}/v1/metrics", closed_port()),
        timeout: Dur::from_millis(200),
        ..support::otlp(OtlpProtocol::HttpProtobuf, "")
    };
    let stats = pushing(vec![closed], Arc::new(families), Dur::from_secs(3_600)).stop();
    assert_eq!((stats[0].exported, stats[0].dropped.export_failed), (0, 5));
    assert!(stats[0].last_error.as_deref().is_some_and(|e| e.contains("onnection refused")), "{stats:?}");
}

#[test]
fn without_a_collector_there_is_no_pusher() {
    let none = Pusher::start(&MetricsConfig::default(), Resource::default(), RunClock::start(), Arc::new(families));
    assert!(none.expect("a good configuration").is_none());
}

/// The telemetry path counts itself, by exporter and by reason.
#[test]
fn telemetry_says_what_it_did() {
    let http = Collector::http(Answer::Accept);
    let refusing = Collector::http(Answer::Refuse(400));
    let to = |c: &Collector| {
        shared::trace::config::ExporterConfig::Otlp(support::otlp(OtlpProtocol::HttpProtobuf, &c.url()))
    };
    let clock = RunClock::start();
    let telemetry = Telemetry::live(support::config(vec![to(&http), to(&refusing)]), clock).expect("telemetry");
    let tracer = telemetry.tracer(Resource::new("test", "one"));
    support::requests(&tracer, clock, 3);
    assert!(telemetry.flush(Dur::from_secs(10)));
    let text = shared::metrics::text::Format::Prometheus.write(&tracer.metrics(), clock.anchor());
    let exporter = |i: u32, more: &str, n: u32| {
        let kind = "otlp_http_span_exporter";
        let labels = format!("otel_component_name=\"{kind}/{i}\",otel_component_type=\"{kind}\"{more}");
        format!("otel_sdk_exporter_span_exported_total{{{labels}}} {n}")
    };
    let processor = |name: &str, more: &str, n: u32| {
        let kind = "batching_span_processor";
        format!("{name}{{otel_component_name=\"{kind}/0\",otel_component_type=\"{kind}\"{more}}} {n}")
    };
    for expect in [
        "otel_sdk_span_started_total 9".to_owned(),
        "igsim_telemetry_records_total 3".to_owned(),
        "igsim_telemetry_records_total{error_type=\"queue_full\"} 0".to_owned(),
        exporter(0, "", 9),
        exporter(1, "", 0),
        exporter(1, ",error_type=\"export_failed\"", 9),
        processor("otel_sdk_processor_span_processed_total", "", 9),
        processor("otel_sdk_processor_span_processed_total", ",error_type=\"queue_full\"", 0),
        processor("otel_sdk_processor_span_queue_size", "", 0),
        processor("otel_sdk_processor_span_queue_capacity", "", 16_384),
    ] {
        assert!(text.lines().any(|l| l == expect), "{expect} is not in\n{text}");
    }
    assert!(text.contains("otel_sdk_exporter_operation_duration_seconds_count{"), "{text}");
}
