//! The load thread: sends what is due, reads what arrives, on sockets that never block.
//!
//! One `ppoll` waits for both with nanosecond timeouts. Requests come written and leave as samples; what they say is not known
//! here.

use std::io::{ErrorKind, Read, Write};
use std::iter::Peekable;
use std::net::{SocketAddr, TcpStream};
use std::num::NonZeroU64;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with};
use shared::clock::RunClock;
use shared::time::{Dur, Time};

use super::request::Prepared;
use super::wire::{Answer, Progress};
use super::{MAX_IN_FLIGHT, Sample};
use crate::report::Failure;

/// How often a waiting loop looks for timeouts and for the end.
const LOOK_EVERY: Dur = Dur::from_millis(100);
/// A connection idle for longer is asked whether it is still there before it is used.
const FRESH: Dur = Dur::from_millis(100);
/// From the start of the thread to the start of a block, so that the first request is not late.
const LEAD: Dur = Dur::from_millis(1);
const READ_BUFFER: usize = 1 << 16;

/// What makes a request due.
#[derive(Clone, Copy, Debug)]
pub(super) enum Pace {
    /// Its time.
    Open,
    /// Fewer than so many in flight.
    Closed(usize),
}

/// Connections that wait for a request.
#[derive(Debug, Default)]
pub(super) struct Connections {
    /// The one used last is used next: it is warm, and the others age until they are closed.
    idle: Vec<(TcpStream, Time)>,
}

/// A block that is being sent.
pub(super) struct Drive<'a> {
    clock: RunClock,
    address: SocketAddr,
    pace: Pace,
    timeout: Dur,
    spin: Dur,
    stop: &'a AtomicBool,
    connections: &'a mut Connections,
    flights: Vec<Flight>,
    looked: Time,
    buffer: Vec<u8>,
}

/// A request in flight.
struct Flight {
    stream: TcpStream,
    sample: Sample,
    answer: Answer,
    bytes: Vec<u8>,
    /// How much of `bytes` is on its way.
    written: usize,
    connecting: bool,
}

impl<'a> Drive<'a> {
    pub(super) fn new(
        clock: RunClock,
        address: SocketAddr,
        pace: Pace,
        timeout: Dur,
        spin: Dur,
        stop: &'a AtomicBool,
        connections: &'a mut Connections,
    ) -> Drive<'a> {
        let (flights, buffer) = (Vec::new(), vec![0; READ_BUFFER]);
        Drive { clock, address, pace, timeout, spin, stop, connections, flights, looked: Time::ZERO, buffer }
    }

    /// Sends every request and hands over a sample of each.
    pub(super) fn run(mut self, requests: impl Iterator<Item = Prepared>, sink: &mut dyn FnMut(Sample)) {
        // Without this the kernel adds 50 us to every wait; where it is refused, sends are that late and samples say so.
        let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1));
        let start = self.clock.now() + LEAD;
        let mut requests = requests.peekable();
        loop {
            self.send_due(start, &mut requests, sink);
            let done = requests.peek().is_none() && self.flights.is_empty();
            if done || self.stop.load(Ordering::Relaxed) {
                break;
            }
            let due = requests.peek().map(|next| start + next.sample.intended.since(Time::ZERO));
            let ready = self.wait(due);
            self.receive(&ready, sink);
            self.look(sink);
        }
        for flight in std::mem::take(&mut self.flights) {
            self.end(flight.sample, Err(Failure::Unfinished), sink);
        }
    }

    fn send_due(
        &mut self,
        start: Time,
        requests: &mut Peekable<impl Iterator<Item = Prepared>>,
        sink: &mut dyn FnMut(Sample),
    ) {
        while let Some(next) = requests.peek() {
            let (due, most) = match self.pace {
                Pace::Open => (start + next.sample.intended.since(Time::ZERO), MAX_IN_FLIGHT as usize),
                Pace::Closed(in_flight) => (self.clock.now(), in_flight),
            };
            if self.flights.len() >= most || self.clock.now() < due || self.stop.load(Ordering::Relaxed) {
                return;
            }
            let Some(Prepared { mut sample, bytes }) = requests.next() else { return };
            sample.intended = due;
            sample.sent = self.clock.now();
            self.send(sample, bytes, sink);
        }
    }

    fn send(&mut self, sample: Sample, bytes: Vec<u8>, sink: &mut dyn FnMut(Sample)) {
        let reused = self.connections.take(sample.sent);
        let connecting = reused.is_none();
        let stream = match reused.map_or_else(|| open(self.address), Ok) {
            Ok(stream) => stream,
            Err(_) => return self.end(sample, Err(Failure::Connect), sink),
        };
        let mut flight = Flight { stream, sample, answer: Answer::new(), bytes, written: 0, connecting };
        match if connecting { Ok(()) } else { flight.write() } {
            Ok(()) => self.flights.push(flight),
            Err(failure) => self.end(flight.sample, Err(failure), sink),
        }
    }

    /// Waits until something may be done: which flights may go on, by index.
    fn wait(&mut self, due: Option<Time>) -> Vec<usize> {
        let full = self.flights.len() >= MAX_IN_FLIGHT as usize;
        let due = match self.pace {
            Pace::Open if !full => due,
            Pace::Open | Pace::Closed(_) => None,
        };
        let left = due.map_or(LOOK_EVERY, |at| at.since(self.clock.now()));
        // The last part of the wait is not slept through: who polls without a timeout sees the time come.
        let nanos = (left - self.spin).as_nanos().min(LOOK_EVERY.as_nanos());
        let timeout = Timespec { tv_sec: 0, tv_nsec: nanos as _ };
        let mut polled: Vec<PollFd<'_>> = self.flights.iter().map(Flight::interest).collect();
        // An error is a signal that came: the loop looks again.
        let _ = poll(&mut polled, Some(&timeout));
        let ready = polled.iter().enumerate().filter(|(_, p)| !p.revents().is_empty()).map(|(i, _)| i);
        ready.collect()
    }

    /// Goes on with the flights of `ready`, which is sorted: from the last, so that the others keep their places.
    fn receive(&mut self, ready: &[usize], sink: &mut dyn FnMut(Sample)) {
        for &index in ready.iter().rev() {
            let flight = &mut self.flights[index];
            let progress = flight.proceed(&mut self.buffer, self.clock);
            match progress {
                Ok(Progress::More) => {}
                Ok(Progress::Done { reusable }) => {
                    let flight = self.flights.swap_remove(index);
                    let verdict = flight.answer.verdict();
                    if reusable && flight.written == flight.bytes.len() {
                        self.connections.idle.push((flight.stream, self.clock.now()));
                    }
                    self.end(flight.sample, verdict, sink);
                }
                Err(failure) => {
                    let flight = self.flights.swap_remove(index);
                    self.end(flight.sample, Err(failure), sink);
                }
            }
        }
    }

    /// Gives up on what took too long.
    fn look(&mut self, sink: &mut dyn FnMut(Sample)) {
        let now = self.clock.now();
        if now.since(self.looked) < LOOK_EVERY {
            return;
        }
        self.looked = now;
        let late = |flight: &mut Flight| now.since(flight.sample.sent) > self.timeout;
        for flight in self.flights.extract_if(.., late).collect::<Vec<_>>() {
            self.end(flight.sample, Err(Failure::Timeout), sink);
        }
    }

    fn end(&self, mut sample: Sample, outcome: Result<(), Failure>, sink: &mut dyn FnMut(Sample)) {
        // An answer that is complete ended when its last bytes had been read, everything else ends now.
        if outcome.is_err() {
            sample.last = self.clock.now();
        }
        sample.failure = outcome.err();
        sink(sample);
    }
}

impl Connections {
    /// A connection that is still open, as far as can be known.
    fn take(&mut self, now: Time) -> Option<TcpStream> {
        while let Some((mut stream, since)) = self.idle.pop() {
            let quiet = |stream: &mut TcpStream| matches!(stream.read(&mut [0]), Err(error) if error.kind() == ErrorKind::WouldBlock);
            if now.since(since) <= FRESH || quiet(&mut stream) {
                return Some(stream);
            }
        }
        None
    }
}

impl Flight {
    fn interest(&self) -> PollFd<'_> {
        let unsent = self.connecting || self.written < self.bytes.len();
        let flags = if unsent { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
        PollFd::from_borrowed_fd(self.stream.as_fd(), flags)
    }

    fn proceed(&mut self, buffer: &mut [u8], clock: RunClock) -> Result<Progress, Failure> {
        if std::mem::take(&mut self.connecting) && !matches!(self.stream.take_error(), Ok(None)) {
            return Err(Failure::Connect);
        }
        self.write()?;
        let read = match self.stream.read(buffer) {
            Ok(read) => read,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                return Ok(Progress::More);
            }
            Err(_) => return Err(Failure::Disconnected),
        };
        let now = clock.now();
        self.sample.last = now;
        if read == 0 {
            return self.answer.closed().map(|()| Progress::Done { reusable: false });
        }
        self.answer.push(&buffer[..read], now, &mut self.sample)
    }

    fn write(&mut self) -> Result<(), Failure> {
        while self.written < self.bytes.len() {
            match self.stream.write(&self.bytes[self.written..]) {
                Ok(0) => return Err(Failure::Disconnected),
                Ok(size) => self.written += size,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Err(Failure::Disconnected),
            }
        }
        Ok(())
    }
}

/// A connection that is being made.
fn open(address: SocketAddr) -> std::io::Result<TcpStream> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket: OwnedFd = socket_with(family, SocketType::STREAM, flags, None)?;
    match connect(&socket, &address) {
        Ok(()) | Err(Errno::INPROGRESS) => {}
        Err(error) => return Err(error.into()),
    }
    let stream = TcpStream::from(socket);
    // A small request must not wait for the acknowledgement of the one before.
    stream.set_nodelay(true)?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use std::net::{Shutdown, TcpListener};

    use super::*;

    #[test]
    fn a_connection_that_was_closed_meanwhile_is_not_used_again() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut connections = Connections::default();
        for _ in 0..2 {
            let stream = open(listener.local_addr().unwrap()).unwrap();
            listener.accept().unwrap();
            stream.shutdown(Shutdown::Both).unwrap();
            connections.idle.push((stream, Time::ZERO));
        }
        // Whoever was used just now is not asked.
        assert!(connections.take(Time::ZERO + FRESH).is_some());
        assert!(connections.take(Time::ZERO + Dur::from_secs(1)).is_none());
        assert_eq!(connections.idle.len(), 0);
    }
}
