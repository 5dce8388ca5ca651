//! What a request is made of: tenant, prompt, lengths. Pure: everything follows from scenario, seed and key.

use std::sync::Arc;

use shared::rng::Seed;
use shared::time::{Dur, Time};
use shared::tokens::ContentId;

use super::draws::{Dice, Weighted};
use super::{Answer, PlannedRequest, Segment, SessionId};
use crate::replay::Recorded;
use crate::scenario::{Arrivals, Builtin, Scenario, ThinkTime, Workload};

/// Makes requests.
#[derive(Debug)]
pub(super) struct Composer {
    workload: Workload,
    objectives: Vec<Option<Arc<str>>>,
    priorities: Vec<i32>,
    client_think: ThinkTime,
    tenant_weights: Weighted,
    groups: Option<Weighted>,
    /// The order of prompts that come in turn.
    turns: Vec<u32>,
    context_limit: u32,
    dice: AllDice,
}

/// One set of draws per concern.
#[derive(Debug)]
struct AllDice {
    tenants: Dice,
    prompts: Dice,
    outputs: Dice,
    streaming: Dice,
    prefix_shared: Dice,
    prefix_group: Dice,
    prefix_tokens: Dice,
    turns: Dice,
    pauses: Dice,
    text_system: Dice,
    text_prefix: Dice,
    text_user: Dice,
    text_prompt: Dice,
    text_answer: Dice,
}

/// What differs between the ways in which requests come about.
struct Parts {
    client: Option<u32>,
    tenant: u16,
    intended: Time,
    session: Option<(SessionId, u32)>,
    prompt: Vec<Segment>,
    output_tokens: u32,
}

impl Composer {
    /// A composer for a valid scenario.
    pub(super) fn new(scenario: &Scenario, seed: Seed) -> Composer {
        let workload = scenario.workload.clone();
        let client_think = match &workload.arrivals {
            Some(Arrivals::Closed { think_time, .. }) => *think_time,
            Some(
                Arrivals::Poisson { .. }
                | Arrivals::Gamma { .. }
                | Arrivals::Constant { .. }
                | Arrivals::Steps { .. }
                | Arrivals::Replay {},
            )
            | None => ThinkTime::default(),
        };
        let zipf = |groups: u32, skew: f64| Weighted::new((1..=groups).map(move |k| f64::from(k).powf(-skew)));
        Composer {
            priorities: scenario.tenants().into_iter().map(|(_, priority)| priority).collect(),
            objectives: workload.tenants.iter().map(|t| t.objective_name().map(Arc::from)).collect(),
            tenant_weights: Weighted::new(workload.tenants.iter().map(|t| t.weight)),
            groups: workload.prefixes.as_ref().map(|p| zipf(p.groups, p.skew)),
            turns: turns(&workload, seed),
            context_limit: scenario.context_limit(),
            dice: AllDice::new(seed),
            client_think,
            workload,
        }
    }

    /// The first request of session `key`.
    pub(super) fn first(&self, key: u64, client: Option<u32>, intended: Time) -> PlannedRequest {
        let tenant = self.tenant(key);
        let output_tokens = self.workload.output_tokens.at(self.dice.outputs.unit(key, 0), Builtin::Output);
        let mut prompt = self.shared_prompt(key, tenant);
        let before: u32 = prompt.iter().map(|s| s.tokens).sum();
        let wanted = self.workload.prompt_tokens.at(self.dice.prompts.unit(key, 0), Builtin::Prompt);
        // Distributions have long tails: what would not fit the engines' context is cut to what does.
        let room = self.context_limit.saturating_sub(before.saturating_add(output_tokens));
        let own = wanted.min(room).max(1);
        prompt.push(self.prompt_in_turn(key, own).unwrap_or_else(|| self.own_text(key, 0, own)));
        let session = self.workload.sessions.is_some().then_some((SessionId(key), 0));
        self.request(key, 0, Parts { client, tenant, intended, session, prompt, output_tokens })
    }

    /// The turn after `request`, to be sent when its answer has come; `None` when the conversation is over or would no longer
    /// fit the engines' context. The caller sets the time.
    pub(super) fn next_turn(&self, request: &PlannedRequest, answer: Answer) -> Option<PlannedRequest> {
        let sessions = self.workload.sessions.as_ref()?;
        let (key, turn) = (request.key, request.turn + 1);
        if turn >= sessions.turns.at(self.dice.turns.unit(key, 0), Builtin::Prompt) {
            return None;
        }
        let n = u64::from(turn);
        let length = sessions.turn_tokens.as_ref().unwrap_or(&self.workload.prompt_tokens);
        let own = length.at(self.dice.prompts.unit(key, n), Builtin::Prompt);
        let output_tokens = self.workload.output_tokens.at(self.dice.outputs.unit(key, n), Builtin::Output);
        let all = [request.prompt_tokens, answer.tokens, own, output_tokens];
        if all.iter().map(|&t| u64::from(t)).sum::<u64>() > u64::from(self.context_limit) {
            return None;
        }
        let mut prompt = request.prompt.clone();
        prompt.push(Segment { content: answer.content, from: 0, tokens: answer.tokens });
        prompt.push(self.own_text(key, turn, own));
        let PlannedRequest { client, tenant, intended, .. } = *request;
        let session = Some((SessionId(key), turn));
        Some(self.request(key, turn, Parts { client, tenant, intended, session, prompt, output_tokens }))
    }

    /// A request of a trace. Its prompt and lengths are the trace's.
    pub(super) fn recorded(&self, index: u64, recorded: Recorded) -> PlannedRequest {
        let Recorded { at: intended, mut prompt, own_tokens, output_tokens, tenant, priority } = recorded;
        if own_tokens > 0 {
            prompt.push(self.own_text(index, 0, own_tokens));
        }
        let tenant = tenant.unwrap_or_else(|| self.tenant(index));
        let parts = Parts { client: None, tenant, intended, session: None, prompt, output_tokens };
        let request = self.request(index, 0, parts);
        PlannedRequest { priority: priority.unwrap_or(request.priority), ..request }
    }

    /// The pause between the answer to `request` and the next turn.
    pub(super) fn turn_pause(&self, request: &PlannedRequest) -> Dur {
        let think = self.workload.sessions.as_ref().map(|s| s.think_time).unwrap_or_default();
        self.pause(think, request)
    }

    /// The pause of a closed-loop client after `request`.
    pub(super) fn client_pause(&self, request: &PlannedRequest) -> Dur {
        self.pause(self.client_think, request)
    }

    fn pause(&self, think: ThinkTime, request: &PlannedRequest) -> Dur {
        match think {
            ThinkTime::Constant(pause) => pause.get(),
            ThinkTime::Exponential(exponential) => {
                let u = self.dice.pauses.unit(request.key, request.turn.into());
                Dur::from_secs_f64(exponential.mean.get().as_secs_f64() * -(1.0 - u).ln())
            }
        }
    }

    fn tenant(&self, key: u64) -> u16 {
        self.tenant_weights.at(self.dice.tenants.unit(key, 0)) as u16
    }

    /// System prompt and group prefix.
    fn shared_prompt(&self, key: u64, tenant: u16) -> Vec<Segment> {
        let mut prompt = Vec::with_capacity(3);
        if let Some(system) = &self.workload.system_prompt {
            let whose = if system.per_tenant { u64::from(tenant) } else { 0 };
            let content = ContentId(self.dice.text_system.bits(whose, 0));
            prompt.push(Segment { content, from: 0, tokens: system.tokens });
        }
        if let (Some(prefixes), Some(groups)) = (&self.workload.prefixes, &self.groups)
            && self.dice.prefix_shared.unit(key, 0) < prefixes.share
        {
            let drawn = || groups.at(self.dice.prefix_group.unit(key, 0)) as u64;
            let group = self.turn(key).map_or_else(drawn, |turn| u64::from(turn) % u64::from(prefixes.groups));
            let tokens = prefixes.tokens.at(self.dice.prefix_tokens.unit(group, 0), Builtin::Prompt);
            prompt.push(Segment { content: ContentId(self.dice.text_prefix.bits(group, 0)), from: 0, tokens });
        }
        prompt
    }

    /// The number of the prompt whose turn it is, among those of all groups.
    fn turn(&self, key: u64) -> Option<u32> {
        let all = self.turns.len() as u64;
        (all > 0).then(|| self.turns[(key % all) as usize])
    }

    /// What follows the prefix of a prompt that comes again.
    fn prompt_in_turn(&self, key: u64, tokens: u32) -> Option<Segment> {
        let turn = self.turn(key)?;
        Some(Segment { content: ContentId(self.dice.text_prompt.bits(turn.into(), 0)), from: 0, tokens })
    }

    fn own_text(&self, key: u64, turn: u32, tokens: u32) -> Segment {
        Segment { content: ContentId(self.dice.text_user.bits(key, turn.into())), from: 0, tokens }
    }

    fn request(&self, key: u64, turn: u32, parts: Parts) -> PlannedRequest {
        let Parts { client, tenant, intended, session, prompt, output_tokens } = parts;
        PlannedRequest {
            index: 0,
            tenant,
            client,
            intended,
            session,
            prompt_tokens: prompt.iter().map(|s| s.tokens).sum(),
            prompt,
            output_tokens,
            output: ContentId(self.dice.text_answer.bits(key, turn.into())),
            streaming: self.dice.streaming.unit(key, turn.into()) < self.workload.streaming,
            priority: self.priorities.get(usize::from(tenant)).copied().unwrap_or(0),
            objective: self.objectives.get(usize::from(tenant)).cloned().flatten(),
            key,
            turn,
        }
    }
}

/// All prompts of all groups, shuffled.
fn turns(workload: &Workload, seed: Seed) -> Vec<u32> {
    let Some((groups, prompts)) = workload.prefixes.as_ref().and_then(|p| Some((p.groups, p.prompts?))) else {
        return Vec::new();
    };
    let mut order: Vec<u32> = (0..groups * prompts).collect();
    let mut stream = seed.stream("workload/prompt-order");
    for i in (1..order.len()).rev() {
        order.swap(i, stream.below(i + 1));
    }
    order
}

impl AllDice {
    fn new(seed: Seed) -> AllDice {
        let dice = |name: &str| Dice::new(seed, &format!("workload/{name}"));
        AllDice {
            tenants: dice("tenants"),
            prompts: dice("prompt-tokens"),
            outputs: dice("output-tokens"),
            streaming: dice("streaming"),
            prefix_shared: dice("prefix-shared"),
            prefix_group: dice("prefix-group"),
            prefix_tokens: dice("prefix-tokens"),
            turns: dice("turns"),
            pauses: dice("pauses"),
            text_system: dice("text/system"),
            text_prefix: dice("text/prefix"),
            text_user: dice("text/user"),
            text_prompt: dice("text/prompt"),
            text_answer: dice("text/answer"),
        }
    }
}
