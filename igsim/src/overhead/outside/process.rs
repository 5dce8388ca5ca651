//! A process that is not ours: started in a group of its own, asked whether it is ready, ended with everything that it started.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use http::Uri;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use shared::clock::RunClock;
use shared::time::Dur;

use super::tree::Tree;

/// How long a process may take to end when it is asked to.
const FAREWELL: Dur = Dur::from_secs(5);
/// Between two looks at something that is waited for.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// The longest wait for one answer to whether a system is ready.
const GLANCE: Duration = Duration::from_secs(2);
/// The longest such answer that is read.
const MAX_ANSWER: u64 = 1 << 20;
/// What of a log is shown when something goes wrong.
const TAIL_LINES: usize = 20;
const TAIL_BYTES: u64 = 4_000;

/// A program with its arguments and environment, placeholders filled in, and where its output goes.
#[derive(Clone, Debug)]
pub(super) struct Program {
    pub(super) arguments: Vec<String>,
    pub(super) environment: BTreeMap<String, String>,
    pub(super) log: PathBuf,
}

impl Program {
    /// Starts it on the CPUs of the calling thread.
    pub(super) fn start(&self) -> io::Result<Process> {
        let (program, arguments) =
            self.arguments.split_first().ok_or_else(|| io::Error::other("there is no command"))?;
        let log = File::options().create(true).append(true).open(&self.log)?;
        let mut command = Command::new(program);
        // A group of its own: Ctrl-C is for the lab, and the group is ended as one.
        command.args(arguments).process_group(0).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        // What is traced is the file's to say, not the shell's that the lab was started from.
        std::env::vars_os().filter(|(k, _)| k.to_string_lossy().starts_with("OTEL_")).for_each(|(k, _)| {
            command.env_remove(k);
        });
        let child = command.envs(&self.environment).spawn()?;
        Ok(Process { child, released: false })
    }

    /// The command in words.
    pub(super) fn words(&self) -> String {
        self.arguments.join(" ")
    }
}

/// A running process. Dropping it ends it and everything that it started.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    /// Whether what it started is left running.
    released: bool,
}

impl Process {
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it did.
    pub(super) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Lets what it started live on: a switch may restart a system, and that is to stay.
    pub(super) fn release(mut self) {
        self.released = true;
    }

    /// Waits for its end; how it ended, if it did within `bound`.
    pub(super) fn wait(&mut self, clock: RunClock, bound: Dur) -> Option<ExitStatus> {
        let began = clock.now();
        loop {
            match self.ended() {
                None if clock.now().since(began) < bound => std::thread::sleep(LOOK_AGAIN),
                ended => return ended,
            }
        }
    }

    fn signal_group(&self, signal: Signal) {
        if let Some(pid) = i32::try_from(self.pid()).ok().and_then(Pid::from_raw) {
            // Nobody left to signal is what is wanted.
            let _ = kill_process_group(pid, signal);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.released {
            return;
        }
        // Those that left the group are found as long as their parents live.
        let tree = Tree::read(Path::new("/proc"), &[self.pid()]).unwrap_or_default();
        self.signal_group(Signal::TERM);
        self.wait(RunClock::start(), FAREWELL);
        self.signal_group(Signal::KILL);
        let own = self.pid();
        for pid in tree.pids().filter(|pid| *pid != own && still_in(*pid, &tree)) {
            if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        let _ = self.child.wait();
    }
}

/// Whether a process of `tree` lives on: an id that was given to another process is not to be killed.
fn still_in(pid: u32, tree: &Tree) -> bool {
    tree.began(pid).is_some_and(|began| Tree::began_now(Path::new("/proc"), pid) == Some(began))
}

/// The last lines of a log, each set in.
pub(super) fn tail(log: &Path) -> String {
    let text = File::open(log).and_then(|file| last_bytes(file, TAIL_BYTES)).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let last = &lines[lines.len().saturating_sub(TAIL_LINES)..];
    last.iter().map(|line| format!("\n  {line}")).collect()
}

/// The end of a file, which may be large.
fn last_bytes(mut file: File, most: u64) -> io::Result<String> {
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(most)))?;
    let mut bytes = Vec::new();
    file.take(most).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Two ports that nobody listens on. Somebody may before they are used: then their process says so.
pub(super) fn free_ports() -> io::Result<[u16; 2]> {
    let listen = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
    let (one, two) = (listen()?, listen()?);
    Ok([one.local_addr()?.port(), two.local_addr()?.port()])
}

/// Whether `base` answers 2xx on `path`, with `contains` in the answer.
pub(super) fn is_ready(base: &Uri, path: &str, contains: Option<&str>) -> bool {
    let host = base.host().unwrap_or_default();
    let answer = get(host, base.port_u16().unwrap_or(80), path).unwrap_or_default();
    let success = answer.strip_prefix("HTTP/1.").and_then(|rest| rest.get(2..3)) == Some("2");
    success && contains.is_none_or(|text| answer.contains(text))
}

/// A GET on a connection of its own: the whole answer as it came.
fn get(host: &str, port: u16, path: &str) -> io::Result<String> {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let address = (bare, port).to_socket_addrs()?.next().ok_or_else(|| io::Error::other("the host has no address"))?;
    let mut stream = TcpStream::connect_timeout(&address, GLANCE)?;
    stream.set_read_timeout(Some(GLANCE))?;
    stream.set_write_timeout(Some(GLANCE))?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: {host}:{port}\r\nconnection: close\r\n\r\n")?;
    let mut bytes = Vec::new();
    // What came before a timeout may be all there is: not everybody closes when asked to.
    let _ = stream.take(MAX_ANSWER).read_to_end(&mut bytes);
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Waits until `ready`; false if it is not within `bound`, or something else ends the wait.
pub(super) fn poll(clock: RunClock, bound: Dur, mut ready: impl FnMut() -> Option<bool>) -> bool {
    let began = clock.now();
    loop {
        match ready() {
            Some(done) => return done,
            None if clock.now().since(began) >= bound => return false,
            None => std::thread::sleep(LOOK_AGAIN),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, dir: &Path) -> Program {
        let arguments = ["sh", "-c", script].map(str::to_owned).to_vec();
        Program { arguments, environment: BTreeMap::new(), log: dir.join("log") }
    }

    #[test]
    fn a_process_ends_with_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let process = shell("sleep 600 & echo $!; exec 2>&-; wait", dir.path()).start().unwrap();
        let log = dir.path().join("log");
        let child = || std::fs::read_to_string(&log).ok().filter(|t| t.ends_with('\n'));
        assert!(poll(RunClock::start(), Dur::from_secs(20), || child().map(|_| true)));
        let child = Path::new("/proc").join(child().unwrap().trim());
        assert!(child.exists());
        drop(process);
        // A killed process stays in the list until its new parent has looked.
        let gone = || {
            let status = std::fs::read_to_string(child.join("status")).unwrap_or_default();
            (status.is_empty() || status.contains("State:\tZ")).then_some(true)
        };
        assert!(poll(RunClock::start(), Dur::from_secs(20), gone));
    }

    #[test]
    fn what_it_said_last_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let mut process = shell("for i in $(seq 1 50); do echo line $i; done; exit 3", dir.path()).start().unwrap();
        let status = process.wait(RunClock::start(), Dur::from_secs(20)).unwrap();
        assert_eq!(status.code(), Some(3));
        let tail = tail(&dir.path().join("log"));
        assert!(tail.starts_with("\n  line 31\n") && tail.ends_with("\n  line 50"), "{tail}");
        let missing = Program { arguments: vec!["/nowhere/x".into()], ..shell("", dir.path()) };
        assert!(missing.start().is_err());
    }

    #[test]
    fn nobody_is_ready_where_nobody_listens() {
        let [port, _] = free_ports().unwrap();
        let base: Uri = format!("http://127.0.0.1:{port}").parse().unwrap();
        assert!(!is_ready(&base, "/", None));
    }
}
