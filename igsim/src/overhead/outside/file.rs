//! The file that describes a system that is not ours: how it is started or switched, and what is sent to it.
//!
//! Says what is possible and what is wrong; starts nothing.

use std::collections::BTreeMap;

use http::Uri;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use shared::config::{Problems, Validate};
use shared::time::Dur;
use shared::units::HumanDur;

use super::fill::{self, Places};
use crate::overhead::load::{Lengths, MAX_IN_FLIGHT, MAX_REQUESTS, Pattern};
use crate::overhead::model::{Arm, Regime};
use crate::scenario::Api;

/// The longest that a block waits for late spans, and a system for being ready or switched.
const MAX_WAIT: Dur = Dur::from_secs(600);
/// The most requests per second of an open loop.
const MAX_RATE: f64 = 100_000.0;

/// A system that is not ours, and how the lab measures it.
///
/// Either each arm is a process that the lab starts (`start`), or one system runs already and is switched (`url`, `process`,
/// and `switch` of each arm).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OutsideFile {
    /// Short name, for the folder of the results.
    #[schemars(length(min = 1))]
    pub name: String,
    /// The endpoint that is called.
    #[serde(default)]
    pub api: Api,
    /// The model that is asked for, and that the lab's own engines serve.
    #[schemars(length(min = 1))]
    pub model: String,
    /// How many of our engines stand behind the system, each answering at once; 0 if it needs none.
    #[serde(default)]
    #[schemars(range(max = 64))]
    pub engines: u32,
    /// Command of every arm that names none of its own. Placeholders: `{port}` and `{port2}` (free ports), `{engine0}`,
    /// `{engine1}` (base URLs of engines), `{engines}` (all of them; one argument each where it stands alone, else separated by
    /// commas), `{receiver}` (host:port of the lab's OTLP receiver, HTTP and gRPC).
    #[serde(default)]
    pub start: Vec<String>,
    /// Environment of every command, before that of the arm. With placeholders.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Base URL; with `{port}` for arms that are started.
    #[serde(default = "default_url")]
    pub url: String,
    /// Path that answers 2xx when the system is ready.
    #[serde(default = "default_ready")]
    pub ready: String,
    /// Text that this answer contains, where 2xx alone says too little.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_contains: Option<String>,
    /// The longest wait for a system to be ready, or for a switch to end.
    #[serde(default = "default_ready_within")]
    pub ready_within: HumanDur,
    /// The process that is switched, whose CPU is read with that of its children: its name as the kernel keeps it (at most 15
    /// bytes), or, with a `/` in it, a file with its id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<String>,
    /// What is sent.
    pub load: Load,
    /// Requests of a block.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub requests: u64,
    /// How long a block waits after its last answer, in every arm: longer than the system keeps spans back. CPU and spans that
    /// come within this time belong to the block.
    #[serde(default = "default_settle")]
    pub settle: HumanDur,
    /// The states to compare. The first is `off`; `off'` is its control.
    #[schemars(length(min = 2, max = 12))]
    pub arms: Vec<OutsideArm>,
}

/// What is sent: a closed loop with `in_flight`, or an open one with `per_second`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Load {
    /// Closed loop: requests in flight at any time. CPU per request is the primary statistic.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 512))]
    pub in_flight: Option<u32>,
    /// Open loop: requests per second at equal distances. Latency is the primary statistic.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub per_second: Option<f64>,
    /// Tokens of a prompt.
    #[serde(default = "default_prompt")]
    #[schemars(range(min = 1, max = 100_000))]
    pub prompt_tokens: u32,
    /// Tokens of an answer.
    #[serde(default = "default_output")]
    #[schemars(range(min = 1, max = 100_000))]
    pub output_tokens: u32,
}

/// One state of the system.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OutsideArm {
    /// Its name in tables: `off`, `off'`, or anything else.
    #[schemars(length(min = 1, max = 40))]
    pub name: String,
    /// Program and arguments; the process stays up and is idle when it is not its turn.
    #[serde(default)]
    pub start: Vec<String>,
    /// Arguments behind `start`.
    #[serde(default)]
    pub args: Vec<String>,
    /// Environment of `start` or `switch`. With placeholders.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Base URL, if it is not that of the file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// Program and arguments that bring the running system into this state, run before each of its blocks.
    #[serde(default)]
    pub switch: Vec<String>,
}

fn default_url() -> String {
    "http://127.0.0.1:{port}".to_owned()
}

fn default_ready() -> String {
    "/v1/models".to_owned()
}

const fn default_ready_within() -> HumanDur {
    HumanDur(Dur::from_secs(60))
}

const fn default_settle() -> HumanDur {
    HumanDur(Dur::from_millis(500))
}

const fn default_prompt() -> u32 {
    64
}

const fn default_output() -> u32 {
    8
}

impl OutsideFile {
    /// Whether the lab starts a process for each arm; otherwise it switches one that runs.
    pub fn starts(&self) -> bool {
        self.process.is_none()
    }

    /// The command of an arm, before placeholders are filled in.
    pub fn command(&self, arm: &OutsideArm) -> Vec<String> {
        let start = if arm.start.is_empty() { &self.start } else { &arm.start };
        start.iter().chain(&arm.args).cloned().collect()
    }

    /// The environment of an arm, before placeholders are filled in.
    pub fn environment(&self, arm: &OutsideArm) -> BTreeMap<String, String> {
        self.env.iter().chain(&arm.env).map(|(k, v)| (k.clone(), v.clone())).collect()
    }

    /// The base URL of an arm, before placeholders are filled in.
    pub fn url<'a>(&'a self, arm: &'a OutsideArm) -> &'a str {
        arm.url.as_deref().unwrap_or(&self.url)
    }

    /// The regime whose statistics apply: those of CPU for a closed loop, of latency for an open one.
    pub const fn regime(&self) -> Regime {
        match self.load.per_second {
            Some(_) => Regime::Floor,
            None => Regime::Saturation,
        }
    }

    /// What a block sends.
    pub fn pattern(&self) -> Pattern {
        let Load { in_flight, per_second, prompt_tokens, output_tokens } = self.load;
        let lengths = Lengths { prompt: prompt_tokens, output: output_tokens };
        let requests = self.requests;
        match per_second {
            Some(per_second) => Pattern::FixedRate { per_second, requests, lengths },
            None => Pattern::Closed { in_flight: in_flight.unwrap_or(1), requests, lengths },
        }
    }

    /// The load in words.
    pub fn words(&self) -> String {
        let load = match (self.load.per_second, self.load.in_flight) {
            (Some(rate), _) => format!("{rate} requests a second"),
            (None, in_flight) => format!("{} requests in flight", in_flight.unwrap_or(1)),
        };
        format!("{load}, then {:.0} ms for late spans", self.settle.get().as_millis_f64())
    }
}

impl OutsideArm {
    /// As the lab's statistics know it.
    pub fn arm(&self) -> Arm {
        match self.name.as_str() {
            "off" => Arm::Off,
            "off'" => Arm::Control,
            name => Arm::Outside { name: name.to_owned() },
        }
    }
}

impl Validate for OutsideFile {
    fn validate(&self, problems: &mut Problems) {
        problems.check(self.model.trim() == self.model, "model", &self.model, "a name without spaces around it");
        problems.check(self.requests <= MAX_REQUESTS, "requests", self.requests, "at most 1000000");
        for (path, wait) in [("settle", self.settle), ("ready_within", self.ready_within)] {
            problems.check(wait.get() <= MAX_WAIT, path, format!("{:.0} s", wait.get().as_secs_f64()), "at most 10m");
        }
        problems.check(self.ready.starts_with('/'), "ready", &self.ready, "a path that begins with /");
        problems.at("load", |p| self.load.validate(p));
        if let Some(first) = self.arms.first().filter(|a| a.name != "off") {
            problems.add("arms[0].name", &first.name, "`off`: what every other arm is compared with comes first");
        }
        for (i, arm) in self.arms.iter().enumerate() {
            problems.at(&format!("arms[{i}]"), |p| self.validate_arm(i, arm, p));
        }
    }
}

impl OutsideFile {
    fn validate_arm(&self, index: usize, arm: &OutsideArm, problems: &mut Problems) {
        let again = self.arms.iter().take(index).any(|a| a.name == arm.name);
        problems.check(!again, "name", &arm.name, "a name that no other arm has");
        let mut places = Places::example(self.engines);
        if self.starts() {
            let none = self.command(arm).is_empty();
            problems.check(!none, "start", "nothing", "a program and its arguments, here or in `start` of the file");
            let why = "no `switch` without `process`: what is switched must run already, and its CPU must be read";
            problems.check(arm.switch.is_empty(), "switch", arm.switch.join(" "), why);
        } else {
            places = places.without_ports();
            problems.check(
                !arm.switch.is_empty(),
                "switch",
                "nothing",
                "a program and its arguments, since `process` is given",
            );
            let started = !arm.start.is_empty() || !self.start.is_empty() || !arm.args.is_empty();
            problems.check(!started, "start", "a command", "no `start` and `args` with `process`: one of both ways");
        }
        let commands = [("start", self.command(arm)), ("switch", arm.switch.clone())];
        for (path, command) in commands.iter().chain([&("env", self.environment(arm).into_values().collect())]) {
            if let Err(wrong) = fill::arguments(command, &places) {
                problems.add(path, format!("{{{wrong}}}"), places.allowed());
            }
        }
        match fill::text(self.url(arm), &places) {
            Err(wrong) => drop(problems.add("url", format!("{{{wrong}}}"), places.allowed())),
            Ok(url) => {
                let valid = url.parse::<Uri>().is_ok_and(|u| u.scheme_str() == Some("http") && u.host().is_some());
                problems.check(valid, "url", self.url(arm), "an http URL with a host");
            }
        }
    }
}

impl Validate for Load {
    fn validate(&self, problems: &mut Problems) {
        let one = "one of `in_flight` (closed loop) and `per_second` (open loop)";
        match (self.in_flight, self.per_second) {
            (None, None) => drop(problems.add("", "neither", one)),
            (Some(_), Some(_)) => drop(problems.add("", "both", one)),
            (Some(n), None) => problems.check(n <= MAX_IN_FLIGHT, "in_flight", n, "at most 512"),
            (None, Some(rate)) => {
                let fits = rate > 0.0 && rate <= MAX_RATE;
                problems.check(fits, "per_second", rate, "above 0 and at most 100000");
            }
        }
    }
}
