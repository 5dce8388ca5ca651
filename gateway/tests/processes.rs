//! The programs as processes: what is open when they are told to stop is in the trace file, the last metrics are pushed, and with
//! `--log-format json` every line they write is one JSON object whose ids are those of the trace.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread::JoinHandle;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use shared::trace::{Span, otlp_json};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const GAUGES: &str = "vllm:num_requests_running 0\nvllm:num_requests_waiting 0\nvllm:kv_cache_usage_perc 0\n";
const MODELS: &str = r#"{"object":"list","data":[{"id":"m","object":"model"}]}"#;

/// A server that knows the paths of an engine and of a collector, and keeps every other request waiting for ever. Tells of each request.
fn server() -> (SocketAddr, mpsc::Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let (told, paths) = mpsc::channel();
    std::thread::spawn(move || {
        let mut kept = Vec::new();
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let mut first = String::new();
            let (mut line, mut length) = (String::new(), 0);
            while reader.read_line(&mut line).is_ok_and(|n| n > 2) {
                if first.is_empty() {
                    first = line.split(' ').nth(1).unwrap_or_default().to_owned();
                }
                if let Some(n) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                    length = n.trim().parse().unwrap();
                }
                line.clear();
            }
            reader.read_exact(&mut vec![0; length]).unwrap();
            let body = match first.as_str() {
                "/metrics" => Some(GAUGES),
                "/v1/models" => Some(MODELS),
                "/v1/metrics" => Some(""),
                _ => None,
            };
            if let Some(body) = body {
                let head = format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
                stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
            } else {
                kept.push(stream);
            }
            if told.send(first).is_err() {
                return;
            }
        }
    });
    (addr, paths)
}

/// A program that runs.
struct Running {
    child: Child,
    addr: SocketAddr,
    log: JoinHandle<Vec<Value>>,
}

/// Starts a program with JSON logs and reads where it listens.
fn start(program: &str, args: &[&str]) -> Running {
    let mut command = Command::new(program);
    command.args(["--listen", "127.0.0.1:0", "--sampling", "1"]).args(args);
    command.env_clear().env("IGSIM_LOG_FORMAT", "json").stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program starts");
    let lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut lines = lines.map(|line| {
        let line = line.unwrap();
        serde_json::from_str::<Value>(&line).unwrap_or_else(|e| panic!("{e}: {line}"))
    });
    let mut before = Vec::new();
    let addr = loop {
        let line = lines.next().unwrap_or_else(|| panic!("it ended: {before:?}"));
        before.push(line.clone());
        if line["message"] == "listening" {
            break line["addr"].as_str().unwrap().parse().unwrap();
        }
    };
    let log = std::thread::spawn(move || before.into_iter().chain(lines).collect());
    Running { child, addr, log }
}

impl Running {
    /// Sends a request, of which the connection is to be kept.
    fn post(&self, path: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.addr).unwrap();
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\
             x-request-id: req-1\r\ntraceparent: 00-{TRACE}-00f067aa0ba902b7-01\r\n\r\n",
            body.len()
        );
        stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
        stream
    }

    /// Tells it to stop; its log lines.
    fn stop(mut self) -> Vec<Value> {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
        assert!(self.child.wait().unwrap().success());
        self.log.join().unwrap()
    }
}

/// The spans of the caller's trace in a file.
fn spans(file: &Path) -> Vec<Span> {
    let all = otlp_json::read_file(file).expect("the trace file").spans;
    all.into_iter().filter(|s| s.trace_id.to_string() == TRACE).collect()
}

fn root<'a>(spans: &'a [Span], name: &str) -> &'a Span {
    spans.iter().find(|s| s.name == name).unwrap_or_else(|| panic!("no {name} in {spans:#?}"))
}

/// The line of the access log.
fn access(log: &[Value]) -> &Value {
    let lines: Vec<_> = log.iter().filter(|l| l["target"] == "access").collect();
    assert_eq!(lines.len(), 1, "{log:#?}");
    lines[0]
}

fn check_ids(line: &Value, root: &Span) {
    let ids = (root.trace_id.to_string(), root.span_id.to_string());
    assert_eq!((&line["trace_id"], &line["span_id"]), (&ids.0.into(), &ids.1.into()), "{line}");
    assert_eq!((&line["request_id"], &line["level"]), (&"req-1".into(), &"INFO".into()), "{line}");
}

const CHAT: &str = r#"{"model":"m","messages":[{"role":"user","content":"canary-in-the-coal-mine"}]}"#;

#[test]
fn the_gateway_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let (file, (engine, paths)) = (folder.path().join("traces.jsonl"), server());
    let (collector, pushed) = server();
    let (endpoint, metrics) = (format!("a=http://{engine}"), format!("http://{collector}"));
    let file_name = file.to_str().unwrap();
    let more = ["--set", "timeouts.drain=50ms", "--access-log", "--trace-file", file_name, "--otlp-metrics", &metrics];
    let gateway = start(env!("CARGO_BIN_EXE_gateway"), &[&["--endpoint", &endpoint][..], &more].concat());
    let _caller = gateway.post("/v1/chat/completions", CHAT);
    assert!(paths.iter().any(|path| path == "/v1/chat/completions"), "the engine has the request");
    let log = gateway.stop();
    let spans = spans(&file);
    let root = root(&spans, "gateway.request");
    assert_eq!(root.get("error.type").and_then(|v| v.as_str()), Some("abandoned"));
    check_ids(access(&log), root);
    assert_eq!(access(&log)["endpoint"], "a");
    assert_eq!(pushed.try_iter().collect::<Vec<_>>(), ["/v1/metrics"], "once, at the end");
    assert!(!format!("{log:?}").contains("canary"), "content in the log: {log:#?}");
}

#[test]
fn the_sidecar_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let (file, (engine, paths)) = (folder.path().join("traces.jsonl"), server());
    let engine = format!("http://{engine}");
    let args = ["--engine", &engine, "--allow", "x", "--set", "timeouts.drain=50ms", "--access-log", "--trace-file"];
    let proxy = start(env!("CARGO_BIN_EXE_pd-proxy"), &[&args[..], &[file.to_str().unwrap()]].concat());
    let _caller = proxy.post("/v1/chat/completions", CHAT);
    assert!(paths.iter().any(|path| path == "/v1/chat/completions"), "the engine has the request");
    let log = proxy.stop();
    let spans = spans(&file);
    let root = root(&spans, "pd_proxy.request");
    assert_eq!(root.get("error.type").and_then(|v| v.as_str()), Some("abandoned"));
    check_ids(access(&log), root);
    assert!(!format!("{log:?}").contains("canary"), "content in the log: {log:#?}");
}

/// Blocks are named by keys that stand for what they hold.
const ASKED: &str = r#"{"model":"m","block_keys":[1987654321,2],"prompt":"canary-in-the-coal-mine"}"#;

/// Its spans wait for their batch when it is told to stop.
#[test]
fn the_kv_cache_manager_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("traces.jsonl");
    let args = ["--endpoint", "a=http://127.0.0.1:1", "--access-log", "--trace-file", file.to_str().unwrap()];
    let manager = start(env!("CARGO_BIN_EXE_kv-cache-manager"), &args);
    let caller = manager.post("/v1/score", ASKED);
    let mut answer = String::new();
    BufReader::new(caller).read_line(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let log = manager.stop();
    let spans = spans(&file);
    let line = access(&log);
    check_ids(line, root(&spans, "kvcache.manager.get_scores"));
    assert_eq!((&line["route"], &line["status"], &line["model"]), (&"/v1/score".into(), &200.into(), &"m".into()));
    assert_eq!((&line["blocks"], &line["blocks_found"]), (&2.into(), &0.into()), "{line}");
    let told = format!("{log:?}");
    assert!(!told.contains("canary") && !told.contains("1987654321"), "content in the log: {log:#?}");
}
