//! Gateway and engines of a scenario as servers of this process.

use std::net::SocketAddr;
use std::sync::Arc;

use engine_sim::core::engine::Engine;
use engine_sim::server::control::Control;
use engine_sim::server::pacing::{Lateness, Pacer};
use engine_sim::server::{self as engine_server, Frontend, ServedHook, ServerConfig, VLLM_VERSION};
use gateway::core::config::GatewayConfig;
use gateway::server::{Backend, BadBackend, KvManager, ServeError, Server as GatewayServer, Stats as GatewayStats};
use http::HeaderMap;
use shared::clock::RunClock;
use shared::metrics::Source;
use shared::rng::Seed;
use shared::time::Dur;
use shared::trace::{Resource, Telemetry, TelemetryError};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::membership::{self, Change};
use super::outgoing::Destination;
use super::proxies::Proxies;
use crate::replay::ReplayError;
use crate::report::{EngineFigures, FaultFigures, PdFigures};
use crate::scenario::{Api, EngineGroup, Hop, Listen, Scenario};
use crate::virtual_time::world::path_of;

/// Why a live run cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum StackError {
    /// Telemetry cannot start.
    #[error(transparent)]
    Telemetry(#[from] TelemetryError),
    /// The gateway cannot start.
    #[error(transparent)]
    Gateway(#[from] ServeError),
    /// A sidecar cannot start.
    #[error(transparent)]
    Sidecar(#[from] gateway::pd_proxy::server::BindError),
    /// An engine that prefills has an address that no sidecar can be told.
    #[error("the address of an engine that prefills: {0}")]
    Target(gateway::pd_proxy::core::BadTarget),
    /// An engine's URL is none.
    #[error(transparent)]
    Backend(#[from] BadBackend),
    /// An address is not to be had.
    #[error("cannot listen on {address}: {error}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        error: std::io::Error,
    },
    /// The system has no thread or runtime to give.
    #[error("cannot start: {0}")]
    Runtime(#[from] std::io::Error),
    /// The recorded trace is broken.
    #[error(transparent)]
    Replay(ReplayError),
}

/// Between looks at a gateway that is starting.
const LOOK_AGAIN: Dur = Dur::from_millis(1);

/// Ports that the command line sets.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ports {
    /// The gateway's; then it is taken or the run fails. Without it a default port that is taken is replaced by a free one.
    pub gateway: Option<u16>,
}

/// Everything that serves.
pub struct Stack {
    gateway: SocketAddr,
    engines: Vec<(String, String)>,
    stop: watch::Sender<Phase>,
    gateway_task: JoinHandle<GatewayStats>,
    metrics: Source,
    engine_tasks: Vec<JoinHandle<std::io::Result<()>>>,
    proxies: Proxies,
    pacer: Pacer,
    own_engines: usize,
    control: Option<SocketAddr>,
    kv_manager: Option<SocketAddr>,
}

/// Whoever drains stops before what it is draining into.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    Serving,
    StopGateway,
    StopProxies,
    StopEngines,
}

impl Stack {
    /// Starts every engine and the gateway in front of them.
    ///
    /// # Errors
    /// If an address cannot be bound or the gateway's configuration does not hold.
    pub async fn start(
        scenario: &Scenario,
        telemetry: &Telemetry,
        clock: RunClock,
        ports: Ports,
        served: Option<ServedHook>,
    ) -> Result<Stack, StackError> {
        super::files::raise(super::files::of_all(scenario));
        let pacer = Pacer::start(clock, simulated(scenario))?;
        let (stop, phase) = watch::channel(Phase::Serving);
        let mut stack = Starting { scenario, telemetry, clock, served, phase: phase.clone(), pacer: &pacer, own: 0 };
        let (mut backends, mut engines, mut engine_tasks) = (Vec::new(), Vec::new(), Vec::new());
        let (mut changes, mut joins) = (Vec::new(), Vec::new());
        let ports_of: std::collections::BTreeMap<usize, u32> = scenario.first_ports().into_iter().collect();
        for (g, group) in scenario.engines.iter().enumerate() {
            for i in 0..group.count {
                let name = name_of(engines.len() as u32);
                let url = match &group.url {
                    Some(url) => url.clone(),
                    None => {
                        let (address, task) =
                            stack.engine(&name, group, i, &scenario.listen, port(ports_of.get(&g), i)).await?;
                        engine_tasks.push(task);
                        format!("http://{address}")
                    }
                };
                let mut backend = Backend::new(&name, &url)?;
                backend.config = backend.config.with_labels(group.endpoint_labels());
                if let Some(at) = group.drains_at {
                    changes.push(Change::Drains(at.get(), name.clone()));
                }
                backends.push(backend);
                joins.push(group.joins_at);
                engines.push((name, url));
            }
        }
        let own_engines = stack.own;
        let control = control(scenario, &pacer, clock, phase.clone()).await?;
        let proxies = Proxies::start(scenario, telemetry, clock, &phase, &mut backends).await?;
        let mut config = scenario.gateway_config();
        let mut at_manager = None;
        if let Some((manager, task)) = kv_manager(scenario, telemetry, clock, &backends, phase.clone()).await? {
            config.ask_manager(&format!("http://{manager}"));
            at_manager = Some(manager);
            engine_tasks.push(task);
        }
        // Sidecars and the index stand beside every engine; the gateway knows some of them later.
        let (later, backends): (Vec<_>, Vec<_>) = backends.into_iter().zip(joins).partition(|(_, at)| at.is_some());
        changes.extend(later.into_iter().filter_map(|(backend, at)| Some(Change::Joins(at?.get(), backend))));
        let backends: Vec<_> = backends.into_iter().map(|(backend, _)| backend).collect();
        let known = backends.len() as u64;
        let server = gateway(scenario, config, telemetry, clock, ports, backends).await?;
        membership::plan(changes, &server.endpoints(), clock);
        let gateway = server.local_addr();
        let (stats, metrics) = (server.stats(), server.metrics());
        let gateway_task = tokio::spawn(server.run(reached(phase, Phase::StopGateway)));
        // The gateway accepts nobody before it has looked at every engine; the first requests shall not measure that.
        while stats().scrapes < known && !gateway_task.is_finished() {
            tokio::time::sleep(LOOK_AGAIN.to_std()).await;
        }
        Ok(Stack {
            gateway,
            engines,
            stop,
            gateway_task,
            metrics,
            engine_tasks,
            proxies,
            pacer,
            own_engines,
            control,
            kv_manager: at_manager,
        })
    }

    /// Where requests go.
    pub(super) fn destination(&self, api: Api) -> Destination {
        let text = format!("http://{}{}", self.gateway, path_of(api));
        let uri = text.parse().expect("an address and a path are a URL");
        Destination { uri, headers: HeaderMap::new() }
    }

    /// Base URL of the gateway.
    pub fn gateway_url(&self) -> String {
        format!("http://{}", self.gateway)
    }

    /// One line that says where everything listens.
    pub fn addresses(&self) -> String {
        let shown = match self.engines.as_slice() {
            [(_, only)] => only.clone(),
            [(_, first), .., (_, last)] => format!("{first} to {last}"),
            [] => String::new(),
        };
        let control = self.control.map_or_else(String::new, |at| format!("  faults http://{at}/faults"));
        let sidecars = match self.proxies.len() {
            0 => String::new(),
            n => format!("  {n} pd-proxies"),
        };
        let manager = self.kv_manager.map_or_else(String::new, |at| format!("  kv-cache-manager http://{at}"));
        format!("gateway {}  engines {shown}{sidecars}{manager}{control}", self.gateway_url())
    }

    /// The gateway's metrics, and those of this process's telemetry.
    pub fn metrics(&self) -> Source {
        Arc::clone(&self.metrics)
    }

    /// Every engine, by name and URL.
    pub fn engines(&self) -> &[(String, String)] {
        &self.engines
    }

    /// Drains the gateway, then stops the engines, and says what both count.
    pub async fn stop(self) -> (EngineFigures, GatewayStats) {
        self.stop.send_replace(Phase::StopGateway);
        let gateway = self.gateway_task.await.unwrap_or_else(|error| {
            tracing::error!(%error, "the gateway ended badly");
            GatewayStats::default()
        });
        self.stop.send_replace(Phase::StopProxies);
        let pd = self.proxies.stopped().await;
        self.stop.send_replace(Phase::StopEngines);
        for task in self.engine_tasks {
            match task.await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::error!(%error, "an engine's server ended badly"),
                Err(error) => tracing::error!(%error, "an engine's server ended badly"),
            }
        }
        (figures(&self.pacer, self.own_engines, pd), gateway)
    }
}

/// The engines that are not somewhere else.
fn simulated(scenario: &Scenario) -> Vec<Engine> {
    let (mut engines, mut all) = (Vec::new(), 0);
    for group in &scenario.engines {
        let first = all;
        all += group.count;
        if group.url.is_some() {
            continue;
        }
        let config = group.engine_config();
        let profile = engine_sim::profiles::find(&config.profile).expect("the scenario is valid");
        engines.extend((first..all).map(|i| {
            let engine = Engine::new(config.clone(), Arc::clone(&profile));
            let faults = group.faults(Seed(scenario.seed), &name_of(i), scenario.listen.control.is_some());
            match faults {
                Some(faults) => engine.with_faults(faults),
                None => engine,
            }
        }));
    }
    engines
}

/// Serves the control address, if the scenario has one.
async fn control(
    scenario: &Scenario,
    pacer: &Pacer,
    clock: RunClock,
    phase: watch::Receiver<Phase>,
) -> Result<Option<SocketAddr>, StackError> {
    let Some(address) = scenario.listen.control else { return Ok(None) };
    let (mut all, mut engines) = (0, Vec::new());
    for group in &scenario.engines {
        for i in (all..all + group.count).filter(|_| group.url.is_none()) {
            engines.push((name_of(i), pacer.engine(engines.len())));
        }
        all += group.count;
    }
    let bind = |error| StackError::Bind { address, error };
    let control = Control::bind(address, engines, clock).await.map_err(bind)?;
    let bound = control.local_addr().map_err(bind)?;
    tokio::spawn(control.run(reached(phase, Phase::StopEngines)));
    Ok(Some(bound))
}

/// The `i`-th engine of all groups.
fn name_of(i: u32) -> String {
    format!("engine-{i}")
}

/// Port of the `i`-th engine of a group whose first port is `first`; 0 stays 0.
fn port(first: Option<&u32>, i: u32) -> u16 {
    let first = first.copied().unwrap_or(0);
    u16::try_from(if first == 0 { 0 } else { first + i }).expect("validation bounds ports")
}

/// What starting an engine needs.
struct Starting<'a> {
    scenario: &'a Scenario,
    telemetry: &'a Telemetry,
    clock: RunClock,
    served: Option<ServedHook>,
    phase: watch::Receiver<Phase>,
    pacer: &'a Pacer,
    own: usize,
}

impl Starting<'_> {
    async fn engine(
        &mut self,
        name: &str,
        group: &EngineGroup,
        nth: u32,
        listen: &Listen,
        port: u16,
    ) -> Result<(SocketAddr, JoinHandle<std::io::Result<()>>), StackError> {
        let config = ServerConfig {
            engine: group.nth_engine_config(nth),
            model: group.model_name().unwrap_or_default().into(),
            max_body_bytes: 64 << 20,
            prompt_tokens_details: true,
            frontend: Frontend::default(),
            on_served: self.served.clone(),
        };
        let mut resource = Resource::new("vllm", name).here();
        resource.version = Some(VLLM_VERSION.to_owned());
        let tracer = self.scenario.tracer(self.telemetry, resource, None);
        let engine = self.pacer.engine(self.own);
        let address = SocketAddr::new(listen.engines.ip(), port);
        let fallback = listen.engines == Listen::default().engines && group.port.is_none();
        let bind = |at| engine_server::Server::bind(at, config.clone(), engine.clone(), tracer.clone(), self.clock);
        let server = match bind(address).await {
            Err(error) if fallback && error.kind() == std::io::ErrorKind::AddrInUse => {
                bind(SocketAddr::new(address.ip(), 0)).await
            }
            other => other,
        };
        let server = server.map_err(|error| StackError::Bind { address, error })?;
        self.own += 1;
        let bound = server.local_addr()?;
        Ok((bound, tokio::spawn(server.run(reached(self.phase.clone(), Phase::StopEngines)))))
    }
}

/// Serves the kv-cache-manager, if the scenario has one.
async fn kv_manager(
    scenario: &Scenario,
    telemetry: &Telemetry,
    clock: RunClock,
    backends: &[Backend],
    phase: watch::Receiver<Phase>,
) -> Result<Option<(SocketAddr, JoinHandle<std::io::Result<()>>)>, StackError> {
    let Some(address) = scenario.listen.kv_cache_manager else { return Ok(None) };
    let resource = Resource::new("kv-cache-manager", "kv-cache-manager-0").here();
    let tracer = scenario.tracer(telemetry, resource, None);
    let gateway = scenario.gateway_config();
    let pools = gateway.pool_configs();
    let reads = pools.iter().find(|config| config.reads_kv_events());
    let config = reads.or(pools.first()).map(|config| config.precise_prefix.clone()).unwrap_or_default();
    let manager = KvManager::bind(address, config, backends.to_vec(), tracer, clock).await?;
    let manager = manager.access_log(gateway.access_log);
    Ok(Some((manager.local_addr(), tokio::spawn(manager.run(reached(phase, Phase::StopEngines))))))
}

/// Who the gateway is in traces and metrics.
pub(super) fn gateway_resource() -> Resource {
    Resource::new("inference-gateway", "gateway-0").here()
}

async fn gateway(
    scenario: &Scenario,
    config: GatewayConfig,
    telemetry: &Telemetry,
    clock: RunClock,
    ports: Ports,
    backends: Vec<Backend>,
) -> Result<GatewayServer, StackError> {
    let tracer = scenario.tracer(telemetry, gateway_resource(), Some(Hop::Gateway));
    let mut address = scenario.listen.gateway;
    if let Some(port) = ports.gateway {
        address.set_port(port);
    }
    let seed = Seed(scenario.seed);
    let bind = |at| GatewayServer::bind(at, config.clone(), backends.clone(), tracer.clone(), clock, seed);
    let fallback = ports.gateway.is_none() && address == Listen::default().gateway;
    match bind(address).await {
        Err(ServeError::Bind { source, .. }) if fallback && source.kind() == std::io::ErrorKind::AddrInUse => {
            Ok(bind(SocketAddr::new(address.ip(), 0)).await?)
        }
        other => Ok(other?),
    }
}

/// Completes once the phase is reached, or nobody is left to say so.
pub(super) async fn reached(mut phase: watch::Receiver<Phase>, wanted: Phase) {
    let _ = phase.wait_for(|now| *now >= wanted).await;
}

fn figures(pacer: &Pacer, own: usize, pd: PdFigures) -> EngineFigures {
    let Lateness { p50, p99, behind_share, events, .. } = pacer.lateness();
    let count = |pick: &dyn Fn(&Engine) -> u64| (0..own).map(|i| pacer.engine(i).inspect(|e| pick(e))).sum();
    EngineFigures {
        preemptions: count(&|e| e.metrics().num_preemptions),
        steps: count(&|e| e.metrics().iteration_tokens_total.count()),
        faults: FaultFigures::of((0..own).map(|i| pacer.engine(i).inspect(Engine::fault_counts))),
        late_p50_us: p50.as_micros_f64(),
        late_p99_us: p99.as_micros_f64(),
        late_step_share: behind_share,
        fell_behind: pacer.lateness().fell_behind(),
        planned_moments: events,
        pd,
    }
}
