//! Traces of steps, driven through an engine.

use http::HeaderMap;
use shared::rng::Seed;
use shared::time::Anchor;
use shared::trace::check::{CheckOptions, check_spans};
use shared::trace::config::ExporterConfig;
use shared::trace::exporter::memory::MemorySpans;
use shared::trace::registry::Registry;
use shared::trace::tree::outline;
use shared::trace::{Ratio, Resource, Sampler, Span, Stats, Status, Telemetry, TelemetryConfig, Tracer, Trail};

use super::*;
use crate::core::config::EngineConfig;
use crate::core::engine::tests::{engine, request, run_to_idle};
use crate::core::engine::{Engine, Input, Output};
use crate::core::facts::EngineFact;
use crate::core::step_facts::MAX_LINKS;

/// An engine whose steps are recorded, in virtual time.
struct Rig {
    engine: Engine,
    tracer: Tracer,
    telemetry: Telemetry,
    spans: MemorySpans,
    trails: Vec<Trail<EngineFact>>,
}

impl Rig {
    fn new(change: impl FnOnce(&mut EngineConfig, &mut TelemetryConfig)) -> Rig {
        let (mut config, spans) = (EngineConfig::default(), MemorySpans::default());
        let mut telemetry = TelemetryConfig {
            sampler: Sampler::parent_based_ratio(Ratio::ALL),
            engine_steps: Ratio::ALL,
            exporters: vec![ExporterConfig::Memory(spans.clone())],
            ..TelemetryConfig::default()
        };
        change(&mut config, &mut telemetry);
        let telemetry = Telemetry::inline(telemetry, Anchor::VIRTUAL, Seed(1)).unwrap();
        let tracer = telemetry.tracer(Resource::new("vllm", "engine-0"));
        let mut engine = engine(config);
        engine.trace_steps(tracer.engine_steps());
        Rig { engine, tracer, telemetry, spans, trails: Vec::new() }
    }

    fn add(&mut self, us: u64, prompt: u32, max_tokens: u32) {
        let at = Time::ZERO + Dur::from_micros(us);
        let mut new = request(self.engine.config(), self.trails.len() as u64, prompt, max_tokens, at);
        (_, new.trail) = self.tracer.start(&HeaderMap::new(), at);
        self.trails.push(new.trail.clone());
        self.engine.handle(at, Input::Add(Box::new(new)));
    }

    /// Runs everything; the spans, sound and in the order of their starts.
    fn run(mut self) -> (Vec<Span>, Stats) {
        for output in run_to_idle(&mut self.engine) {
            if let Output::Finished { key, at, .. } = output {
                self.trails[key.0 as usize].clone().finish(at);
            }
        }
        self.trails.clear();
        self.stop()
    }

    fn stop(self) -> (Vec<Span>, Stats) {
        drop(self.engine);
        let stats = self.telemetry.shutdown(Time::ZERO);
        let mut spans = self.spans.take().spans;
        spans.sort_by_key(|s| (s.start, s.trace_id, s.parent.is_some()));
        let registry = Registry::builtin().unwrap();
        let found = check_spans(&spans, &CheckOptions { registry: Some(&registry), ..CheckOptions::default() });
        assert!(found.is_empty(), "{found:#?}");
        (spans, stats)
    }
}

fn roots(spans: &[Span]) -> Vec<&Span> {
    spans.iter().filter(|s| s.name == "vllm.engine.step").collect()
}

fn trace(root: &Span, spans: &[Span]) -> Vec<Span> {
    spans.iter().filter(|s| s.trace_id == root.trace_id).cloned().collect()
}

fn child<'a>(root: &Span, name: &str, spans: &'a [Span]) -> &'a Span {
    spans.iter().find(|s| s.trace_id == root.trace_id && s.name == name).unwrap_or_else(|| panic!("no {name}"))
}

#[test]
fn a_step_has_a_trace_of_its_own() {
    let mut rig = Rig::new(|_, _| ());
    rig.add(0, 100, 5);
    rig.add(8_000, 64, 2);
    let (spans, _) = rig.run();
    let is_mixed = |s: &&Span| s.get("vllm.batch.phase").and_then(|v| v.as_str()) == Some("mixed");
    let mixed = roots(&spans).into_iter().find(is_mixed).expect("a step of both kinds");
    insta::assert_snapshot!(outline(&trace(mixed, &spans)), @r"
    vllm.engine.step (internal) vllm.scheduler.iteration=4 vllm.batch.phase=mixed vllm.batch.size=2 vllm.batch.total_tokens=65
      ~ link
      ~ link
      vllm.scheduler.schedule (internal) vllm.scheduler.iteration=4 vllm.batch.phase=mixed vllm.batch.prefill_requests=1 vllm.batch.decode_requests=1 vllm.batch.total_tokens=65 vllm.batch.max_seq_len=103 vllm.kv_cache.blocks_available=28152 vllm.kv_cache.blocks_allocated=4 vllm.kv_cache.blocks_freed=0
        vllm.scheduler.admit_requests (internal) vllm.requests.waiting=1 vllm.requests.admitted=1 vllm.requests.preempted=0 vllm.blocks.needed=4 vllm.blocks.available=28152
        vllm.scheduler.allocate_blocks (internal) vllm.allocation.blocks_allocated=4 vllm.allocation.blocks_freed=0 vllm.allocation.blocks_evicted=0 vllm.prefix_cache.hit=false vllm.prefix_cache.blocks_reused=0
        vllm.scheduler.create_batch (internal) vllm.batch.size=2 vllm.batch.total_tokens=65 vllm.batch.prefill_tokens=64 vllm.batch.decode_tokens=1
      vllm.executor.execute_model (internal) vllm.executor.phase=mixed vllm.executor.iterations=1 vllm.batch.size_mean=2 vllm.batch.size_max=2 vllm.model.forward_duration_ms=7.157428
      vllm.output.process_batch (internal) vllm.output.phase=mixed vllm.outputs.processed=2 vllm.outputs.finished=0 vllm.tokens.new=2
    ");
}

#[test]
fn the_finest_detail_shows_the_parts_of_the_execution() {
    let mut rig = Rig::new(|_, telemetry| telemetry.detail = 3);
    rig.add(0, 100, 1);
    let (spans, _) = rig.run();
    let step = trace(roots(&spans)[0], &spans);
    let parts: Vec<&Span> = step.iter().filter(|s| level(&s.name) == 3).collect();
    let text = outline(&parts.iter().map(|s| (*s).clone()).collect::<Vec<_>>());
    insta::assert_snapshot!(text, @r"
    vllm.worker.prepare_inputs (internal) vllm.attention.backend=FLASH_ATTN
    vllm.model.forward (internal) vllm.model.name=meta-llama/Llama-3.1-8B-Instruct vllm.model.num_layers=32 vllm.model.hidden_size=4096
    vllm.sampler.sample (internal) vllm.sampling.tokens=1
    ");
    let execute = child(&step[0], "vllm.executor.execute_model", &step);
    assert!(parts.is_sorted_by(|a, b| a.end == b.start), "one after the other");
    assert_eq!((parts[0].start, parts[2].end), (execute.start, execute.end), "nothing is left over");
}

/// vLLM schedules a step while the one before it executes, unless told not to.
#[test]
fn scheduling_overlaps_the_execution_before_it_only_when_asynchronous() {
    let overlaps = |async_scheduling: bool| {
        let mut rig = Rig::new(|config, _| config.scheduler.async_scheduling = async_scheduling);
        rig.add(0, 100, 20);
        let (spans, _) = rig.run();
        let steps = roots(&spans);
        assert_eq!(steps.len(), 20);
        let overlap = |pair: &[&Span]| {
            let (execute, next) = (child(pair[0], "vllm.executor.execute_model", &spans), pair[1]);
            child(next, "vllm.scheduler.schedule", &spans).start < execute.end
        };
        steps.windows(2).filter(|pair| overlap(pair)).count()
    };
    assert_eq!((overlaps(true), overlaps(false)), (19, 0));
}

#[test]
fn a_step_links_to_the_recorded_requests_in_it() {
    let mut rig = Rig::new(|_, telemetry| telemetry.sampler = Sampler::parent_based_ratio(Ratio::new(0.5).unwrap()));
    (0..8).for_each(|i| rig.add(0, 20 + i, 3));
    let recorded = rig.trails.iter().filter(|t| t.is_recording()).count();
    assert!((1..8).contains(&recorded), "{recorded} of 8");
    let (spans, _) = rig.run();
    for root in roots(&spans) {
        assert_eq!(root.get("vllm.batch.size").and_then(|v| v.as_int()), Some(8));
        assert_eq!(root.links.len(), recorded);
        let target =
            |l: &shared::trace::Link| spans.iter().find(|s| (s.trace_id, s.span_id) == (l.trace_id, l.span_id));
        assert!(root.links.iter().all(|l| target(l).is_some_and(|s| s.name == "vllm.engine.request")));
    }
}

#[test]
fn links_beyond_the_most_are_counted() {
    let mut rig = Rig::new(|_, _| ());
    let most = MAX_LINKS as u32;
    (0..most + 12).for_each(|_| rig.add(0, 20, 2));
    let (spans, stats) = rig.run();
    for root in roots(&spans) {
        assert_eq!(root.get("vllm.batch.links_dropped").and_then(|v| v.as_int()), Some(12));
        assert_eq!(root.links.len(), MAX_LINKS);
    }
    assert_eq!(stats.facts_cut, 0);
}

#[test]
fn no_step_is_recorded_unless_asked_for() {
    for off in [
        |t: &mut TelemetryConfig| t.engine_steps = Ratio::NONE,
        |t: &mut TelemetryConfig| t.detail = 1,
        |t: &mut TelemetryConfig| t.disabled = true,
    ] {
        let mut rig = Rig::new(|_, telemetry| off(telemetry));
        assert!(rig.tracer.engine_steps().is_none());
        rig.add(0, 100, 5);
        let (spans, stats) = rig.run();
        assert_eq!((roots(&spans).len(), stats.own_traces_started), (0, 0));
    }
}

/// Ids and counts of requests do not depend on whether steps are recorded, and steps repeat with the seed (I6).
#[test]
fn steps_change_nothing_about_the_traces_of_requests() {
    let run = |ratio: f64| {
        let mut rig = Rig::new(|_, telemetry| telemetry.engine_steps = Ratio::new(ratio).unwrap());
        (0..5).for_each(|i| rig.add(1_000 * i, 50, 40));
        let (spans, stats) = rig.run();
        let (steps, requests): (Vec<Span>, Vec<Span>) = spans
            .into_iter()
            .partition(|s| s.name == "vllm.engine.step" || !s.tracestate.as_deref().unwrap_or_default().is_empty());
        (requests, steps, stats.own_traces_sampled, stats.traces_started)
    };
    let (without, none, ..) = run(0.0);
    let (with, some, sampled, requests) = run(0.25);
    assert_eq!(none.len(), 0);
    assert_eq!((with == without, requests), (true, 5));
    let ids: std::collections::BTreeSet<_> = some.iter().map(|s| s.trace_id).collect();
    assert_eq!(ids.len() as u64, sampled);
    assert!((2..30).contains(&sampled), "{sampled} of some 45 steps");
    assert!(some.iter().all(|s| s.tracestate.as_deref() == Some("ot=th:c")), "backends can scale counts");
    assert_eq!(run(0.25).1, some);
}

#[test]
fn a_step_that_is_never_finished_is_abandoned() {
    let mut rig = Rig::new(|_, _| ());
    rig.add(0, 100, 50);
    rig.engine.advance(Time::ZERO + Dur::from_millis(20), &mut Vec::new());
    rig.trails.clear();
    let (spans, _) = rig.stop();
    let open: Vec<&Span> = roots(&spans).into_iter().filter(|s| s.status != Status::Unset).collect();
    assert_eq!(open.len(), 2, "with asynchronous scheduling two are in flight");
    assert!(open.iter().all(|s| s.get("error.type").and_then(|v| v.as_str()) == Some("abandoned")));
}
