//! Every kind of fault over real sockets: a caller sees a clear error or a whole answer, and nothing hangs.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use engine_sim::core::faults::{Down, FaultKind};
use http::{HeaderValue, Request};
use shared::trace::check::{CheckOptions, check_spans};
use shared::trace::{Span, Status, Value};

use crate::harness::{COMPLETIONS, Running, chunks, content, instant, paced};

const LONG: &str = r#"{"prompt":"hello","max_tokens":100000,"ignore_eos":true}"#;
const LONG_STREAM: &str = r#"{"prompt":"hello","max_tokens":100000,"ignore_eos":true,"stream":true}"#;
const SHORT: &str = r#"{"prompt":"hello","max_tokens":4,"ignore_eos":true}"#;
const SHORT_STREAM: &str = r#"{"prompt":"hello","max_tokens":4,"ignore_eos":true,"stream":true}"#;

/// A test that waits for ever fails instead.
async fn soon<T>(what: &str, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), work).await.unwrap_or_else(|_| panic!("{what}: nothing happens"))
}

/// Asks again until `holds`.
async fn until<T, F: Future<Output = T>>(what: &str, ask: impl Fn() -> F, holds: impl Fn(&T) -> bool) -> T {
    soon(what, async {
        loop {
            let found = ask().await;
            if holds(&found) {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await
}

async fn health(server: &Running) -> Option<u16> {
    server.attempt(Request::get(server.url("/health")).body(Default::default()).unwrap()).await.0
}

/// Requests of the run: their `error.type` and the faults that struck them.
fn roots(spans: &[Span]) -> Vec<(Option<String>, Vec<String>)> {
    let findings = check_spans(spans, &CheckOptions::default());
    assert!(findings.is_empty(), "{findings:?}");
    let mut all = Vec::new();
    for root in spans.iter().filter(|s| s.name == "vllm.engine.request") {
        let error = root.get("error.type").map(|v| format!("{v:?}"));
        let failed = matches!(root.status, Status::Error(_));
        let http = error.as_deref().is_some_and(|e| e.contains("\"4"));
        assert_eq!(failed, error.is_some() && !http, "{error:?}");
        let faults = root.events.iter().filter(|e| e.name == "vllm.fault_injected");
        all.push((error, faults.map(|e| format!("{:?}", e.attrs[0].1)).collect()));
    }
    all
}

fn check_roots(spans: &[Span], requests: usize, error: Option<&str>, fault: Option<&str>) {
    let roots = roots(spans);
    assert_eq!(roots.len(), requests);
    for (found, faults) in roots {
        assert_eq!(found.is_some(), error.is_some(), "{found:?}");
        assert!(error.is_none_or(|e| found.as_deref().is_some_and(|f| f.contains(e))), "{found:?} for {error:?}");
        assert_eq!(faults.len(), usize::from(fault.is_some()), "{faults:?}");
        assert!(fault.is_none_or(|f| faults[0].contains(f)), "{faults:?} for {fault:?}");
    }
}

/// Lets an engine with an open stream and an open whole answer go down, and come back.
async fn check_fall(fault: &str, down: Down, error_type: &str) {
    let server = Arc::new(Running::faulty(paced(), &[], false).await);
    let attempt = |body: &'static str| {
        let server = Arc::clone(&server);
        tokio::spawn(async move { server.attempt(server.request(COMPLETIONS, body)).await })
    };
    let (whole, stream) = (attempt(LONG), attempt(LONG_STREAM));
    server.until("running", |s| s.running == 2).await;
    server.inject(&format!(r#"{{"kind": "{fault}"}}"#));
    let whole = soon("the whole answer", whole).await.unwrap();
    let stream = soon("the stream", stream).await.unwrap();
    let dead = r#""message":"The server had an error while processing your request.","type":"InternalServerError""#;
    match down {
        Down::Process => {
            assert_eq!((whole.0, whole.2), (None, false), "no answer at all");
            assert!(!stream.2 && !stream.1.contains("error"), "{}", stream.1);
        }
        Down::Core => {
            assert_eq!((whole.0, whole.2), (Some(500), true));
            assert!(whole.1.contains(dead), "{}", whole.1);
            assert!(stream.2 && stream.1.contains(dead) && stream.1.ends_with("data: [DONE]\n\n"), "{}", stream.1);
        }
    }
    // The port is closed until the engine is back.
    until("the port is closed", || health(&server), Option::is_none).await;
    assert_eq!(server.engine.inspect(|e| e.down()), Some(down));
    server.mend();
    until("the port is open", || health(&server), |status| *status == Some(200)).await;
    assert_eq!(
        server
            .metric("vllm:generation_tokens_total{model_name=\"meta-llama/Llama-3.1-8B-Instruct\",engine=\"0\"}")
            .await,
        0.0
    );
    let answer = soon("an answer", server.post(COMPLETIONS, SHORT)).await;
    assert_eq!(answer.status, 200);
    let counts = server.engine.inspect(|e| e.fault_counts());
    assert_eq!((counts.requests_lost, server.get("/load").await.text.as_str()), (2, r#"{"server_load":0}"#));

    let server = Arc::into_inner(server).expect("nobody else has it");
    let spans = server.stop().await;
    let (ok, lost): (Vec<_>, Vec<_>) = roots(&spans).into_iter().partition(|(error, _)| error.is_none());
    assert_eq!((ok.len(), lost.len()), (1, 2));
    assert!(
        lost.iter().all(|(e, f)| e.as_deref().is_some_and(|e| e.contains(error_type)) && f[0].contains(fault)),
        "{lost:?}"
    );
}

#[tokio::test]
async fn a_crash_resets_connections_and_the_port_is_closed_until_it_is_back() {
    check_fall("crash", Down::Process, "engine_crashed").await;
}

#[tokio::test]
async fn a_dead_engine_core_is_told_and_the_server_stops() {
    check_fall("engine_dead", Down::Core, "engine_dead").await;
}

#[tokio::test]
async fn an_engine_that_hangs_takes_requests_and_answers_later() {
    let server = Arc::new(Running::faulty(paced(), &[r#"{"kind": "hang"}"#], false).await);
    let spawned = |body: &'static str| {
        let server = Arc::clone(&server);
        tokio::spawn(async move { server.attempt(server.request(COMPLETIONS, body)).await })
    };
    let (waits, leaves) = (spawned(SHORT_STREAM), spawned(LONG_STREAM));
    until("both are in", || async { server.engine.inspect(|e| e.open_requests()) }, |n| *n == 2).await;
    assert_eq!((health(&server).await, server.get("/load").await.text.as_str()), (Some(200), r#"{"server_load":2}"#));
    assert_eq!(server.engine.inspect(|e| e.metrics().generation_tokens), 0);
    // A caller that gives up is let go of when the engine goes on.
    leaves.abort();
    until("one has left", || async { server.get("/load").await.text }, |t| t == r#"{"server_load":1}"#).await;
    server.mend();
    let (status, text, complete) = soon("the answer", waits).await.unwrap();
    assert!(status == Some(200) && complete && text.ends_with("data: [DONE]\n\n"), "{text}");
    server.until("idle", |s| s.running + s.waiting == 0).await;
    assert!(leaves.await.is_err_and(|e| e.is_cancelled()));
    let spans = Arc::into_inner(server).expect("nobody else has it").stop().await;
    check_roots(&spans, 2, None, Some("hang"));
}

#[tokio::test]
async fn a_slow_engine_plans_longer_steps() {
    let decode = |spans: &[Span]| {
        let root = spans.iter().find(|s| s.name == "vllm.engine.request").unwrap();
        match root.get("gen_ai.latency.time_in_model_decode") {
            Some(Value::F64(seconds)) => *seconds,
            other => panic!("{other:?}"),
        }
    };
    let mut times = Vec::new();
    for rules in [&[][..], &[r#"{"kind": "slow", "factor": 5}"#][..]] {
        let server = Running::faulty(paced(), rules, false).await;
        assert_eq!(server.post(COMPLETIONS, SHORT).await.status, 200);
        let spans = server.stop().await;
        check_roots(&spans, 1, None, (!rules.is_empty()).then_some("slow"));
        times.push(decode(&spans));
    }
    // The host's part of a step, under a tenth of a millisecond, stays as it is.
    let ratio = times[1] / times[0];
    assert!((4.9..=5.01).contains(&ratio), "{times:?}");
}

#[tokio::test]
async fn errors_come_with_vllms_bodies() {
    for (status, kind) in [(429, "Too Many Requests"), (500, "InternalServerError"), (503, "Service Unavailable")] {
        let rule = format!(r#"{{"kind": "http_error", "status": {status}}}"#);
        let server = Running::faulty(instant(), &[&rule], false).await;
        for body in [SHORT, SHORT_STREAM] {
            let reply = server.post(COMPLETIONS, body).await;
            let error: serde_json::Value = serde_json::from_str(&reply.text).unwrap();
            assert_eq!((reply.status, error["error"]["type"].as_str()), (status, Some(kind)), "{}", reply.text);
            assert_eq!(error["error"]["code"], status);
        }
        assert_eq!(server.engine.inspect(|e| (e.fault_counts().of(FaultKind::HttpError), e.open_requests())), (2, 0));
        check_roots(&server.stop().await, 2, Some(&status.to_string()), Some("http_error"));
    }
}

#[tokio::test]
async fn some_requests_are_struck_and_the_others_are_answered() {
    let server = Running::faulty(instant(), &[r#"{"kind": "http_error", "status": 503, "rate": 0.5}"#], false).await;
    let mut refused = 0;
    for _ in 0..40 {
        match server.post(COMPLETIONS, SHORT).await.status {
            200 => {}
            503 => refused += 1,
            other => panic!("{other}"),
        }
    }
    assert!((8..=32).contains(&refused), "{refused}");
    assert_eq!(server.engine.inspect(|e| e.fault_counts().of(FaultKind::HttpError)), refused);
}

#[tokio::test]
async fn a_stream_is_cut_after_so_many_tokens() {
    let server = Running::faulty(paced(), &[r#"{"kind": "cut_stream", "after_tokens": 3}"#], false).await;
    let (status, text, complete) = soon("the stream", server.attempt(server.request(COMPLETIONS, LONG_STREAM))).await;
    assert_eq!((status, complete), (Some(200), false));
    let events = text.trim_end().split("\n\n").map(|e| e.strip_prefix("data: ").unwrap());
    let got: String = events.map(|e| content(&serde_json::from_str(e).unwrap())).collect();
    assert_eq!(got.len(), 12, "three tokens of four bytes: {text}");
    // Of an answer in one piece nothing comes.
    let (status, text, complete) = soon("the answer", server.attempt(server.request(COMPLETIONS, LONG))).await;
    assert_eq!((status, text.as_str(), complete), (None, "", false));
    // One that is over before is whole.
    let short = r#"{"prompt":"hello","max_tokens":2,"ignore_eos":true,"stream":true}"#;
    assert_eq!(chunks(&server.events(COMPLETIONS, short).await).len(), 2);
    server.until("idle", |s| s.running + s.waiting == 0 && s.kv_usage == 0.0).await;
    assert_eq!(server.get("/load").await.text, r#"{"server_load":0}"#);
    let spans = server.stop().await;
    let (ok, cut): (Vec<_>, Vec<_>) = roots(&spans).into_iter().partition(|(error, _)| error.is_none());
    assert_eq!((ok.len(), cut.len()), (1, 2));
    assert!(
        cut.iter().all(|(e, f)| e.as_deref().unwrap().contains("stream_cut") && f[0].contains("cut_stream")),
        "{cut:?}"
    );
}

#[tokio::test]
async fn a_request_asks_for_its_own_fault_where_that_is_allowed() {
    let ask = |server: &Running, header: &'static str, value: &'static str| {
        let mut request = server.request(COMPLETIONS, SHORT_STREAM);
        request.headers_mut().insert(header, HeaderValue::from_static(value));
        request
    };
    for (allowed, faulty) in [(true, true), (false, true), (false, false)] {
        let server =
            if faulty { Running::faulty(instant(), &[], allowed).await } else { Running::start(instant()).await };
        let (status, ..) = server.attempt(ask(&server, "x-return-error", "429")).await;
        assert_eq!(status, Some(if allowed { 429 } else { 200 }));
        let (status, _, complete) = server.attempt(ask(&server, "x-igsim-fault", "cut_stream=0")).await;
        assert_eq!((status.is_some(), complete), (!allowed, !allowed));
        assert_eq!(server.post(COMPLETIONS, SHORT).await.status, 200);
    }
}

#[tokio::test]
async fn a_metrics_page_is_stale_broken_or_silent() {
    let server = Arc::new(Running::faulty(instant(), &[], false).await);
    let page = || async { server.get("/metrics").await };
    let fresh = page().await.text;
    server.inject(r#"{"kind": "metrics_stale"}"#);
    let fault = || async { server.engine.inspect(|e| e.page_fault()) };
    until("stale", fault, Option::is_some).await;
    let stale = page().await.text;
    assert_eq!(server.post(COMPLETIONS, SHORT).await.status, 200);
    assert_eq!((page().await.text == stale, stale == fresh), (true, true));
    server.mend();
    until("fresh", page, |p| p.text != stale).await;

    server.inject(r#"{"kind": "metrics_error", "status": 502}"#);
    let broken = until("broken", page, |p| p.status != 200).await;
    assert_eq!((broken.status, broken.text.contains("Bad Gateway")), (502, true));
    server.mend();
    until("mended", page, |p| p.status == 200).await;

    server.inject(r#"{"kind": "metrics_timeout"}"#);
    until("silent", fault, Option::is_some).await;
    let silent = {
        let server = Arc::clone(&server);
        tokio::spawn(async move { server.get("/metrics").await.status })
    };
    // Other pages answer meanwhile, and so does this one when it is over.
    assert_eq!((health(&server).await, server.post(COMPLETIONS, SHORT).await.status), (Some(200), 200));
    assert!(!silent.is_finished());
    server.mend();
    assert_eq!(soon("the page", silent).await.unwrap(), 200);
}

#[tokio::test]
async fn faults_are_asked_for_at_the_control_address() {
    let server = Running::faulty(instant(), &[], false).await;
    let control = server.control("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", control.local_addr().unwrap());
    tokio::spawn(control.run(std::future::pending()));
    let ask = |method: &str, path: &str, body: &str| {
        let request = Request::builder().method(method).uri(format!("{url}{path}"));
        let request =
            request.header("content-type", "application/json").body(body.to_owned().into_bytes().into()).unwrap();
        server.exchange(request)
    };
    let check = async |method: &str, path: &str, body: &str, status: u16, text: &str| {
        let reply = ask(method, path, body).await;
        assert_eq!((reply.status, reply.text.contains(text)), (status, true), "{method} {path} {body}: {}", reply.text);
    };
    check("GET", "/faults", "", 200, r#"[{"engine":"engine-0","active":[],"counts":{},"requests_lost":0}]"#).await;
    check(
        "POST",
        "/faults",
        r#"{"kind": "slow", "factor": 0.1}"#,
        400,
        "factor: found 0.1, expected a number in 1..=1000",
    )
    .await;
    check("POST", "/faults", r#"{"kind": "meteor"}"#, 400, "unknown variant `meteor`").await;
    check("POST", "/engines/engine-9/faults", r#"{"kind": "hang"}"#, 404, "expected one of engine-0").await;
    check("POST", "/engines/engine-0/faults", r#"{"kind": "http_error", "status": 503}"#, 202, "").await;
    let post = || async { server.post(COMPLETIONS, SHORT).await.status };
    until("refused", post, |status| *status == 503).await;
    check("POST", "/faults", r#"{"kind": "crash"}"#, 202, "").await;
    until("gone", || health(&server), Option::is_none).await;
    check("GET", "/engines/engine-0/faults", "", 200, r#""active":[{"kind":"crash","ends_in_s":null}]"#).await;
    check("DELETE", "/faults", "", 202, "").await;
    until("back", || health(&server), |status| *status == Some(200)).await;
    assert_eq!(post().await, 200);
    let far = server.control("0.0.0.0:0").await.err().map(|e| e.to_string()).unwrap_or_default();
    assert!(far.contains("0.0.0.0:0 is not a loopback address"), "{far}");
}
