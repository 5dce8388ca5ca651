//! What the gateway learns of its engines: metrics, as old as a scrape is, or why there are none.

use std::sync::Arc;

use engine_sim::core::faults::PageFault;
use gateway::core::gateway::Input;
use gateway::core::pool::{EndpointId, EndpointMetrics, ScrapeError};
use gateway::spans::ScrapeFact;
use shared::time::{Dur, Time};

use super::event::Event;
use super::world::World;

impl World<'_> {
    /// A gateway knows its endpoints before the first request, as a live one waits for a first scrape.
    pub(super) fn first_scrapes(&mut self) {
        for engine in (0..self.machines.len()).filter(|e| self.machines[*e].member).collect::<Vec<_>>() {
            let metrics = self.metrics(engine, Time::ZERO);
            self.scraped(engine, Ok(metrics));
            self.push(Time::ZERO + self.scrape_every, Event::Scrape(engine));
        }
    }

    /// Asked now; the engine answers one delay later, the gateway knows after another.
    pub(super) fn scrape(&mut self, engine: usize) {
        let (answer, takes) = self.page(engine);
        self.record(engine, answer, takes);
        self.push(self.now + takes, Event::Scraped(engine, answer));
        // Scrapes of one engine never overlap.
        self.push(self.now + self.scrape_every.max(takes), Event::Scrape(engine));
    }

    /// Records a share of the scrapes.
    fn record(&self, engine: usize, outcome: Result<EndpointMetrics, ScrapeError>, takes: Dur) {
        let Some(traces) = &self.scrape_traces else { return };
        let trail = traces.start::<ScrapeFact>(self.now);
        let config = self.pools.endpoint(engine);
        let (endpoint, address) = (&config.name, &config.address);
        let end = self.now + takes;
        trail.note(end, || ScrapeFact { endpoint: Arc::clone(endpoint), address: Arc::clone(address), outcome });
        trail.finish(end);
    }

    /// What the engine's metrics page answers, and how long that takes.
    fn page(&mut self, engine: usize) -> (Result<EndpointMetrics, ScrapeError>, Dur) {
        let soon = self.engine_delay * 2;
        if self.machines[engine].engine.down().is_some() {
            // A sidecar is there all the same, and says so.
            let behind = self.sidecars.is_before(engine);
            return (Err(if behind { ScrapeError::Status(502) } else { ScrapeError::Unreachable }), soon);
        }
        let metrics = self.metrics(engine, self.now + self.engine_delay);
        match self.machines[engine].engine.page_fault() {
            None => (Ok(metrics), soon),
            Some(PageFault::Stale(since)) => {
                let frozen = &mut self.machines[engine].frozen;
                let page = match *frozen {
                    Some((begun, page)) if begun == since => page,
                    Some(_) | None => frozen.insert((since, metrics)).1,
                };
                // The gateway takes it for a new one.
                (Ok(EndpointMetrics { at: metrics.at, ..page }), soon)
            }
            // A server that refuses to tell is up all the same.
            Some(PageFault::Status(400..500)) => (Err(ScrapeError::NoMetrics), soon),
            Some(PageFault::Status(status)) => (Err(ScrapeError::Status(status)), soon),
            Some(PageFault::Timeout) => {
                (Err(ScrapeError::TimedOut), self.scenario.gateway.metrics.scrape_timeout.get())
            }
        }
    }

    fn metrics(&self, engine: usize, at: Time) -> EndpointMetrics {
        let s = self.machines[engine].engine.reported();
        EndpointMetrics {
            waiting: s.waiting,
            running: s.running,
            kv_usage: s.kv_usage,
            block_size: s.block_size,
            num_gpu_blocks: s.num_gpu_blocks,
            at,
        }
    }

    pub(super) fn scraped(&mut self, engine: usize, metrics: Result<EndpointMetrics, ScrapeError>) {
        let endpoint = EndpointId(engine as u32);
        self.tell(Input::Metrics { endpoint, metrics });
    }
}
