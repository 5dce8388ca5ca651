//! What is sent to whom, and what comes back.

use bytes::Bytes;
use http_body_util::BodyExt;
use serde_json::{Value, json};
use shared::trace::tree::outline;

use super::engines::{Call, header, json as answer, stream, text as body_of};
use super::harness::{BODY, PARAMS, Sidecar, named, prefilled, text};
use crate::pd_proxy::core::{PdProxyConfig, Reason};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

fn place(call: &Call) -> (String, String) {
    let all: Vec<_> = call.head.headers.get_all("traceparent").iter().collect();
    assert_eq!(all.len(), 1, "one traceparent: {all:?}");
    let parts: Vec<&str> = all[0].to_str().unwrap().split('-').collect();
    (parts[1].to_owned(), parts[2].to_owned())
}

#[tokio::test]
async fn one_engine_prefills_and_the_other_decodes() {
    let mut sidecar = Sidecar::start(PdProxyConfig::default()).await;
    let mut request = sidecar.disaggregated();
    let headers = request.headers_mut();
    headers.insert("traceparent", format!("00-{TRACE}-00f067aa0ba902b7-01").parse().unwrap());
    headers.insert("tracestate", "vendor=1".parse().unwrap());
    headers.insert("accept-encoding", "gzip".parse().unwrap());
    headers.insert("authorization", "Bearer k".parse().unwrap());
    let response = sidecar.spawn(request);

    let prefill = sidecar.prefill.call().await;
    let sent: Value = serde_json::from_slice(&prefill.body).unwrap();
    assert_eq!((&sent["max_tokens"], &sent["max_completion_tokens"]), (&json!(1), &json!(1)));
    assert_eq!((&sent["stream"], &sent["x_unknown"]), (&json!(false), &json!(1.5)));
    assert_eq!(sent["kv_transfer_params"]["do_remote_decode"], json!(true));
    assert_eq!(prefill.head.headers["authorization"], "Bearer k");
    assert!(!prefill.head.headers.contains_key("accept-encoding"), "its answer is read here");
    let prefill_place = place(&prefill);
    assert_eq!(
        (prefill.head.uri.path(), &prefill.head.headers["x-request-id"]),
        ("/v1/completions", &"req-1".parse().unwrap())
    );
    prefill.reply.send(prefilled()).unwrap();

    let decode = sidecar.decode.call().await;
    let expect = BODY.strip_suffix('}').unwrap().to_owned() + r#","kv_transfer_params":"# + PARAMS + "}";
    assert_eq!(decode.body, expect, "the caller's own text, and the parameters verbatim");
    assert_eq!(decode.head.headers["accept-encoding"], "gzip");
    assert_eq!(decode.head.headers["tracestate"], "vendor=1");
    for call in [&prefill.head, &decode.head] {
        assert_eq!(call.headers["x-request-id"], "req-1");
        assert!(!call.headers.contains_key("x-prefiller-host-port"));
    }
    let decode_place = place(&decode);
    let (pieces, reply) = stream();
    decode.reply.send(reply).unwrap();
    let mut response = response.await.unwrap();
    assert_eq!(header(&response, "content-type"), "text/event-stream");
    // Each piece is passed on before the next one is there.
    for piece in ["data: {\"a\":1}\n\n", "data: [DO", "NE]\n\n"] {
        pieces.send(Bytes::from_static(piece.as_bytes())).await.unwrap();
        assert_eq!(response.body_mut().frame().await.unwrap().unwrap().into_data().unwrap(), piece);
    }
    drop(pieces);
    assert!(response.body_mut().frame().await.is_none());

    let (done, spans) = sidecar.done().await;
    let calls = named(&spans, "pd_proxy.backend");
    let places: Vec<_> = calls.iter().map(|s| (s.trace_id.to_string(), s.span_id.to_string())).collect();
    assert_eq!(places, [prefill_place, decode_place], "each call is where its engine says");
    assert_eq!(places[0].0, TRACE);
    assert_eq!((done[0].reason, done[0].prefill_attempts, done[0].status), (Reason::PrefillHeader, 1, Some(200)));
    let (root, t) = (named(&spans, "pd_proxy.request")[0], done[0].times);
    assert_eq!(root.parent.unwrap().to_string(), "00f067aa0ba902b7");
    let (prefill, decode) = (t.prefill.unwrap(), t.decode.unwrap());
    assert!(
        t.first_byte.unwrap() > prefill && prefill + decode <= t.total && t.coordination.unwrap() < t.total,
        "{t:?}"
    );
    assert_eq!(spans.len(), 5, "{}", outline(&spans));
    let (first, second) = (named(&spans, "pd_proxy.prefill")[0], named(&spans, "pd_proxy.decode")[0]);
    assert_eq!((first.parent, second.parent), (Some(root.span_id), Some(root.span_id)), "siblings");
    assert_eq!((calls[0].parent, calls[1].parent), (Some(first.span_id), Some(second.span_id)));
    assert!(first.end <= second.start);
}

#[tokio::test]
async fn without_the_header_a_request_passes_as_it_is() {
    let mut sidecar = Sidecar::start(PdProxyConfig::default()).await;
    // What is in it is the engine's to judge.
    const ODD: &str = "{not json";
    let response = sidecar.spawn(sidecar.request(ODD));
    let call = sidecar.decode.call().await;
    assert_eq!(call.body, ODD);
    call.reply.send(answer(422, r#"{"error":{}}"#)).unwrap();
    let response = response.await.unwrap();
    assert_eq!((response.status().as_u16(), body_of(response).await.as_str()), (422, r#"{"error":{}}"#));
    let (done, spans) = sidecar.done().await;
    assert_eq!((done[0].reason, done[0].status, done[0].failure), (Reason::NoPrefillHeader, Some(422), None));
    assert_eq!(text(&spans, "pd_proxy.request", "pd_proxy.reason"), "no_prefill_header");
    let names: Vec<_> = spans.iter().map(|s| s.name.as_ref()).collect();
    assert_eq!(names, ["pd_proxy.backend", "pd_proxy.decode", "pd_proxy.request"]);
}

#[tokio::test]
async fn a_prefill_that_says_nothing_of_its_cache_is_for_nothing() {
    let mut sidecar = Sidecar::start(PdProxyConfig::default()).await;
    let response = sidecar.spawn(sidecar.disaggregated());
    sidecar.prefill.call().await.reply.send(answer(200, r#"{"kv_transfer_params":null}"#)).unwrap();
    let decode = sidecar.decode.call().await;
    assert_eq!(decode.body, BODY, "the request as it came");
    decode.reply.send(answer(200, "{}")).unwrap();
    body_of(response.await.unwrap()).await;
    let (done, spans) = sidecar.done().await;
    assert_eq!(done[0].reason, Reason::NoTransferParams);
    assert_eq!(text(&spans, "pd_proxy.request", "pd_proxy.reason"), "no_transfer_params");
}

#[tokio::test]
async fn what_is_no_inference_passes_unrecorded() {
    let mut sidecar = Sidecar::start(PdProxyConfig::default()).await;
    let get =
        |path: &str| http::Request::get(format!("http://{}{path}", sidecar.addr)).body(Default::default()).unwrap();
    let metrics = sidecar.send(get("/metrics")).await;
    assert!(body_of(metrics).await.contains("vllm:num_requests_waiting"));
    let mut other = get("/v1/other?x=1");
    other.headers_mut().insert("traceparent", format!("00-{TRACE}-00f067aa0ba902b7-01").parse().unwrap());
    let response = sidecar.spawn(other);
    let call = sidecar.decode.call().await;
    assert_eq!(call.head.uri, "/v1/other?x=1");
    assert_eq!(place(&call).1, "00f067aa0ba902b7", "the engine is the caller's child");
    call.reply.send(answer(200, "{}")).unwrap();
    body_of(response.await.unwrap()).await;
    let (done, spans) = sidecar.done().await;
    assert_eq!((done.len(), spans.len()), (0, 0));
}

#[tokio::test]
async fn an_unsampled_trace_goes_on_and_is_not_recorded() {
    let mut sidecar = Sidecar::start(PdProxyConfig::default()).await;
    let mut request = sidecar.disaggregated();
    request.headers_mut().insert("traceparent", format!("00-{TRACE}-00f067aa0ba902b7-00").parse().unwrap());
    request.headers_mut().remove("x-request-id");
    let response = sidecar.spawn(request);
    let prefill = sidecar.prefill.call().await;
    let (flags, id) = (prefill.head.headers["traceparent"].clone(), prefill.head.headers["x-request-id"].clone());
    assert!(flags.to_str().unwrap().ends_with("-00"));
    prefill.reply.send(prefilled()).unwrap();
    let decode = sidecar.decode.call().await;
    assert_eq!(decode.head.headers["x-request-id"], id, "both engines know it by one id");
    assert_ne!(decode.head.headers["traceparent"], flags);
    decode.reply.send(answer(200, "{}")).unwrap();
    body_of(response.await.unwrap()).await;
    let (done, spans) = sidecar.done().await;
    assert_eq!((done.len(), spans.len()), (1, 0));
}
