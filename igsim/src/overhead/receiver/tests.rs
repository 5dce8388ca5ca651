//! The receiver over plain HTTP; `tests/overhead_load.rs` has real exporters send to it.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span};
use prost::Message;
use tokio::runtime::Runtime;

use super::*;

const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

fn started(limits: Limits) -> (Runtime, Receiver) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let receiver = {
        let _entered = runtime.enter();
        Receiver::start(LOOPBACK, limits).unwrap()
    };
    (runtime, receiver)
}

/// A body with one whole trace of two spans.
fn two_spans(trace: u128) -> Vec<u8> {
    let span = |id: u64, parent: &[u8]| Span {
        trace_id: trace.to_be_bytes().to_vec(),
        span_id: id.to_be_bytes().to_vec(),
        parent_span_id: parent.to_vec(),
        ..Span::default()
    };
    let spans = vec![span(1, &[]), span(2, &1u64.to_be_bytes())];
    let scope_spans = vec![ScopeSpans { spans, ..ScopeSpans::default() }];
    let resource_spans = vec![ResourceSpans { scope_spans, ..ResourceSpans::default() }];
    ExportTraceServiceRequest { resource_spans }.encode_to_vec()
}

/// Posts a body on a connection of its own: the status, 0 if there is none.
fn post(receiver: &Receiver, headers: &str, body: &[u8]) -> u16 {
    post_to(receiver, "POST /v1/traces", &format!("content-type: application/x-protobuf\r\n{headers}"), body)
}

fn post_to(receiver: &Receiver, line: &str, headers: &str, body: &[u8]) -> u16 {
    let Ok(mut stream) = TcpStream::connect(receiver.address()) else { return 0 };
    let length = body.len();
    let head = format!("{line} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}content-length: {length}\r\n\r\n");
    let mut answer = String::new();
    let done = stream
        .write_all(head.as_bytes())
        .and_then(|()| stream.write_all(body))
        .and_then(|()| stream.read_to_string(&mut answer));
    done.ok().and_then(|_| answer.get(9..12)?.parse().ok()).unwrap_or(0)
}

#[test]
fn bodies_are_counted_by_mark_and_decoded_later() {
    let (_runtime, receiver) = started(Limits::default());
    let body = two_spans(1);
    assert_eq!(post(&receiver, "", &body), 200);
    assert_eq!(post(&receiver, "", &two_spans(2)), 200);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&two_spans(3)).unwrap();
    let gzip = gzip.finish().unwrap();
    let taken = receiver.take();
    assert_eq!(taken, Taken { requests: 2, bytes: 2 * body.len() as u64, ..Taken::default() });
    assert_eq!(post(&receiver, "content-encoding: gzip\r\n", &gzip), 200);
    assert_eq!(receiver.take(), Taken { mark: 1, requests: 1, bytes: gzip.len() as u64, ..Taken::default() });
    assert_eq!(receiver.take(), Taken { mark: 2, ..Taken::default() });
    let decoded = receiver.decode().unwrap();
    let spans: Vec<_> = decoded.marks.iter().map(|(mark, m)| (*mark, m.spans, m.traces, m.incomplete)).collect();
    assert_eq!(spans, [(0, 4, 2, 0), (1, 2, 1, 0)]);
    assert_eq!(receiver.decode().unwrap(), Decoded::default(), "what was decoded is forgotten");
}

#[test]
fn health_is_switched_while_it_runs() {
    let (runtime, receiver) = started(Limits::default());
    let turn = |health| runtime.block_on(receiver.set_health(health)).unwrap();
    let body = two_spans(1);
    for _ in 0..2 {
        turn(Health::Refusing);
        assert_eq!(post(&receiver, "", &body), 503);
        turn(Health::Absent);
        assert_eq!(post(&receiver, "", &body), 0);
        turn(Health::Healthy);
        assert_eq!(post(&receiver, "", &body), 200);
    }
    turn(Health::Slow);
    let clock = shared::clock::RunClock::start();
    assert_eq!(post(&receiver, "", &body), 200);
    assert!(clock.now().since(shared::time::Time::ZERO) >= SLOW);
    let taken = receiver.take();
    assert_eq!((taken.requests, taken.refused), (3, 2));
    assert_eq!(receiver.decode().unwrap().total().spans, 6, "what was refused is not kept");
}

#[test]
fn an_absent_receiver_breaks_off_its_connections() {
    let (runtime, receiver) = started(Limits::default());
    let mut open = TcpStream::connect(receiver.address()).unwrap();
    // An answer on it says that it was accepted.
    open.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    assert!(open.read(&mut [0; 1024]).unwrap() > 0);
    runtime.block_on(receiver.set_health(Health::Absent)).unwrap();
    assert!(matches!(open.read(&mut [0; 1024]), Ok(0) | Err(_)));
}

#[test]
fn what_finds_no_room_is_counted_and_still_acknowledged() {
    let body = two_spans(1);
    let (_runtime, receiver) = started(Limits { memory: body.len(), storage: 2 * body.len() as u64 });
    for _ in 0..5 {
        assert_eq!(post(&receiver, "", &body), 200);
    }
    let taken = receiver.take();
    assert_eq!((taken.requests, taken.not_kept), (5, 2));
    assert_eq!(receiver.decode().unwrap().total().spans, 6);
}

#[test]
fn what_is_no_export_of_traces_is_refused() {
    let (_runtime, receiver) = started(Limits::default());
    let json = "content-type: application/json\r\n";
    let protobuf = "content-type: application/x-protobuf\r\n";
    assert_eq!(post_to(&receiver, "POST /v1/metrics", protobuf, b""), 404);
    assert_eq!(post_to(&receiver, "PUT /v1/traces", protobuf, b""), 404);
    assert_eq!(post_to(&receiver, "POST /v1/traces", json, b"{}"), 415);
    assert_eq!(post(&receiver, "content-encoding: br\r\n", b""), 415);
    assert_eq!(receiver.take(), Taken::default());
    assert_eq!(
        Receiver::start("0.0.0.0:0".parse().unwrap(), Limits::default()).unwrap_err().kind(),
        io::ErrorKind::AddrNotAvailable
    );
}

#[test]
fn grpc_is_taken_on_the_same_port() {
    use opentelemetry_proto::tonic::collector::trace::v1::trace_service_client::TraceServiceClient;
    use tonic::codec::CompressionEncoding;

    let (runtime, receiver) = started(Limits::default());
    let request = |trace| ExportTraceServiceRequest::decode(two_spans(trace).as_slice()).unwrap();
    let url = format!("http://{}", receiver.address());
    let mut client = runtime.block_on(TraceServiceClient::connect(url)).unwrap();
    let answer = runtime.block_on(client.export(request(1))).unwrap();
    assert_eq!(answer.into_inner().partial_success, None);
    assert_eq!(post(&receiver, "", &two_spans(2)), 200);
    let mut packed = client.clone().send_compressed(CompressionEncoding::Gzip);
    runtime.block_on(packed.export(request(3))).unwrap();
    let taken = receiver.take();
    assert_eq!((taken.requests, taken.not_kept), (3, 0));
    runtime.block_on(receiver.set_health(Health::Refusing)).unwrap();
    let refused = runtime.block_on(client.export(request(4))).unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Unavailable);
    assert_eq!(receiver.take().refused, 1);
    let decoded = receiver.decode().unwrap();
    let marked = &decoded.marks[&0];
    assert_eq!((marked.spans, marked.traces, marked.incomplete), (6, 3, 0));
}
