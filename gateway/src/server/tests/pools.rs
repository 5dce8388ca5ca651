//! Several pools behind one gateway.

use serde_json::json;

use super::harness::{Engine, Running, header, json as answer, named, text};
use crate::core::config::GatewayConfig;
use crate::server::{Backend, CannotJoin};

fn config(extra: serde_json::Value) -> GatewayConfig {
    let mut config = json!({"pools": [
        {"name": "small", "models": ["s", "s-adapter"], "selector": {"size": "small"}},
        {"name": "large", "models": ["l"], "selector": {"size": "large"}, "namespace": "big"},
    ]});
    config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    serde_json::from_value(config).unwrap()
}

fn labelled(engine: &Engine, name: &str, size: &str) -> Backend {
    let mut backend = engine.backend(name);
    backend.config = backend.config.with_labels([("size".to_owned(), size.to_owned())].into());
    backend
}

/// A gateway before one engine in each pool.
async fn start(extra: serde_json::Value) -> (Engine, Engine, Running) {
    let (small, large) = (Engine::serving(0, "s").await, Engine::serving(0, "l").await);
    let backends = vec![labelled(&small, "a", "small"), labelled(&large, "b", "large")];
    let gateway = Running::start(config(extra), backends).await;
    (small, large, gateway)
}

fn ask(gateway: &Running, model: &str) -> http::Request<http_body_util::Full<bytes::Bytes>> {
    let body: &'static str = Box::leak(format!(r#"{{"model":"{model}","prompt":"p"}}"#).into_boxed_str());
    gateway.post("/v1/completions", body)
}

#[tokio::test]
async fn a_request_goes_to_the_pool_of_its_model() {
    let (mut small, mut large, gateway) = start(json!({})).await;
    let response = gateway.spawn(ask(&gateway, "s"));
    small.call().await.reply.send(answer(200, "{}")).unwrap();
    assert_eq!(header(&response.await.unwrap(), "x-gateway-destination-endpoint-served"), "a");
    let response = gateway.spawn(ask(&gateway, "l"));
    large.call().await.reply.send(answer(200, "{}")).unwrap();
    assert_eq!(header(&response.await.unwrap(), "x-gateway-destination-endpoint-served"), "b");
    // Without a model it is the first one of the first pool.
    let response = gateway.spawn(gateway.post("/v1/completions", r#"{"prompt":"p"}"#));
    small.call().await.reply.send(answer(200, "{}")).unwrap();
    text(response.await.unwrap()).await;

    let unknown = gateway.send(ask(&gateway, "x")).await;
    assert_eq!(unknown.status(), 404);
    let body: serde_json::Value = serde_json::from_str(&text(unknown).await).unwrap();
    assert_eq!((&body["error"]["type"], &body["error"]["param"]), (&json!("NotFoundError"), &json!("model")));
    // The pool has it, its engine does not.
    assert_eq!(gateway.send(ask(&gateway, "s-adapter")).await.status(), 404);

    let (_, models) = gateway.get("/v1/models").await;
    let models: serde_json::Value = serde_json::from_str(&models).unwrap();
    let ids: Vec<_> = models["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["s", "l"]);
    let (_, metrics) = gateway.get("/metrics").await;
    for line in [
        "gateway_endpoints{pool=\"small\",state=\"available\"} 1",
        "gateway_pool_requests_total{pool=\"small\"} 3",
        "gateway_pool_requests_total{pool=\"large\"} 1",
        "gateway_ejections_total{pool=\"large\"} 0",
    ] {
        assert!(metrics.lines().any(|l| l == line), "{line} is not in\n{metrics}");
    }
    let (stats, spans) = gateway.stop().done().await;
    assert_eq!((stats.succeeded, stats.client_errors, stats.rejected), (3, 2, 2));
    let of = |key: &str| -> Vec<String> {
        let roots = named(&spans, "gateway.request").into_iter();
        roots.map(|s| s.get(key).and_then(|v| v.as_str()).unwrap_or("-").to_owned()).collect()
    };
    assert_eq!(of("gateway.pool.name"), ["small", "large", "small", "-", "small"]);
    assert_eq!(of("gateway.pool.namespace"), ["default", "big", "default", "-", "default"]);
    assert_eq!(of("gen_ai.request.model"), ["s", "l", "s", "x", "s-adapter"]);
    assert_eq!(named(&spans, "gateway.director.handle_request").len(), 4, "no pool, nobody to direct it");
}

#[tokio::test]
async fn a_rewritten_model_decides_the_pool() {
    let (_small, mut large, gateway) = start(json!({"model_rewrites": {"s": [{"model": "l"}]}})).await;
    let response = gateway.spawn(ask(&gateway, "s"));
    let call = large.call().await;
    let body: serde_json::Value = serde_json::from_slice(&call.body).unwrap();
    assert_eq!(body["model"], "l");
    call.reply.send(answer(200, "{}")).unwrap();
    text(response.await.unwrap()).await;
    let (_, spans) = gateway.stop().done().await;
    let root = named(&spans, "gateway.request")[0];
    let of = |key: &str| root.get(key).and_then(|v| v.as_str()).unwrap_or_default().to_owned();
    assert_eq!(
        (of("gen_ai.request.model"), of("gateway.target_model"), of("gateway.pool.name")),
        ("s".into(), "l".into(), "large".into())
    );
}

#[tokio::test]
async fn an_endpoint_joins_the_pool_that_selects_it() {
    let (_small, large, gateway) = start(json!({})).await;
    let mut more = Engine::serving(0, "l").await;
    let nowhere = gateway.endpoints.join(more.backend("c")).unwrap_err();
    assert_eq!(nowhere, CannotJoin::NoPool("c".to_owned()));
    let taken = gateway.endpoints.join(labelled(&more, "a", "large")).unwrap_err();
    assert_eq!(taken, CannotJoin::NameTaken("a".to_owned()), "names are those of all pools");
    gateway.endpoints.join(labelled(&more, "c", "large")).unwrap();
    assert!(gateway.endpoints.drain("b"));
    let available = "gateway_endpoints{pool=\"large\",state=\"available\"} 1";
    while !gateway.get("/metrics").await.1.contains(available) {
        tokio::task::yield_now().await;
    }
    let response = gateway.spawn(ask(&gateway, "l"));
    more.call().await.reply.send(answer(200, "{}")).unwrap();
    assert_eq!(header(&response.await.unwrap(), "x-gateway-destination-endpoint-served"), "c");
    drop(large);
}

/// One pool waits, the other one does not.
#[tokio::test]
async fn pools_are_full_each_for_itself() {
    let flow = json!({"enabled": true});
    let full = json!({"detector": "concurrency-detector", "concurrency": {"max_requests": 1}});
    let pools = json!({"pools": [
        {"name": "small", "models": ["s"], "selector": {"size": "small"}},
        {"name": "large", "models": ["l"], "selector": {"size": "large"}, "flow_control": flow, "saturation": full},
    ]});
    let (mut small, mut large, gateway) = start(pools).await;
    let first = gateway.spawn(ask(&gateway, "l"));
    let held = large.call().await;
    let second = gateway.spawn(ask(&gateway, "l"));
    while !gateway.get("/metrics").await.1.contains("gateway_flow_control_queue_size 1\n") {
        tokio::task::yield_now().await;
    }
    let other = gateway.spawn(ask(&gateway, "s"));
    small.call().await.reply.send(answer(200, "{}")).unwrap();
    let other = other.await.unwrap();
    assert_eq!(header(&other, "x-llm-d-flow-queue-duration-ms"), "", "its pool has no queue");
    held.reply.send(answer(200, "{}")).unwrap();
    text(first.await.unwrap()).await;
    large.call().await.reply.send(answer(200, "{}")).unwrap();
    assert_ne!(header(&second.await.unwrap(), "x-llm-d-flow-queue-duration-ms"), "");
}

#[tokio::test]
async fn the_priority_of_an_objective_is_written_for_the_engine() {
    let extra = json!({"engine_priority": true, "objectives": {"premium": 10}});
    let (mut small, _large, gateway) = start(extra).await;
    for (objective, expect) in [("premium", json!(-10)), ("other", json!(99))] {
        let mut request = gateway.post("/v1/completions", r#"{"model":"s","priority":99,"prompt":"p"}"#);
        request.headers_mut().insert("x-llm-d-inference-objective", objective.parse().unwrap());
        let response = gateway.spawn(request);
        let call = small.call().await;
        let body: serde_json::Value = serde_json::from_slice(&call.body).unwrap();
        assert_eq!((&body["priority"], &body["prompt"]), (&expect, &json!("p")), "{objective}");
        call.reply.send(answer(200, "{}")).unwrap();
        text(response.await.unwrap()).await;
    }
}
