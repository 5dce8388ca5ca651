//! Drives an engine in virtual time with requests that arrive by themselves or one for each that ends.

use std::collections::BTreeMap;
use std::sync::Arc;

use engine_sim::core::config::EngineConfig;
use engine_sim::core::engine::{Engine, Input, NewRequest, Output, RequestKey, prepare_prompt};
use engine_sim::core::latency::LatencyProfile;
use engine_sim::core::sequence::SamplingParams;
use shared::block_hash::ExtraKeys;
use shared::time::{Dur, Time};
use shared::tokens::{ContentId, TokenId};
use shared::trace::Trail;

/// A request: tokens in and out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lengths {
    pub(crate) prompt: u32,
    pub(crate) output: u32,
}

/// What its caller saw.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) ttft_ms: f64,
    /// Time per output token after the first.
    pub(crate) tpot_ms: f64,
    pub(crate) e2e_ms: f64,
}

/// One engine and the requests that are on their way.
pub(crate) struct Load {
    engine: Engine,
    config: EngineConfig,
    open: BTreeMap<u64, Open>,
    ended: BTreeMap<u64, Seen>,
    sent: u64,
}

struct Open {
    arrival: Time,
    first: Option<Time>,
    output: u32,
}

impl Load {
    pub(crate) fn new(profile: Arc<LatencyProfile>, config: EngineConfig) -> Load {
        let engine = Engine::new(config.clone(), profile);
        Load { engine, config, open: BTreeMap::new(), ended: BTreeMap::new(), sent: 0 }
    }

    fn send(&mut self, at: Time, lengths: Lengths) {
        let key = self.sent;
        self.sent += 1;
        let prompt = vec![TokenId(1); lengths.prompt as usize];
        let request = NewRequest {
            key: RequestKey(key),
            prompt: prepare_prompt(&self.config.cache, &prompt, &ExtraKeys::default()),
            params: SamplingParams { max_tokens: lengths.output, ignore_eos: true, ..SamplingParams::default() },
            priority: 0,
            arrival: at,
            content: ContentId(key),
            lora: None,
            trail: Trail::off(),
        };
        self.engine.handle(at, Input::Add(Box::new(request)));
        self.open.insert(key, Open { arrival: at, first: None, output: lengths.output });
    }

    /// Goes on to the next event; returns when requests ended, one time for each.
    fn advance(&mut self, at: Time) -> Vec<Time> {
        let mut out = Vec::new();
        self.engine.advance(at, &mut out);
        let mut ends = Vec::new();
        for output in out {
            match output {
                Output::Tokens { key, at, .. } => {
                    if let Some(open) = self.open.get_mut(&key.0) {
                        open.first.get_or_insert(at);
                    }
                }
                Output::Finished { key, at, .. } => {
                    let open = self.open.remove(&key.0).unwrap();
                    let first = open.first.unwrap();
                    let ms = |d: Dur| d.as_millis_f64();
                    let tpot_ms = ms(at - first) / f64::from(open.output.max(2) - 1);
                    self.ended.insert(
                        key.0,
                        Seen { ttft_ms: ms(first - open.arrival), tpot_ms, e2e_ms: ms(at - open.arrival) },
                    );
                    ends.push(at);
                }
                Output::Rejected { .. } | Output::Broken { .. } => panic!("{output:?}"),
            }
        }
        ends
    }

    /// `concurrency` requests at time zero, then one for each that ends, until `all` have been sent.
    pub(crate) fn closed(mut self, concurrency: u64, all: u64, mut draw: impl FnMut() -> Lengths) -> Vec<Seen> {
        (0..concurrency).for_each(|_| self.send(Time::ZERO, draw()));
        while let Some(at) = self.engine.next_wakeup() {
            for _ in self.advance(at) {
                if self.sent < all {
                    self.send(at, draw());
                }
            }
        }
        self.ended.into_values().collect()
    }

    /// Requests at their times, which do not go back.
    pub(crate) fn open(mut self, arrivals: impl IntoIterator<Item = (Time, Lengths)>) -> Vec<Seen> {
        for (arrival, lengths) in arrivals {
            while let Some(at) = self.engine.next_wakeup().filter(|at| *at <= arrival) {
                self.advance(at);
            }
            self.send(arrival, lengths);
        }
        while let Some(at) = self.engine.next_wakeup() {
            self.advance(at);
        }
        self.ended.into_values().collect()
    }
}
