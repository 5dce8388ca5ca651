//! The loader against a server of a few lines that can misbehave.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::AtomicU32;
use std::sync::mpsc;

use super::*;

/// What the server does with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manner {
    /// Streams a whole answer.
    Answer,
    /// Answers once so many requests are waiting, so that nobody is served unless the client has so many in flight.
    Together(u32),
    /// Answers 503.
    Refuse,
    /// Closes in the middle of the answer.
    BreakOff,
    /// Says nothing.
    Hang,
}

/// A server in threads of the test.
struct Server {
    uri: Uri,
    seen: mpsc::Receiver<String>,
    connections: Arc<AtomicU32>,
}

const HEAD: &str = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\
    traceresponse: 00-000000000000000000000000000000ff-00000000000000aa-00\r\n\r\n";
const EVENT: &str = "data: {\"choices\":[{\"delta\":{\"content\":\"abc \"}}]}\n\n";

fn chunk(text: &str) -> String {
    format!("{:x}\r\n{text}\r\n", text.len())
}

impl Server {
    fn start(manner: Manner) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("http://{}/v1/chat/completions", listener.local_addr().unwrap()).parse().unwrap();
        let (sender, seen) = mpsc::channel();
        let connections = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&connections);
        let waiting = Arc::new((Mutex::new(0), std::sync::Condvar::new()));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                counted.fetch_add(1, Ordering::SeqCst);
                let (sender, waiting) = (sender.clone(), Arc::clone(&waiting));
                // A client that goes away ends its thread.
                std::thread::spawn(move || serve(stream.unwrap(), manner, &sender, &waiting));
            }
        });
        Server { uri, seen, connections }
    }
}

fn serve(
    stream: TcpStream,
    manner: Manner,
    seen: &mpsc::Sender<String>,
    waiting: &(Mutex<u32>, std::sync::Condvar),
) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut stream = stream;
    loop {
        let (mut id, mut length) = (String::new(), 0);
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).ok()? == 0 {
                return None;
            }
            match line.trim_end().split_once(": ") {
                Some(("x-request-id", value)) => id = value.to_owned(),
                Some(("content-length", value)) => length = value.parse().unwrap(),
                Some(_) => {}
                None if line == "\r\n" => break,
                None => {}
            }
        }
        reader.read_exact(&mut vec![0; length]).ok()?;
        let _ = seen.send(id);
        match manner {
            Manner::Answer => {}
            Manner::Together(n) => {
                let mut count = waiting.0.lock().unwrap();
                *count += 1;
                // The `n` that came together leave together.
                let target = count.div_ceil(n) * n;
                waiting.1.notify_all();
                drop(waiting.1.wait_while(count, |count| *count < target).unwrap());
            }
            Manner::Refuse => {
                stream.write_all(b"HTTP/1.1 503 no\r\ncontent-length: 2\r\n\r\n{}").ok()?;
                continue;
            }
            Manner::BreakOff => {
                stream.write_all(format!("{HEAD}{}", chunk(EVENT)).as_bytes()).ok()?;
                return None;
            }
            Manner::Hang => {
                reader.read_line(&mut String::new()).ok()?;
                return None;
            }
        }
        let answer = format!("{HEAD}{}{}{}0\r\n\r\n", chunk(EVENT), chunk(EVENT), chunk("data: [DONE]\n\n"));
        stream.write_all(answer.as_bytes()).ok()?;
    }
}

const LENGTHS: Lengths = Lengths { prompt: 8, output: 2 };

fn spec(uri: &Uri, pattern: Pattern) -> LoadSpec {
    let (headers, timeout, spin) = (HeaderMap::new(), Dur::from_secs(20), Dur::ZERO);
    LoadSpec { uri: uri.clone(), api: Api::Chat, model: "m".into(), headers, pattern, timeout, spin, seed: Seed(1) }
}

fn loader(spec: LoadSpec) -> Loader {
    Loader::new(RunClock::start(), spec).unwrap()
}

fn run(loader: &Loader, block: u64) -> Vec<Sample> {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(loader.run(block)).unwrap()
}

fn closed(in_flight: u32, requests: u64) -> Pattern {
    Pattern::Closed { in_flight, requests, lengths: LENGTHS }
}

#[test]
fn every_request_is_answered_once_and_timed() {
    let server = Server::start(Manner::Answer);
    for pattern in [
        closed(3, 40),
        Pattern::FixedRate { per_second: 2_000.0, requests: 40, lengths: LENGTHS },
        Pattern::Poisson { per_second: 2_000.0, requests: 40, lengths: LENGTHS },
    ] {
        let samples = run(&loader(spec(&server.uri, pattern)), 5);
        let ids: BTreeSet<_> = samples.iter().map(|s| s.id.clone()).collect();
        let seen: BTreeSet<_> = (0..40).map(|_| server.seen.recv().unwrap()).collect();
        assert_eq!((ids.len(), &ids), (40, &seen));
        for s in &samples {
            assert!(s.ok() && !s.sampled && s.gaps.len() == 1, "{s:?}");
            let times = [Some(s.intended), Some(s.sent), s.first_byte, s.first_token, s.last_token, Some(s.last)];
            assert!(times.iter().all(Option::is_some) && times.is_sorted(), "{s:?}");
        }
    }
}

#[test]
fn intended_times_are_those_of_the_plan_however_late_the_answers() {
    let server = Server::start(Manner::Answer);
    let pattern = Pattern::FixedRate { per_second: 1_000.0, requests: 30, lengths: LENGTHS };
    for spin in [Dur::ZERO, Dur::from_micros(100)] {
        let samples = run(&loader(LoadSpec { spin, ..spec(&server.uri, pattern.clone()) }), 0);
        let mut intended: Vec<_> = samples.iter().map(|s| s.intended).collect();
        intended.sort();
        assert!(intended.windows(2).all(|w| w[1] - w[0] == Dur::from_millis(1)), "{intended:?}");
        assert!(samples.iter().all(|s| s.sent >= s.intended), "nothing is sent early");
    }
}

#[test]
fn a_closed_loop_keeps_its_number_in_flight() {
    // The server answers nobody before four wait: with fewer in flight this would never end, with more it would see more.
    let server = Server::start(Manner::Together(4));
    let loader = loader(spec(&server.uri, closed(4, 32)));
    let mut samples = run(&loader, 0);
    assert!(samples.iter().all(Sample::ok), "{samples:?}");
    samples.sort_by_key(|s| s.sent);
    for s in &samples {
        let open = samples.iter().filter(|o| o.sent <= s.sent && s.sent < o.last).count();
        assert!(open <= 4, "{open} in flight");
    }
    assert_eq!(server.connections.load(Ordering::SeqCst), 4);
    run(&loader, 1);
    assert_eq!(server.connections.load(Ordering::SeqCst), 4, "connections outlive a block");
}

#[test]
fn every_request_is_accounted_for_when_the_server_misbehaves() {
    let check = |manner: Manner, expect: Failure| {
        let server = Server::start(manner);
        let timeout = if manner == Manner::Hang { Dur::from_millis(1) } else { Dur::from_secs(20) };
        for pattern in [closed(2, 6), Pattern::FixedRate { per_second: 5_000.0, requests: 6, lengths: LENGTHS }] {
            let samples = run(&loader(LoadSpec { timeout, ..spec(&server.uri, pattern) }), 0);
            let ids: BTreeSet<_> = samples.iter().map(|s| &s.id).collect();
            assert_eq!(ids.len(), 6);
            for s in &samples {
                assert_eq!(s.failure, Some(expect), "{manner:?}");
                assert!(s.last >= s.sent && s.sent >= s.intended, "{s:?}");
            }
        }
    };
    check(Manner::Refuse, Failure::Status(503));
    check(Manner::BreakOff, Failure::Disconnected);
    check(Manner::Hang, Failure::Timeout);
}

#[test]
fn nobody_listening_is_a_failure_of_each_request() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri: Uri = format!("http://{}/", listener.local_addr().unwrap()).parse().unwrap();
    drop(listener);
    let samples = run(&loader(spec(&uri, closed(2, 5))), 0);
    assert_eq!(samples.iter().map(|s| s.failure).collect::<Vec<_>>(), [Some(Failure::Connect); 5]);
}

#[test]
fn a_stream_that_is_stopped_accounts_for_what_was_open() {
    let server = Server::start(Manner::Answer);
    let loader =
        loader(spec(&server.uri, Pattern::FixedRate { per_second: 1e4, requests: 1_000_000, lengths: LENGTHS }));
    let stop = AtomicBool::new(false);
    let mut samples = Vec::new();
    loader.stream(0, &stop, &mut |sample| {
        samples.push(sample);
        if samples.len() == 20 {
            stop.store(true, Ordering::Relaxed);
        }
    });
    assert!(samples.len() >= 20);
    assert!(samples.iter().all(|s| matches!(s.failure, None | Some(Failure::Unfinished))), "{samples:?}");
}

#[test]
fn loads_that_cannot_be_sent_are_refused() {
    let check = |uri: &str, pattern: Pattern, expect: &str| {
        let refused = Loader::new(RunClock::start(), spec(&uri.parse().unwrap(), pattern)).unwrap_err();
        assert_eq!(refused.to_string(), expect);
    };
    let fixed = |per_second, requests| Pattern::FixedRate { per_second, requests, lengths: LENGTHS };
    let here = "http://127.0.0.1:1/";
    check("https://a/", closed(1, 1), "cannot send load to https://a/: an http URL with a host is needed");
    check("/v1", closed(1, 1), "cannot send load to /v1: an http URL with a host is needed");
    check(here, closed(0, 1), "requests in flight: found 0, 1 to 512 are allowed");
    check(here, closed(513, 1), "requests in flight: found 513, 1 to 512 are allowed");
    check(here, closed(1, 0), "requests of a block: found 0, at least 1 is allowed");
    check(here, Pattern::Schedule(Arc::from([])), "requests of a block: found 0, at least 1 is allowed");
    check(here, fixed(0.0, 1), "requests per second: found 0, a number above 0 is allowed");
    check(here, fixed(f64::NAN, 1), "requests per second: found NaN, a number above 0 is allowed");
}

#[test]
fn a_scenario_gives_its_own_arrivals() {
    let yaml = "name: t\nrequests: 9\nengines: [{count: 1}]\nworkload:\n  arrivals: { process: poisson, rate: 10 }\n  \
                system_prompt: {tokens: 5}\n  prompt_tokens: 7\n  output_tokens: 4\n";
    let scenario = shared::config::load_str::<Scenario>("t", yaml, &[]).unwrap().config;
    let Pattern::Schedule(arrivals) = Pattern::of_scenario(&scenario, Seed(1), 6).unwrap() else { panic!() };
    assert_eq!(arrivals.len(), 6);
    assert!(arrivals.is_sorted_by_key(|a| a.offset) && arrivals[5].offset > Dur::ZERO);
    assert!(arrivals.iter().all(|a| a.prompt.len() == 2 && a.output_tokens == 4));
    assert_eq!(arrivals[0].prompt[0], arrivals[5].prompt[0], "the system prompt is shared");
}
