//! Trees of whole requests, driven through the core as a driver does it.

use std::sync::Arc;

use shared::ids::{InstanceId, RequestId, SpanId, TraceId};
use shared::rng::Seed;
use shared::time::{Dur, Ticking, Time};
use shared::trace::check::{CheckOptions, check_spans};
use shared::trace::record::Folded;
use shared::trace::registry::Registry;
use shared::trace::tree::outline;
use shared::trace::{Head, Naming, Sink, Span, Trail};

use super::{Failure, GatewayFact, MAX_NAME_BYTES, bounded_name, bounded_path, proxy_span_id};
use crate::core::config::{DisaggregationConfig, GatewayConfig, PluginConfig, ProfileConfig, ScorerConfig, StageOrder};
use crate::core::gateway::{EndpointConfig, EndpointId, EndpointMetrics, Gateway, Input, Output};
use crate::core::gateway::{RequestInfo, RequestKey};

mod flow_control;
mod llm_d;

/// One request, its gateway and its clock.
struct Run {
    gateway: Gateway,
    trail: Trail<GatewayFact>,
    now: Time,
    folded: Arc<Folded>,
    attempt: u32,
}

const KEY: RequestKey = RequestKey(7);

fn ms(n: u64) -> Dur {
    Dur::from_millis(n)
}

impl Run {
    /// A gateway before two engines with so many waiting requests each, and a request that was read.
    fn new(detail: u8, waiting: [u32; 2]) -> Run {
        let endpoints = ["a", "b"].map(|name| EndpointConfig::new(name, "10.0.0.1", 8000));
        Run::with(GatewayConfig::default(), endpoints, detail, waiting)
    }

    fn with(config: GatewayConfig, endpoints: [EndpointConfig; 2], detail: u8, waiting: [u32; 2]) -> Run {
        Run::named(Naming::Proposal, config, endpoints, detail, waiting)
    }

    fn named(
        naming: Naming,
        config: GatewayConfig,
        endpoints: [EndpointConfig; 2],
        detail: u8,
        waiting: [u32; 2],
    ) -> Run {
        let mut gateway = Gateway::new(config, endpoints.to_vec(), Seed(1));
        let mut out = Vec::new();
        for (i, waiting) in waiting.into_iter().enumerate() {
            let at = Time::ZERO + ms(20);
            let m = EndpointMetrics { waiting, running: 1, kv_usage: 0.25, block_size: 16, num_gpu_blocks: 100, at };
            let input = Input::Metrics { endpoint: EndpointId(i as u32), metrics: Ok(m) };
            gateway.handle(at, input, &mut Ticking::new(at, Dur::ZERO), &mut out);
        }
        let folded = Arc::new(Folded::default());
        let sink: Arc<dyn Sink> = folded.clone();
        let now = Time::ZERO + ms(50);
        let head = Head {
            trace_id: TraceId::new(1).unwrap(),
            span_id: SpanId::new(2).unwrap(),
            parent: None,
            tracestate: None,
            instance: InstanceId(0),
            opened: now,
            detail,
            naming,
        };
        let trail = Trail::open(head, &sink);
        let path = "/v1/chat/completions";
        trail.note(now, || GatewayFact::Received { method: "POST", path: path.into(), route: Some(path) });
        Run { gateway, trail, now, folded, attempt: 0 }
    }

    fn handle(&mut self, input: Input) -> Output {
        let mut out = Vec::new();
        self.now += Dur::from_micros(100);
        self.gateway.handle(self.now, input, &mut Ticking::new(self.now, Dur::from_micros(1)), &mut out);
        self.now += Dur::from_micros(100);
        assert_eq!(out.len(), 1);
        out[0]
    }

    fn request(&mut self, priority: i32) -> Output {
        self.handle(Input::Request(Box::new(RequestInfo {
            key: KEY,
            id: RequestId::sanitise("req-1"),
            model: "m".into(),
            streaming: true,
            size_bytes: 300,
            priority,
            objective: None,
            fairness_id: Some("team-a".into()),
            session: None,
            session_endpoint: None,
            selection: None,
            prompt_tokens_estimate: 64,
            max_output_tokens: None,
            deadlines: Default::default(),
            prefix: vec![1],
            kv: Default::default(),
            trail: self.trail.clone(),
        })))
    }

    fn note(&mut self, after: Dur, fact: GatewayFact) {
        self.now += after;
        self.trail.note(self.now, || fact);
    }

    /// Connects where the core says.
    fn connect(&mut self, output: Output) -> EndpointId {
        let Output::Dispatch { endpoint, attempt, .. } = output else { panic!("{output:?}") };
        let config = self.gateway.endpoints()[endpoint.index()].config.clone();
        self.attempt = attempt;
        let (name, address, port) = (config.name, config.address, config.port);
        self.note(Dur::ZERO, GatewayFact::AttemptStarted { attempt, endpoint: name, address, port });
        endpoint
    }

    fn end_attempt(&mut self, failure: Option<Failure>) {
        let attempt = self.attempt;
        self.note(ms(1), GatewayFact::AttemptEnded { attempt, failure });
    }

    fn end(mut self, status: Option<u16>, failure: Option<Failure>) -> Vec<Span> {
        self.note(ms(1), GatewayFact::Ended { status, failure });
        self.trail.finish(self.now);
        nested(self.folded.take())
    }
}

/// Invariant: children lie inside their parents, and every span is as the registry says. The outermost span ends last.
fn nested(mut spans: Vec<Span>) -> Vec<Span> {
    spans.rotate_right(1);
    let registry = Registry::builtin().expect("the registry is sound");
    let found = check_spans(&spans, &CheckOptions { registry: Some(&registry), clock_tolerance: Dur::ZERO });
    assert!(found.is_empty(), "{found:#?}\n{}", outline(&spans));
    spans
}

fn streamed(detail: u8) -> Vec<Span> {
    streams(Run::new(detail, [3, 1]))
}

fn streams(mut run: Run) -> Vec<Span> {
    let output = run.request(0);
    run.connect(output);
    run.note(ms(5), GatewayFact::ResponseHead { status: 200 });
    run.note(ms(5), GatewayFact::FirstToken);
    run.note(ms(5), GatewayFact::Usage { input: 64, output: 2 });
    run.note(Dur::ZERO, GatewayFact::FinishReason("length"));
    run.end_attempt(None);
    run.note(Dur::ZERO, GatewayFact::Streamed { chunks: 3, bytes: 600, complete: true });
    run.end(Some(200), None)
}

fn names(spans: &[Span]) -> String {
    let short =
        |s: &Span| if s.status == shared::trace::Status::Unset { s.name.to_string() } else { format!("{}!", s.name) };
    spans.iter().map(short).collect::<Vec<_>>().join("\n")
}

#[test]
fn facts_are_small() {
    assert!(size_of::<GatewayFact>() <= 56, "{}", size_of::<GatewayFact>());
}

#[test]
fn a_streamed_answer_has_twelve_spans() {
    let spans = streamed(2);
    assert_eq!(spans.len(), 12);
    insta::assert_snapshot!(outline(&spans), @"
    gateway.request (server) http.request.method=POST url.path=/v1/chat/completions http.route=/v1/chat/completions gen_ai.operation.name=chat gateway.request.id=req-1 gateway.target_model=m gen_ai.request.model=m gateway.request.size_bytes=300 gateway.request.priority=0 gateway.request.streaming=true langfuse.observation.type=span gateway.fairness_id=team-a gateway.pool.name=default-pool gateway.pool.namespace=default gateway.response.time_to_first_token_ms=10.2 gen_ai.usage.input_tokens=64 gen_ai.usage.output_tokens=2 gen_ai.response.finish_reasons=[length] http.response.status_code=200
      * gateway.first_token
      gateway.director.handle_request (internal) gateway.saturation=0.45625 gateway.candidate_endpoints=2 gateway.admission.result=admitted gateway.flow_control.enabled=false gateway.target_endpoint.name=b gateway.target_endpoint.address=10.0.0.1
        gateway.scheduler.schedule (internal) gateway.scheduler.profile=default gateway.scheduler.policy=filter-score-pick gateway.scheduler.candidates.initial=2 gateway.scheduler.candidates.after_filter=2 gateway.scheduler.metrics_age_ms=30.1 gateway.scheduler.selected.score=4.5 gateway.scheduler.runner_up.score=2.5 gateway.scheduler.margin=2 gateway.scheduler.selected.endpoint=b
          gateway.scheduler.filter (internal) gateway.scheduler.filter.name=healthy-filter gateway.scheduler.filter.type=healthy-filter gateway.scheduler.filter.candidates_in=2 gateway.scheduler.filter.candidates_out=2 gateway.scheduler.filter.rejected_count=0
          gateway.scheduler.filter (internal) gateway.scheduler.filter.name=decode-filter gateway.scheduler.filter.type=decode-filter gateway.scheduler.filter.candidates_in=2 gateway.scheduler.filter.candidates_out=2 gateway.scheduler.filter.rejected_count=0
          gateway.scheduler.score (internal) gateway.scheduler.scorer.name=queue-scorer gateway.scheduler.scorer.type=queue-scorer gateway.scheduler.scorer.weight=2 gateway.scheduler.score.min=0 gateway.scheduler.score.max=1 gateway.scheduler.score.avg=0.5
          gateway.scheduler.score (internal) gateway.scheduler.scorer.name=kv-cache-utilization-scorer gateway.scheduler.scorer.type=kv-cache-utilization-scorer gateway.scheduler.scorer.weight=2 gateway.scheduler.score.min=0.75 gateway.scheduler.score.max=0.75 gateway.scheduler.score.avg=0.75
          gateway.scheduler.score (internal) gateway.scheduler.scorer.name=prefix-cache-scorer gateway.scheduler.scorer.type=prefix-cache-scorer gateway.scheduler.scorer.weight=3 gateway.scheduler.score.min=0 gateway.scheduler.score.max=0 gateway.scheduler.score.avg=0
          gateway.scheduler.score (internal) gateway.scheduler.scorer.name=running-requests-size-scorer gateway.scheduler.scorer.type=running-requests-size-scorer gateway.scheduler.scorer.weight=1 gateway.scheduler.score.min=1 gateway.scheduler.score.max=1 gateway.scheduler.score.avg=1
          gateway.scheduler.pick (internal) gateway.scheduler.picker.type=max-score-picker gateway.scheduler.selected_index=1 gateway.scheduler.picker.ties=0 gateway.scheduler.picker.top_endpoints=[b,a] gateway.scheduler.picker.top_scores=[4.5,2.5]
      gateway.backend.proxy (client) http.request.method=POST url.path=/v1/chat/completions server.address=10.0.0.1 server.port=8000 gateway.backend.endpoint.name=b http.response.status_code=200
      gateway.response.process (internal) gateway.response.status_code=200 gateway.response.streaming=true gateway.response.chunks=3 gateway.response.total_bytes=600 gateway.response.complete=true
    ");
}

/// The first endpoint prefills, the second decodes.
fn disaggregated(detail: u8, non_cached_tokens: u32) -> Vec<Span> {
    disaggregates(Naming::Proposal, detail, non_cached_tokens)
}

fn disaggregates(naming: Naming, detail: u8, non_cached_tokens: u32) -> Vec<Span> {
    let endpoint = |name, role: &str| {
        let labels = [("llm-d.ai/role".to_owned(), role.to_owned())].into();
        EndpointConfig::new(name, "10.0.0.1", 8000).with_labels(labels)
    };
    let profile = |name: &str, filter| ProfileConfig {
        name: name.to_owned(),
        filters: vec![PluginConfig::of(filter)],
        scorers: vec![ScorerConfig::of("queue-scorer", 1.0)],
        ..ProfileConfig::default()
    };
    let mut decider = PluginConfig::of("prefix-based-pd-decider");
    decider.parameters.insert("nonCachedTokens".to_owned(), non_cached_tokens.into());
    let (profile, prefill) = (profile("decode", "decode-filter"), profile("prefill", "prefill-filter"));
    let disaggregation = Some(DisaggregationConfig { profile: prefill, decider, stage_order: StageOrder::DecodeFirst });
    let config = GatewayConfig { profile, disaggregation, ..GatewayConfig::default() };
    let endpoints = [endpoint("prefiller", "prefill"), endpoint("decoder", "decode")];
    let mut run = Run::named(naming, config, endpoints, detail, [0, 0]);
    let output = run.request(0);
    let expect = (64 >= non_cached_tokens).then_some(EndpointId(0));
    assert!(
        matches!(output, Output::Dispatch { endpoint: EndpointId(1), prefill, .. } if prefill == expect),
        "{output:?}"
    );
    run.connect(output);
    run.note(ms(5), GatewayFact::ResponseHead { status: 200 });
    run.end_attempt(None);
    run.end(Some(200), None)
}

#[test]
fn each_profile_that_ran_has_a_span_and_the_decision_too() {
    let director = |spans: Vec<Span>| {
        let all = outline(&spans);
        let lines =
            all.lines().skip_while(|l| !l.contains("gateway.director")).take_while(|l| !l.contains("gateway.backend"));
        lines.filter_map(|l| l.get(2..)).collect::<Vec<_>>().join("\n")
    };
    insta::assert_snapshot!(director(disaggregated(2, 16)), @"
    gateway.director.handle_request (internal) gateway.saturation=0.3125 gateway.candidate_endpoints=2 gateway.admission.result=admitted gateway.flow_control.enabled=false gateway.target_endpoint.name=decoder gateway.target_endpoint.address=10.0.0.1
      gateway.scheduler.schedule (internal) gateway.scheduler.profile=decode gateway.scheduler.policy=filter-score-pick gateway.scheduler.candidates.initial=2 gateway.scheduler.candidates.after_filter=1 gateway.scheduler.metrics_age_ms=30.1 gateway.scheduler.selected.score=1 gateway.scheduler.selected.endpoint=decoder
        gateway.scheduler.filter (internal) gateway.scheduler.filter.name=decode-filter gateway.scheduler.filter.type=decode-filter gateway.scheduler.filter.candidates_in=2 gateway.scheduler.filter.candidates_out=1 gateway.scheduler.filter.rejected_count=1
        gateway.scheduler.score (internal) gateway.scheduler.scorer.name=queue-scorer gateway.scheduler.scorer.type=queue-scorer gateway.scheduler.scorer.weight=1 gateway.scheduler.score.min=1 gateway.scheduler.score.max=1 gateway.scheduler.score.avg=1
        gateway.scheduler.pick (internal) gateway.scheduler.picker.type=max-score-picker gateway.scheduler.selected_index=0 gateway.scheduler.picker.ties=0 gateway.scheduler.picker.top_endpoints=[decoder] gateway.scheduler.picker.top_scores=[1]
      gateway.pd.decide (internal) gateway.pd.decision=disaggregate gateway.pd.reason=prefix_not_cached gateway.pd.uncached_tokens=64 gateway.pd.threshold_tokens=16 gateway.pd.prefill_endpoint.name=prefiller
      gateway.scheduler.schedule (internal) gateway.scheduler.profile=prefill gateway.scheduler.policy=filter-score-pick gateway.scheduler.candidates.initial=2 gateway.scheduler.candidates.after_filter=1 gateway.scheduler.metrics_age_ms=30.1 gateway.scheduler.selected.score=1 gateway.scheduler.selected.endpoint=prefiller
        gateway.scheduler.filter (internal) gateway.scheduler.filter.name=prefill-filter gateway.scheduler.filter.type=prefill-filter gateway.scheduler.filter.candidates_in=2 gateway.scheduler.filter.candidates_out=1 gateway.scheduler.filter.rejected_count=1
        gateway.scheduler.score (internal) gateway.scheduler.scorer.name=queue-scorer gateway.scheduler.scorer.type=queue-scorer gateway.scheduler.scorer.weight=1 gateway.scheduler.score.min=1 gateway.scheduler.score.max=1 gateway.scheduler.score.avg=1
        gateway.scheduler.pick (internal) gateway.scheduler.picker.type=max-score-picker gateway.scheduler.selected_index=0 gateway.scheduler.picker.ties=0 gateway.scheduler.picker.top_endpoints=[prefiller] gateway.scheduler.picker.top_scores=[1]
    ");
    insta::assert_snapshot!(director(disaggregated(2, 65)), @"
    gateway.director.handle_request (internal) gateway.saturation=0.3125 gateway.candidate_endpoints=2 gateway.admission.result=admitted gateway.flow_control.enabled=false gateway.target_endpoint.name=decoder gateway.target_endpoint.address=10.0.0.1
      gateway.scheduler.schedule (internal) gateway.scheduler.profile=decode gateway.scheduler.policy=filter-score-pick gateway.scheduler.candidates.initial=2 gateway.scheduler.candidates.after_filter=1 gateway.scheduler.metrics_age_ms=30.1 gateway.scheduler.selected.score=1 gateway.scheduler.selected.endpoint=decoder
        gateway.scheduler.filter (internal) gateway.scheduler.filter.name=decode-filter gateway.scheduler.filter.type=decode-filter gateway.scheduler.filter.candidates_in=2 gateway.scheduler.filter.candidates_out=1 gateway.scheduler.filter.rejected_count=1
        gateway.scheduler.score (internal) gateway.scheduler.scorer.name=queue-scorer gateway.scheduler.scorer.type=queue-scorer gateway.scheduler.scorer.weight=1 gateway.scheduler.score.min=1 gateway.scheduler.score.max=1 gateway.scheduler.score.avg=1
        gateway.scheduler.pick (internal) gateway.scheduler.picker.type=max-score-picker gateway.scheduler.selected_index=0 gateway.scheduler.picker.ties=0 gateway.scheduler.picker.top_endpoints=[decoder] gateway.scheduler.picker.top_scores=[1]
      gateway.pd.decide (internal) gateway.pd.decision=decode_only gateway.pd.reason=short_prompt gateway.pd.threshold_tokens=65
    ");
    insta::assert_snapshot!(names(&disaggregated(1, 16)), @"
    gateway.request
    gateway.scheduler.schedule
    gateway.scheduler.schedule
    gateway.director.handle_request
    gateway.backend.proxy
    gateway.response.process
    ");
}

#[test]
fn level_three_shows_how_the_request_arrived() {
    let mut run = Run::new(3, [3, 1]);
    run.note(Dur::from_micros(20), GatewayFact::HeadersRead { count: Some(9), metadata: true });
    let arrived = super::Arrived { chunks: 2, bytes: 300 };
    run.note(Dur::from_micros(30), GatewayFact::BodyRead { arrived, parsed: false });
    let spans = run.end(Some(400), None);
    let us = |t: Time| t.since(spans[0].start).as_nanos() / 1000;
    let times: Vec<_> = spans[1..].iter().map(|s| (us(s.start), us(s.end))).collect();
    assert_eq!(times, [(0, 20), (20, 50)]);
    insta::assert_snapshot!(outline(&spans), @"
    gateway.request (server) http.request.method=POST url.path=/v1/chat/completions http.route=/v1/chat/completions gen_ai.operation.name=chat http.response.status_code=400
      gateway.request.headers (internal) gateway.header.count=9 gateway.metadata.extracted=true
      gateway.request.body (internal) gateway.body.chunks=2 gateway.body.total_bytes=300 gateway.body.parsed=false
    ");
}

#[test]
fn level_one_leaves_the_stages_out() {
    insta::assert_snapshot!(names(&streamed(1)), @"
    gateway.request
    gateway.scheduler.schedule
    gateway.director.handle_request
    gateway.backend.proxy
    gateway.response.process
    ");
}

#[test]
fn a_sheddable_request_is_refused_when_saturated() {
    let mut run = Run::new(2, [9, 9]);
    let output = run.request(-1);
    assert!(matches!(output, Output::Reject { .. }), "{output:?}");
    insta::assert_snapshot!(outline(&run.end(Some(429), None)), @"
    gateway.request (server) http.request.method=POST url.path=/v1/chat/completions http.route=/v1/chat/completions gen_ai.operation.name=chat gateway.request.id=req-1 gateway.target_model=m gen_ai.request.model=m gateway.request.size_bytes=300 gateway.request.priority=-1 gateway.request.streaming=true langfuse.observation.type=span gateway.fairness_id=team-a gateway.pool.name=default-pool gateway.pool.namespace=default http.response.status_code=429
      gateway.director.handle_request (internal) gateway.saturation=1.8 gateway.candidate_endpoints=2 gateway.admission.result=rejected gateway.admission.reason=rejected-saturated gateway.flow_control.enabled=false
    ");
}

#[test]
fn no_endpoint_is_an_error() {
    let mut run = Run::new(2, [0, 0]);
    // Three scrapes in a row fail.
    for endpoint in [0, 1, 0, 1, 0, 1].map(EndpointId) {
        let lost = Input::Metrics { endpoint, metrics: Err(crate::core::pool::ScrapeError::Unreachable) };
        run.gateway.handle(run.now, lost, &mut Ticking::new(run.now, Dur::ZERO), &mut Vec::new());
    }
    run.request(0);
    insta::assert_snapshot!(outline(&run.end(Some(503), None)), @"
    gateway.request (server) http.request.method=POST url.path=/v1/chat/completions http.route=/v1/chat/completions gen_ai.operation.name=chat gateway.request.id=req-1 gateway.target_model=m gen_ai.request.model=m gateway.request.size_bytes=300 gateway.request.priority=0 gateway.request.streaming=true langfuse.observation.type=span gateway.fairness_id=team-a gateway.pool.name=default-pool gateway.pool.namespace=default http.response.status_code=503 error.type=503 !error: the response has an error status
      gateway.director.handle_request (internal) gateway.saturation=1 gateway.candidate_endpoints=2 gateway.admission.result=rejected gateway.admission.reason=rejected-no-endpoints gateway.flow_control.enabled=false error.type=rejected-no-endpoints !error: no endpoint to send the request to
        gateway.scheduler.schedule (internal) gateway.scheduler.profile=default gateway.scheduler.policy=filter-score-pick gateway.scheduler.candidates.initial=2 gateway.scheduler.candidates.after_filter=0
          gateway.scheduler.filter (internal) gateway.scheduler.filter.name=healthy-filter gateway.scheduler.filter.type=healthy-filter gateway.scheduler.filter.candidates_in=2 gateway.scheduler.filter.candidates_out=0 gateway.scheduler.filter.rejected_count=2
    ");
}

#[test]
fn a_retry_is_directed_to_another_endpoint() {
    let mut run = Run::new(1, [3, 1]);
    let output = run.request(0);
    let endpoint = run.connect(output);
    run.end_attempt(Some(Failure::Connect));
    let output = run.handle(Input::AttemptFailed { key: KEY, endpoint, failure: Failure::Connect });
    let second = run.connect(output);
    assert_ne!(second, endpoint);
    run.note(ms(5), GatewayFact::ResponseHead { status: 200 });
    run.end_attempt(None);
    run.note(Dur::ZERO, GatewayFact::Streamed { chunks: 1, bytes: 10, complete: true });
    let spans = run.end(Some(200), None);
    let second = spans.iter().rfind(|s| s.name == "gateway.backend.proxy").unwrap();
    assert_eq!(second.span_id, proxy_span_id(spans[0].span_id, 1));
    insta::assert_snapshot!(outline(&spans), @"
    gateway.request (server) http.request.method=POST url.path=/v1/chat/completions http.route=/v1/chat/completions gen_ai.operation.name=chat gateway.request.id=req-1 gateway.target_model=m gen_ai.request.model=m gateway.request.size_bytes=300 gateway.request.priority=0 gateway.request.streaming=true langfuse.observation.type=span gateway.fairness_id=team-a gateway.pool.name=default-pool gateway.pool.namespace=default http.response.status_code=200
      * gateway.retry gateway.retry.attempt=1 gateway.backend.endpoint.name=b
      gateway.director.handle_request (internal) gateway.saturation=0.45625 gateway.candidate_endpoints=2 gateway.admission.result=admitted gateway.flow_control.enabled=false gateway.target_endpoint.name=b gateway.target_endpoint.address=10.0.0.1
        gateway.scheduler.schedule (internal) gateway.scheduler.profile=default gateway.scheduler.policy=filter-score-pick gateway.scheduler.candidates.initial=2 gateway.scheduler.candidates.after_filter=2 gateway.scheduler.metrics_age_ms=30.1 gateway.scheduler.selected.score=4.5 gateway.scheduler.runner_up.score=2.5 gateway.scheduler.margin=2 gateway.scheduler.selected.endpoint=b
      gateway.backend.proxy (client) http.request.method=POST url.path=/v1/chat/completions server.address=10.0.0.1 server.port=8000 gateway.backend.endpoint.name=b error.type=connection_failed !error: the engine could not be reached
      gateway.director.handle_request (internal) gateway.saturation=0.6 gateway.candidate_endpoints=2 gateway.admission.result=admitted gateway.flow_control.enabled=false gateway.target_endpoint.name=a gateway.target_endpoint.address=10.0.0.1
        gateway.scheduler.schedule (internal) gateway.scheduler.profile=default gateway.scheduler.policy=filter-score-pick gateway.scheduler.candidates.initial=1 gateway.scheduler.candidates.after_filter=1 gateway.scheduler.metrics_age_ms=31.3 gateway.scheduler.selected.score=4.5 gateway.scheduler.selected.endpoint=a
      gateway.backend.proxy (client) http.request.method=POST url.path=/v1/chat/completions server.address=10.0.0.1 server.port=8000 gateway.backend.endpoint.name=a http.request.resend_count=1 http.response.status_code=200
      gateway.response.process (internal) gateway.response.status_code=200 gateway.response.streaming=true gateway.response.chunks=1 gateway.response.total_bytes=10 gateway.response.complete=true
    ");
}

#[test]
fn an_upstream_error_marks_both_sides() {
    let failed = |status: u16| {
        let mut run = Run::new(1, [3, 1]);
        let output = run.request(0);
        run.connect(output);
        run.note(ms(5), GatewayFact::ResponseHead { status });
        run.end_attempt(None);
        names(&run.end(Some(status), None))
    };
    insta::assert_snapshot!(failed(500), @"
    gateway.request!
    gateway.scheduler.schedule
    gateway.director.handle_request
    gateway.backend.proxy!
    gateway.response.process
    ");
    insta::assert_snapshot!(failed(400), @"
    gateway.request
    gateway.scheduler.schedule
    gateway.director.handle_request
    gateway.backend.proxy!
    gateway.response.process
    ");
}

#[test]
fn a_caller_that_goes_away_is_no_error() {
    let mut run = Run::new(1, [3, 1]);
    let output = run.request(0);
    run.connect(output);
    run.note(ms(5), GatewayFact::ResponseHead { status: 200 });
    run.note(ms(5), GatewayFact::ClientDisconnected);
    run.end_attempt(Some(Failure::Cancelled));
    run.note(Dur::ZERO, GatewayFact::Streamed { chunks: 2, bytes: 50, complete: false });
    insta::assert_snapshot!(outline(&run.end(Some(200), Some(Failure::Cancelled))), @"
    gateway.request (server) http.request.method=POST url.path=/v1/chat/completions http.route=/v1/chat/completions gen_ai.operation.name=chat gateway.request.id=req-1 gateway.target_model=m gen_ai.request.model=m gateway.request.size_bytes=300 gateway.request.priority=0 gateway.request.streaming=true langfuse.observation.type=span gateway.fairness_id=team-a gateway.pool.name=default-pool gateway.pool.namespace=default http.response.status_code=200
      * gateway.client_disconnected
      gateway.director.handle_request (internal) gateway.saturation=0.45625 gateway.candidate_endpoints=2 gateway.admission.result=admitted gateway.flow_control.enabled=false gateway.target_endpoint.name=b gateway.target_endpoint.address=10.0.0.1
        gateway.scheduler.schedule (internal) gateway.scheduler.profile=default gateway.scheduler.policy=filter-score-pick gateway.scheduler.candidates.initial=2 gateway.scheduler.candidates.after_filter=2 gateway.scheduler.metrics_age_ms=30.1 gateway.scheduler.selected.score=4.5 gateway.scheduler.runner_up.score=2.5 gateway.scheduler.margin=2 gateway.scheduler.selected.endpoint=b
      gateway.backend.proxy (client) http.request.method=POST url.path=/v1/chat/completions server.address=10.0.0.1 server.port=8000 gateway.backend.endpoint.name=b http.response.status_code=200
      gateway.response.process (internal) gateway.response.status_code=200 gateway.response.streaming=true gateway.response.chunks=2 gateway.response.total_bytes=50 gateway.response.complete=false
    ");
}

#[test]
fn an_engine_that_breaks_off_is_an_error_after_a_good_status() {
    let mut run = Run::new(1, [3, 1]);
    let output = run.request(0);
    run.connect(output);
    run.note(ms(5), GatewayFact::ResponseHead { status: 200 });
    run.end_attempt(Some(Failure::Reset));
    insta::assert_snapshot!(names(&run.end(Some(200), Some(Failure::Reset))), @"
    gateway.request!
    gateway.scheduler.schedule
    gateway.director.handle_request
    gateway.backend.proxy!
    gateway.response.process!
    ");
}

#[test]
fn an_abandoned_request_is_folded_as_far_as_it_got() {
    let mut run = Run::new(1, [3, 1]);
    let output = run.request(0);
    run.connect(output);
    run.note(ms(5), GatewayFact::ResponseHead { status: 200 });
    run.note(ms(5), GatewayFact::FirstToken);
    let folded = run.folded.clone();
    drop(run);
    insta::assert_snapshot!(names(&nested(folded.take())), @"
    gateway.request!
    gateway.scheduler.schedule
    gateway.director.handle_request
    gateway.backend.proxy!
    gateway.response.process!
    ");
}

#[test]
fn names_and_paths_from_outside_are_bounded() {
    let name = |raw: &str| bounded_name(&raw.into());
    assert_eq!(&*name("org/model-7b:latest"), "org/model-7b:latest");
    for raw in ["line\nbreak".to_owned(), "x".repeat(MAX_NAME_BYTES + 1)] {
        let bounded = name(&raw);
        assert!(bounded.starts_with("h-") && bounded.len() == 34, "{bounded}");
    }
    let route = "/v1/{*path}";
    assert_eq!(&*bounded_path("/v1/files", route), "/v1/files");
    assert_eq!(&*bounded_path(&format!("/v1/{}", "x".repeat(MAX_NAME_BYTES)), route), route);
}
