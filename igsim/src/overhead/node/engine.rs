//! The engines' process: all simulated engines of the fleet.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use engine_sim::core::engine::Engine;
use engine_sim::server::pacing::Pacer;
use engine_sim::server::{Frontend, Served, ServedHook, Server, ServerConfig, VLLM_VERSION};
use shared::clock::RunClock;
use shared::time::Dur;
use shared::trace::{Resource, Tracer, TracerCell};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::message::{Answer, Order, Role, Start};
use super::pipelines::Pipelines;
use super::{Node, not_for};
use crate::scenario::EngineGroup;

/// The most requests whose times are kept between two questions.
const MAX_SERVED: usize = 1 << 20;
/// How long an engine may take to let go of its last request.
const PATIENCE: Dur = Dur::from_secs(2);

pub(super) struct EngineNode {
    clock: RunClock,
    urls: Vec<String>,
    pacer: Pacer,
    pipelines: Pipelines,
    watch: Arc<Watch>,
    stop: watch::Sender<bool>,
    tasks: Vec<JoinHandle<std::io::Result<()>>>,
}

/// Sees every answer begin.
struct Watch {
    clock: RunClock,
    /// Request ids and nanoseconds from the last byte read to the first byte written.
    served: Mutex<Vec<(String, u64)>>,
    /// Nanoseconds by which each answer is held back.
    delay: AtomicU64,
}

impl Watch {
    fn see(&self, served: &Served) {
        // Behind the prefix of the endpoint stands the id that the client chose.
        let id = served.id.as_str();
        let own = id.split_once('-').map_or(id, |(_, rest)| rest).to_owned();
        let mut all = self.served.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() < MAX_SERVED {
            all.push((own, served.first_write.since(served.body_read).as_nanos()));
        }
        drop(all);
        self.hold_back();
    }

    /// Spins: a delay of microseconds is shorter than any sleep.
    fn hold_back(&self) {
        let delay = Dur::from_nanos(self.delay.load(Ordering::Relaxed));
        if delay > Dur::ZERO {
            let until = self.clock.now().saturating_add(delay);
            while self.clock.now() < until {
                std::hint::spin_loop();
            }
        }
    }
}

impl EngineNode {
    pub(super) fn start(runtime: &Runtime, start: Start) -> Result<EngineNode, String> {
        let clock = RunClock::start();
        let watch = Arc::new(Watch { clock, served: Mutex::default(), delay: AtomicU64::new(0) });
        let groups = &start.scenario.engines;
        let pacer = Pacer::start(clock, engines(groups)?).map_err(|e| format!("cannot start: {e}"))?;
        let (stop, stopped) = watch::channel(false);
        let mut node = Starting { clock, pacer: &pacer, watch: &watch, stopped, servers: Vec::new(), urls: Vec::new() };
        let mut tasks = Vec::new();
        for (group, i) in groups.iter().flat_map(|g| (0..g.count).map(move |i| (g, i))) {
            tasks.push(node.engine(runtime, group, i)?);
        }
        let Starting { servers, urls, .. } = node;
        let pipelines = Pipelines::new(clock, start.spans_to, start.schedule_delay_ms, servers);
        Ok(EngineNode { clock, urls, pacer, pipelines, watch, stop, tasks })
    }

    /// Empties every engine; one whose last request is not gone yet is waited for.
    fn reset(&self, runtime: &Runtime) -> Result<Answer, String> {
        let deadline = self.clock.now().saturating_add(PATIENCE);
        for (i, url) in self.urls.iter().enumerate() {
            while !self.pacer.engine(i).reset() {
                if self.clock.now() > deadline {
                    return Err(format!("the engine at {url} still has requests"));
                }
                runtime.block_on(tokio::time::sleep(Dur::from_millis(1).to_std()));
            }
        }
        Ok(Answer::Done)
    }
}

/// Engines that do not serve yet.
fn engines(groups: &[EngineGroup]) -> Result<Vec<Engine>, String> {
    let mut engines = Vec::new();
    for group in groups {
        if let Some(url) = &group.url {
            return Err(format!("the engine at {url} is not ours: the lab measures simulated ones"));
        }
        let profile = engine_sim::profiles::find(&group.profile).map_err(|e| format!("profile: {e}"))?;
        engines.extend((0..group.count).map(|_| Engine::new(group.engine_config(), Arc::clone(&profile))));
    }
    Ok(engines)
}

struct Starting<'a> {
    clock: RunClock,
    pacer: &'a Pacer,
    watch: &'a Arc<Watch>,
    stopped: watch::Receiver<bool>,
    servers: Vec<(Resource, Arc<TracerCell>)>,
    urls: Vec<String>,
}

impl Starting<'_> {
    fn engine(
        &mut self,
        runtime: &Runtime,
        group: &EngineGroup,
        nth: u32,
    ) -> Result<JoinHandle<std::io::Result<()>>, String> {
        let index = self.urls.len();
        let watch = Arc::clone(self.watch);
        let on_served: ServedHook = Arc::new(move |served| watch.see(served));
        let config = ServerConfig {
            engine: group.nth_engine_config(nth),
            model: group.model_name().unwrap_or_default().into(),
            max_body_bytes: 64 << 20,
            prompt_tokens_details: true,
            frontend: Frontend::default(),
            on_served: Some(on_served),
        };
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let engine = self.pacer.engine(index);
        let server = runtime.block_on(Server::bind(any, config, engine, Tracer::off(), self.clock));
        let server = server.map_err(|e| format!("cannot listen: {e}"))?;
        let mut resource = Resource::new("vllm", format!("engine-{index}")).here();
        resource.version = Some(VLLM_VERSION.to_owned());
        self.servers.push((resource, server.tracer_cell()));
        self.urls.push(format!("http://{}", server.local_addr().map_err(|e| e.to_string())?));
        let mut stopped = self.stopped.clone();
        Ok(runtime.spawn(server.run(async move {
            let _ = stopped.wait_for(|stop| *stop).await;
        })))
    }
}

impl Node for EngineNode {
    fn urls(&self) -> Vec<String> {
        self.urls.clone()
    }

    fn handle(&mut self, runtime: &Runtime, order: Order) -> Result<Answer, String> {
        match order {
            Order::Arm(tracing) => {
                self.pipelines.arm(tracing)?;
                for (i, tracer) in self.pipelines.tracers().enumerate() {
                    self.pacer.engine(i).trace_steps(tracer.engine_steps());
                }
                Ok(Answer::Done)
            }
            Order::Reset => self.reset(runtime),
            Order::Flush(ms) => Ok(Answer::Settled(self.pipelines.flush(Dur::from_millis(ms)))),
            Order::Counters => Ok(Answer::Counters(self.pipelines.counters())),
            Order::Served => {
                let mut served = self.watch.served.lock().unwrap_or_else(PoisonError::into_inner);
                Ok(Answer::Served(std::mem::take(&mut *served)))
            }
            Order::Delay(us) => {
                self.watch.delay.store(Dur::from_secs_f64(us / 1e6).as_nanos(), Ordering::Relaxed);
                Ok(Answer::Done)
            }
            Order::Start(_) | Order::Health(_) | Order::Take | Order::Decode => not_for(Role::Engine),
        }
    }

    fn stop(self: Box<Self>, runtime: &Runtime) {
        self.stop.send_replace(true);
        for task in self.tasks {
            let _ = runtime.block_on(task);
        }
        self.pipelines.shutdown(self.clock.now());
    }
}
