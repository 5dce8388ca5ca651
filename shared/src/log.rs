//! Diagnostics on standard error: text for people, or one JSON object a line for machines. What is logged never decides what is traced.
//!
//! A line of JSON has `time`, `level`, `target` and `message`, then the fields of the event; where a request is concerned these are
//! `trace_id`, `span_id` and `request_id` among others. No line holds content of a request.

use std::fmt;
use std::io::IsTerminal;
use std::str::FromStr;

use serde_json::Value;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// The environment variable that names the format where the command line does not.
pub const FORMAT_VARIABLE: &str = "IGSIM_LOG_FORMAT";

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people, with colours on a terminal unless `NO_COLOR` is set.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

impl FromStr for LogFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<LogFormat, String> {
        match text {
            "text" => Ok(LogFormat::Text),
            "json" => Ok(LogFormat::Json),
            _ => Err("expected text or json".to_owned()),
        }
    }
}

/// Starts logging to standard error. A second call changes nothing.
pub fn init(filter: EnvFilter, format: LogFormat) {
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let _ = match format {
        LogFormat::Text => {
            let colours = std::env::var_os("NO_COLOR").is_none() && std::io::stderr().is_terminal();
            lines.with_ansi(colours).try_init()
        }
        LogFormat::Json => lines.with_ansi(false).event_format(JsonLines).try_init(),
    };
}

/// Writes an event as a JSON object in a line of its own.
#[derive(Clone, Copy, Debug, Default)]
pub struct JsonLines;

impl<S, N> FormatEvent<S, N> for JsonLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut time = String::new();
        SystemTime.format_time(&mut Writer::new(&mut time))?;
        let mut fields = Fields::default();
        event.record(&mut fields);
        let (metadata, message) = (event.metadata(), fields.message.unwrap_or_default());
        let first = [
            ("time", time),
            ("level", metadata.level().to_string()),
            ("target", metadata.target().to_owned()),
            ("message", message),
        ];
        let first = first.into_iter().map(|(key, text)| (key.to_owned(), Value::from(text)));
        let mut separator = '{';
        for (key, value) in first.chain(fields.others) {
            write!(writer, "{separator}{}:{value}", Value::from(key))?;
            separator = ',';
        }
        writer.write_str("}\n")
    }
}

/// The fields of an event.
#[derive(Default)]
struct Fields {
    message: Option<String>,
    others: Vec<(String, Value)>,
}

impl Fields {
    fn put(&mut self, field: &Field, value: Value) {
        // A line has each of its own keys once.
        let name = match field.name() {
            own @ ("time" | "level" | "target") => format!("field.{own}"),
            name => name.to_owned(),
        };
        self.others.push((name, value));
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let text = format!("{value:?}");
        if field.name() == "message" {
            self.message = Some(text);
        } else {
            self.put(field, text.into());
        }
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.into());
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, value.into());
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn every_event_is_a_line_that_parses() {
        let kept = Kept::default();
        let writer = kept.clone();
        let lines = tracing_subscriber::fmt().event_format(JsonLines).with_writer(move || writer.clone()).finish();
        tracing::subscriber::with_default(lines, || {
            tracing::info!(target: "access", request_id = %"r-1", status = 200u64, late = true, "done \"so\"\nfar");
            tracing::warn!(error = ?"x\u{7}y", time = 1.5, absent = None::<u64>, "odd");
        });
        let text = String::from_utf8(kept.0.lock().unwrap().clone()).unwrap();
        let lines: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).expect(l)).collect();
        assert_eq!(lines.len(), 2);
        let first = &lines[0];
        assert_eq!((&first["level"], &first["target"]), (&"INFO".into(), &"access".into()));
        assert_eq!((&first["message"], &first["request_id"]), (&"done \"so\"\nfar".into(), &"r-1".into()));
        assert_eq!((&first["status"], &first["late"]), (&200.into(), &true.into()));
        assert!(first["time"].as_str().is_some_and(|t| t.contains('T')), "{first}");
        assert_eq!((&lines[1]["field.time"], &lines[1]["absent"]), (&1.5.into(), &Value::Null));
    }
}
