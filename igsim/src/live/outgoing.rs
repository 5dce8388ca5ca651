//! Planned requests as HTTP: bodies of filler text, headers of tenant and session.

use std::fmt::Write as _;

use bytes::Bytes;
use engine_sim::core::filler::output_content;
use http::{HeaderMap, HeaderName, HeaderValue, Uri};
use shared::ids::RequestId;
use shared::tokens::{self, TokenId};

use crate::client::Outgoing;
use crate::scenario::{Api, Callers, Scenario, Tenant};
use crate::workload::{Answer, PlannedRequest};

/// Where requests go, and what goes with each of them.
#[derive(Clone, Debug)]
pub(super) struct Destination {
    pub(super) uri: Uri,
    pub(super) headers: HeaderMap,
}

/// What bodies and headers need of the scenario.
#[derive(Clone, Debug)]
pub(super) struct Writer {
    api: Api,
    /// As JSON: the model of all, and that of each tenant that has its own.
    model: String,
    models: Vec<Option<String>>,
    tenants: Vec<Tenant>,
    callers: Callers,
    to: Destination,
    tokens: Vec<TokenId>,
}

/// The id a request is sent with.
pub(super) fn request_id(plan: &PlannedRequest) -> String {
    format!("req-{}", plan.index)
}

impl Writer {
    pub(super) fn new(scenario: &Scenario, to: Destination) -> Writer {
        let json = |text: &String| serde_json::to_string(text).expect("text serialises");
        let tenants = scenario.workload.tenants.clone();
        let models = tenants.iter().map(|t| t.model.as_ref().map(json)).collect();
        let (model, callers) = (json(&scenario.model()), scenario.callers());
        Writer { api: scenario.workload.api, model, models, tenants, callers, to, tokens: Vec::new() }
    }

    /// The request, and the answer that our engines give to it.
    pub(super) fn write(&mut self, plan: &PlannedRequest) -> (Outgoing, Answer) {
        self.tokens.clear();
        plan.tokens(&mut self.tokens);
        let answer = Answer { content: output_content(&self.tokens, None), tokens: plan.output_tokens };
        let outgoing = Outgoing {
            uri: self.to.uri.clone(),
            id: RequestId::sanitise(&request_id(plan)),
            body: Bytes::from(self.body(plan)),
            streaming: plan.streaming,
            headers: self.headers(plan),
        };
        (outgoing, answer)
    }

    /// Filler is letters and spaces: it needs no JSON escapes.
    fn body(&self, plan: &PlannedRequest) -> String {
        let mut body = String::with_capacity(self.tokens.len() * tokens::BYTES_PER_TOKEN + 256);
        let own = self.models.get(usize::from(plan.tenant)).and_then(Option::as_ref);
        let _ = write!(body, "{{\"model\":{},", own.unwrap_or(&self.model));
        match self.api {
            Api::Completions => {
                body.push_str("\"prompt\":\"");
                tokens::push_text(&self.tokens, &mut body);
                body.push_str("\",");
            }
            Api::Chat => self.messages(plan, &mut body),
        }
        let _ = write!(body, "\"max_tokens\":{},\"ignore_eos\":true", plan.output_tokens);
        if plan.priority != 0 {
            let _ = write!(body, ",\"priority\":{}", -plan.priority);
        }
        body.push_str(if plan.streaming {
            ",\"stream\":true,\"stream_options\":{\"include_usage\":true}}"
        } else {
            "}"
        });
        body
    }

    /// The last segments are what user and assistant said in turn, the user last; what comes before is the system's.
    fn messages(&self, plan: &PlannedRequest, body: &mut String) {
        let said = plan.session.map_or(1, |(_, turn)| 2 * turn as usize + 1);
        let head = plan.prompt.len().saturating_sub(said);
        let mut rest = self.tokens.as_slice();
        let mut take = |n: usize| {
            let (text, tail) = rest.split_at(n);
            rest = tail;
            text
        };
        let system = take(plan.prompt[..head].iter().map(|s| s.tokens as usize).sum());
        let mut messages = vec![("system", system)];
        for (i, segment) in plan.prompt[head..].iter().enumerate() {
            messages.push((if i % 2 == 0 { "user" } else { "assistant" }, take(segment.tokens as usize)));
        }
        body.push_str("\"messages\":[");
        for (i, (role, text)) in messages.iter().filter(|(_, text)| !text.is_empty()).enumerate() {
            let comma = if i == 0 { "" } else { "," };
            let _ = write!(body, "{comma}{{\"role\":\"{role}\",\"content\":\"");
            tokens::push_text(text, body);
            body.push_str("\"}");
        }
        body.push_str("],");
    }

    fn headers(&self, plan: &PlannedRequest) -> HeaderMap {
        let mut headers = self.to.headers.clone();
        if let Some(context) = self.callers.context(plan.index) {
            shared::trace::context::inject(&context, &mut headers);
        }
        let mut set = |name: &'static str, value: &str| {
            if let Ok(value) = HeaderValue::from_str(value) {
                headers.insert(HeaderName::from_static(name), value);
            }
        };
        if let Some(objective) = &plan.objective {
            set("x-llm-d-inference-objective", objective);
        }
        if let Some(tenant) = self.tenants.get(usize::from(plan.tenant)) {
            set("x-llm-d-inference-fairness-id", &tenant.name);
            if let Some(slo) = tenant.slo_ttft {
                set("x-llm-d-slo-ttft-ms", &(slo.get().as_nanos() / 1_000_000).to_string());
            }
            if let Some(ttl) = tenant.queue_ttl {
                set("x-llm-d-inference-ttl", &ttl.to_string());
            }
        }
        if let Some((session, _)) = plan.session {
            set("x-session-id", &format!("session-{}", session.0));
        }
        headers
    }
}

#[cfg(test)]
mod tests {
    use shared::openai::Request;
    use shared::rng::Seed;

    use super::*;
    use crate::workload::Plan;

    fn nowhere() -> Destination {
        Destination { uri: Uri::from_static("http://127.0.0.1/"), headers: HeaderMap::new() }
    }

    fn check(api: &str) {
        let yaml = format!(
            "name: t\nrequests: 3\nengines: [{{count: 1}}]\nworkload:\n  api: {api}\n  arrivals: {{process: constant, rate: 1}}\n  \
             system_prompt: {{tokens: 5}}\n  prompt_tokens: 7\n  output_tokens: 4\n"
        );
        let scenario = shared::config::load_str::<Scenario>("t", &yaml, &[]).unwrap().config;
        let mut writer = Writer::new(&scenario, nowhere());
        let mut plan = Plan::new(&scenario, Seed(1)).unwrap();
        while let Some(request) = plan.next_arrival().unwrap() {
            let (outgoing, _) = writer.write(&request);
            let parsed: Request<'_> = serde_json::from_slice(&outgoing.body).unwrap();
            let (mut sent, mut planned) = (Vec::new(), Vec::new());
            parsed.prompt_tokens(&mut sent).unwrap();
            request.tokens(&mut planned);
            assert_eq!(sent, planned, "what an engine reads is what was planned");
            assert_eq!(parsed.output_limit(), Some(4));
        }
    }

    #[test]
    fn a_conversation_is_sent_as_one() {
        let yaml = "name: t\nrequests: 3\nengines: [{count: 1}]\nworkload:\n  arrivals: {process: closed, concurrency: 1}\n  \
                    system_prompt: {tokens: 5}\n  sessions: {turns: 3}\n  prompt_tokens: 7\n  output_tokens: 4\n";
        let scenario = shared::config::load_str::<Scenario>("t", yaml, &[]).unwrap().config;
        let mut writer = Writer::new(&scenario, nowhere());
        let mut plan = Plan::new(&scenario, Seed(1)).unwrap();
        let mut next = plan.next_arrival().unwrap();
        let mut roles = Vec::new();
        while let Some(request) = next {
            let (outgoing, answer) = writer.write(&request);
            let parsed: Request<'_> = serde_json::from_slice(&outgoing.body).unwrap();
            let of = parsed.messages.unwrap().iter().map(|m| m.role.chars().next().unwrap()).collect::<String>();
            roles.push(of);
            next = plan.finished(&request, request.intended, Some(answer));
        }
        assert_eq!(roles, ["su", "suau", "suauau"]);
    }

    #[test]
    fn engines_read_the_tokens_that_were_planned() {
        check("chat");
        check("completions");
    }
}
