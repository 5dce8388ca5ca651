//! A process of the lab as the lab sees it: orders go in, answers come out within a bound, and one that fails shows what it said.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::message::{Answer, Counters, Order, Role, Start};

/// How long a process may take for its answer, beyond what the order itself allows.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long a process may take to end once its input has.
const FAREWELL: Duration = Duration::from_secs(5);
/// Lines of its standard error that are kept.
const KEPT_LINES: usize = 40;

/// A process of the lab that does not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// It cannot be started.
    #[error("cannot start the {role}: {error}")]
    Spawn {
        /// Which one.
        role: &'static str,
        /// What the system said.
        error: std::io::Error,
    },
    /// It ended.
    #[error("the {role} ended before its time ({status}){said}")]
    Ended {
        /// Which one.
        role: &'static str,
        /// How.
        status: String,
        /// The last of its standard error.
        said: String,
    },
    /// It does not answer.
    #[error("the {role} did not answer within {seconds} s{said}")]
    Silent {
        /// Which one.
        role: &'static str,
        /// How long it was waited for.
        seconds: u64,
        /// The last of its standard error.
        said: String,
    },
    /// It answered that it could not.
    #[error("the {role} failed: {problem}{said}")]
    Failed {
        /// Which one.
        role: &'static str,
        /// What it said.
        problem: String,
        /// The last of its standard error.
        said: String,
    },
}

/// A running process. Dropping it ends it.
#[derive(Debug)]
pub struct Node {
    role: Role,
    process: Child,
    orders: Option<ChildStdin>,
    answers: Receiver<String>,
    said: Arc<Mutex<VecDeque<String>>>,
    urls: Vec<String>,
}

impl Node {
    /// Starts `binary` as `role` and waits until it serves.
    ///
    /// # Errors
    /// If it does not start.
    pub fn start(binary: &Path, role: Role, start: Start) -> Result<Node, NodeError> {
        let fail = |error| NodeError::Spawn { role: role.name(), error };
        let mut command = Command::new(binary);
        // A group of its own: Ctrl-C is for the lab, which ends its processes when it has written down what it knows.
        command.args(["overhead-node", role.name()]).process_group(0);
        // Telemetry is set up by orders only.
        std::env::vars_os().filter(|(k, _)| k.to_string_lossy().starts_with("OTEL_")).for_each(|(k, _)| {
            command.env_remove(k);
        });
        let mut process =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().map_err(fail)?;
        let gone = || fail(std::io::Error::other("a pipe is missing"));
        let orders = Some(process.stdin.take().ok_or_else(gone)?);
        let answers = lines(process.stdout.take().ok_or_else(gone)?);
        let said = keep_last(process.stderr.take().ok_or_else(gone)?);
        let mut node = Node { role, process, orders, answers, said, urls: Vec::new() };
        node.urls = match node.ask(&Order::Start(start))? {
            Answer::Serving(urls) => urls,
            other => return Err(node.unexpected(&other)),
        };
        Ok(node)
    }

    /// Where it serves.
    pub fn urls(&self) -> &[String] {
        &self.urls
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Gives an order and waits for the answer.
    ///
    /// # Errors
    /// If the process is gone, silent, or could not do it.
    pub fn ask(&mut self, order: &Order) -> Result<Answer, NodeError> {
        self.tell(order)?;
        self.answer(order)
    }

    /// Gives an order without waiting; [`Node::answer`] does.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn tell(&mut self, order: &Order) -> Result<(), NodeError> {
        let line = serde_json::to_string(order).map_err(|e| self.failed(format!("an order cannot be written: {e}")))?;
        let written = match &mut self.orders {
            Some(orders) => writeln!(orders, "{line}").and_then(|()| orders.flush()),
            None => Ok(()),
        };
        written.map_err(|_| self.ended())
    }

    /// Waits for the answer to `order`.
    ///
    /// # Errors
    /// If the process is gone, silent, or could not do it.
    pub fn answer(&mut self, order: &Order) -> Result<Answer, NodeError> {
        let bound = match order {
            Order::Flush(ms) => PATIENCE + Duration::from_millis(*ms),
            // Everything of a run: as long as it takes, within reason.
            Order::Decode => PATIENCE * 15,
            _ => PATIENCE,
        };
        let line = match self.answers.recv_timeout(bound) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => {
                return Err(NodeError::Silent { role: self.role.name(), seconds: bound.as_secs(), said: self.said() });
            }
            Err(RecvTimeoutError::Disconnected) => return Err(self.ended()),
        };
        match serde_json::from_str(&line) {
            Ok(Answer::Failed(problem)) => Err(self.failed(problem)),
            Ok(answer) => Ok(answer),
            Err(error) => Err(self.failed(format!("an answer that is none: {error}"))),
        }
    }

    /// Gives an order whose answer is that it is done.
    ///
    /// # Errors
    /// As [`Node::ask`].
    pub fn order(&mut self, order: &Order) -> Result<(), NodeError> {
        match self.ask(order)? {
            Answer::Done => Ok(()),
            other => Err(self.unexpected(&other)),
        }
    }

    /// What became of its records and spans.
    ///
    /// # Errors
    /// As [`Node::ask`].
    pub fn counters(&mut self) -> Result<Counters, NodeError> {
        match self.ask(&Order::Counters)? {
            Answer::Counters(counters) => Ok(counters),
            other => Err(self.unexpected(&other)),
        }
    }

    /// An answer to another question.
    pub(crate) fn unexpected(&mut self, answer: &Answer) -> NodeError {
        let kind = match answer {
            Answer::Serving(_) => "serving",
            Answer::Done => "done",
            Answer::Settled(_) => "settled",
            Answer::Counters(_) => "counters",
            Answer::Served(_) => "served",
            Answer::Taken(_) => "taken",
            Answer::Decoded(_) => "decoded",
            Answer::Failed(_) => "failed",
        };
        self.failed(format!("it answered another question (`{kind}`)"))
    }

    fn failed(&mut self, problem: String) -> NodeError {
        NodeError::Failed { role: self.role.name(), problem, said: self.said() }
    }

    fn ended(&mut self) -> NodeError {
        let status = self.wait(FAREWELL).unwrap_or_else(|| "it closed its output".to_owned());
        NodeError::Ended { role: self.role.name(), status, said: self.said() }
    }

    fn said(&self) -> String {
        let lines = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().map(|line| format!("\n  {}: {line}", self.role.name())).collect()
    }

    /// Waits for its end; how it ended, if it did within `bound`.
    fn wait(&mut self, bound: Duration) -> Option<String> {
        const LOOK_AGAIN: Duration = Duration::from_millis(5);
        for _ in 0..=bound.as_millis() / LOOK_AGAIN.as_millis() {
            match self.process.try_wait() {
                Ok(Some(status)) => return Some(status.to_string()),
                Ok(None) => std::thread::sleep(LOOK_AGAIN),
                Err(error) => return Some(error.to_string()),
            }
        }
        None
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.orders = None;
        if self.wait(FAREWELL).is_none() {
            let _ = self.process.kill();
            let _ = self.process.wait();
        }
    }
}

/// Each line of `from`, until it ends.
fn lines(from: impl std::io::Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    receiver
}

/// The last lines of `from`.
fn keep_last(from: impl std::io::Read + Send + 'static) -> Arc<Mutex<VecDeque<String>>> {
    let kept = Arc::new(Mutex::new(VecDeque::new()));
    let theirs = Arc::clone(&kept);
    std::thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            let mut kept = theirs.lock().unwrap_or_else(PoisonError::into_inner);
            kept.push_back(line);
            if kept.len() > KEPT_LINES {
                kept.pop_front();
            }
        }
    });
    kept
}
