//! Live runs: real servers, real HTTP, real time; in one process unless the gateway runs already.
//!
//! [`stack`] starts gateway and engines, or they run already ([`running`]); `arrivals` sends the plan's requests when they are due,
//! `outgoing` turns them into HTTP. Nothing here decides anything.

mod arrivals;
mod files;
mod membership;
mod outgoing;
mod proxies;
pub mod running;
pub mod stack;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use engine_sim::server::Served;
use shared::clock::RunClock;
use shared::metrics::Pusher;
use shared::time::Dur;
use shared::trace::config::MetricsConfig;
use shared::trace::{Stats, Telemetry, TelemetryConfig};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

use crate::client::Observed;
use crate::report::{EngineFigures, Outcome, RequestRow};
use crate::run::collect::Collector;
use crate::run::interrupt::Interrupt;
use crate::scenario::Scenario;
use crate::workload::{Answer, Plan, PlannedRequest};
use arrivals::Arrivals;
use outgoing::Destination;
use running::Running;
use stack::{Ports, Stack, StackError};

/// How long a runtime may take to end what nobody waits for any more.
const AFTERWARDS: std::time::Duration = std::time::Duration::from_secs(1);

/// What a live run leaves behind.
#[derive(Debug)]
pub struct Ended {
    /// Whether the plan was not done.
    pub interrupted: bool,
    /// Figures and rows.
    pub collector: Collector,
}

/// What a gateway and engines that were started here say of themselves.
#[derive(Debug)]
pub struct Own {
    /// What the engines count, and how late they were.
    pub engines: EngineFigures,
    /// Further attempts of the gateway after an engine could not be reached.
    pub retries: u64,
    /// What became of records and spans.
    pub stats: Stats,
}

/// A request that ended.
struct Finished {
    plan: PlannedRequest,
    answer: Answer,
    seen: Observed,
}

/// How long engines took from reading requests to their first bytes, by the caller's request id: prefill and decode together.
#[derive(Clone, Default)]
struct ServedLog(Arc<Mutex<HashMap<String, Dur>>>);

impl ServedLog {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Dur>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, served: &Served) {
        // Behind the prefix of the endpoint stands the id that the client chose.
        let id = served.id.as_str();
        let own = id.split_once('-').map_or(id, |(_, rest)| rest);
        *self.lock().entry(own.to_owned()).or_default() += served.first_write.since(served.body_read);
    }

    /// The engines' own share of the time to first byte.
    fn take(&self, id: &str) -> Option<Dur> {
        self.lock().remove(id)
    }
}

/// Runs `scenario` with the requests of `plan`: its own gateway and engines.
///
/// # Errors
/// If a server or an exporter cannot be started.
pub fn run(
    scenario: &Scenario,
    plan: Plan,
    telemetry: TelemetryConfig,
    mut collector: Collector,
    interrupt: &Interrupt,
) -> Result<(Ended, Own), StackError> {
    let clock = RunClock::start();
    let metrics = telemetry.metrics.clone();
    let telemetry = Telemetry::live(telemetry, clock)?;
    fold_on_panic(&telemetry);
    let runtime = runtime()?;
    let served = ServedLog::default();
    let log = served.clone();
    let hook: engine_sim::server::ServedHook = Arc::new(move |s| log.add(s));
    let ((engines, gateway), interrupted) = runtime.block_on(async {
        let stack = Stack::start(scenario, &telemetry, clock, Ports::default(), Some(hook)).await?;
        let pushing = Pushing::start(&metrics, &stack, clock)?;
        eprintln!("{}", stack.addresses());
        let to = stack.destination(scenario.workload.api);
        let interrupted = load(scenario, plan, to, clock, interrupt, &served, &mut collector).await?;
        let stopped = stack.stop().await;
        pushing.stop();
        Ok::<_, StackError>((stopped, interrupted))
    })?;
    runtime.shutdown_timeout(AFTERWARDS);
    let stats = telemetry.shutdown(clock.now());
    Ok((Ended { interrupted, collector }, Own { engines, retries: gateway.retries, stats }))
}

/// Sends the requests of `plan` to a gateway that runs already: of `scenario` nothing is started.
///
/// # Errors
/// If the system has no thread to give, or the recorded trace is broken.
pub fn run_against(
    gateway: &Running,
    scenario: &Scenario,
    plan: Plan,
    mut collector: Collector,
    interrupt: &Interrupt,
) -> Result<Ended, StackError> {
    let clock = RunClock::start();
    files::raise(files::of_client(scenario));
    let (runtime, to, nobody) = (runtime()?, gateway.destination(scenario.workload.api), ServedLog::default());
    let interrupted = runtime.block_on(load(scenario, plan, to, clock, interrupt, &nobody, &mut collector))?;
    runtime.shutdown_timeout(AFTERWARDS);
    Ok(Ended { interrupted, collector })
}

fn runtime() -> Result<Runtime, StackError> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(StackError::Runtime)
}

/// Sends every request and takes in what became of it; true if the plan was not done.
async fn load(
    scenario: &Scenario,
    plan: Plan,
    to: Destination,
    clock: RunClock,
    interrupt: &Interrupt,
    served: &ServedLog,
    collector: &mut Collector,
) -> Result<bool, StackError> {
    let (sender, receiver) = mpsc::unbounded_channel();
    let arrivals = Arrivals::start(scenario, plan, to, clock, interrupt.clone(), sender)?;
    collect(receiver, &arrivals, served, collector).await;
    arrivals.finish().map_err(StackError::Replay)
}

/// Takes in what the clients saw, until all of them are done.
async fn collect(
    mut finished: mpsc::UnboundedReceiver<Finished>,
    arrivals: &Arrivals,
    served: &ServedLog,
    collector: &mut Collector,
) {
    while let Some(end) = finished.recv().await {
        let own = served.take(&outgoing::request_id(&end.plan));
        let row = row(&end, own);
        let answer = (row.outcome == Outcome::Ok).then_some(end.answer);
        collector.request(&row, &end.seen.gaps);
        arrivals.finished(end.plan, end.seen.done, answer);
    }
}

/// The row of a request; `own` is the engine's share of its time to first byte.
fn row(end: &Finished, own: Option<Dur>) -> RequestRow {
    let Finished { plan, seen, .. } = end;
    let usage = seen.usage.unwrap_or_default();
    let details = usage.prompt_tokens_details.unwrap_or_default();
    let first_byte = seen.first_byte.map(|at| at.since(seen.sent));
    RequestRow {
        index: plan.index,
        tenant: plan.tenant,
        session: plan.session.map(|(s, turn)| (s.0, turn)),
        intended: plan.intended,
        sent: seen.sent,
        first_token: seen.first_token,
        done: Some(seen.done),
        prompt_tokens: if usage.prompt_tokens > 0 { usage.prompt_tokens } else { plan.prompt_tokens },
        output_tokens: seen.usage.map_or(seen.pieces(), |u| u.completion_tokens),
        cached_tokens: details.cached_tokens,
        endpoint: seen.endpoint.clone(),
        attempts: 1,
        outcome: seen.failure.map_or(Outcome::Ok, Outcome::Failed),
        dropped: seen.dropped.clone(),
        trace_id: seen.trace.map(|(id, _)| id),
        sampled: seen.trace.is_some_and(|(_, sampled)| sampled),
        added: first_byte.zip(own).map(|(client, engine)| client - engine),
    }
}

/// Pushes the gateway's metrics while a stack serves.
pub struct Pushing(Option<Pusher>);

impl Pushing {
    /// Starts pushing, if the configuration names a collector.
    ///
    /// # Errors
    /// If the configuration cannot be used.
    pub fn start(config: &MetricsConfig, stack: &Stack, clock: RunClock) -> Result<Pushing, StackError> {
        Ok(Pushing(Pusher::start(config, stack::gateway_resource(), clock, stack.metrics())?))
    }

    /// Pushes for the last time, and tells what was not taken.
    pub fn stop(self) {
        for lost in self.0.into_iter().flat_map(Pusher::stop).filter(|e| e.dropped.total() > 0) {
            let why = lost.last_error.as_deref().unwrap_or("no reason given");
            eprintln!("warning: {}: {} series dropped: {why}", lost.name, lost.dropped.total());
        }
    }
}

/// Open records are folded and sent before a panic ends the process: one of the main thread, or of the thread that all engines
/// depend on. A panic in a request's task ends that request only, and its record with it.
pub fn fold_on_panic(telemetry: &Telemetry) {
    shared::trace::fold_on_panic(telemetry, &["main", "pacing"]);
}
