//! The gateway's process.

use std::net::{Ipv4Addr, SocketAddr};

use gateway::server::{Backend, Server, Stats};
use shared::clock::RunClock;
use shared::rng::Seed;
use shared::time::Dur;
use shared::trace::{Resource, Tracer};
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::message::{Answer, Order, Role, Start};
use super::pipelines::Pipelines;
use super::{Node, not_for};

/// Between looks at a gateway that is starting.
const LOOK_AGAIN: Dur = Dur::from_millis(1);

pub(super) struct GatewayNode {
    clock: RunClock,
    address: SocketAddr,
    pipelines: Pipelines,
    reset: Box<dyn Fn() + Send>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<Stats>,
}

impl GatewayNode {
    pub(super) fn start(runtime: &Runtime, start: Start) -> Result<GatewayNode, String> {
        let clock = RunClock::start();
        let mut backends = Vec::new();
        for (i, url) in start.engines.iter().enumerate() {
            backends.push(Backend::new(&format!("engine-{i}"), url).map_err(|e| e.to_string())?);
        }
        let engines = backends.len() as u64;
        let (config, seed) = (start.scenario.gateway_config(), Seed(start.scenario.seed));
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let server = runtime.block_on(Server::bind(any, config, backends, Tracer::off(), clock, seed));
        let server = server.map_err(|e| e.to_string())?;
        let (address, stats, reset) = (server.local_addr(), server.stats(), server.reset());
        let resource = Resource::new("inference-gateway", "gateway-0").here();
        let servers = vec![(resource, server.tracer_cell())];
        let pipelines = Pipelines::new(clock, start.spans_to, start.schedule_delay_ms, servers);
        let (stop, stopped) = oneshot::channel::<()>();
        let task = runtime.spawn(server.run(async {
            let _ = stopped.await;
        }));
        // It accepts nobody before it has looked at every engine.
        runtime.block_on(async {
            while stats().scrapes < engines && !task.is_finished() {
                tokio::time::sleep(LOOK_AGAIN.to_std()).await;
            }
        });
        Ok(GatewayNode { clock, address, pipelines, reset: Box::new(reset), stop, task })
    }
}

impl Node for GatewayNode {
    fn urls(&self) -> Vec<String> {
        vec![format!("http://{}", self.address)]
    }

    fn handle(&mut self, _: &Runtime, order: Order) -> Result<Answer, String> {
        match order {
            Order::Arm(tracing) => self.pipelines.arm(tracing).map(|()| Answer::Done),
            Order::Reset => {
                (self.reset)();
                Ok(Answer::Done)
            }
            Order::Flush(ms) => Ok(Answer::Settled(self.pipelines.flush(Dur::from_millis(ms)))),
            Order::Counters => Ok(Answer::Counters(self.pipelines.counters())),
            Order::Start(_) | Order::Served | Order::Delay(_) | Order::Health(_) | Order::Take | Order::Decode => {
                not_for(Role::Gateway)
            }
        }
    }

    fn stop(self: Box<Self>, runtime: &Runtime) {
        let _ = self.stop.send(());
        let _ = runtime.block_on(self.task);
        self.pipelines.shutdown(self.clock.now());
    }
}
