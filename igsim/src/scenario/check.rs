//! What the types of a scenario cannot say: relations between its fields.

use std::collections::{BTreeMap, BTreeSet};

use engine_sim::core::latency::LatencyProfile;
use engine_sim::profiles::{self, ProfileError};
use shared::config::{Problems, Validate, did_you_mean, one_of};
use shared::units::HumanDur;

use super::fleet::ROLE_LABEL;
use super::{
    Arrivals, Builtin, EngineGroup, Exporter, Length, Metrics, Mode, Otlp, Prefixes, Recorder, Scenario, Sessions,
    Shape, Trace, Tracing, Workload,
};
use crate::report::figure_exists;

impl Validate for Scenario {
    fn validate(&self, problems: &mut Problems) {
        self.check_name(problems);
        self.check_extent(problems);
        problems.at("gateway", |p| {
            for found in self.gateway.validate() {
                p.add(&found.path, found.found, found.allowed);
            }
            let followed = self.gateway.discovery.is_empty() || self.mode == Mode::Live;
            p.check(
                followed,
                "discovery",
                "sources of endpoints in virtual mode",
                "engines with joins_at and drains_at",
            );
        });
        for (i, group) in self.engines.iter().enumerate() {
            problems.at(&format!("engines[{i}]"), |p| self.check_engines(group, p));
        }
        self.check_ports(problems);
        self.check_control(problems);
        self.check_models(problems);
        problems.at("workload", |p| self.check_workload(&self.workload, p));
        if let Some(trace) = &self.trace {
            problems.at("trace", |p| check_trace(trace, p));
        }
        problems.at("tracing", |p| check_tracing(&self.tracing, self.mode, p));
        problems.at("metrics", |p| check_metrics(&self.metrics, p));
        self.check_propagation(problems);
        problems.at("expectations", |p| self.check_expectations(p));
    }
}

impl Scenario {
    fn check_name(&self, p: &mut Problems) {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let ok = !self.name.is_empty()
            && self.name.len() <= 64
            && self.name.chars().all(plain)
            && !self.name.starts_with('.');
        // The name becomes a directory.
        p.check(
            ok,
            "name",
            format!("{:?}", self.name),
            "1 to 64 of the characters A-Z a-z 0-9 - _ . not starting with a dot",
        );
    }

    /// How long the run lasts: exactly one answer, unless a trace ends it.
    fn check_extent(&self, p: &mut Problems) {
        match (self.duration, self.requests) {
            (Some(_), Some(_)) => {
                p.add("requests", "both duration and requests", "one of the two");
            }
            (None, None) if self.trace.is_none() => {
                p.add("duration", "neither duration nor requests", "one of the two, for example duration: 30s");
            }
            (Some(d), None) => p.check(d.get().as_nanos() > 0, "duration", d, "a duration above 0"),
            (None, _) => {}
        }
        p.check(
            self.engine_count() <= 100_000,
            "engines",
            format!("{} engines", self.engine_count()),
            "at most 100000",
        );
    }

    fn check_engines(&self, group: &EngineGroup, p: &mut Problems) {
        if let (Some(joins), Some(drains)) = (group.joins_at, group.drains_at) {
            p.check(joins < drains, "drains_at", drains, "a time after joins_at");
        }
        let twice = group.role.is_some() && group.labels.contains_key(ROLE_LABEL);
        p.check(!twice, "role", format!("a role beside the label {ROLE_LABEL}"), "one of the two");
        self.check_pd_proxy(group, p);
        if let Some(url) = &group.url {
            let ok = ["http://", "https://"].iter().any(|s| url.strip_prefix(s).is_some_and(|host| !host.is_empty()));
            p.check(ok, "url", format!("{url:?}"), "an address such as http://10.0.0.5:8000");
            p.check(self.mode == Mode::Live, "url", "a real server in virtual mode", "mode: live");
            p.check(group.count == 1, "count", group.count, "1 for a real server: give each its own group");
            let faulty = !group.faults.is_empty() || group.fault_headers;
            p.check(!faulty, "faults", "faults of a real server", "none: only simulated engines fail on request");
            p.check(group.model.is_some(), "model", "nothing", "the model that the real server serves");
            return;
        }
        if let Some(kv) = group.kv_transfer.as_ref().filter(|_| group.count > 1) {
            let (id, port) = (&kv.engine_id, kv.kv_connector_extra_config.side_channel_port);
            p.check(id.is_none(), "kv_transfer.engine_id", "one name for several engines", "none, or count: 1");
            let path = "kv_transfer.kv_connector_extra_config.side_channel_port";
            p.check(port == 0, path, "one port for several engines", "0, or count: 1");
        }
        let profile = match profiles::find(&group.profile) {
            Ok(profile) => profile,
            Err(error) => {
                let found = match &error {
                    ProfileError::Unknown { name } => name.clone(),
                    ProfileError::File(errors) => {
                        let all = errors.problems().iter();
                        let all = all.map(|e| format!("{}: found {}, expected {}", e.path, e.found, e.expected));
                        let all = all.collect::<Vec<_>>().join("; ");
                        format!("{}, which is no profile ({})", group.profile, all.trim_start_matches(": "))
                    }
                };
                p.add("profile", found, profiles::allowed()).help = error.hint();
                // What else is wrong does not depend on which profile was meant, but for its sizes.
                LatencyProfile::named(LatencyProfile::DEFAULT_NAME).expect("it is built in")
            }
        };
        for found in group.engine_config().validate(&profile) {
            p.add(&found.path, found.found, found.allowed);
        }
        for (i, rule) in group.faults.iter().enumerate() {
            for found in rule.validate() {
                p.add(&format!("faults[{i}].{}", found.path), found.found, found.allowed);
            }
        }
        let by_header = !group.fault_headers || self.mode == Mode::Live;
        p.check(by_header, "fault_headers", "headers in virtual mode", "mode: live");
    }

    /// Who can reach the control address can stop engines.
    fn check_control(&self, p: &mut Problems) {
        if let Some(address) = self.listen.kv_cache_manager {
            let live = self.mode == Mode::Live;
            p.check(live, "listen.kv_cache_manager", address, "mode: live; virtual gateways keep the index themselves");
        }
        if let Some(address) = self.listen.control {
            p.check(address.ip().is_loopback(), "listen.control", address, "a loopback address such as 127.0.0.1:8099");
            p.check(self.mode == Mode::Live, "listen.control", "an address in virtual mode", "mode: live");
        }
    }

    /// Ports of a live run that would collide. Port 0 never does.
    fn check_ports(&self, p: &mut Problems) {
        if self.mode == Mode::Virtual {
            return;
        }
        let mut taken = Taken::default();
        if self.listen.gateway.port() != 0 {
            taken.0.insert(self.listen.gateway.port().into(), "the gateway".to_owned());
        }
        for (i, first) in self.first_ports() {
            let group = &self.engines[i];
            let path = if group.port.is_some() { format!("engines[{i}].port") } else { "listen.engines".to_owned() };
            taken.claim(&path, first, group.count, &format!("engines[{i}]"), p);
        }
        for (i, group) in self.engines.iter().enumerate().filter(|(_, g)| g.url.is_none()) {
            for (field, first) in group.kv_events_config.bound_ports() {
                let path = format!("engines[{i}].kv_events_config.{field}");
                taken.claim(&path, first.into(), group.count, &path, p);
            }
        }
    }

    fn check_workload(&self, w: &Workload, p: &mut Problems) {
        match (&w.arrivals, &self.trace) {
            (None, None) => {
                p.add(
                    "arrivals",
                    "nothing",
                    "when requests come, for example {process: poisson, rate: 10}, or a trace",
                );
            }
            (Some(Arrivals::Replay {}), None) => {
                p.add("arrivals.process", "replay without a section trace", "a section trace with format and path");
            }
            (None | Some(Arrivals::Replay {}), Some(_)) => self.check_replay(w, p),
            (
                Some(
                    Arrivals::Poisson { .. }
                    | Arrivals::Gamma { .. }
                    | Arrivals::Constant { .. }
                    | Arrivals::Steps { .. }
                    | Arrivals::Closed { .. },
                ),
                Some(_),
            ) => {
                p.add("arrivals.process", "arrivals beside a trace", "replay, or no section trace");
            }
            (Some(arrivals), None) => check_arrivals(arrivals, p),
        }
        p.at("prompt_tokens", |p| check_length(&w.prompt_tokens, p));
        p.at("output_tokens", |p| check_length(&w.output_tokens, p));
        p.check((0.0..=1.0).contains(&w.streaming), "streaming", w.streaming, "a share from 0 to 1");
        if let Some(prefixes) = &w.prefixes {
            p.at("prefixes", |p| check_prefixes(prefixes, p));
        }
        if let Some(sessions) = &w.sessions {
            p.at("sessions", |p| check_sessions(sessions, p));
        }
        self.check_tenants(w, p);
        if self.trace.is_none() {
            self.check_context(w, p);
        }
    }

    fn check_replay(&self, w: &Workload, p: &mut Problems) {
        let extra = [
            ("prefixes", w.prefixes.is_some()),
            ("sessions", w.sessions.is_some()),
            ("system_prompt", w.system_prompt.is_some()),
        ];
        for (path, given) in extra {
            p.check(!given, path, "a section beside a trace", "nothing: the trace says what prompts share");
        }
    }

    fn check_tenants(&self, w: &Workload, p: &mut Problems) {
        let mut names = BTreeSet::new();
        for (i, tenant) in w.tenants.iter().enumerate() {
            let path = |field: &str| format!("tenants[{i}].{field}");
            p.check(!tenant.name.is_empty(), &path("name"), "no name", "a name");
            p.check(
                names.insert(&tenant.name),
                &path("name"),
                format!("{:?} a second time", tenant.name),
                "each name once",
            );
            p.check(
                tenant.weight.is_finite() && tenant.weight >= 0.0,
                &path("weight"),
                tenant.weight,
                "a number of at least 0",
            );
            let known = &self.gateway.objectives;
            let of_objective = tenant.objective.as_ref().and_then(|o| known.get(o)).copied().unwrap_or(tenant.priority);
            p.check(
                tenant.priority == 0 || tenant.priority == of_objective,
                &path("priority"),
                tenant.priority,
                &format!("{of_objective}, the priority of its objective, or none"),
            );
            let whole = tenant.slo_ttft.is_none_or(|d| d.get().as_nanos().is_multiple_of(1_000_000));
            p.check(whole, &path("slo_ttft"), format!("{:?}", tenant.slo_ttft), "whole milliseconds");
            if let Some(objective) = tenant.objective.as_ref().filter(|o| !known.contains_key(*o)) {
                let names = || known.keys().map(String::as_str);
                let expected = format!("{} (gateway.objectives)", one_of(names()));
                p.add(&path("objective"), format!("{objective:?}"), expected).help =
                    did_you_mean(objective, names()).map(|n| format!("did you mean {n}?"));
            }
        }
        let total: f64 = w.tenants.iter().map(|t| t.weight).sum();
        p.check(w.tenants.is_empty() || total > 0.0, "tenants", "only weights of 0", "a weight above 0");
        p.check(w.tenants.len() <= usize::from(u16::MAX), "tenants", w.tenants.len(), "at most 65535 tenants");
    }

    /// Whether the longest request that is certain to come fits the engines.
    fn check_context(&self, w: &Workload, p: &mut Problems) {
        let limit = self.context_limit();
        let shared = w.system_prompt.as_ref().map_or(0, |s| s.tokens);
        let prefix = w.prefixes.as_ref().map_or(Some(0), |f| f.tokens.longest(Builtin::Prompt));
        let parts =
            [w.prompt_tokens.longest(Builtin::Prompt), w.output_tokens.longest(Builtin::Output), prefix, Some(shared)];
        let longest: u64 = parts.iter().flatten().map(|&n| u64::from(n)).sum();
        if longest > u64::from(limit) {
            let found = format!("requests of up to {longest} tokens (system prompt, prefix, prompt and output)");
            p.add("prompt_tokens", found, format!("at most {limit}, the engines' max_model_len"));
        }
    }

    fn check_expectations(&self, p: &mut Problems) {
        for (path, bound) in &self.expectations {
            let tenant = path.strip_prefix("tenants.").and_then(|rest| rest.split('.').next());
            let unknown = tenant.is_some_and(|name| !self.workload.tenants.iter().any(|t| t.name == name));
            if unknown || !figure_exists(path) {
                p.add(path, "no such figure of the report", "a path such as errors, ttft_ms.p99 or traces.incomplete");
            }
            let given: Vec<f64> = [bound.min, bound.max].into_iter().flatten().collect();
            p.check(!given.is_empty(), path, "no bound", "min, max or both");
            p.check(given.is_sorted(), path, format!("{bound}"), "a min that is not above max");
        }
    }
}

fn check_arrivals(arrivals: &Arrivals, p: &mut Problems) {
    let positive = |p: &mut Problems, field: &str, v: f64| {
        p.check(v.is_finite() && v > 0.0, &format!("arrivals.{field}"), v, "a number above 0");
    };
    match arrivals {
        Arrivals::Poisson { rate } | Arrivals::Constant { rate } => positive(p, "rate", *rate),
        Arrivals::Gamma { rate, cv } => {
            positive(p, "rate", *rate);
            positive(p, "cv", *cv);
        }
        Arrivals::Steps { steps } => {
            p.check(!steps.is_empty(), "arrivals.steps", "no steps", "one step at least");
            for (i, step) in steps.iter().enumerate() {
                positive(p, &format!("steps[{i}].rate"), step.rate);
                let positive = step.duration > HumanDur::default();
                p.check(positive, &format!("arrivals.steps[{i}].duration"), step.duration, "a duration above 0");
            }
        }
        Arrivals::Closed { .. } | Arrivals::Replay {} => {}
    }
}

fn check_length(length: &Length, p: &mut Problems) {
    match length {
        Length::Fixed(tokens) => p.check(*tokens > 0, "", tokens, "an integer of at least 1"),
        Length::Drawn(shape @ Shape::Lognormal { median, sigma, mean, p99, .. }) => {
            for (field, value) in [("median", median), ("sigma", sigma), ("mean", mean), ("p99", p99)] {
                if let Some(v) = value {
                    p.check(v.is_finite() && *v > 0.0, field, v, "a number above 0");
                }
            }
            let given = (median.is_some() && sigma.is_some(), mean.is_some() && p99.is_some());
            let count = [median, sigma, mean, p99].into_iter().flatten().count();
            if count != 2 || !(given.0 || given.1) {
                p.add("", format!("{count} parameters of a log-normal"), "median and sigma, or mean and p99");
            } else if shape.log_parameters().is_none() {
                p.add("p99", p99.unwrap_or_default(), "less than 15 times the mean: no log-normal is so wide");
            } else if mean.zip(*p99).is_some_and(|(mean, p99)| p99 <= mean) {
                p.add("p99", p99.unwrap_or_default(), "a number above the mean");
            }
        }
        Length::Drawn(Shape::Uniform { min, max }) => p.check(min <= max, "max", max, "a number that is not below min"),
        Length::Drawn(Shape::AzureConv {} | Shape::AzureLikeCode {} | Shape::MooncakeConv {} | Shape::Sharegpt {}) => {}
    }
}

/// Prompts that come in turn have an order, which is kept.
const MAX_PROMPTS: u64 = 1_000_000;

fn check_prefixes(prefixes: &Prefixes, p: &mut Problems) {
    p.at("tokens", |p| check_length(&prefixes.tokens, p));
    p.check((0.0..=1.0).contains(&prefixes.share), "share", prefixes.share, "a share from 0 to 1");
    p.check(prefixes.skew.is_finite() && prefixes.skew >= 0.0, "skew", prefixes.skew, "a number of at least 0");
    if let Some(prompts) = prefixes.prompts {
        let even = prefixes.skew == 0.0 && prefixes.share == 1.0;
        p.check(even, "prompts", "prompts that come in turn beside share or skew", "share 1 and skew 0");
        let all = u64::from(prefixes.groups) * u64::from(prompts);
        p.check((1..=MAX_PROMPTS).contains(&all), "prompts", format!("{all} prompts"), "1 to 1000000 with all groups");
    }
}

fn check_sessions(sessions: &Sessions, p: &mut Problems) {
    p.at("turns", |p| check_length(&sessions.turns, p));
    if let Some(tokens) = &sessions.turn_tokens {
        p.at("turn_tokens", |p| check_length(tokens, p));
    }
}

fn check_trace(trace: &Trace, p: &mut Problems) {
    p.check(trace.speed_up.is_finite() && trace.speed_up > 0.0, "speed_up", trace.speed_up, "a number above 0");
    if !trace.path.is_file() {
        let found = format!("no file {:?}", trace.path);
        p.add("path", found, "a trace file").help = Some(
            "give the path of yours with --set trace.path=FILE; scenarios/README.md says where traces come from".into(),
        );
    }
}

fn check_tracing(tracing: &Tracing, mode: Mode, p: &mut Problems) {
    let eager = tracing.recorder == Some(Recorder::Eager);
    p.check(!eager || mode == Mode::Live, "recorder", "eager in virtual mode", "deferred, or eager in live mode");
    let policy = tracing.policy();
    policy.validate(p);
    if eager && let Some(part) = policy.needs_records() {
        let allowed =
            "deferred: the eager recorder leaves sampling to the OpenTelemetry SDK, which decides by trace ids alone";
        p.add("recorder", format!("eager with {part}"), allowed);
    }
    let steps = tracing.engine_steps.unwrap_or(0.0);
    p.check((0.0..=1.0).contains(&steps), "engine_steps", steps, "a number from 0 to 1");
    let events = tracing.kv_events.unwrap_or(0.0);
    p.check((0.0..=1.0).contains(&events), "kv_events", events, "a number from 0 to 1");
    let scrapes = tracing.scrapes.unwrap_or(0.0);
    p.check((0.0..=1.0).contains(&scrapes), "scrapes", scrapes, "a number from 0 to 1");
    for (i, exporter) in tracing.exporters.iter().flatten().enumerate() {
        match exporter {
            Exporter::Otlp(otlp) => p.at(&format!("exporters[{i}].otlp"), |p| check_otlp(otlp, p)),
            Exporter::RotatingFile(_) => {
                let live = mode == Mode::Live;
                p.check(live, &format!("exporters[{i}]"), "rotating files in virtual mode", "file, or mode: live");
            }
            Exporter::File | Exporter::Console | Exporter::None => {}
        }
    }
    let nothing = tracing.exporters.iter().flatten().any(|e| *e == Exporter::None);
    let count = tracing.exporters.as_ref().map_or(0, Vec::len);
    p.check(!nothing || count == 1, "exporters", "none among others", "none alone");
    p.check(tracing.max_open.is_none_or(|d| d.get().as_nanos() > 0), "max_open", "0", "a duration above 0");
}

/// Headers are looked at when they are used: what is wrong with one is told without its value.
fn check_otlp(otlp: &Otlp, p: &mut Problems) {
    let ok = ["http://", "https://"].iter().any(|s| otlp.url.strip_prefix(s).is_some_and(|host| !host.is_empty()));
    p.check(ok, "url", format!("{:?}", otlp.url), "an address such as http://localhost:4317");
}

fn check_metrics(metrics: &Metrics, p: &mut Problems) {
    for (i, otlp) in metrics.otlp.iter().flatten().enumerate() {
        p.at(&format!("otlp[{i}]"), |p| {
            check_otlp(otlp, p);
            p.check(otlp.encoding.is_none(), "encoding", "an encoding of metrics", "none: there is only one");
        });
    }
    p.check(metrics.interval.is_none_or(|d| d.get().as_nanos() > 0), "interval", "0", "a duration above 0");
}

/// Ports of a live run with who has them.
#[derive(Default)]
struct Taken(BTreeMap<u32, String>);

impl Taken {
    /// Takes `count` ports from `first` on for `owner`; port 0 is any free one.
    fn claim(&mut self, path: &str, first: u32, count: u32, owner: &str, p: &mut Problems) {
        if first == 0 {
            return;
        }
        let last = first + count - 1;
        if last > u32::from(u16::MAX) {
            p.add(path, format!("ports up to {last}"), "ports up to 65535");
            return;
        }
        if let Some((port, owner)) = self.0.range(first..=last).next() {
            p.add(path, format!("port {port}, which {owner} has"), "ports of its own");
        }
        self.0.extend((first..=last).map(|port| (port, owner.to_owned())));
    }
}
