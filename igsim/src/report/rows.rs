//! One row per request: what the client saw of it, in memory and in `requests.csv`.
//!
//! Rows carry sizes, times and ids, never content.

use std::fmt;
use std::io::Write;
use std::sync::Arc;

use shared::ids::TraceId;
use shared::time::{Dur, Time};

/// What became of one request.
#[derive(Clone, Debug)]
pub struct RequestRow {
    /// Number of the request in its plan, from 0.
    pub index: u64,
    /// Index of the tenant.
    pub tenant: u16,
    /// The session and the turn in it, both from 0.
    pub session: Option<(u64, u32)>,
    /// When the plan wanted it sent.
    pub intended: Time,
    /// When it was sent.
    pub sent: Time,
    /// When the first token arrived.
    pub first_token: Option<Time>,
    /// When the last byte arrived, or the failure was known.
    pub done: Option<Time>,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens of the answer.
    pub output_tokens: u32,
    /// Tokens of the prompt found in the engine's prefix cache, as the engine reports them.
    pub cached_tokens: u32,
    /// The engine that answered.
    pub endpoint: Option<Arc<str>>,
    /// How many engines were tried, as far as the client can know: 1 in a live run.
    pub attempts: u32,
    /// How it ended.
    pub outcome: Outcome,
    /// Why the gateway refused it, by llm-d's names (`x-llm-d-request-dropped-reason`).
    pub dropped: Option<Arc<str>>,
    /// Its trace.
    pub trace_id: Option<TraceId>,
    /// Whether the trace was sampled.
    pub sampled: bool,
    /// Latency that the gateway and the way to it added: the client's time to the first byte minus the engine's own.
    pub added: Option<Dur>,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Answered in full.
    Ok,
    /// Not answered, or not in full.
    Failed(Failure),
}

/// Why a request failed. The order is that of reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Failure {
    /// Answered with an HTTP status of 400 or more.
    Status(u16),
    /// No connection.
    Connect,
    /// No answer, or not all of it, in the time allowed.
    Timeout,
    /// The stream ended before the answer did.
    Disconnected,
    /// An answer that is not what the API promises.
    Protocol,
    /// The client went away, as the scenario wanted.
    Cancelled,
    /// Still open when the run ended.
    Unfinished,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Status(code) => write!(f, "http_{code}"),
            Failure::Connect => f.write_str("connect"),
            Failure::Timeout => f.write_str("timeout"),
            Failure::Disconnected => f.write_str("disconnected"),
            Failure::Protocol => f.write_str("protocol"),
            Failure::Cancelled => f.write_str("cancelled"),
            Failure::Unfinished => f.write_str("unfinished"),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::Ok => f.write_str("ok"),
            Outcome::Failed(failure) => failure.fmt(f),
        }
    }
}

impl RequestRow {
    /// Time from sending to the first token.
    pub fn ttft(&self) -> Option<Dur> {
        self.first_token.map(|t| t.since(self.sent))
    }
    /// Time from sending to the end of an answer.
    pub fn e2e(&self) -> Option<Dur> {
        self.done.filter(|_| self.outcome == Outcome::Ok).map(|t| t.since(self.sent))
    }
    /// Mean time per output token after the first.
    pub fn per_token(&self) -> Option<Dur> {
        let (first, done) = (self.first_token?, self.done.filter(|_| self.outcome == Outcome::Ok)?);
        let gaps = u64::from(self.output_tokens.checked_sub(1)?);
        (gaps > 0).then(|| Dur::from_nanos(done.since(first).as_nanos() / gaps))
    }
    /// How late it was sent.
    pub fn lateness(&self) -> Dur {
        self.sent.since(self.intended)
    }
}

/// Writes `requests.csv`: times in seconds since the start of the run with nine decimals, empty where there is no value.
pub struct RowWriter<W: Write>(csv::Writer<W>);

/// The columns of `requests.csv`.
const COLUMNS: [&str; 20] = [
    "index",
    "tenant",
    "session",
    "turn",
    "intended_s",
    "sent_s",
    "first_token_s",
    "done_s",
    "prompt_tokens",
    "output_tokens",
    "cached_tokens",
    "endpoint",
    "attempts",
    "outcome",
    "dropped",
    "trace_id",
    "sampled",
    "ttft_ms",
    "e2e_ms",
    "gateway_added_us",
];

impl<W: Write> RowWriter<W> {
    /// Writes the header.
    ///
    /// # Errors
    /// What the writer says.
    pub fn new(out: W) -> csv::Result<RowWriter<W>> {
        let mut writer = csv::Writer::from_writer(out);
        writer.write_record(COLUMNS)?;
        Ok(RowWriter(writer))
    }

    /// Writes one row.
    ///
    /// # Errors
    /// What the writer says.
    pub fn write(&mut self, row: &RequestRow) -> csv::Result<()> {
        let (session, turn) = row.session.map_or_else(Default::default, |(s, t)| (s.to_string(), t.to_string()));
        self.0.write_record([
            row.index.to_string(),
            row.tenant.to_string(),
            session,
            turn,
            seconds(row.intended),
            seconds(row.sent),
            row.first_token.map(seconds).unwrap_or_default(),
            row.done.map(seconds).unwrap_or_default(),
            row.prompt_tokens.to_string(),
            row.output_tokens.to_string(),
            row.cached_tokens.to_string(),
            row.endpoint.as_deref().unwrap_or_default().to_owned(),
            row.attempts.to_string(),
            row.outcome.to_string(),
            row.dropped.as_deref().unwrap_or_default().to_owned(),
            row.trace_id.map(|t| t.to_string()).unwrap_or_default(),
            row.sampled.to_string(),
            row.ttft().map(|d| fixed(d, 6)).unwrap_or_default(),
            row.e2e().map(|d| fixed(d, 6)).unwrap_or_default(),
            row.added.map(|d| fixed(d, 3)).unwrap_or_default(),
        ])
    }

    /// Writes everything out.
    ///
    /// # Errors
    /// What the writer says.
    pub fn finish(mut self) -> std::io::Result<()> {
        self.0.flush()
    }
}

fn seconds(t: Time) -> String {
    fixed(t.since(Time::ZERO), 9)
}

/// Nanoseconds with the decimal point `places` from the right: exact, whatever the size.
fn fixed(d: Dur, places: u32) -> String {
    let unit = 10u64.pow(places);
    format!("{}.{:0width$}", d.as_nanos() / unit, d.as_nanos() % unit, width = places as usize)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn row(index: u64) -> RequestRow {
        let sent = Time::from_nanos(1_000_000_000 + index * 10_000_000);
        RequestRow {
            index,
            tenant: 0,
            session: None,
            intended: sent - Dur::from_micros(50),
            sent,
            first_token: Some(sent + Dur::from_millis(40)),
            done: Some(sent + Dur::from_millis(40 + 8 * 31)),
            prompt_tokens: 500,
            output_tokens: 32,
            cached_tokens: 208,
            endpoint: Some(format!("engine-{}", index % 4).into()),
            attempts: 1,
            outcome: Outcome::Ok,
            dropped: None,
            trace_id: TraceId::new(u128::from(index) + 1),
            sampled: index.is_multiple_of(10),
            added: Some(Dur::from_micros(120)),
        }
    }

    #[test]
    fn rows_are_written_with_exact_times() {
        let mut out = Vec::new();
        let mut writer = RowWriter::new(&mut out).unwrap();
        writer.write(&row(0)).unwrap();
        let outcome = Outcome::Failed(Failure::Status(429));
        let dropped = Some("rejected-saturated".into());
        let refused =
            RequestRow { first_token: None, endpoint: None, outcome, dropped, session: Some((7, 2)), ..row(1) };
        writer.write(&refused).unwrap();
        writer.finish().unwrap();
        insta::assert_snapshot!(String::from_utf8(out).unwrap(), @r"
        index,tenant,session,turn,intended_s,sent_s,first_token_s,done_s,prompt_tokens,output_tokens,cached_tokens,endpoint,attempts,outcome,dropped,trace_id,sampled,ttft_ms,e2e_ms,gateway_added_us
        0,0,,,0.999950000,1.000000000,1.040000000,1.288000000,500,32,208,engine-0,1,ok,,00000000000000000000000000000001,true,40.000000,288.000000,120.000
        1,0,7,2,1.009950000,1.010000000,,1.298000000,500,32,208,,1,http_429,rejected-saturated,00000000000000000000000000000002,false,,,120.000
        ");
    }
}
