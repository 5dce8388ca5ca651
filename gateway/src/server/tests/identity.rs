//! Users and sessions in spans: only where the operator says so, and never more than an id may be.

use http_body_util::BodyExt;
use shared::trace::Span;

use super::harness::{Engine, Running, json, named};
use crate::core::config::GatewayConfig;

/// The outermost span of a request that names a user and a session.
async fn root(config: GatewayConfig, user: &str) -> Span {
    let mut engine = Engine::start(0).await;
    let gateway = Running::start(config, vec![engine.backend("a")]).await;
    let mut request = gateway.chat();
    for (name, value) in [("x-user-id", user), ("x-session-id", "s-1")] {
        request.headers_mut().insert(name, value.parse().unwrap());
    }
    let response = gateway.spawn(request);
    engine.call().await.reply.send(json(200, "{}")).unwrap();
    response.await.unwrap().into_body().collect().await.unwrap();
    let (_, spans) = gateway.stop().done().await;
    named(&spans, "gateway.request")[0].clone()
}

fn ids(span: &Span) -> [Option<&str>; 2] {
    ["user.id", "session.id"].map(|key| span.get(key).and_then(|v| v.as_str()))
}

#[tokio::test]
async fn users_and_sessions_are_named_where_that_is_allowed() {
    assert_eq!(ids(&root(GatewayConfig::default(), "u-1").await), [None, None]);
    let user_header = || Some("X-User-Id".to_owned());
    let config = GatewayConfig { user_header: user_header(), ..GatewayConfig::default() };
    assert_eq!(ids(&root(config, "u-1").await), [Some("u-1"), None]);
    let config = GatewayConfig { user_header: user_header(), identity_in_spans: true, ..GatewayConfig::default() };
    let span = root(config, "tell me a secret").await;
    let [Some(user), session] = ids(&span) else { panic!("{span:?}") };
    assert!(user.starts_with("h-") && session == Some("s-1"), "{user}");
}
