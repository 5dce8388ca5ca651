//! The engine as a process that is told to stop: what waits to be written is written, and log lines are what they were asked to be.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use shared::trace::otlp_json;

#[test]
fn spans_are_written_before_the_engine_stops() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("traces.jsonl");
    let mut command = Command::new(env!("CARGO_BIN_EXE_engine-sim"));
    command
        .args(["--profile", "instant", "--port", "0", "--log-format", "json", "--access-log", "--trace-file"])
        .arg(&file);
    command.env_clear().env("OTEL_TRACES_SAMPLER", "always_on").env("RUST_LOG", "info");
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts");
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let addr = line.trim().rsplit("http://").next().unwrap();
    let body = r#"{"prompt":"canary-in-the-coal-mine","max_tokens":2}"#;
    let mut stream = TcpStream::connect(addr).unwrap();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    let output = child.wait_with_output().unwrap();
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{told}");
    let spans = otlp_json::read_file(&file).expect("the trace file").spans;
    let root = spans.iter().find(|s| s.name == "vllm.engine.request").unwrap_or_else(|| panic!("{spans:#?}"));
    // What it tells people who started it is no log line.
    let (log, people): (Vec<_>, Vec<_>) = told.lines().partition(|l| l.starts_with('{'));
    let log: Vec<serde_json::Value> = log.into_iter().map(|l| serde_json::from_str(l).expect(l)).collect();
    let access: Vec<_> = log.iter().filter(|l| l["target"] == "access").collect();
    let ids: Vec<_> = access.iter().map(|l| (l["trace_id"].as_str(), l["span_id"].as_str())).collect();
    assert_eq!(ids, [(Some(root.trace_id.to_string().as_str()), Some(root.span_id.to_string().as_str()))]);
    assert_eq!(access[0]["request_id"].as_str(), root.get("gen_ai.request.id").and_then(|v| v.as_str()));
    assert!(people.iter().all(|l| l.starts_with("stopping")), "{told}");
    assert!(!told.contains("canary"), "content is written down: {told}");
}
