//! What passes through, and when.

use bytes::Bytes;
use http_body_util::BodyExt;

use super::harness::{CHAT, Engine, Running, Tracing, header, json, stream, text};
use crate::core::config::{
    DisaggregationConfig, GatewayConfig, ModelTarget, PluginConfig, ProfileConfig, ScorerConfig, StageOrder,
};
use crate::server::Backend;

#[tokio::test]
async fn every_piece_of_a_stream_passes_before_the_next_is_made() {
    let mut engine = Engine::start(0).await;
    let gateway = Running::start(GatewayConfig::default(), vec![engine.backend("a")]).await;
    let response = gateway.spawn(gateway.chat());
    let call = engine.call().await;
    assert_eq!(call.body, CHAT);
    let (pieces, reply) = stream();
    call.reply.send(reply).unwrap();
    let mut response = response.await.unwrap();
    assert_eq!(
        (header(&response, "x-gateway-destination-endpoint-served").as_str(), response.status().as_u16()),
        ("a", 200)
    );
    for i in 0..50 {
        let piece = Bytes::from(format!("data: {{\"n\":{i}}}\n\n"));
        pieces.send(piece.clone()).await.unwrap();
        let frame = response.body_mut().frame().await.unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), piece, "bytes are passed on as they are");
    }
    drop(pieces);
    assert!(response.body_mut().frame().await.is_none());
    let (stats, _) = gateway.stop().done().await;
    assert_eq!((stats.received, stats.succeeded, stats.active, stats.disconnected), (1, 1, 0, 0));
}

#[tokio::test]
async fn headers_and_query_travel_and_connection_headers_do_not() {
    let mut engine = Engine::start(0).await;
    let gateway = Running::start(GatewayConfig::default(), vec![engine.backend("a")]).await;
    let mut request = gateway.post("/v1/completions?debug=1", r#"{"model":"m","prompt":"x"}"#);
    for (name, value) in [("authorization", "Bearer k"), ("x-request-id", "req-1"), ("x-odd", "1"), ("te", "trailers")]
    {
        request.headers_mut().insert(name, value.parse().unwrap());
    }
    let response = gateway.spawn(request);
    let call = engine.call().await;
    assert_eq!(call.head.uri, "/v1/completions?debug=1");
    let sent = |name: &str| call.head.headers.get(name).map(|v| v.to_str().unwrap().to_owned());
    assert_eq!(sent("authorization").as_deref(), Some("Bearer k"));
    assert_eq!(
        (sent("x-request-id").as_deref(), sent("x-odd").as_deref(), sent("te")),
        (Some("req-1"), Some("1"), None)
    );
    assert_eq!(sent("host"), Some(engine.addr.to_string()));
    call.reply.send(json(418, r#"{"odd":true}"#)).unwrap();
    let response = response.await.unwrap();
    assert_eq!((response.status().as_u16(), header(&response, "x-request-id").as_str()), (418, "req-1"));
    assert_eq!(text(response).await, r#"{"odd":true}"#);
}

#[tokio::test]
async fn without_telemetry_trace_headers_pass_untouched() {
    let mut engine = Engine::start(0).await;
    let gateway = Running::with(Tracing::Off, GatewayConfig::default(), vec![engine.backend("a")]).await;
    let mut request = gateway.chat();
    for (name, value) in [("traceparent", "not even valid"), ("tracestate", "a=1"), ("baggage", "user=1")] {
        request.headers_mut().insert(name, value.parse().unwrap());
    }
    let response = gateway.spawn(request);
    let call = engine.call().await;
    let sent = |name: &str| call.head.headers[name].to_str().unwrap().to_owned();
    assert_eq!(
        (sent("traceparent"), sent("tracestate"), sent("baggage")),
        ("not even valid".into(), "a=1".into(), "user=1".into())
    );
    assert!(!sent("x-request-id").is_empty());
    call.reply.send(json(200, "{}")).unwrap();
    let response = response.await.unwrap();
    assert_eq!(header(&response, "traceresponse"), "");
}

#[tokio::test]
async fn other_paths_are_passed_on() {
    let mut engine = Engine::start(0).await;
    let gateway = Running::start(GatewayConfig::default(), vec![engine.backend("a")]).await;
    let response = gateway.spawn(gateway.post("/v1/embeddings", r#"{"model":"m","input":"x"}"#));
    let call = engine.call().await;
    assert_eq!((call.head.uri.path(), call.head.method.as_str()), ("/v1/embeddings", "POST"));
    call.reply.send(json(200, "[]")).unwrap();
    assert_eq!(text(response.await.unwrap()).await, "[]");
}

#[tokio::test]
async fn the_gateway_answers_for_itself() {
    let (first, second) = (Engine::start(0).await, Engine::start(0).await);
    let backends = vec![first.backend("a"), second.backend("b")];
    let gateway = Running::start(GatewayConfig::default(), backends).await;
    assert_eq!(gateway.get("/health").await.0, 200);
    let (status, models) = gateway.get("/v1/models").await;
    assert_eq!((status, models.as_str()), (200, r#"{"data":[{"id":"m","object":"model"}],"object":"list"}"#));
    let (status, metrics) = gateway.get("/metrics").await;
    assert!(status == 200 && metrics.contains("\nllm_requests_active 0\n"), "{metrics}");
    assert!((gateway.stats)().scrapes >= 2);
}

#[tokio::test]
async fn a_gateway_without_engines_is_not_ready() {
    let gateway = Running::start(GatewayConfig::default(), Vec::new()).await;
    assert_eq!(gateway.get("/health").await.0, 503);
}

#[tokio::test]
async fn any_openai_server_can_be_an_endpoint() {
    use axum::Router;
    use axum::routing::{get, post};
    let completions = post(async || r#"{"object":"chat.completion"}"#);
    let plain = Router::new().route("/v1/chat/completions", completions);
    let other_metrics = plain.clone().route("/metrics", get(async || "process_cpu_seconds_total 1\n"));
    for router in [plain, other_metrics] {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, router).await });
        let gateway = Running::start(GatewayConfig::default(), vec![Backend::new("plain", &url).unwrap()]).await;
        assert_eq!(gateway.get("/health").await.0, 200);
        let response = gateway.send(gateway.chat()).await;
        assert_eq!(response.status(), 200);
        text(response).await;
        let (stats, _) = gateway.stop().done().await;
        assert_eq!((stats.succeeded, stats.scrapes_failed), (1, 0));
    }
}

#[tokio::test]
async fn the_engine_that_decodes_is_told_who_prefills() {
    let mut engines = [Engine::start(0).await, Engine::start(0).await];
    let labelled = |engine: &Engine, name, role: &str| {
        let mut backend = engine.backend(name);
        backend.config = backend.config.with_labels([("llm-d.ai/role".to_owned(), role.to_owned())].into());
        backend
    };
    let backends = vec![labelled(&engines[0], "prefiller", "prefill"), labelled(&engines[1], "decoder", "decode")];
    let prefiller = engines[0].addr.to_string();
    let mut config = GatewayConfig::default();
    let filters = ["healthy-filter", "prefill-filter"].map(PluginConfig::of).to_vec();
    let profile = ProfileConfig { filters, ..ProfileConfig::default() };
    let decider = PluginConfig::of("always-disagg-pd-decider");
    config.disaggregation = Some(DisaggregationConfig { profile, decider, stage_order: StageOrder::DecodeFirst });
    let gateway = Running::start(config, backends).await;
    let mut request = gateway.chat();
    request.headers_mut().insert("x-prefiller-host-port", "evil:1".parse().unwrap());
    let response = gateway.spawn(request);
    let call = engines[1].call().await;
    let told: Vec<_> = call.head.headers.get_all("x-prefiller-host-port").iter().collect();
    assert_eq!(told, [&prefiller]);
    call.reply.send(json(200, "{}")).unwrap();
    assert_eq!(header(&response.await.unwrap(), "x-gateway-destination-endpoint-served"), "decoder");
    let (_, spans) = gateway.stop().done().await;
    assert_eq!(spans.iter().filter(|s| s.name == "gateway.scheduler.schedule").count(), 2);
    assert_eq!(spans.iter().filter(|s| s.name == "gateway.pd.decide").count(), 1);
}

#[tokio::test]
async fn a_session_token_brings_its_caller_back() {
    let mut engines = [Engine::start(0).await, Engine::start(0).await];
    let backends = vec![engines[0].backend("a"), engines[1].backend("b")];
    let mut config = GatewayConfig::default();
    config.profile.scorers = vec![ScorerConfig::of("session-affinity-scorer", 1.0)];
    let gateway = Running::start(config, backends).await;
    let mut token = None;
    for _ in 0..6 {
        let mut request = gateway.chat();
        if let Some(token) = &token {
            request.headers_mut().insert("x-session-token", http::HeaderValue::clone(token));
        }
        let response = gateway.spawn(request);
        let (first, second) = engines.split_at_mut(1);
        let call = tokio::select! {
            call = first[0].call() => call,
            call = second[0].call() => call,
        };
        call.reply.send(json(200, "{}")).unwrap();
        let given = response.await.unwrap().headers().get("x-session-token").cloned().unwrap();
        assert!(token.replace(given.clone()).is_none_or(|t| t == given), "the token names another endpoint");
    }
    gateway.stop().done().await;
}

#[tokio::test]
async fn a_model_is_rewritten_by_rule_or_by_header_in_the_body_too() {
    let mut engine = Engine::start(0).await;
    let target = ModelTarget { model: "m".into(), weight: 1 };
    let config = GatewayConfig { model_rewrites: [("chat".into(), vec![target])].into(), ..GatewayConfig::default() };
    let gateway = Running::start(config, vec![engine.backend("a")]).await;
    let body = r#"{"model":"chat","max_tokens":3,"prompt":"x","seed":18446744073709551615}"#;
    let mut named = gateway.post("/v1/completions", r#"{"prompt":"x","model":"other"}"#);
    named.headers_mut().insert("x-llm-d-model-name-rewrite", "m".parse().unwrap());
    let sent = [gateway.post("/v1/completions", body), named, gateway.post("/v1/completions", r#"{"model":"m"}"#)];
    for request in sent {
        let response = gateway.spawn(request);
        let call = engine.call().await;
        let read: serde_json::Value = serde_json::from_slice(&call.body).unwrap();
        assert_eq!(read["model"], "m");
        if let Some(seed) = read.get("seed") {
            assert_eq!((seed.as_u64(), read["max_tokens"].as_u64()), (Some(u64::MAX), Some(3)));
        }
        assert_eq!(call.head.headers["content-length"], call.body.len().to_string());
        call.reply.send(json(200, "{}")).unwrap();
        text(response.await.unwrap()).await;
    }
    let (_, spans) = gateway.stop().done().await;
    let roots = spans.iter().filter(|s| s.name == "gateway.request");
    let models =
        |key: &'static str| roots.clone().map(move |s| s.get(key).and_then(|v| v.as_str()).unwrap_or_default());
    assert_eq!(models("gen_ai.request.model").collect::<Vec<_>>(), ["chat", "other", "m"]);
    assert_eq!(models("gateway.target_model").collect::<Vec<_>>(), ["m"; 3]);
}
