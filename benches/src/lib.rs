//! What the benches share: a request taken through gateway and engine cores, to get the facts of a real trace.

pub mod candidates;
pub mod eager;
pub mod stages;

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use engine_sim::core::config::EngineConfig;
use engine_sim::core::engine::{Engine, Input, NewRequest, RequestKey};
use engine_sim::core::facts::{EngineFact, Operation};
use engine_sim::core::hasher::prepare_prompt;
use engine_sim::core::latency::LatencyProfile;
use engine_sim::core::sequence::SamplingParams;
use gateway::core::config::GatewayConfig;
use gateway::core::gateway::{Gateway, Input as GatewayInput, RequestInfo, RequestKey as GatewayKey};
use gateway::core::pool::{EndpointConfig, EndpointId, EndpointMetrics, Role};
use gateway::core::prefix_index::prefix_hashes_of_tokens;
use gateway::spans::GatewayFact;
use shared::block_hash::ExtraKeys;
use shared::ids::{InstanceId, RequestId, SpanId, TraceId};
use shared::rng::Seed;
use shared::time::{Dur, Stopped, Ticking, Time};
use shared::tokens::{ContentId, TokenId};
use shared::trace::Trail;
use shared::trace::record::{Closed, Head, Open, Sink, Ticket};

/// The facts of one request of the default scenario.
#[derive(Debug)]
pub struct Facts {
    /// Noted at the gateway.
    pub gateway: Vec<(Time, GatewayFact)>,
    /// Noted at the engine.
    pub engine: Vec<(Time, EngineFact)>,
    /// When both records closed.
    pub end: Time,
}

/// A gateway in front of `endpoints` engines with uneven loads, configured as by default: two filters, four scorers.
pub fn busy_gateway(endpoints: u32) -> Gateway {
    busy(GatewayConfig::default(), endpoints)
}

/// The same with llm-d's configuration in place of the default; one engine in two prefills only.
pub fn scheduling_gateway(epp: &str, endpoints: u32) -> Gateway {
    let mut config = GatewayConfig::default();
    gateway::epp::load_str("epp", epp, false).expect("the file is good").apply(&mut config);
    busy(config, endpoints)
}

fn busy(config: GatewayConfig, endpoints: u32) -> Gateway {
    let role = |i: u32| match (&config.disaggregation, i % 2) {
        (Some(_), 1) => [(Role::LABEL.to_owned(), "prefill".to_owned())].into(),
        _ => BTreeMap::new(),
    };
    let endpoint = |i| EndpointConfig::new(&format!("engine-{i}"), "127.0.0.1", 8000).with_labels(role(i));
    let configs = (0..endpoints).map(endpoint).collect();
    let mut gateway = Gateway::new(config, configs, Seed(1));
    for i in 0..endpoints {
        let metrics = EndpointMetrics {
            waiting: i % 7,
            running: 3 * (i % 11),
            kv_usage: f64::from(i % 13) / 20.0,
            block_size: 16,
            num_gpu_blocks: 28_160,
            at: Time::ZERO,
        };
        let input = GatewayInput::Metrics { endpoint: EndpointId(i), metrics: Ok(metrics) };
        gateway.handle(Time::ZERO, input, &mut Stopped(Time::ZERO), &mut Vec::new());
    }
    gateway
}

/// A prompt of `tokens` filler tokens.
pub fn prompt(content: u64, tokens: u64) -> Vec<TokenId> {
    let mut out = Vec::new();
    ContentId(content).extend(0, tokens, &mut out);
    out
}

/// A request for [`busy_gateway`].
pub fn request_info(key: u64, prompt: &[TokenId], trail: Trail<GatewayFact>) -> Box<RequestInfo> {
    Box::new(RequestInfo {
        key: GatewayKey(key),
        id: RequestId::sanitise("bench"),
        model: "model".into(),
        streaming: true,
        size_bytes: 4 * prompt.len() as u32,
        priority: 0,
        objective: None,
        fairness_id: None,
        session: None,
        session_endpoint: None,
        selection: None,
        prompt_tokens_estimate: prompt.len() as u32,
        max_output_tokens: None,
        deadlines: Default::default(),
        prefix: prefix_hashes_of_tokens("model", None, prompt, 131_072),
        kv: Default::default(),
        trail,
    })
}

/// Takes closed records and forgets them.
#[derive(Debug)]
pub struct Nothing;

impl Sink for Nothing {
    fn accept(&self, _: Box<dyn Closed>) {}
    fn opened(&self, _: Weak<dyn Open>) -> Ticket {
        Ticket::NONE
    }
    fn closed(&self, _: Ticket) {}
}

/// The head of a sampled record at detail 2.
pub fn head() -> Head {
    let (trace_id, span_id) = (TraceId::new(1).expect("not zero"), SpanId::new(2).expect("not zero"));
    let (instance, opened) = (InstanceId(0), Time::ZERO);
    Head { trace_id, span_id, parent: None, tracestate: None, instance, opened, detail: 2, naming: Default::default() }
}

/// Takes one request of the default scenario through both cores: 800 tokens in, 48 out, one of four engines.
pub fn one_traced_request() -> Facts {
    let sink: Arc<dyn Sink> = Arc::new(Nothing);
    let tokens = prompt(1, 800);
    let (engine, end) = engine_facts(&sink, &tokens);
    Facts { gateway: gateway_facts(&sink, &tokens, end), engine, end }
}

fn gateway_facts(sink: &Arc<dyn Sink>, tokens: &[TokenId], end: Time) -> Vec<(Time, GatewayFact)> {
    let trail = Trail::<GatewayFact>::open(head(), sink);
    let path = "/v1/chat/completions";
    trail.note(Time::ZERO, || GatewayFact::Received { method: "POST", path: path.into(), route: Some(path) });
    let mut watch = Ticking::new(Time::from_nanos(20_000), Dur::from_nanos(300));
    let mut out = Vec::new();
    let info = request_info(1, tokens, trail.clone());
    busy_gateway(4).handle(Time::from_nanos(20_000), GatewayInput::Request(info), &mut watch, &mut out);
    let sent = Time::from_nanos(30_000);
    let (endpoint, address): (Arc<str>, Arc<str>) = ("engine-0".into(), "127.0.0.1".into());
    trail.note(sent, || GatewayFact::AttemptStarted { attempt: 0, endpoint, address, port: 8000 });
    trail.note(sent, || GatewayFact::ResponseHead { status: 200 });
    trail.note(sent, || GatewayFact::FirstToken);
    trail.note(end, || GatewayFact::ResponseModel("model".into()));
    trail.note(end, || GatewayFact::Usage { input: 800, output: 48 });
    trail.note(end, || GatewayFact::FinishReason("length"));
    trail.note(end, || GatewayFact::AttemptEnded { attempt: 0, failure: None });
    trail.note(end, || GatewayFact::Streamed { chunks: 48, bytes: 9_000, complete: true });
    trail.note(end, || GatewayFact::Ended { status: Some(200), failure: None });
    trail.facts()
}

fn engine_facts(sink: &Arc<dyn Sink>, tokens: &[TokenId]) -> (Vec<(Time, EngineFact)>, Time) {
    let trail = Trail::<EngineFact>::open(head(), sink);
    let config = EngineConfig::default();
    let profile = LatencyProfile::named(&config.profile).expect("the default profile exists");
    let operation = Operation::Chat;
    trail.note(Time::ZERO, || EngineFact::Received {
        model: "model".into(),
        request: RequestId::sanitise("r"),
        operation,
    });
    trail.note(Time::ZERO, || EngineFact::Asked {
        max_tokens: Some(48),
        temperature: None,
        top_p: None,
        n: None,
        priority: None,
    });
    let prompt_tokens = tokens.len() as u32;
    trail.note(Time::ZERO, || EngineFact::InputsProcessed { started: Time::ZERO, prompt_tokens, truncated: false });
    let request = NewRequest {
        key: RequestKey(1),
        prompt: prepare_prompt(&config.cache, tokens, &ExtraKeys::default()),
        params: SamplingParams { max_tokens: 48, ignore_eos: true, ..SamplingParams::default() },
        priority: 0,
        arrival: Time::ZERO,
        content: ContentId(7),
        lora: None,
        kv: None,
        trail: trail.clone(),
    };
    let mut engine = Engine::new(config, profile);
    engine.handle(Time::ZERO, Input::Add(Box::new(request)));
    let (mut out, mut end) = (Vec::new(), Time::ZERO);
    while let Some(at) = engine.next_wakeup() {
        engine.advance(at, &mut out);
        end = at;
    }
    trail.note(end, || EngineFact::LastWrite);
    (trail.facts(), end)
}
