//! How traces are handed from service to service, seen from the whole set: calls without a server below them, servers whose callers
//! are elsewhere, and decisions about sampling that do not agree.
//!
//! A call and a server that were torn apart are brought together by the id of their request, or else by their times.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::audit::AuditOptions;
use super::{Finding, Findings, Rule, is_late};
use crate::ids::{InstanceId, SpanId, TraceId};
use crate::time::{Dur, Time};
use crate::trace::naming::Naming;
use crate::trace::sampler::{ot_fields, randomness};
use crate::trace::set::TraceSet;
use crate::trace::span::{Kind, Span, Value};
use crate::trace::tree::value_text;

/// A call whose callee records it too.
struct Call {
    /// The caller's span.
    client: &'static str,
    /// The callee's, by name: of a proxy that may stand in between, and of who stands behind it.
    servers: &'static [&'static str],
    /// Services that may be called.
    services: &'static [&'static str],
    /// Whether the callee has taken the call in, as far as the caller knows.
    taken: fn(&Span) -> bool,
}

const OURS: &[Call] = &[
    Call {
        client: "gateway.backend.proxy",
        servers: &["pd_proxy.request", "vllm.engine.request"],
        services: &["pd-proxy", "vllm"],
        taken: inference,
    },
    Call { client: "pd_proxy.backend", servers: &["vllm.engine.request"], services: &["vllm"], taken: inference },
    Call {
        client: "gateway.kvcache.lookup",
        servers: &["kvcache.manager.get_scores"],
        services: &["kv-cache-manager"],
        taken: |span| status(span) == Some(200),
    },
    Call {
        client: "vllm.kv_cache.transfer",
        servers: &["vllm.kv_cache.transfer"],
        services: &["vllm"],
        // A reader that did not get its blocks may not have been heard.
        taken: |span| span.get("vllm.kv_transfer.bytes").is_some(),
    },
];

/// llm-d's sidecar calls engines by otelhttp, which names its spans so; the endpoint picker calls nobody itself.
const OF_LLM_D: &[Call] =
    &[Call { client: "HTTP POST", servers: &["llm_request"], services: &["vllm"], taken: |s| status(s) == Some(200) }];

/// Routes whose requests engines record.
const RECORDED: [&str; 2] = ["/v1/chat/completions", "/v1/completions"];
/// Answers of an engine that does not look further into a request: to a stranger, to a path, method or form that it does not know.
const NOT_LOOKED_AT: [i64; 4] = [401, 404, 405, 415];

fn inference(span: &Span) -> bool {
    let path = span.get("url.path").and_then(Value::as_str);
    path.is_some_and(|p| RECORDED.contains(&p)) && status(span).is_some_and(|s| !NOT_LOOKED_AT.contains(&s))
}

fn status(span: &Span) -> Option<i64> {
    span.get("http.response.status_code").and_then(Value::as_int)
}

/// What the set says of how its traces were handed on.
pub(super) fn find(set: &TraceSet, options: &AuditOptions<'_>) -> Vec<Finding> {
    let mut findings = Findings::default();
    let view = View::new(set, options);
    let met = view.calls(&mut findings);
    let torn = view.match_up(&met, &mut findings);
    view.tell_torn(&met, &torn, &mut findings);
    thresholds(set, &mut findings);
    if options.naming == Naming::Proposal && set.flags_known {
        unsampled(set, &mut findings);
    }
    findings.0
}

/// The spans of a set by who is below whom.
struct View<'a> {
    set: &'a TraceSet,
    options: &'a AuditOptions<'a>,
    calls: &'static [Call],
    by_id: HashMap<(TraceId, SpanId), &'a Span>,
    /// Server spans by the span above them, whether or not that is in the set.
    servers: HashMap<(TraceId, SpanId), Vec<&'a Span>>,
    /// Traces of requests that waited in the gateway.
    waited: HashSet<TraceId>,
    /// Service instances that have spans, by their names.
    instances: HashSet<&'a str>,
}

/// Calls as they were met.
#[derive(Default)]
struct Met<'a> {
    /// Those with nothing below them.
    lone: Vec<Lone<'a>>,
    /// Callees that record calls of this caller.
    known: HashSet<Peer>,
    /// Traces with a call that is whole.
    whole: HashSet<TraceId>,
    /// Names of server spans that are called by somebody in the set.
    called: BTreeSet<&'static str>,
}

/// A call that was taken in and has no server below it.
struct Lone<'a> {
    span: &'a Span,
    call: &'static Call,
    /// Where its service was entered.
    entry: Option<&'a Span>,
    /// The id of its request.
    request: Option<&'a str>,
}

/// A call and the server that it should have above it, in different traces.
struct Torn<'a> {
    lone: usize,
    server: &'a Span,
}

/// A callee as its caller names it.
type Peer = (InstanceId, String, String);

impl<'a> View<'a> {
    fn new(set: &'a TraceSet, options: &'a AuditOptions<'a>) -> View<'a> {
        let calls = match options.naming {
            Naming::Proposal => OURS,
            Naming::LlmD => OF_LLM_D,
        };
        let mut servers: HashMap<_, Vec<&Span>> = HashMap::new();
        for span in set.spans.iter().filter(|s| s.kind == Kind::Server) {
            if let Some(parent) = span.parent {
                servers.entry((span.trace_id, parent)).or_default().push(span);
            }
        }
        let by_id = set.spans.iter().map(|s| ((s.trace_id, s.span_id), s)).collect();
        let waited = |s: &&Span| {
            s.name == "gateway.flowcontrol.dispatch"
                && s.get("gateway.queue.wait_ms").and_then(Value::as_f64).is_some_and(|ms| ms > 0.0)
        };
        let waited = set.spans.iter().filter(waited).map(|s| s.trace_id).collect();
        let with_spans: BTreeSet<InstanceId> = set.spans.iter().map(|s| s.instance).collect();
        let instances = with_spans.into_iter().filter_map(|i| Some(&*set.resource(i)?.instance_id));
        let instances = instances.filter(|name| !name.is_empty()).collect();
        View { set, options, calls, by_id, servers, waited, instances }
    }

    /// Looks at every call; a call with servers of several instances below it went through somebody who is not seen.
    fn calls(&self, findings: &mut Findings) -> Met<'a> {
        let mut met = Met::default();
        for span in self.set.spans.iter().filter(|s| s.kind == Kind::Client) {
            let Some(call) = self.calls.iter().find(|call| call.client == span.name) else { continue };
            met.called.extend(call.servers);
            if is_late(span) || !(call.taken)(span) || self.is_uninstrumented(span, call) {
                continue;
            }
            let below = self.servers.get(&(span.trace_id, span.span_id)).map_or(&[][..], Vec::as_slice);
            // Whoever stands first on the way is the callee; what hangs beside it is a matter of the callee's own calls.
            let named = |name: &&&str| below.iter().any(|s| s.name == ***name);
            let callee = call.servers.iter().find(named).copied().unwrap_or_default();
            let instances: BTreeSet<InstanceId> =
                below.iter().filter(|s| s.name == callee).map(|s| s.instance).collect();
            match instances.len() {
                0 => {
                    let (entry, request) = self.origin(span);
                    met.lone.push(Lone { span, call, entry, request });
                }
                1 => {
                    met.known.insert(peer(span));
                    met.whole.insert(span.trace_id);
                }
                n => findings.add(
                    span,
                    Rule::Untraced,
                    format!("{n} services answer one call: who asked them is not seen"),
                ),
            }
        }
        met
    }

    /// The server span by which the service of `span` was entered, and the id of the request.
    fn origin(&self, span: &'a Span) -> (Option<&'a Span>, Option<&'a str>) {
        let (mut entry, mut request, mut at) = (None, request_id(span), span);
        // No deeper than a trace can be; a cycle is another rule's.
        for _ in 0..64 {
            let Some(parent) = at.parent.and_then(|p| self.by_id.get(&(at.trace_id, p))) else { break };
            at = parent;
            request = request.or_else(|| request_id(at));
            if entry.is_none() && at.kind == Kind::Server {
                entry = Some(at);
            }
        }
        (entry, request)
    }

    /// Finds the servers of lone calls, and tells of servers that have no call.
    fn match_up(&self, met: &Met<'a>, findings: &mut Findings) -> Vec<Torn<'a>> {
        let is_loose = |s: &&Span| {
            let above = s.parent.and_then(|p| self.by_id.get(&(s.trace_id, p)));
            s.kind == Kind::Server && above.is_none() && met.called.contains(&*s.name)
        };
        let mut loose: Vec<&Span> = self.set.spans.iter().filter(is_loose).collect();
        loose.sort_by_key(|s| s.start);
        let mut by_request: HashMap<&str, Vec<usize>> = HashMap::new();
        for (i, server) in loose.iter().enumerate() {
            if let Some(id) = request_id(server) {
                by_request.entry(id).or_default().push(i);
            }
        }
        let mut used = vec![false; loose.len()];
        let mut torn = Vec::new();
        for (i, lone) in met.lone.iter().enumerate() {
            if let Some(sibling) = self.sibling(lone) {
                if let Some(place) = loose.iter().position(|s| std::ptr::eq(*s, sibling)) {
                    used[place] = true;
                }
                self.tell_sibling(lone, sibling, findings);
                continue;
            }
            let named = lone.request.and_then(|id| by_request.get(id)).map_or(&[][..], Vec::as_slice);
            let fits = |place: &usize| !used[*place] && lone.call.servers.contains(&&*loose[*place].name);
            let tolerance = self.options.check.clock_tolerance;
            let in_time = |place: &usize| within(loose[*place], lone.span, tolerance);
            let found = named.iter().copied().filter(fits).min_by_key(|place| (!in_time(place), *place));
            let found = found.or_else(|| {
                let first = loose.partition_point(|s| s.start.saturating_add(tolerance) < lone.span.start);
                let last = loose.partition_point(|s| s.start <= lone.span.end.saturating_add(tolerance));
                let nameless = |place: &usize| lone.request.is_none() || request_id(loose[*place]).is_none();
                (first..last).filter(|p| fits(p) && nameless(p)).find(in_time)
            });
            if let Some(place) = found {
                used[place] = true;
                torn.push(Torn { lone: i, server: loose[place] });
            } else {
                self.tell_missing(lone, met, findings);
            }
        }
        for (server, _) in loose.iter().zip(&used).filter(|(_, used)| !**used) {
            let why = match server.parent {
                None => "starts a trace of its own, although callers of it are in the set".to_owned(),
                Some(parent) => format!("its caller's span {parent} is not in the set, although callers of it are"),
            };
            findings.add(server, Rule::Severed, why);
        }
        torn
    }

    /// A server that took the context of whoever called its caller.
    fn sibling(&self, lone: &Lone<'a>) -> Option<&'a Span> {
        let entry = lone.entry?;
        let beside = self.servers.get(&(entry.trace_id, entry.parent?))?;
        let tolerance = self.options.check.clock_tolerance;
        let is_its_own = |s: &&&Span| {
            let same_request = match (lone.request, request_id(s)) {
                (Some(own), Some(other)) => own == other,
                (None, _) | (_, None) => true,
            };
            lone.call.servers.contains(&&*s.name) && same_request && within(s, lone.span, tolerance)
        };
        beside.iter().find(is_its_own).copied()
    }

    fn tell_sibling(&self, lone: &Lone<'_>, server: &Span, findings: &mut Findings) {
        let (entry, call) = (lone.entry.map_or("", |e| &e.name), &lone.span.name);
        findings.add(server, Rule::Sibling, format!("hangs beside `{entry}`, not below its `{call}`"));
        let detail = format!("`{}` hangs beside `{entry}`", server.name);
        findings.add(lone.span, Rule::ClientWithoutServer, detail);
    }

    /// A call of which nothing else is in the set.
    fn tell_missing(&self, lone: &Lone<'_>, met: &Met<'_>, findings: &mut Findings) {
        let (_, shown, _) = peer(lone.span);
        let seen = names(lone.span).any(|name| self.instances.contains(name.as_str()));
        if met.known.contains(&peer(lone.span)) || seen {
            let detail = format!("recorded here, not by {shown}, which records other requests");
            findings.add(lone.span, Rule::Sampling, detail);
        } else {
            findings.add(lone.span, Rule::Untraced, format!("answered by {shown}, of which nothing is in the set"));
        }
    }

    /// Calls and servers in different traces; of requests that waited, where those that did not are whole.
    fn tell_torn(&self, met: &Met<'_>, torn: &[Torn<'_>], findings: &mut Findings) {
        let waited = |t: &Torn<'_>| self.waited.contains(&met.lone[t.lone].span.trace_id);
        let others_whole = met.whole.iter().any(|trace| !self.waited.contains(trace));
        let by_queue = !torn.is_empty() && torn.iter().all(waited) && others_whole;
        for Torn { lone, server } in torn {
            let call = met.lone[*lone].span;
            let detail = format!("its server `{}` is in trace {}", server.name, server.trace_id);
            let (rule, detail) = if by_queue {
                (Rule::LostInQueue, format!("{detail}; so it is with every request that waited, and with no other"))
            } else {
                (Rule::ClientWithoutServer, detail)
            };
            findings.add(call, rule, detail);
            let detail = format!("starts a trace of its own, called by `{}` of trace {}", call.name, call.trace_id);
            findings.add(server, Rule::Severed, detail);
        }
    }

    fn is_uninstrumented(&self, span: &Span, call: &Call) -> bool {
        let listed = |name: &str| self.options.uninstrumented.iter().any(|u| u == name);
        call.services.iter().any(|s| listed(s)) || names(span).any(|n| listed(&n))
    }
}

/// Names that a caller has for whom it calls.
fn names(span: &Span) -> impl Iterator<Item = String> {
    let text = |key: &str| span.get(key).map(value_text);
    let (endpoint, address, port) =
        (text("gateway.backend.endpoint.name"), text("server.address"), text("server.port"));
    let both = address.as_ref().zip(port).map(|(a, p)| format!("{a}:{p}"));
    [endpoint, both, address].into_iter().flatten()
}

fn peer(span: &Span) -> Peer {
    (span.instance, names(span).next().unwrap_or_else(|| "a callee".to_owned()), span.name.to_string())
}

/// The caller's id of a request, whatever prefix a service puts before it.
fn request_id(span: &Span) -> Option<&str> {
    const KEYS: [&str; 4] =
        ["gateway.request.id", "pd_proxy.request.id", "llm_d.pd_proxy.request_id", "gen_ai.request.id"];
    let id = KEYS.iter().find_map(|key| span.get(key))?.as_str()?;
    // vLLM's: `chatcmpl-` or `cmpl-`, after the number of a further choice.
    Some(id.rsplit_once("cmpl-").map_or(id, |(_, own)| own))
}

/// Whether `inner` lies within `outer`, up to `tolerance`.
fn within(inner: &Span, outer: &Span, tolerance: Dur) -> bool {
    let late = |a: Time, b: Time| a > b.saturating_add(tolerance);
    !late(outer.start, inner.start) && !late(inner.end, outer.end)
}

/// What trace states say of sampling: one threshold in a trace, and one that its id passes.
fn thresholds(set: &TraceSet, findings: &mut Findings) {
    let mut first: BTreeMap<TraceId, (&str, &Span)> = BTreeMap::new();
    let mut told: HashSet<(TraceId, InstanceId)> = HashSet::new();
    for span in &set.spans {
        let Some(state) = &span.tracestate else { continue };
        let fields = ot_fields(state).unwrap_or_default();
        let Some(th) = fields.split(';').find_map(|f| f.strip_prefix("th:")) else { continue };
        let (begun, other) = *first.entry(span.trace_id).or_insert((th, span));
        let above = threshold(th).is_some_and(|t| t > randomness(span.trace_id, Some(state)));
        if above && told.insert((span.trace_id, span.instance)) {
            findings.add(span, Rule::Sampling, format!("kept, although its threshold `{th}` keeps other traces"));
        } else if begun != th && told.insert((span.trace_id, span.instance)) {
            let detail = format!("sampled by threshold `{th}`, `{}` by `{begun}`", other.name);
            findings.add(span, Rule::Sampling, detail);
        }
    }
}

/// The number that `th` stands for: up to 14 hexadecimal digits, without trailing zeros.
fn threshold(th: &str) -> Option<u64> {
    if th.is_empty() || th.len() > 14 { None } else { u64::from_str_radix(&format!("{th:0<14}"), 16).ok() }
}

/// Spans that were exported although their trace is not sampled.
fn unsampled(set: &TraceSet, findings: &mut Findings) {
    let listed: HashSet<&(TraceId, SpanId)> = set.unsampled.iter().collect();
    for span in set.spans.iter().filter(|s| listed.contains(&(s.trace_id, s.span_id))) {
        findings.add(span, Rule::Sampling, "exported, although its flags say that its trace is not sampled");
    }
}
