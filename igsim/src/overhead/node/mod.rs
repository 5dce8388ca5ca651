//! The processes of the lab: gateway, engines and receiver, each one `igsim overhead-node ROLE`, told what to do line by line.
//!
//! A process reads its first order before it starts a thread, so that all its threads run where they are meant to. It ends when
//! its standard input does.

pub mod child;
mod engine;
mod gateway;
pub mod message;
mod pipelines;
mod receiver;

use std::io::{self, BufRead, Write};

use message::{Answer, Order, Role, Start};
use tokio::runtime::Runtime;

use super::place;

/// A process that serves.
trait Node {
    /// Its base URLs.
    fn urls(&self) -> Vec<String>;
    /// Does what it is told.
    fn handle(&mut self, runtime: &Runtime, order: Order) -> Result<Answer, String>;
    /// Stops serving.
    fn stop(self: Box<Self>, runtime: &Runtime);
}

/// Runs a process of the lab until its standard input ends.
///
/// # Errors
/// If it cannot serve; the lab has been told the same.
pub fn main(role: Role) -> Result<(), String> {
    let mut lines = io::stdin().lock().lines();
    let Some(Ok(first)) = lines.next() else { return Ok(()) };
    let (runtime, mut node) = begin(role, &first).inspect_err(|problem| {
        say(&Answer::Failed(problem.clone()));
    })?;
    say(&Answer::Serving(node.urls()));
    for line in lines.map_while(Result::ok) {
        let answer = serde_json::from_str::<Order>(&line)
            .map_err(|error| format!("an order that is none: {error}"))
            .and_then(|order| node.handle(&runtime, order));
        if !say(&answer.unwrap_or_else(Answer::Failed)) {
            break;
        }
    }
    node.stop(&runtime);
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    Ok(())
}

fn begin(role: Role, first: &str) -> Result<(Runtime, Box<dyn Node>), String> {
    let start = match serde_json::from_str(first) {
        Ok(Order::Start(start)) => start,
        Ok(_) => return Err("the first order is not to start".to_owned()),
        Err(error) => return Err(format!("an order that is none: {error}")),
    };
    place::run_on(&start.cpus).map_err(|e| format!("cannot run on CPUs {:?}: {e}", start.cpus))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(start.cpus.len().max(1))
        .enable_all()
        .build()
        .map_err(|e| format!("cannot start: {e}"))?;
    let node = node(role, &runtime, start)?;
    Ok((runtime, node))
}

fn node(role: Role, runtime: &Runtime, start: Start) -> Result<Box<dyn Node>, String> {
    Ok(match role {
        Role::Gateway => Box::new(gateway::GatewayNode::start(runtime, start)?),
        Role::Engine => Box::new(engine::EngineNode::start(runtime, start)?),
        Role::Receiver => Box::new(receiver::ReceiverNode::start(runtime, start.stored_bytes)?),
    })
}

/// Writes an answer; false if nobody reads it any more.
fn say(answer: &Answer) -> bool {
    let mut out = io::stdout().lock();
    let line = serde_json::to_string(answer).unwrap_or_else(|e| format!("{{\"failed\":\"{e}\"}}"));
    writeln!(out, "{line}").and_then(|()| out.flush()).is_ok()
}

/// What an order that is for another role gets.
fn not_for(role: Role) -> Result<Answer, String> {
    Err(format!("this is no order for the {}", role.name()))
}
