//! The lab's load: a block of requests, sent when they are due, each answer timed from the intended send time.
//!
//! The client is part of what is measured, so it does little: one thread, requests written as bytes before the block, answers
//! searched instead of parsed, connections kept from block to block. It knows nothing of arms, engines or telemetry.

mod drive;
mod request;
mod wire;

use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use http::{HeaderMap, Uri};
use shared::clock::RunClock;
use shared::rng::Seed;
use shared::time::{Dur, Time};

use crate::report::Failure;
use crate::scenario::{Api, Scenario};
use crate::workload::{Plan, Segment};
use drive::{Connections, Drive, Pace};
use request::Writer;

/// The most requests of a block that is written out before it is sent.
pub const MAX_REQUESTS: u64 = 1_000_000;
/// The most requests in flight; what is due beyond that waits, and its wait counts.
pub const MAX_IN_FLIGHT: u32 = 512;

/// What is sent, where and when.
#[derive(Clone, Debug)]
pub struct LoadSpec {
    /// The endpoint, `http` only: the lab's hops are on one machine, and TLS would be measured with them.
    pub uri: Uri,
    /// What the endpoint speaks.
    pub api: Api,
    /// The model asked for.
    pub model: String,
    /// Further headers, for example an authorisation.
    pub headers: HeaderMap,
    /// When, and how long prompts and answers are.
    pub pattern: Pattern,
    /// The longest wait for the end of an answer, from the moment it was sent.
    pub timeout: Dur,
    /// The last so much of the wait for a due time is spent looking at the clock instead of sleeping: a sleep ends some 50 us
    /// late, which would be measured as latency. Costs the client's CPU, nobody else's.
    pub spin: Dur,
    /// Seed of prompts, and of arrivals that are drawn.
    pub seed: Seed,
}

/// When requests are sent. The same in every block, lengths included.
#[derive(Clone, Debug, PartialEq)]
pub enum Pattern {
    /// At equal distances, whatever the answers do.
    FixedRate {
        /// Requests per second.
        per_second: f64,
        /// How many.
        requests: u64,
        /// How long.
        lengths: Lengths,
    },
    /// At exponential distances, whatever the answers do.
    Poisson {
        /// Requests per second, on average.
        per_second: f64,
        /// How many.
        requests: u64,
        /// How long.
        lengths: Lengths,
    },
    /// The next one when one ends.
    Closed {
        /// How many are open at any time.
        in_flight: u32,
        /// How many.
        requests: u64,
        /// How long.
        lengths: Lengths,
    },
    /// At given times, with given prompts and lengths.
    Schedule(Arc<[Arrival]>),
}

/// Lengths in tokens, the same for every request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lengths {
    /// Of a prompt.
    pub prompt: u32,
    /// Of an answer.
    pub output: u32,
}

/// A request of a schedule.
#[derive(Clone, Debug, PartialEq)]
pub struct Arrival {
    /// When, from the start of the block.
    pub offset: Dur,
    /// What it says. Equal contents are equal text within a block and different text in different blocks.
    pub prompt: Vec<Segment>,
    /// How many tokens it asks for.
    pub output_tokens: u32,
}

/// What the client saw of one request. Times are those of the loader's clock.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample {
    /// What was sent as `x-request-id`: unique as long as block numbers are.
    pub id: String,
    /// When it should have been sent; in a closed loop when it was its turn.
    pub intended: Time,
    /// When it was handed to the system.
    pub sent: Time,
    /// When the first byte of the answer's body had been read.
    pub first_byte: Option<Time>,
    /// When the first text had been read.
    pub first_token: Option<Time>,
    /// When the latest text had been read.
    pub last_token: Option<Time>,
    /// The end, good or bad.
    pub last: Time,
    /// Time between consecutive pieces of text; zero for pieces that were read together.
    pub gaps: Vec<Dur>,
    /// Why there was no complete answer.
    pub failure: Option<Failure>,
    /// Whether the request's trace is kept: only then the server names it (`traceresponse`).
    pub sampled: bool,
    /// Tokens of the answer, where the server counts them.
    pub output_tokens: Option<u32>,
}

/// A load that cannot be sent.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The endpoint is no `http` URL with a host.
    #[error("cannot send load to {0}: an http URL with a host is needed")]
    Uri(Uri),
    /// The host has no address.
    #[error("cannot find {host}: {error}")]
    Resolve {
        /// Host and port.
        host: String,
        /// What the system said; `None` if there is no address and no error.
        error: std::io::Error,
    },
    /// A number is out of range.
    #[error("{what}: found {found}, {allowed}")]
    Range {
        /// What is out of range.
        what: &'static str,
        /// What was found.
        found: String,
        /// What is allowed.
        allowed: String,
    },
    /// The system has no thread to give.
    #[error("cannot start the load thread: {0}")]
    Thread(std::io::Error),
}

/// Sends blocks of load. Keeps its connections between blocks.
#[derive(Debug)]
pub struct Loader {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    clock: RunClock,
    spec: LoadSpec,
    writer: Writer,
    address: SocketAddr,
    connections: Mutex<Connections>,
}

impl Sample {
    /// Whether the answer is complete.
    pub fn ok(&self) -> bool {
        self.failure.is_none()
    }

    /// From the intended send time to the end.
    pub fn e2e(&self) -> Dur {
        self.last.since(self.intended)
    }

    /// From the intended send time to the first text.
    pub fn ttft(&self) -> Option<Dur> {
        self.first_token.map(|at| at.since(self.intended))
    }

    /// From the actual send time to the first byte of the body: what the engine's own time to first byte is taken from to
    /// get what the gateway added.
    pub fn to_first_byte(&self) -> Option<Dur> {
        self.first_byte.map(|at| at.since(self.sent))
    }

    fn token(&mut self, now: Time) {
        match self.last_token {
            None => self.first_token = Some(now),
            Some(before) => self.gaps.push(now.since(before)),
        }
        self.last_token = Some(now);
    }
}

impl Pattern {
    /// How many requests a block has.
    pub fn requests(&self) -> u64 {
        match self {
            Pattern::FixedRate { requests, .. }
            | Pattern::Poisson { requests, .. }
            | Pattern::Closed { requests, .. } => *requests,
            Pattern::Schedule(arrivals) => arrivals.len() as u64,
        }
    }

    /// The first `requests` arrivals of a scenario's own plan: its times, prompts and lengths.
    ///
    /// Only what comes by itself: no further turns of conversations, no closed loops, no recorded traces.
    pub fn of_scenario(scenario: &Scenario, seed: Seed, requests: u64) -> Result<Pattern, crate::replay::ReplayError> {
        let mut plan = Plan::new(scenario, seed)?;
        let mut arrivals = Vec::new();
        while arrivals.len() as u64 != requests
            && let Some(request) = plan.next_arrival()?
        {
            let offset = request.intended.since(Time::ZERO);
            arrivals.push(Arrival { offset, prompt: request.prompt, output_tokens: request.output_tokens });
        }
        Ok(Pattern::Schedule(arrivals.into()))
    }

    fn check(&self) -> Result<(), LoadError> {
        let out = |what, found: String, allowed: String| Err(LoadError::Range { what, found, allowed });
        let requests = self.requests();
        if requests == 0 {
            return out("requests of a block", requests.to_string(), "at least 1 is allowed".to_owned());
        }
        match self {
            Pattern::FixedRate { per_second, .. } | Pattern::Poisson { per_second, .. }
                if !(*per_second > 0.0 && per_second.is_finite()) =>
            {
                out("requests per second", per_second.to_string(), "a number above 0 is allowed".to_owned())
            }
            Pattern::Closed { in_flight, .. } if !(1..=MAX_IN_FLIGHT).contains(in_flight) => {
                out("requests in flight", in_flight.to_string(), format!("1 to {MAX_IN_FLIGHT} are allowed"))
            }
            Pattern::FixedRate { .. } | Pattern::Poisson { .. } | Pattern::Closed { .. } | Pattern::Schedule(_) => {
                Ok(())
            }
        }
    }

    fn pace(&self) -> Pace {
        match self {
            Pattern::Closed { in_flight, .. } => Pace::Closed(*in_flight as usize),
            Pattern::FixedRate { .. } | Pattern::Poisson { .. } | Pattern::Schedule(_) => Pace::Open,
        }
    }
}

impl Loader {
    /// A loader of `spec` on `clock`. Connects to nothing yet.
    ///
    /// # Errors
    /// If the endpoint is no `http` URL, its host is unknown, or a number is out of range.
    pub fn new(clock: RunClock, spec: LoadSpec) -> Result<Loader, LoadError> {
        spec.pattern.check()?;
        let address = address(&spec.uri)?;
        let writer = Writer::new(&spec);
        let connections = Mutex::default();
        Ok(Loader { inner: Arc::new(Inner { clock, spec, writer, address, connections }) })
    }

    /// What is sent.
    pub fn spec(&self) -> &LoadSpec {
        &self.inner.spec
    }

    /// Sends block `block` and waits for its last answer: one sample per request, in the order in which they ended.
    ///
    /// Arrivals and lengths are those of every block; prompts and ids follow from seed and block number, so a block that is
    /// repeated needs a number of its own. Dropping the future ends the block: nothing more is sent, what is open is let go.
    ///
    /// # Errors
    /// If there are more than [`MAX_REQUESTS`], or the system has no thread to give.
    ///
    /// # Panics
    /// If the load thread did.
    pub async fn run(&self, block: u64) -> Result<Vec<Sample>, LoadError> {
        let requests = self.inner.spec.pattern.requests();
        if requests > MAX_REQUESTS {
            let (what, found) = ("requests of a block", requests.to_string());
            return Err(LoadError::Range { what, found, allowed: format!("at most {MAX_REQUESTS} are allowed") });
        }
        let (done, samples) = tokio::sync::oneshot::channel();
        let stop = StopOnDrop::default();
        let (inner, flag) = (Arc::clone(&self.inner), Arc::clone(&stop.0));
        let thread = std::thread::Builder::new().name("load".to_owned());
        let thread = thread
            .spawn(move || {
                // Whoever waited has given up.
                let _ = done.send(inner.block(block, &flag));
            })
            .map_err(LoadError::Thread)?;
        match samples.await {
            Ok(samples) => Ok(samples),
            Err(_) => match thread.join() {
                Err(panic) => std::panic::resume_unwind(panic),
                Ok(()) => unreachable!("a thread that ends has sent its samples"),
            },
        }
    }

    /// As [`Loader::run`] on the calling thread, each sample handed over when its request ends and requests written just before
    /// they are due: for loads too long to lie in memory. Ends early, with what is open counted as unfinished, once `stop` is
    /// set.
    pub fn stream(&self, block: u64, stop: &AtomicBool, sink: &mut dyn FnMut(Sample)) {
        let requests = self.inner.writer.requests(&self.inner.spec, block);
        self.inner.drive(requests, stop, sink);
    }
}

#[derive(Debug, Default)]
struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Inner {
    fn block(&self, block: u64, stop: &AtomicBool) -> Vec<Sample> {
        let requests: Vec<_> = self.writer.requests(&self.spec, block).collect();
        let mut samples = Vec::with_capacity(requests.len());
        self.drive(requests.into_iter(), stop, &mut |sample| samples.push(sample));
        samples
    }

    fn drive(
        &self,
        requests: impl Iterator<Item = request::Prepared>,
        stop: &AtomicBool,
        sink: &mut dyn FnMut(Sample),
    ) {
        let mut connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        let LoadSpec { timeout, spin, .. } = self.spec;
        let pace = self.spec.pattern.pace();
        Drive::new(self.clock, self.address, pace, timeout, spin, stop, &mut connections).run(requests, sink);
    }
}

fn address(uri: &Uri) -> Result<SocketAddr, LoadError> {
    let host = match (uri.scheme_str(), uri.authority()) {
        (Some("http"), Some(authority)) => (authority.host(), authority.port_u16().unwrap_or(80)),
        (Some(_) | None, Some(_) | None) => return Err(LoadError::Uri(uri.clone())),
    };
    // Brackets mark IPv6 addresses in URLs only.
    let name = host.0.trim_start_matches('[').trim_end_matches(']');
    let resolve = |error| LoadError::Resolve { host: format!("{}:{}", host.0, host.1), error };
    let mut addresses = (name, host.1).to_socket_addrs().map_err(resolve)?;
    addresses.next().ok_or_else(|| resolve(std::io::ErrorKind::NotFound.into()))
}

#[cfg(test)]
mod tests;
