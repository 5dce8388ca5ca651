//! The sidecar as a program: whatever it is sent and whatever goes wrong, nothing of a request or an answer is in its log, its traces or
//! its metrics.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;

/// Planted in bodies, answers and headers.
const CANARIES: [&str; 6] =
    ["canary-prompt", "canary-answer", "canary-params", "canary-key", "canary-cookie", "canary-target"];

/// An engine that gives one answer to every request.
fn engine(status: &'static str, body: &'static str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            thread::spawn(move || {
                read_request(&mut stream);
                let head = format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\nconnection: close\r\n");
                let _ = write!(stream, "{head}content-length: {}\r\n\r\n{body}", body.len());
            });
        }
    });
    addr
}

/// Reads a request to the end of its body.
fn read_request(stream: &mut TcpStream) {
    let (mut all, mut piece) = (Vec::new(), [0; 4096]);
    while let Ok(n) = stream.read(&mut piece)
        && n > 0
    {
        all.extend_from_slice(&piece[..n]);
        let text = String::from_utf8_lossy(&all).to_lowercase();
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length = head.lines().find_map(|l| l.strip_prefix("content-length: ")).unwrap_or("0");
        if body.len() >= length.trim().parse().unwrap() {
            return;
        }
    }
}

/// A running sidecar.
struct Sidecar {
    program: Child,
    addr: SocketAddr,
    metrics: SocketAddr,
    log: Receiver<String>,
    told: Vec<String>,
    traces: tempfile::TempDir,
}

impl Sidecar {
    fn start(decode: SocketAddr) -> Sidecar {
        let traces = tempfile::tempdir().unwrap();
        let mut program = Command::new(env!("CARGO_BIN_EXE_pd-proxy"))
            .args(["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", "--allow", "127.0.0.1"])
            .args(["--log", "gateway=trace,shared=trace,pd_proxy=trace", "--sampling", "1"])
            .args(["--engine", &format!("http://{decode}"), "--set", "prefill_max_retries=1"])
            .args(["--set", "prefill_retry_backoff=1ms", "--trace-file"])
            .arg(traces.path().join("traces.otlp.jsonl"))
            .env_clear()
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let (sender, log) = channel();
        let lines = BufReader::new(program.stderr.take().unwrap()).lines();
        thread::spawn(move || lines.map_while(Result::ok).for_each(|line| _ = sender.send(line)));
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut sidecar = Sidecar { program, addr: any, metrics: any, log, told: Vec::new(), traces };
        sidecar.metrics = sidecar.address("metrics");
        sidecar.addr = sidecar.address("listening");
        sidecar
    }

    /// The address that the log names with this word.
    fn address(&mut self, word: &str) -> SocketAddr {
        loop {
            let line = self.log.recv().expect("the program tells where it listens");
            self.told.push(line.clone());
            if line.contains(word) {
                let (_, addr) = line.split_once("addr=").expect("an address");
                return addr.trim().parse().expect("an address");
            }
        }
    }

    /// Sends a request; the status of its answer.
    fn post(&self, prefiller: Option<&str>, body: &str) -> u16 {
        let named = prefiller.map(|p| format!("x-prefiller-host-port: {p}\r\n")).unwrap_or_default();
        let secrets = "authorization: Bearer canary-key\r\ncookie: session=canary-cookie\r\n";
        let head = format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{secrets}{named}");
        let answer = exchange(self.addr, &format!("{head}content-length: {}\r\n\r\n{body}", body.len()));
        answer.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or_else(|| panic!("no status: {answer}"))
    }

    /// Stops it; everything that it told.
    fn told(mut self) -> String {
        let page = exchange(self.metrics, "GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        assert!(page.contains("pd_proxy_requests_total{reason=\"prefill_header\"}"), "{page}");
        let stopped = Command::new("kill").args(["-TERM", &self.program.id().to_string()]).status().unwrap();
        assert!(stopped.success());
        assert!(self.program.wait().unwrap().success(), "an orderly end");
        self.told.extend(self.log.iter());
        let traces = std::fs::read_to_string(self.traces.path().join("traces.otlp.jsonl")).unwrap();
        assert!(traces.contains("pd_proxy.request"), "{traces}");
        format!("{}\n{traces}\n{page}", self.told.join("\n"))
    }
}

fn exchange(addr: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(addr).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn nothing_of_a_request_or_an_answer_is_told() {
    let decode = engine("200 OK", r#"{"choices":[{"text":"canary-answer"}]}"#);
    let prefills =
        r#"{"choices":[{"text":"canary-answer"}],"kv_transfer_params":{"remote_engine_id":"canary-params"}}"#;
    let prefill = engine("200 OK", prefills).to_string();
    let without = engine("200 OK", r#"{"choices":[{"text":"canary-answer"}]}"#).to_string();
    let failing =
        engine("500 Internal Server Error", r#"{"error":{"message":"canary-prompt canary-answer"}}"#).to_string();
    let odd = engine("200 OK", "canary-answer, which is no object").to_string();
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let sidecar = Sidecar::start(decode);
    let body = r#"{"model":"m","prompt":"canary-prompt","user":"canary-key","max_tokens":4}"#;
    for (prefiller, body, expect) in [
        (None, body, 200),
        (Some(&*prefill), body, 200),
        (Some(&without), body, 200),
        (Some(&failing), body, 500),
        (Some(&odd), body, 502),
        (Some(&nobody), body, 502),
        // Whom a caller wants asked is told, as far as it names an engine.
        (Some("elsewhere.example:1"), body, 403),
        (Some("canary-target"), body, 400),
        (Some(&prefill), "canary-prompt, which is no object", 400),
    ] {
        assert_eq!(sidecar.post(prefiller, body), expect, "{prefiller:?}");
    }
    let told = sidecar.told();
    assert!(told.contains("stopping") && told.contains("connection_failed"), "it tells what it does\n{told}");
    for canary in CANARIES {
        assert!(!told.contains(canary), "{canary} is told\n{told}");
    }
}
