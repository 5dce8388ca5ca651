//! HTTP for tests: a client of a few lines, and a backend that keeps what it was sent.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::extract::{Request, State};
use axum::routing::get;
use http::HeaderMap;

/// Sends one request on a connection of its own and reads the answer to its end: status, then head and body as they came.
pub fn request(address: SocketAddr, method: &str, target: &str, headers: &[(&str, &str)], body: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).expect("the server listens");
    let extra: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let length = body.len();
    let head = format!("{method} {target} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n{extra}");
    write!(stream, "{head}content-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}").expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    let status = answer.split(' ').nth(1).and_then(|s| s.parse().ok()).expect("a status");
    (status, answer)
}

/// The address behind `http://`.
pub fn address(url: &str) -> SocketAddr {
    url.strip_prefix("http://").and_then(|a| a.parse().ok()).unwrap_or_else(|| panic!("no address in {url}"))
}

/// An OpenAI-compatible server that serves the model `m` and keeps the headers of what it is asked.
#[derive(Clone, Default)]
pub struct Backend(Arc<Mutex<Vec<HeaderMap>>>);

impl Backend {
    /// Serves on a free port of the runtime that calls this.
    pub async fn start() -> (Backend, SocketAddr) {
        let backend = Backend::default();
        let router = Router::new()
            .route(
                "/metrics",
                get(async || "vllm:num_requests_running 0\nvllm:num_requests_waiting 0\nvllm:kv_cache_usage_perc 0\n"),
            )
            .route("/v1/models", get(async || r#"{"object":"list","data":[{"id":"m","object":"model"}]}"#))
            .fallback(answer)
            .with_state(backend.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        tokio::spawn(async move { axum::serve(listener, router).await });
        (backend, address)
    }

    /// The headers of each request, in order.
    pub fn headers(&self) -> Vec<HeaderMap> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

async fn answer(State(backend): State<Backend>, request: Request) -> &'static str {
    backend.0.lock().unwrap_or_else(PoisonError::into_inner).push(request.headers().clone());
    r#"{"choices":[{"message":{"role":"assistant","content":"yes"},"finish_reason":"stop"}],"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}}"#
}
