//! The routing sidecars of a live run, one in front of each engine that decodes what others prefill.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use gateway::pd_proxy::core::Allowed;
use gateway::pd_proxy::server::Server;
use gateway::server::Backend;
use shared::clock::RunClock;
use shared::trace::{Resource, Telemetry};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::stack::{Phase, StackError, reached};
use crate::report::{PdFigures, PdTally};
use crate::scenario::{Hop, Scenario};

/// Sidecars that serve, and what they tell.
#[derive(Default)]
pub(super) struct Proxies {
    tasks: Vec<JoinHandle<()>>,
    tally: Arc<Mutex<PdTally>>,
}

impl Proxies {
    /// Starts the sidecars that the scenario asks for. Each takes the place of its engine among `backends`, which are all engines in
    /// order.
    pub(super) async fn start(
        scenario: &Scenario,
        telemetry: &Telemetry,
        clock: RunClock,
        phase: &watch::Receiver<Phase>,
        backends: &mut [Backend],
    ) -> Result<Proxies, StackError> {
        let mut proxies = Proxies::default();
        let mut servers = Vec::new();
        let groups = scenario.engines.iter().flat_map(|group| (0..group.count).map(move |_| group));
        for (i, (group, backend)) in groups.zip(backends.iter_mut()).enumerate() {
            let Some(config) = scenario.pd_proxy_of(group) else { continue };
            let resource = Resource::new("pd-proxy", format!("pd-proxy-{i}")).here();
            let tracer = scenario.tracer(telemetry, resource, Some(Hop::PdProxy));
            // Any free port: engines keep theirs, and callers go through the gateway.
            let any = SocketAddr::new(scenario.listen.engines.ip(), 0);
            let server = Server::bind(any, config, backend.clone(), tracer, clock).await?;
            let labels = group.endpoint_labels();
            *backend = Backend::new(&backend.config.name, &format!("http://{}", server.local_addr()))?;
            backend.config = backend.config.clone().with_labels(labels);
            servers.push(server);
        }
        let pool = pool(backends)?;
        for server in servers {
            let tally = Arc::clone(&proxies.tally);
            let server = server.allowing(pool.clone()).telling(Arc::new(move |done| {
                tally.lock().unwrap_or_else(PoisonError::into_inner).add(done);
            }));
            proxies.tasks.push(tokio::spawn(server.run(reached(phase.clone(), Phase::StopProxies))));
        }
        Ok(proxies)
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.tasks.len()
    }

    /// Waits until they have stopped; what they did.
    pub(super) async fn stopped(self) -> PdFigures {
        for task in self.tasks {
            if let Err(error) = task.await {
                tracing::error!(%error, "a sidecar ended badly");
            }
        }
        self.tally.lock().unwrap_or_else(PoisonError::into_inner).figures()
    }
}

/// The engines that may be asked to prefill: those that the gateway may name.
fn pool(backends: &[Backend]) -> Result<Allowed, StackError> {
    let prefills = backends.iter().filter(|b| b.config.role().prefills());
    let addresses: Vec<String> = prefills.map(|b| format!("{}:{}", b.config.address, b.config.port)).collect();
    Allowed::these(addresses.iter().map(String::as_str)).map_err(StackError::Target)
}
