//! What is sent to a real Tempo comes back by id as the run's own file has it, where `TEMPO_URL` names one.

mod common;

use std::collections::BTreeMap;

use common::tempo::Server;
use common::{Place, by_trace, scenario};
use shared::trace::tree::{kind_name, value_text};
use shared::trace::{Span, Status, TraceSet};

/// Everything that a span says, as text, one line for each thing. Attributes are in the order of their keys: they are a set. Tempo
/// does not keep `flags`, so whether the parent is remote does not come back.
fn told(set: &TraceSet, span: &Span) -> Vec<String> {
    let attributes = |attrs: &[(shared::trace::span::Text, shared::trace::Value)]| {
        let mut lines: Vec<String> =
            attrs.iter().map(|(key, value)| format!("{key} = {} ({value:?})", value_text(value))).collect();
        lines.sort();
        lines
    };
    let at = |time| set.anchor.unix_nanos(time);
    let parent = span.parent.map(|p| p.to_string());
    let mut lines = vec![
        format!("{} {} {}", span.name, kind_name(span.kind), span.span_id),
        format!("parent {parent:?}"),
        format!("{} to {}", at(span.start), at(span.end)),
        format!("state {:?}", span.tracestate),
        match &span.status {
            Status::Unset => "unset".to_owned(),
            Status::Error(message) => format!("error {message}"),
        },
    ];
    let resource = set.resource(span.instance).expect("a resource");
    lines.extend(attributes(&resource.attributes()).into_iter().map(|a| format!("resource {a}")));
    lines.extend(attributes(&span.attrs));
    for event in &span.events {
        lines.push(format!("event {} {} {:?}", event.name, at(event.at), attributes(&event.attrs)));
    }
    // A set as well: Tempo sorts them by id.
    let link = |l: &shared::trace::Link| format!("link {} {} {:?}", l.trace_id, l.span_id, attributes(&l.attrs));
    let mut links: Vec<String> = span.links.iter().map(link).collect();
    links.sort();
    lines.extend(links);
    lines
}

fn spans(set: &TraceSet, spans: &[&Span]) -> BTreeMap<String, Vec<String>> {
    spans.iter().map(|s| (s.span_id.to_string(), told(set, s))).collect()
}

/// Runs the quickstart live, every trace kept, with `options`; all of its traces have to be in Tempo.
fn roundtrip(options: &[&str]) {
    let place = Place::new();
    let file = scenario("quickstart");
    let run = ["run", &file, "--sampling", "1", "--engine-steps", "0.05", "--set", "requests=60", "--out", "out"];
    let Some(server) = Server::given("the round trip of a run") else { return };
    let url = if options.contains(&"http") { server.otlp_http() } else { server.otlp_grpc() };
    let options: Vec<&str> = options.iter().copied().filter(|o| *o != "http").collect();
    place.good(&[run.as_slice(), &["--otlp", &url], &options].concat());
    let sent = place.traces("out");
    let traces = by_trace(&sent);
    assert!(traces.len() > 60, "steps have traces of their own");
    assert!(sent.spans.iter().any(|s| !s.links.is_empty()) && sent.spans.iter().any(|s| !s.events.is_empty()));
    for expect in traces.values() {
        let id = expect[0].trace_id;
        let found = server.tempo.trace(id).expect("Tempo answers").unwrap_or_else(|| panic!("{id} is not there"));
        let back: Vec<&Span> = found.spans.iter().collect();
        assert_eq!(back.len(), expect.len(), "{id}");
        for ((_, found), (span, expect)) in spans(&found, &back).into_iter().zip(spans(&sent, expect)) {
            assert_eq!(found, expect, "trace {id}, span {span}");
        }
    }
    let found: Vec<_> = common::findings(&sent);
    assert_eq!(found.first(), None);
}

#[test]
fn a_run_comes_back_from_tempo_bit_for_bit_over_grpc() {
    roundtrip(&[]);
}

#[test]
fn a_run_at_detail_3_comes_back_from_tempo_bit_for_bit_over_http() {
    roundtrip(&["http", "--detail", "3"]);
}
