//! Trees of requests that wait in the gateway.

use super::*;
use crate::core::config::{BandConfig, FairnessPolicy, FlowControlConfig};
use crate::core::request::Deadlines;

/// A gateway with flow control before two engines that are full.
fn full(detail: u8) -> Run {
    let band =
        BandConfig { fairness: FairnessPolicy::RoundRobinFairnessPolicy, max_requests: 2, ..BandConfig::default() };
    let flow_control = FlowControlConfig { enabled: true, default_band: band, ..FlowControlConfig::default() };
    let config = GatewayConfig { flow_control: Some(flow_control), ..GatewayConfig::default() };
    Run::with(config, ["a", "b"].map(|name| EndpointConfig::new(name, "10.0.0.1", 8000)), detail, [6, 5])
}

/// What the core puts out when it is told this.
fn tell(run: &mut Run, after: Dur, input: Input) -> Vec<Output> {
    run.now += after;
    let mut out = Vec::new();
    run.gateway.handle(run.now, input, &mut Ticking::new(run.now, Dur::from_micros(1)), &mut out);
    out
}

/// The recorded request.
fn ask(run: &mut Run) -> Vec<Output> {
    let mut info = other(run, 7);
    info.trail = run.trail.clone();
    info.deadlines = Deadlines { ttft: Some(ms(250)), ..Deadlines::default() };
    tell(run, Dur::from_micros(100), Input::Request(info))
}

fn other(_: &Run, key: u64) -> Box<RequestInfo> {
    Box::new(RequestInfo {
        key: RequestKey(key),
        id: RequestId::sanitise("req-1"),
        model: "m".into(),
        streaming: true,
        size_bytes: 300,
        priority: 0,
        objective: None,
        fairness_id: Some("team-a".into()),
        session: None,
        session_endpoint: None,
        selection: None,
        prompt_tokens_estimate: 64,
        max_output_tokens: None,
        deadlines: Deadlines::default(),
        prefix: Vec::new(),
        kv: Default::default(),
        trail: Trail::off(),
    })
}

fn advance(run: &mut Run, after: Dur) -> Vec<Output> {
    run.now += after;
    let mut out = Vec::new();
    run.gateway.advance(run.now, &mut Ticking::new(run.now, Dur::from_micros(1)), &mut out);
    out
}

/// The director's part of the tree.
fn director(spans: Vec<Span>) -> String {
    let all = outline(&spans);
    let of_director = |l: &&str| l.contains("gateway.director") || l.contains("flowcontrol");
    all.lines().filter(of_director).filter_map(|l| l.get(2..)).collect::<Vec<_>>().join("\n")
}

#[test]
fn a_request_that_waited_shows_what_held_it() {
    let mut run = full(2);
    let early = Input::Request(other(&run, 1));
    assert!(tell(&mut run, ms(0), early).is_empty());
    assert!(ask(&mut run).is_empty());
    for endpoint in [EndpointId(0), EndpointId(1)] {
        let at = run.now;
        let m = EndpointMetrics { waiting: 0, running: 1, kv_usage: 0.25, block_size: 16, num_gpu_blocks: 100, at };
        assert!(tell(&mut run, ms(20), Input::Metrics { endpoint, metrics: Ok(m) }).is_empty());
    }
    assert_eq!(advance(&mut run, ms(2)).len(), 2);
    run.note(ms(5), GatewayFact::ResponseHead { status: 200 });
    run.note(Dur::ZERO, GatewayFact::Streamed { chunks: 3, bytes: 600, complete: true });
    let spans = run.end(Some(200), None);
    let wait = spans.iter().find(|s| s.name == "gateway.flowcontrol.dispatch").unwrap();
    let schedule = spans.iter().find(|s| s.name == "gateway.scheduler.schedule").unwrap();
    assert_eq!(wait.end, schedule.start);
    insta::assert_snapshot!(director(spans), @"
    gateway.director.handle_request (internal) gateway.saturation=1.1 gateway.candidate_endpoints=2 gateway.queue.size=1 gateway.admission.result=queued gateway.flow_control.enabled=true gateway.target_endpoint.name=a gateway.target_endpoint.address=10.0.0.1
      gateway.flowcontrol.enqueue (internal) gateway.flow_control.flow_id=team-a gateway.flow_control.priority_band=0 gateway.queue.position=1 gateway.request.size_bytes=300 gateway.flow_control.ttl_ms=60000
      gateway.flowcontrol.dispatch (internal) gateway.flow_control.fairness_policy=round-robin-fairness-policy gateway.flow_control.ordering_policy=fcfs-ordering-policy gateway.queue.wait_ms=41.999 gateway.flow_control.result=dispatched gateway.saturation=1.1 gateway.flow_control.ceiling=1
    ");
}

#[test]
fn a_request_that_expired_was_refused() {
    let mut run = full(2);
    ask(&mut run);
    assert!(matches!(advance(&mut run, Dur::from_secs(61))[..], [Output::Reject { .. }]));
    insta::assert_snapshot!(director(run.end(Some(429), None)), @"
    gateway.director.handle_request (internal) gateway.saturation=1.1 gateway.candidate_endpoints=2 gateway.queue.size=0 gateway.admission.result=rejected gateway.admission.reason=rejected-ttl-expired gateway.flow_control.enabled=true
      gateway.flowcontrol.enqueue (internal) gateway.flow_control.flow_id=team-a gateway.flow_control.priority_band=0 gateway.queue.position=0 gateway.request.size_bytes=300 gateway.flow_control.ttl_ms=60000
      gateway.flowcontrol.dispatch (internal) gateway.flow_control.fairness_policy=round-robin-fairness-policy gateway.flow_control.ordering_policy=fcfs-ordering-policy gateway.queue.wait_ms=60999.999 gateway.flow_control.result=timeout gateway.saturation=1.1 gateway.flow_control.ceiling=1
    ");
}

#[test]
fn a_queue_without_room_refuses() {
    let mut run = full(2);
    for key in [1, 2] {
        let info = Input::Request(other(&run, key));
        tell(&mut run, ms(0), info);
    }
    assert!(matches!(ask(&mut run)[..], [Output::Reject { .. }]));
    insta::assert_snapshot!(director(run.end(Some(429), None)), @"
    gateway.director.handle_request (internal) gateway.saturation=1.1 gateway.candidate_endpoints=2 gateway.queue.size=2 gateway.admission.result=rejected gateway.admission.reason=rejected-saturated gateway.flow_control.enabled=true
      gateway.flowcontrol.enqueue (internal) gateway.flow_control.flow_id=team-a gateway.flow_control.priority_band=0 gateway.request.size_bytes=300 gateway.flow_control.ttl_ms=60000
    ");
}

#[test]
fn giving_up_is_no_error_and_a_gateway_that_stops_is() {
    let mut run = full(2);
    ask(&mut run);
    assert!(tell(&mut run, ms(5), Input::Cancelled(KEY)).is_empty());
    run.note(Dur::ZERO, GatewayFact::ClientDisconnected);
    insta::assert_snapshot!(director(run.end(None, Some(Failure::Cancelled))), @"
    gateway.director.handle_request (internal) gateway.saturation=1.1 gateway.candidate_endpoints=2 gateway.queue.size=0 gateway.admission.result=rejected gateway.admission.reason=rejected-context-cancelled gateway.flow_control.enabled=true
      gateway.flowcontrol.enqueue (internal) gateway.flow_control.flow_id=team-a gateway.flow_control.priority_band=0 gateway.queue.position=0 gateway.request.size_bytes=300 gateway.flow_control.ttl_ms=60000
      gateway.flowcontrol.dispatch (internal) gateway.flow_control.fairness_policy=round-robin-fairness-policy gateway.flow_control.ordering_policy=fcfs-ordering-policy gateway.queue.wait_ms=4.999 gateway.flow_control.result=cancelled gateway.saturation=1.1 gateway.flow_control.ceiling=1
    ");
    let mut run = full(1);
    ask(&mut run);
    assert_eq!(tell(&mut run, ms(5), Input::ShutDown).len(), 1);
    insta::assert_snapshot!(director(run.end(Some(503), None)), @"gateway.director.handle_request (internal) gateway.saturation=1.1 gateway.candidate_endpoints=2 gateway.queue.size=0 gateway.admission.result=rejected gateway.admission.reason=rejected-shutting-down gateway.flow_control.enabled=true error.type=rejected-shutting-down !error: no endpoint to send the request to");
}
