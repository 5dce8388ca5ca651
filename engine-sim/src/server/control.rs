//! The control address: faults of running engines, asked for over HTTP. Off unless it is given an address, and that is a loopback
//! one: who can reach it can stop engines. It is no part of vLLM's surface and stays when an engine goes down.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde::Serialize;
use shared::clock::RunClock;
use tokio::net::TcpListener;

use super::pacing::EngineHandle;
use crate::core::faults::{FaultKind, FaultRule, Faults};

/// A rule is a line of JSON.
const MAX_BODY: usize = 16 * 1024;

/// A bound control address.
pub struct Control {
    listener: TcpListener,
    engines: Engines,
}

#[derive(Clone)]
struct Engines {
    all: Arc<Vec<(String, EngineHandle)>>,
    clock: RunClock,
}

/// What an engine suffers.
#[derive(Debug, Serialize)]
struct Suffering {
    engine: String,
    active: Vec<Underway>,
    /// How often faults happened, by kind.
    counts: BTreeMap<&'static str, u64>,
    requests_lost: u64,
}

#[derive(Debug, Serialize)]
struct Underway {
    kind: &'static str,
    /// Seconds from now; null if it has no end.
    ends_in_s: Option<f64>,
}

/// What is wrong with a request.
#[derive(Debug, Serialize)]
struct Wrong {
    error: String,
}

impl Control {
    /// Binds `address` for these engines, by name. Engines that were made without faults are left out: nothing can happen to them.
    ///
    /// # Errors
    /// If the address is not a loopback one, or not to be had.
    pub async fn bind(
        address: SocketAddr,
        engines: Vec<(String, EngineHandle)>,
        clock: RunClock,
    ) -> io::Result<Control> {
        if !address.ip().is_loopback() {
            let text =
                format!("{address} is not a loopback address: whoever reaches the control address can stop engines");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let faulty = |(_, engine): &(String, EngineHandle)| engine.inspect(|e| e.faults().is_some());
        let all = Arc::new(engines.into_iter().filter(faulty).collect());
        Ok(Control { listener: TcpListener::bind(address).await?, engines: Engines { all, clock } })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// If the socket is gone.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `shutdown` completes.
    ///
    /// # Errors
    /// If the socket cannot be accepted from any more.
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send + 'static) -> io::Result<()> {
        let every = get(|State(e): State<Engines>| async move { e.show(None) })
            .post(|State(e): State<Engines>, body: axum::Json<serde_json::Value>| async move { e.inject(None, body.0) })
            .delete(|State(e): State<Engines>| async move { e.clear(None) });
        let one = get(|State(e): State<Engines>, Path(name): Path<String>| async move { e.show(Some(&name)) })
            .post(
                |State(e): State<Engines>, Path(name): Path<String>, body: axum::Json<serde_json::Value>| async move {
                    e.inject(Some(&name), body.0)
                },
            )
            .delete(|State(e): State<Engines>, Path(name): Path<String>| async move { e.clear(Some(&name)) });
        let router = Router::new()
            .route("/faults", every)
            .route("/engines/{name}/faults", one)
            .layer(DefaultBodyLimit::max(MAX_BODY))
            .with_state(self.engines);
        axum::serve(self.listener, router).with_graceful_shutdown(shutdown).await
    }
}

impl Engines {
    /// The engines meant by `name`, all if it is absent.
    fn named(&self, name: Option<&str>) -> Result<Vec<&(String, EngineHandle)>, Box<Response>> {
        let found: Vec<_> = self.all.iter().filter(|(own, _)| name.is_none_or(|name| own == name)).collect();
        if found.is_empty() {
            let known: Vec<&str> = self.all.iter().map(|(name, _)| name.as_str()).collect();
            let text = format!("engine: found {:?}, expected one of {}", name.unwrap_or_default(), known.join(", "));
            return Err(Box::new(wrong(StatusCode::NOT_FOUND, text)));
        }
        Ok(found)
    }

    fn show(&self, name: Option<&str>) -> Response {
        let now = self.clock.now();
        let show = |faults: &Faults, engine: &str| {
            let counts = FaultKind::ALL.map(|kind| (kind.as_str(), faults.counts().of(kind)));
            let active = faults.active().map(|(condition, until)| Underway {
                kind: condition.kind().as_str(),
                ends_in_s: until.map(|until| until.since(now).as_secs_f64()),
            });
            Suffering {
                engine: engine.to_owned(),
                active: active.collect(),
                counts: counts.into_iter().filter(|(_, n)| *n > 0).collect(),
                requests_lost: faults.counts().requests_lost,
            }
        };
        self.named(name).map_or_else(
            |no| *no,
            |engines| {
                let of =
                    |(name, engine): &(String, EngineHandle)| engine.inspect(|e| e.faults().map(|f| show(f, name)));
                axum::Json(engines.into_iter().filter_map(of).collect::<Vec<_>>()).into_response()
            },
        )
    }

    fn inject(&self, name: Option<&str>, rule: serde_json::Value) -> Response {
        let rule: FaultRule = match serde_json::from_value(rule) {
            Ok(rule) => rule,
            Err(error) => return wrong(StatusCode::BAD_REQUEST, error.to_string()),
        };
        let problems: Vec<String> = rule.validate().iter().map(ToString::to_string).collect();
        if !problems.is_empty() {
            return wrong(StatusCode::BAD_REQUEST, problems.join("; "));
        }
        self.tell(name, |engine| engine.inject(self.clock.now(), rule.clone()))
    }

    fn clear(&self, name: Option<&str>) -> Response {
        self.tell(name, |engine| engine.clear_faults(self.clock.now()))
    }

    /// 202: the engine does it with its next event, at once if it is idle.
    fn tell(&self, name: Option<&str>, what: impl Fn(&EngineHandle)) -> Response {
        self.named(name).map_or_else(
            |no| *no,
            |engines| {
                engines.into_iter().for_each(|(_, engine)| what(engine));
                StatusCode::ACCEPTED.into_response()
            },
        )
    }
}

fn wrong(status: StatusCode, error: String) -> Response {
    (status, axum::Json(Wrong { error })).into_response()
}
