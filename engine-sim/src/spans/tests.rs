//! Span trees of whole requests, driven through an engine, compared as text and against the registry.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::Arc;

use shared::ids::{InstanceId, RequestId, TraceId};
use shared::trace::record::{Folded, Head, Sink};
use shared::trace::registry::{Registry, Requirement};
use shared::trace::span::Attr;
use shared::trace::tree::value_text;
use shared::trace::{Naming, Status, Trail};
use shared::trace::{Span, Value};

use super::*;
use crate::core::config::EngineConfig;
use crate::core::engine::tests::{engine, request, run_to_idle};
use crate::core::engine::{Engine, Input, NewRequest, Output, RequestKey};
use crate::core::facts::{DecodingFact, Operation};

mod vllm;

/// An engine with recorded requests, and what a server would note about them.
struct Rig {
    engine: Engine,
    folded: Arc<Folded>,
    trails: Vec<Trail<EngineFact>>,
    detail: u8,
    naming: Naming,
    temperature: Option<f32>,
}

impl Rig {
    fn new(detail: u8, change: impl FnOnce(&mut EngineConfig)) -> Rig {
        let mut config = EngineConfig::default();
        change(&mut config);
        Rig {
            engine: engine(config),
            folded: Arc::default(),
            trails: Vec::new(),
            detail,
            naming: Naming::Proposal,
            temperature: Some(0.0),
        }
    }

    /// A request that arrives at `us` and is read and tokenized in 100 us.
    fn add(&mut self, us: u64, prompt: u32, max_tokens: u32) {
        self.add_with(us, prompt, max_tokens, |_| ());
    }

    fn add_with(&mut self, us: u64, prompt: u32, max_tokens: u32, change: impl FnOnce(&mut NewRequest)) {
        let key = self.trails.len() as u64;
        let at = |more| Time::ZERO + Dur::from_micros(us + more);
        let sink: Arc<dyn Sink> = self.folded.clone();
        let head = Head {
            trace_id: TraceId::new(1).unwrap(),
            span_id: SpanId::new(100 + key).unwrap(),
            parent: SpanId::new(7),
            tracestate: None,
            instance: InstanceId(0),
            opened: at(0),
            detail: self.detail,
            naming: self.naming,
        };
        let trail = Trail::open(head, &sink);
        trail.note(at(0), || EngineFact::Received {
            model: "m".into(),
            request: RequestId::sanitise("cmpl-1"),
            operation: Operation::Chat,
        });
        trail.note(at(0), || EngineFact::Asked {
            max_tokens: Some(max_tokens),
            temperature: self.temperature,
            top_p: Some(0.5),
            n: Some(1),
            priority: Some(0),
        });
        trail.note(at(0), || EngineFact::Adapter("sql".into()));
        let inputs = EngineFact::InputsProcessed { started: at(20), prompt_tokens: prompt, truncated: false };
        trail.note(at(100), || inputs);
        let mut new = request(self.engine.config(), key, prompt, max_tokens, at(0));
        change(&mut new);
        // What a server knows about the text: that the last token completes a stop string.
        let asked = DecodingFact { top_k: Some(40), logprobs: Some(2), stop_string_at: new.params.eos_at };
        if trail.detail() >= 3 {
            trail.note(at(0), || EngineFact::Decoding(asked));
        }
        new.trail = trail.clone();
        self.trails.push(trail);
        self.engine.handle(at(120), Input::Add(Box::new(new)));
    }

    /// Runs everything and finishes the records as a server does.
    fn run(mut self) -> Vec<Span> {
        for output in run_to_idle(&mut self.engine) {
            let trail = &self.trails[output.key().0 as usize];
            match output {
                Output::Tokens { at, .. } => {
                    trail.amend(at, |f| matches!(f, EngineFact::FirstWrite).then_some(()), || EngineFact::FirstWrite);
                }
                Output::Finished { at, reason, .. } => {
                    if reason != FinishReason::Abort {
                        trail.note(at, || EngineFact::LastWrite);
                    }
                    trail.clone().finish(at);
                }
                Output::Rejected { at, reason, .. } => {
                    let failed = EngineFact::Failed { error_type: reason.as_str(), http_status: reason.http_status() };
                    trail.note(at, || failed);
                    trail.clone().finish(at);
                }
                Output::Broken { at, .. } => trail.clone().finish(at),
            }
        }
        self.trails.clear();
        let spans = self.folded.take();
        check(&spans);
        spans
    }
}

/// What holds for every tree: registry, unique ids, children inside their parents.
fn check(spans: &[Span]) {
    let registry = Registry::builtin().expect("the registry is sound");
    let mut ids = BTreeSet::new();
    for span in spans {
        assert!(ids.insert(span.span_id), "{}: id used twice", span.name);
        registered(&registry, span);
        let Some(parent) = spans.iter().find(|p| Some(p.span_id) == span.parent) else {
            assert!(["vllm.engine.request", "llm_request"].contains(&&*span.name));
            continue;
        };
        let late = span.get("vllm.late").is_some();
        assert!(
            span.start >= parent.start && (late || span.end <= parent.end),
            "{} outside {}",
            span.name,
            parent.name
        );
    }
}

/// What the registry says of one span.
fn registered(registry: &Registry, span: &Span) {
    let def = registry.span(&span.name).unwrap_or_else(|| panic!("{} is not registered", span.name));
    assert!(def.kinds.contains(&span.kind), "{}: {:?}", span.name, span.kind);
    if span.name != "llm_request" {
        assert_eq!(level(&span.name), def.level, "{}", span.name);
    }
    attributes(registry, &span.name, &def.attributes, &span.attrs);
    for event in &span.events {
        assert!(def.events.contains(&*event.name), "{}: {} is not registered", span.name, event.name);
        attributes(registry, &event.name, &registry.events[&*event.name].attributes, &event.attrs);
    }
}

fn attributes(registry: &Registry, of: &str, allowed: &BTreeMap<String, Requirement>, found: &[Attr]) {
    for (key, value) in found {
        assert!(allowed.contains_key(&**key), "{of}: {key} is not registered");
        assert!(registry.attributes[&**key].kind.accepts(value), "{of}: {key} is {value:?}");
        assert_eq!(found.iter().filter(|(k, _)| k == key).count(), 1, "{of}: {key} twice");
    }
    for (key, _) in allowed.iter().filter(|(_, requirement)| **requirement == Requirement::Required) {
        assert!(found.iter().any(|(k, _)| k == key), "{of}: {key} is required");
    }
}

/// A tree as text: names, a few attributes, events and status; no ids, no times.
fn tree(spans: &[Span]) -> String {
    let mut text = String::new();
    for root in spans.iter().filter(|s| s.kind == Kind::Server) {
        write_span(root, spans, 0, &mut text);
    }
    text
}

fn write_span(span: &Span, all: &[Span], depth: usize, text: &mut String) {
    let shown = [
        "vllm.queue.reason",
        "vllm.executor.phase",
        "vllm.executor.iterations",
        "vllm.scheduler.scheduled_tokens",
        "vllm.output.phase",
        "vllm.tokens.new",
        "gen_ai.usage.output_tokens",
        "error.type",
        "vllm.late",
    ];
    let _ = write!(text, "{:1$}{2}", "", 2 * depth, span.name);
    for key in shown {
        if let Some(value) = span.get(key) {
            let short = key.rsplit('.').next().unwrap();
            let value = value.as_str().map_or_else(|| format!("{value:?}"), str::to_owned);
            let _ = write!(text, " {short}={value}");
        }
    }
    if let Status::Error(why) = &span.status {
        let _ = write!(text, " ERROR: {why}");
    }
    text.push('\n');
    for event in &span.events {
        let _ = writeln!(text, "{:1$}! {2}", "", 2 * depth + 2, event.name);
    }
    let mut children: Vec<&Span> = all.iter().filter(|s| s.parent == Some(span.span_id)).collect();
    children.sort_by_key(|s| s.start);
    for child in children {
        write_span(child, all, depth + 1, text);
    }
}

#[test]
fn one_chunk_of_prefill_gives_twelve_spans() {
    let mut rig = Rig::new(2, |_| ());
    rig.add(0, 100, 5);
    let spans = rig.run();
    assert_eq!(spans.len(), 12);
    insta::assert_snapshot!(tree(&spans), @r#"
    vllm.engine.request output_tokens=Int(5)
      ! vllm.queued
      ! vllm.scheduled
      ! vllm.first_token
      ! vllm.finished
      vllm.processor.process_inputs
      vllm.engine.add_to_core
      vllm.engine.queue reason=capacity
      vllm.scheduler.schedule scheduled_tokens=Int(100)
        vllm.scheduler.admit_requests
        vllm.scheduler.allocate_blocks
        vllm.scheduler.create_batch
      vllm.executor.execute_model phase=prefill iterations=Int(1)
      vllm.output.process_batch phase=prefill new=Int(1)
      vllm.executor.execute_model phase=decode iterations=Int(4)
      vllm.output.process_batch phase=decode new=Int(4)
    "#);
}

#[test]
fn detail_1_leaves_the_decisions_out() {
    let mut rig = Rig::new(1, |_| ());
    rig.add(0, 100, 5);
    insta::assert_snapshot!(tree(&rig.run()), @r#"
    vllm.engine.request output_tokens=Int(5)
      ! vllm.queued
      ! vllm.scheduled
      ! vllm.first_token
      ! vllm.finished
      vllm.engine.queue reason=capacity
      vllm.scheduler.schedule scheduled_tokens=Int(100)
      vllm.executor.execute_model phase=prefill iterations=Int(1)
      vllm.executor.execute_model phase=decode iterations=Int(4)
    "#);
}

#[test]
fn two_chunks_of_prefill() {
    let mut rig = Rig::new(2, |c| {
        c.scheduler.max_num_batched_tokens = 64;
        c.scheduler.max_num_seqs = 4;
    });
    rig.add(0, 100, 3);
    insta::assert_snapshot!(tree(&rig.run()), @r#"
    vllm.engine.request output_tokens=Int(3)
      ! vllm.queued
      ! vllm.scheduled
      ! vllm.first_token
      ! vllm.finished
      vllm.processor.process_inputs
      vllm.engine.add_to_core
      vllm.engine.queue reason=capacity
      vllm.scheduler.schedule scheduled_tokens=Int(64)
        vllm.scheduler.admit_requests
        vllm.scheduler.allocate_blocks
        vllm.scheduler.create_batch
      vllm.scheduler.schedule scheduled_tokens=Int(36)
        vllm.scheduler.allocate_blocks
        vllm.scheduler.create_batch
      vllm.executor.execute_model phase=prefill iterations=Int(1)
      vllm.executor.execute_model phase=prefill iterations=Int(1)
      vllm.output.process_batch phase=prefill new=Int(1)
      vllm.executor.execute_model phase=decode iterations=Int(2)
      vllm.output.process_batch phase=decode new=Int(2)
    "#);
}

#[test]
fn preempted_and_resumed() {
    let mut rig = Rig::new(2, |c| {
        c.max_model_len = Some(128);
        c.cache.num_gpu_blocks = Some(10);
    });
    rig.add(0, 60, 40);
    rig.add(10, 61, 40);
    let spans = rig.run();
    let preempted =
        spans.iter().find(|s| s.kind == Kind::Server && s.get("vllm.request.preemptions") != Some(&Value::Int(0)));
    let root = preempted.expect("one is preempted");
    let of_it: Vec<Span> =
        spans.iter().filter(|s| s.span_id == root.span_id || descends(s, root.span_id, &spans)).cloned().collect();
    insta::assert_snapshot!(tree(&of_it), @r#"
    vllm.engine.request output_tokens=Int(40)
      ! vllm.queued
      ! vllm.scheduled
      ! vllm.first_token
      ! vllm.preempted
      ! vllm.queued
      ! vllm.resumed
      ! vllm.finished
      vllm.processor.process_inputs
      vllm.engine.add_to_core
      vllm.engine.queue reason=capacity
      vllm.scheduler.schedule scheduled_tokens=Int(61)
        vllm.scheduler.admit_requests
        vllm.scheduler.allocate_blocks
        vllm.scheduler.create_batch
      vllm.executor.execute_model phase=prefill iterations=Int(1)
      vllm.output.process_batch phase=prefill new=Int(1)
      vllm.executor.execute_model phase=decode iterations=Int(3)
      vllm.engine.queue reason=preempted
      vllm.output.process_batch phase=decode new=Int(3)
      vllm.scheduler.schedule scheduled_tokens=Int(33)
        vllm.scheduler.admit_requests
        vllm.scheduler.allocate_blocks
        vllm.scheduler.create_batch
      vllm.executor.execute_model phase=prefill iterations=Int(1)
      vllm.output.process_batch phase=prefill new=Int(1)
      vllm.executor.execute_model phase=decode iterations=Int(35)
      vllm.output.process_batch phase=decode new=Int(35)
    "#);
}

fn descends(span: &Span, from: SpanId, all: &[Span]) -> bool {
    let parent = all.iter().find(|p| Some(p.span_id) == span.parent);
    parent.is_some_and(|p| p.span_id == from || descends(p, from, all))
}

#[test]
fn aborted_while_decoding() {
    let mut rig = Rig::new(2, |_| ());
    rig.add(0, 100, 500);
    rig.engine.handle(Time::from_nanos(50_000_000), Input::Abort(RequestKey(0)));
    insta::assert_snapshot!(tree(&rig.run()), @r#"
    vllm.engine.request output_tokens=Int(7) late=Bool(true)
      ! vllm.queued
      ! vllm.scheduled
      ! vllm.first_token
      ! vllm.finished
      vllm.processor.process_inputs
      vllm.engine.add_to_core
      vllm.engine.queue reason=capacity
      vllm.scheduler.schedule scheduled_tokens=Int(100)
        vllm.scheduler.admit_requests
        vllm.scheduler.allocate_blocks
        vllm.scheduler.create_batch
      vllm.executor.execute_model phase=prefill iterations=Int(1)
      vllm.output.process_batch phase=prefill new=Int(1)
      vllm.executor.execute_model phase=decode iterations=Int(6)
      vllm.output.process_batch phase=decode new=Int(6)
    "#);
}

#[test]
fn spans_after_a_disconnect_are_late() {
    let mut rig = Rig::new(2, |_| ());
    rig.add(0, 100, 5);
    let mut out = Vec::new();
    rig.engine.advance(Time::from_nanos(10_000_000), &mut out);
    // The server sees the disconnect before the token that is ready is handed over.
    let trail = rig.trails.remove(0);
    trail.note(Time::from_nanos(7_800_000), || EngineFact::Aborted);
    trail.finish(Time::from_nanos(7_800_000));
    let spans = rig.folded.take();
    check(&spans);
    let late: Vec<&str> = spans.iter().filter(|s| s.get("vllm.late").is_some()).map(|s| &*s.name).collect();
    assert_eq!(late, ["vllm.engine.request", "vllm.output.process_batch"]);
    assert_eq!((spans[0].end, &spans[0].status), (Time::from_nanos(7_800_000), &Status::Unset));
}

#[test]
fn abandoned_in_the_queue() {
    let mut rig = Rig::new(2, |c| c.scheduler.max_num_seqs = 1);
    rig.add(0, 100, 500);
    rig.add(10, 101, 500);
    rig.engine.advance(Time::from_nanos(30_000_000), &mut Vec::new());
    // A crash: engine and server go away without a word.
    rig.trails.clear();
    drop(rig.engine);
    let spans = rig.folded.take();
    check(&spans);
    insta::assert_snapshot!(tree(&spans), @r#"
    vllm.engine.request type=abandoned ERROR: the request was never finished
      ! vllm.queued
      ! vllm.scheduled
      ! vllm.first_token
      vllm.processor.process_inputs
      vllm.engine.add_to_core
      vllm.engine.queue reason=capacity
      vllm.scheduler.schedule scheduled_tokens=Int(100)
        vllm.scheduler.admit_requests
        vllm.scheduler.allocate_blocks
        vllm.scheduler.create_batch
      vllm.executor.execute_model phase=prefill iterations=Int(1)
      vllm.output.process_batch phase=prefill new=Int(1)
      vllm.executor.execute_model phase=decode iterations=Int(3)
      vllm.output.process_batch phase=decode new=Int(3)
    vllm.engine.request type=abandoned ERROR: the request was never finished
      ! vllm.queued
      vllm.processor.process_inputs
      vllm.engine.add_to_core
      vllm.engine.queue reason=capacity
    "#);
}

#[test]
fn refused() {
    let mut rig = Rig::new(2, |c| {
        c.scheduler.max_num_seqs = 1;
        c.max_num_queued_reqs = Some(1);
        c.max_model_len = Some(300);
    });
    rig.add(0, 20, 2);
    rig.add(10, 30, 2);
    rig.add(20, 300, 2);
    let spans = rig.run();
    let roots: Vec<Span> =
        spans.into_iter().filter(|s| s.kind == Kind::Server && s.get("error.type").is_some()).collect();
    insta::assert_snapshot!(tree(&roots), @r#"
    vllm.engine.request type=queue_full ERROR: the engine refused or failed the request
    vllm.engine.request type=prompt_too_long
    "#);
}

#[test]
fn attributes_of_a_request() {
    let mut rig = Rig::new(2, |_| ());
    rig.add(0, 100, 5);
    let spans = rig.run();
    let lines: Vec<String> = spans[0].attrs.iter().map(|(k, v)| format!("{k} = {v:?}")).collect();
    insta::assert_snapshot!(lines.join("\n"), @r#"
    gen_ai.operation.name = Str("chat")
    gen_ai.provider.name = Str("vllm")
    gen_ai.request.model = Shared("m")
    gen_ai.request.id = Str("cmpl-1")
    gen_ai.request.max_tokens = Int(5)
    gen_ai.request.top_p = F64(0.5)
    gen_ai.request.n = Int(1)
    vllm.request.priority = Int(0)
    vllm.lora.name = Shared("sql")
    gen_ai.usage.prompt_tokens = Int(100)
    gen_ai.usage.input_tokens = Int(100)
    gen_ai.usage.completion_tokens = Int(5)
    gen_ai.usage.output_tokens = Int(5)
    gen_ai.response.finish_reasons = StrList(["length"])
    vllm.kv_cache.cached_tokens = Int(0)
    vllm.request.preemptions = Int(0)
    gen_ai.latency.time_in_queue = F64(0.0)
    gen_ai.latency.time_in_model_prefill = F64(0.007679123)
    gen_ai.latency.time_in_model_decode = F64(0.025777541)
    gen_ai.latency.time_in_model_inference = F64(0.033456664)
    gen_ai.latency.time_to_first_token = F64(0.007850223)
    gen_ai.latency.e2e = F64(0.033627764)
    "#);
}

#[test]
fn detail_3_shows_the_parts_of_every_execution() {
    let mut rig = Rig::new(3, |c| {
        c.scheduler.max_num_batched_tokens = 64;
        c.scheduler.max_num_seqs = 4;
    });
    rig.add(0, 100, 3);
    insta::assert_snapshot!(tree(&rig.run()), @r#"
    vllm.engine.request output_tokens=Int(3)
      ! vllm.queued
      ! vllm.scheduled
      ! vllm.first_token
      ! vllm.finished
      vllm.processor.process_inputs
      vllm.engine.add_to_core
      vllm.engine.queue reason=capacity
      vllm.scheduler.schedule scheduled_tokens=Int(64)
        vllm.scheduler.admit_requests
        vllm.scheduler.allocate_blocks
        vllm.scheduler.create_batch
      vllm.scheduler.schedule scheduled_tokens=Int(36)
        vllm.scheduler.allocate_blocks
        vllm.scheduler.create_batch
      vllm.executor.execute_model phase=prefill iterations=Int(1)
        vllm.worker.prepare_inputs
        vllm.model.forward
      vllm.executor.execute_model phase=prefill iterations=Int(1)
        vllm.worker.prepare_inputs
        vllm.model.forward
        vllm.sampler.sample
      vllm.output.process_batch phase=prefill new=Int(1)
        vllm.detokenizer.update new=Int(1)
        vllm.logprobs.compute
      vllm.executor.execute_model phase=decode iterations=Int(2)
        vllm.worker.prepare_inputs
        vllm.model.forward
        vllm.sampler.sample
      vllm.output.process_batch phase=decode new=Int(2)
        vllm.detokenizer.update new=Int(1)
        vllm.logprobs.compute
    "#);
}

#[test]
fn attributes_of_the_parts() {
    let mut rig = Rig::new(3, |_| ());
    rig.add_with(0, 100, 5, |new| new.params.eos_at = Some(3));
    let spans = rig.run();
    let fine = spans.iter().filter(|s| level(&s.name) == 3);
    let lines: Vec<String> = fine
        .map(|s| {
            let attrs: Vec<String> = s.attrs.iter().map(|(k, v)| format!("{k}={}", value_text(v))).collect();
            format!("{} {}", s.name, attrs.join(" "))
        })
        .collect();
    insta::assert_snapshot!(lines.join("\n"), @r#"
    vllm.worker.prepare_inputs vllm.attention.backend=FLASH_ATTN
    vllm.model.forward vllm.model.name=meta-llama/Llama-3.1-8B-Instruct vllm.model.num_layers=32 vllm.model.hidden_size=4096
    vllm.sampler.sample vllm.sampling.temperature=0 vllm.sampling.top_p=0.5 vllm.sampling.top_k=40 vllm.sampling.tokens=1
    vllm.detokenizer.update vllm.tokens.new=1 vllm.stop_string.detected=false
    vllm.logprobs.compute vllm.logprobs.alternatives=2
    vllm.worker.prepare_inputs vllm.attention.backend=FLASH_ATTN
    vllm.model.forward vllm.model.name=meta-llama/Llama-3.1-8B-Instruct vllm.model.num_layers=32 vllm.model.hidden_size=4096
    vllm.sampler.sample vllm.sampling.temperature=0 vllm.sampling.top_p=0.5 vllm.sampling.top_k=40 vllm.sampling.tokens=1
    vllm.detokenizer.update vllm.tokens.new=1 vllm.stop_string.detected=true
    vllm.logprobs.compute vllm.logprobs.alternatives=2
    "#);
}

/// The parts fill an execution and the handling of its outputs without gaps.
#[test]
fn parts_follow_each_other() {
    let mut rig = Rig::new(3, |_| ());
    rig.add(0, 100, 5);
    let spans = rig.run();
    for parent in spans.iter().filter(|s| s.name == "vllm.executor.execute_model") {
        let parts: Vec<&Span> = spans.iter().filter(|s| s.parent == Some(parent.span_id)).collect();
        assert!(parts.is_sorted_by(|a, b| a.end == b.start) && parts[2].end == parent.end, "{parts:#?}");
    }
    for parent in spans.iter().filter(|s| s.name == "vllm.output.process_batch") {
        let parts: Vec<&Span> = spans.iter().filter(|s| s.parent == Some(parent.span_id)).collect();
        assert!(parts.is_sorted_by(|a, b| a.end == b.start) && parts[1].end == parent.end, "{parts:#?}");
        // vLLM's engine core hands over to the frontend before there is any text.
        assert!(parent.start < parts[0].start);
    }
}

/// Spans that two levels share have the same ids and times in both.
#[test]
fn a_finer_level_only_adds_spans() {
    let run = |detail| {
        let mut rig = Rig::new(detail, |c| {
            c.max_model_len = Some(128);
            c.cache.num_gpu_blocks = Some(10);
        });
        rig.add(0, 60, 40);
        rig.add(10, 61, 40);
        rig.run()
    };
    let levels = [1, 2, 3].map(run);
    for pair in levels.windows(2) {
        let finer: Vec<&Span> = pair[1].iter().collect();
        for span in &pair[0] {
            let same =
                |s: &&&Span| (s.span_id, &s.name, s.start, s.end) == (span.span_id, &span.name, span.start, span.end);
            assert!(finer.iter().any(|s| same(&s)), "{} is not the same", span.name);
        }
    }
    assert!(levels[0].len() < levels[1].len() && levels[1].len() < levels[2].len());
}

/// Only the caller's leaving and refusals end a request early; whatever its state, what happened is there.
#[test]
fn aborted_in_the_queue_in_the_prefill_and_after_a_preemption() {
    // In the queue.
    let mut rig = Rig::new(2, |c| c.scheduler.max_num_seqs = 1);
    rig.add(0, 100, 500);
    rig.add(10, 101, 500);
    for key in [0, 1] {
        rig.engine.handle(Time::from_nanos(30_000_000), Input::Abort(RequestKey(key)));
    }
    let spans = rig.run();
    insta::assert_snapshot!(tree(&of(101, &spans)), @r#"
    vllm.engine.request output_tokens=Int(0) late=Bool(true)
      ! vllm.queued
      ! vllm.finished
      vllm.processor.process_inputs
      vllm.engine.add_to_core
      vllm.engine.queue reason=capacity
    "#);
    // In the prefill, of which the first chunk is computed.
    let mut rig = Rig::new(2, |c| c.scheduler.max_num_batched_tokens = 1024);
    rig.add(0, 3000, 5);
    rig.engine.handle(Time::from_nanos(60_000_000), Input::Abort(RequestKey(0)));
    insta::assert_snapshot!(tree(&rig.run()), @r#"
    vllm.engine.request output_tokens=Int(0) late=Bool(true)
      ! vllm.queued
      ! vllm.scheduled
      ! vllm.finished
      vllm.processor.process_inputs
      vllm.engine.add_to_core
      vllm.engine.queue reason=capacity
      vllm.scheduler.schedule scheduled_tokens=Int(1024)
        vllm.scheduler.admit_requests
        vllm.scheduler.allocate_blocks
        vllm.scheduler.create_batch
      vllm.scheduler.schedule scheduled_tokens=Int(1024)
        vllm.scheduler.allocate_blocks
        vllm.scheduler.create_batch
      vllm.executor.execute_model phase=prefill iterations=Int(1)
      vllm.executor.execute_model phase=prefill iterations=Int(1)
      vllm.scheduler.schedule scheduled_tokens=Int(952)
        vllm.scheduler.allocate_blocks
        vllm.scheduler.create_batch
    "#);
    // While it waits to be resumed.
    let mut rig = Rig::new(2, |c| {
        c.max_model_len = Some(128);
        c.cache.num_gpu_blocks = Some(10);
    });
    rig.add(0, 60, 60);
    rig.add(10, 61, 60);
    rig.engine.handle(Time::from_nanos(90_000_000), Input::Abort(RequestKey(1)));
    insta::assert_snapshot!(tree(&of(61, &rig.run())), @r#"
    vllm.engine.request output_tokens=Int(4) late=Bool(true)
      ! vllm.queued
      ! vllm.scheduled
      ! vllm.first_token
      ! vllm.preempted
      ! vllm.queued
      ! vllm.finished
      vllm.processor.process_inputs
      vllm.engine.add_to_core
      vllm.engine.queue reason=capacity
      vllm.scheduler.schedule scheduled_tokens=Int(61)
        vllm.scheduler.admit_requests
        vllm.scheduler.allocate_blocks
        vllm.scheduler.create_batch
      vllm.executor.execute_model phase=prefill iterations=Int(1)
      vllm.output.process_batch phase=prefill new=Int(1)
      vllm.executor.execute_model phase=decode iterations=Int(3)
      vllm.engine.queue reason=preempted
      vllm.output.process_batch phase=decode new=Int(3)
    "#);
}

/// The spans of the request with a prompt of this length.
fn of(prompt: u32, spans: &[Span]) -> Vec<Span> {
    let is = |s: &&Span| s.get("gen_ai.usage.prompt_tokens") == Some(&Value::Int(i64::from(prompt)));
    let root = spans.iter().find(is).expect("the request").span_id;
    spans.iter().filter(|s| s.span_id == root || descends(s, root, spans)).cloned().collect()
}
