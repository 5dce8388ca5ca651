//! Thousands of streams open at once on one engine, which runs as a process of its own: all of them finish, and what they need of
//! memory is bounded.
//!
//! The engine hangs while the streams are opened, so that all of them are open at the same time, and is let go then. The large test
//! needs some 10,000 open files in both processes:
//! `cargo test --release -p engine-sim --test many_streams -- --ignored --nocapture`

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use shared::clock::RunClock;
use shared::open_files::OpenFiles;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

const TOKENS: usize = 16;
/// Connections that are being made at a time: the kernel's queue of those not yet accepted is short.
const CONNECTING: usize = 128;

/// An engine of a process of its own, with its control address.
struct Process {
    child: Child,
    engine: SocketAddr,
    control: SocketAddr,
}

impl Process {
    fn start() -> Process {
        let mut child = Command::new(env!("CARGO_BIN_EXE_engine-sim"))
            .args([
                "--port",
                "0",
                "--control",
                "127.0.0.1:0",
                "--fault",
                "{kind: hang}",
                "--enable-server-load-tracking",
            ])
            .env("OTEL_TRACES_SAMPLER", "always_off")
            .stdout(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let mut lines = BufReader::new(child.stdout.take().expect("it is piped")).lines();
        let mut address = || {
            let line = lines.next().expect("it says where it listens").expect("text");
            let (_, rest) = line.split_once("http://").expect("an address");
            rest.split('/').next().unwrap_or_default().parse().expect("an address")
        };
        let (control, engine) = (address(), address());
        Process { child, engine, control }
    }

    /// Resident memory of the process now, and its largest, in KiB.
    fn memory(&self) -> (u64, u64) {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("the process lives");
        let of = |name: &str| {
            let line = status.lines().find_map(|l| l.strip_prefix(name)).expect("a figure");
            line.trim().trim_end_matches(" kB").trim().parse().expect("a number")
        };
        (of("VmRSS:"), of("VmHWM:"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A request over a connection of its own, and everything that is answered.
async fn exchange(address: SocketAddr, request: String) -> String {
    let mut stream = TcpStream::connect(address).await.expect("a connection");
    stream.write_all(request.as_bytes()).await.expect("a request");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.expect("an answer");
    String::from_utf8(answer).expect("text")
}

fn get(method: &str, path: &str) -> String {
    format!("{method} {path} HTTP/1.1\r\nhost: e\r\nconnection: close\r\n\r\n")
}

fn stream_request(i: usize) -> String {
    let body = format!(r#"{{"prompt":"request number {i}","max_tokens":{TOKENS},"ignore_eos":true,"stream":true}}"#);
    format!(
        "POST /v1/completions HTTP/1.1\r\nhost: e\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    )
}

async fn load(process: &Process) -> usize {
    let answer = exchange(process.engine, get("GET", "/load")).await;
    let (_, load) = answer.split_once("\"server_load\":").expect("a load");
    load.trim_end_matches(|c: char| !c.is_ascii_digit()).parse().expect("a number")
}

/// Opens `streams` streams at once and reads all of them to their end.
async fn check(streams: usize, most_kib_per_stream: u64) {
    let files = OpenFiles::raise();
    if let Some(missing) = files.missing(streams as u64 + 64) {
        panic!("{missing}");
    }
    let process = Process::start();
    let clock = RunClock::start();
    let (before, _) = process.memory();
    let connecting = Arc::new(Semaphore::new(CONNECTING));
    let mut answers = JoinSet::new();
    for i in 0..streams {
        let (engine, connecting) = (process.engine, Arc::clone(&connecting));
        answers.spawn(async move {
            let permit = connecting.acquire_owned().await.expect("it is never closed");
            let mut stream = TcpStream::connect(engine).await.expect("a connection");
            stream.write_all(stream_request(i).as_bytes()).await.expect("a request");
            // The head says that the engine has the request.
            let mut text = Vec::new();
            stream.read_buf(&mut text).await.expect("the head of an answer");
            drop(permit);
            stream.read_to_end(&mut text).await.expect("the answer");
            String::from_utf8(text).expect("text")
        });
    }
    let open = tokio::time::timeout(Duration::from_secs(120), async {
        while load(&process).await < streams {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    open.await.expect("all streams are open at once");
    let (opened, (waiting, _)) = (clock.now(), process.memory());
    exchange(process.control, get("DELETE", "/faults")).await;
    let mut whole = 0;
    let all = tokio::time::timeout(Duration::from_secs(240), async {
        while let Some(answer) = answers.join_next().await {
            let text = answer.expect("no panic");
            assert!(text.starts_with("HTTP/1.1 200") && text.contains("data: [DONE]"), "{text}");
            assert!(text.contains("\"finish_reason\":\"length\""), "{text}");
            whole += 1;
        }
    });
    all.await.expect("every stream ends");
    assert_eq!(whole, streams);
    let (ended, (_, most)) = (clock.now(), process.memory());
    let per_stream = |kib: u64| kib.saturating_sub(before) as f64 / streams as f64;
    println!(
        "{streams} streams open at once after {}, all ended after {} more; the engine's process has {:.1} MiB before, {:.1} KiB a \
         stream while all wait, {:.1} KiB at its largest",
        opened - shared::time::Time::ZERO,
        ended - opened,
        before as f64 / 1024.0,
        per_stream(waiting),
        per_stream(most),
    );
    assert!(most - before <= most_kib_per_stream * streams as u64, "{:.1} KiB a stream", per_stream(most));
}

/// Buffers of a connection and of its request; an unoptimised program and a small number of streams are dearer.
#[tokio::test]
async fn a_thousand_streams_at_once() {
    check(1_000, 96).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs 10,000 open files and some time; run it with --release"]
async fn ten_thousand_streams_at_once() {
    check(10_000, 64).await;
}
