//! Traces out of a Tempo: those that a TraceQL query finds, each read whole by its id.

use shared::trace::{TraceSet, otlp_json};

use crate::tempo::{Tempo, TempoError, Window, now};

/// How far back is looked without a start, in seconds: as Tempo itself does.
const LOOK_BACK: u64 = 15 * 60;

/// What to look for.
#[derive(Clone, Debug)]
pub struct Query {
    /// In TraceQL.
    pub traceql: String,
    /// From when, in seconds since the Unix epoch; the last minutes before the end without it.
    pub start: Option<u64>,
    /// Until when; now without it.
    pub end: Option<u64>,
    /// Traces at most.
    pub limit: u32,
}

/// Traces, and the ids of those that were found and are not there.
#[derive(Debug)]
pub struct Fetched {
    /// The traces.
    pub set: TraceSet,
    /// What the search names and nobody has.
    pub missing: Vec<String>,
}

/// Asks the Tempo at `url`; `headers` as [`Tempo::new`] takes them.
///
/// # Errors
/// If it cannot be reached, or does not answer as Tempo does.
pub fn fetch(url: &str, headers: &str, query: &Query) -> Result<Fetched, TempoError> {
    let tempo = Tempo::new(url, headers)?;
    let end = query.end.unwrap_or_else(|| now() + 1);
    let window = Window { start: query.start.unwrap_or_else(|| end.saturating_sub(LOOK_BACK)), end };
    let (mut documents, mut missing) = (String::new(), Vec::new());
    for found in tempo.search(&query.traceql, window, query.limit as usize)? {
        match tempo.document(found.trace_id)? {
            Some(document) => {
                documents.push_str(&document);
                documents.push('\n');
            }
            None => missing.push(found.trace_id.to_string()),
        }
    }
    let unread = |e: otlp_json::ReadError| TempoError::Content { url: url.to_owned(), problem: e.to_string() };
    Ok(Fetched { set: otlp_json::read_str(&documents, url).map_err(unread)?, missing })
}
