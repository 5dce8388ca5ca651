//! Addresses, answers and queries as they travel.

use super::*;

#[test]
fn an_address_is_checked_and_credentials_are_not_repeated() {
    let check = |url: &str, expect: &str| {
        assert_eq!(Tempo::new(url, "").unwrap_err().to_string(), expect);
    };
    check("127.0.0.1", "127.0.0.1: expected http:// or https://");
    check("ftp://host", "ftp://host: expected http:// or https://");
    check("http://me:secret@host:1", "http://host:1: found credentials in a URL, expected them in TEMPO_HEADERS");
    check("http://host/?a=b", "http://host/?a=b: found a query, expected a base address");
    let headers = Tempo::new("http://host", "Authorization").unwrap_err();
    assert_eq!(headers.to_string(), "TEMPO_HEADERS: expected NAME=VALUE with commas between");
    for bad in ["", "runs/x", "http://", "http://h/?q=1"] {
        assert!(matches!(Tempo::new(bad, ""), Err(TempoError::Address(_))), "{bad}");
    }
    let tempo = Tempo::new("http://host/tempo/", "X-Scope-OrgID=a,Authorization=Basic eA==").unwrap();
    assert_eq!(format!("{tempo:?}"), "Tempo(http://host/tempo)");
    let headers = tempo.remote.headers();
    assert_eq!((headers["x-scope-orgid"].as_bytes(), headers.len()), (&b"a"[..], 2));
}

#[test]
fn a_search_is_read() {
    let answer = r#"{"traces": [{"traceID": "1f", "rootServiceName": "inference-gateway", "rootTraceName": "gateway.request",
        "startTimeUnixNano": "1767225600000000000", "durationMs": 449, "spanSets": [{"matched": 2, "spans": [
        {"spanID": "00000000000000ab", "name": "vllm.engine.request", "startTimeUnixNano": "1767225600000000001",
         "durationNanos": "449000001", "attributes": [
            {"key": "vllm.request.preemptions", "value": {"intValue": "2"}},
            {"key": "service.instance.id", "value": {"stringValue": "engine-3"}},
            {"key": "gen_ai.latency.e2e", "value": {"doubleValue": 0.25}}]}]}]},
        {"traceID": "2", "rootTraceName": "<root span not yet received>"}], "metrics": {"inspectedTraces": 3}}"#;
    let raw: RawSearch = serde_json::from_str(answer).unwrap();
    let found: Vec<Found> = raw.traces.into_iter().map(|t| t.found().unwrap()).collect();
    assert_eq!(found[0].trace_id, TraceId::new(0x1f).unwrap());
    assert_eq!((found[0].duration_ms, found[0].matched, found[0].root_name.as_str()), (449, 2, "gateway.request"));
    let span = &found[0].spans[0];
    assert_eq!((span.span_id, span.duration_nanos), (SpanId::new(0xab).unwrap(), 449_000_001));
    let keys: Vec<_> = span.attributes.iter().map(|(k, v)| (k.as_str(), shared::trace::tree::value_text(v))).collect();
    let expect =
        [("gen_ai.latency.e2e", "0.25"), ("service.instance.id", "engine-3"), ("vllm.request.preemptions", "2")];
    assert_eq!(keys, expect.map(|(k, v)| (k, v.to_owned())));
    assert_eq!((found[1].root_name.as_str(), found[1].spans.len()), ("", 0));
}

#[test]
fn figures_are_read() {
    let answer = r#"{"series": [{"labels": [{"key": "resource.service.instance.id", "value": {"stringValue": "engine-0"}},
        {"key": "p", "value": {"doubleValue": 0.99}}], "value": 0.5}, {"labels": [], "value": "NaN"}, {}]}"#;
    let raw: RawInstant = serde_json::from_str(answer).unwrap();
    let series: Vec<Series> = raw.series.into_iter().map(RawSeries::series).collect();
    assert_eq!(series[0].labels[1], ("p".to_owned(), Value::F64(0.99)));
    assert_eq!((series[0].value, series[2].value), (0.5, 0.0));
    assert!(series[1].value.is_nan());
}

#[test]
fn a_query_travels_whole() {
    assert_eq!(encode("{ name = \"é\" } | a"), "%7B%20name%20%3D%20%22%C3%A9%22%20%7D%20%7C%20a");
}
