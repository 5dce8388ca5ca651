//! HTTP/1.1 answers read as they arrive: head, framing, server-sent events, as far as latencies need them.
//!
//! Sans-IO: bytes go in with the time at which they were read. Events are searched, not parsed: whoever measures microseconds
//! must not spend them on JSON. Nothing of what an answer says is kept.

use std::sync::LazyLock;

use memchr::memmem::Finder;
use shared::time::Time;

use super::Sample;
use crate::report::Failure;

/// The longest response head, and the longest line of a stream.
const MAX_LINE: usize = 1 << 16;
/// The most headers of a response.
const MAX_HEADERS: usize = 64;

/// What the bytes so far mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// The answer goes on.
    More,
    /// The answer is complete.
    Done {
        /// Whether the connection may carry another request.
        reusable: bool,
    },
}

/// An answer that is being read.
#[derive(Debug)]
pub(super) struct Answer {
    state: State,
    /// An incomplete head, or an incomplete line of the body.
    partial: Vec<u8>,
    status: u16,
    reusable: bool,
    /// Whether the stream said that it is complete.
    ended: bool,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Head,
    Length(u64),
    Chunked(Chunk),
    UntilClose,
}

/// Where in the chunked coding (RFC 9112, 7.1) the next byte stands.
#[derive(Clone, Copy, Debug)]
enum Chunk {
    /// In the size; whether a digit was seen.
    Size { size: u64, digits: bool },
    /// Behind the size, up to the end of the line.
    Extension { size: u64 },
    /// In the data.
    Data { left: u64 },
    /// Between the data and the end of its line.
    DataEnd,
    /// In the trailer; whether the line has anything in it.
    Trailer { empty: bool },
    /// Behind everything.
    End,
}

impl Answer {
    pub(super) fn new() -> Answer {
        Answer { state: State::Head, partial: Vec::new(), status: 0, reusable: true, ended: false }
    }

    /// Takes in bytes that were read at `now`.
    pub(super) fn push(&mut self, data: &[u8], now: Time, sample: &mut Sample) -> Result<Progress, Failure> {
        match self.state {
            State::Head if self.partial.is_empty() => self.head(data, now, sample),
            State::Head => {
                let mut all = std::mem::take(&mut self.partial);
                all.extend_from_slice(data);
                self.head(&all, now, sample)
            }
            State::Length(_) | State::Chunked(_) | State::UntilClose => self.body(data, now, sample),
        }
    }

    /// The peer closed the connection.
    pub(super) fn closed(&self) -> Result<(), Failure> {
        match self.state {
            State::UntilClose => self.verdict(),
            State::Head | State::Length(_) | State::Chunked(_) => Err(Failure::Disconnected),
        }
    }

    /// Whether the answer, now complete, is what was asked for.
    pub(super) fn verdict(&self) -> Result<(), Failure> {
        match (self.status, self.ended) {
            (200..=299, true) => Ok(()),
            (200..=299, false) => Err(Failure::Disconnected),
            (status, _) => Err(Failure::Status(status)),
        }
    }

    fn head(&mut self, data: &[u8], now: Time, sample: &mut Sample) -> Result<Progress, Failure> {
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut response = httparse::Response::new(&mut headers);
        let length = match response.parse(data) {
            Ok(httparse::Status::Complete(length)) => length,
            Ok(httparse::Status::Partial) if data.len() < MAX_LINE => {
                self.partial = data.to_vec();
                return Ok(Progress::More);
            }
            Ok(httparse::Status::Partial) | Err(_) => return Err(Failure::Protocol),
        };
        self.status = response.code.unwrap_or_default();
        self.reusable = response.version == Some(1);
        let mut framing = State::UntilClose;
        for header in response.headers.iter() {
            let text = || std::str::from_utf8(header.value).unwrap_or_default().trim();
            if header.name.eq_ignore_ascii_case("transfer-encoding") {
                framing = State::Chunked(Chunk::Size { size: 0, digits: false });
            } else if header.name.eq_ignore_ascii_case("content-length") && !matches!(framing, State::Chunked(_)) {
                framing = State::Length(text().parse().map_err(|_| Failure::Protocol)?);
            } else if header.name.eq_ignore_ascii_case("connection") {
                self.reusable = !text().eq_ignore_ascii_case("close");
            } else if header.name.eq_ignore_ascii_case("traceresponse") {
                sample.sampled = crate::client::parse_traceresponse(text()).is_some_and(|(_, sampled)| sampled);
            }
        }
        self.state = framing;
        self.body(&data[length..], now, sample)
    }

    fn body(&mut self, data: &[u8], now: Time, sample: &mut Sample) -> Result<Progress, Failure> {
        if !data.is_empty() {
            sample.first_byte.get_or_insert(now);
        }
        match self.state {
            State::Head => unreachable!("the head has been read"),
            State::UntilClose => {
                self.text(data, now, sample)?;
                Ok(Progress::More)
            }
            State::Length(left) => {
                let size = usize::try_from(left).unwrap_or(usize::MAX).min(data.len());
                self.text(&data[..size], now, sample)?;
                let left = left - size as u64;
                self.state = State::Length(left);
                Ok(if left == 0 { self.done(data.len() == size) } else { Progress::More })
            }
            State::Chunked(chunk) => self.chunked(chunk, data, now, sample),
        }
    }

    /// Bytes behind the end of an answer belong to nothing that was asked for.
    fn done(&self, clean: bool) -> Progress {
        Progress::Done { reusable: self.reusable && clean }
    }

    fn chunked(
        &mut self,
        mut chunk: Chunk,
        mut data: &[u8],
        now: Time,
        sample: &mut Sample,
    ) -> Result<Progress, Failure> {
        while let Some((&byte, rest)) = data.split_first() {
            if let Chunk::Data { left } = chunk {
                let size = usize::try_from(left).unwrap_or(usize::MAX).min(data.len());
                self.text(&data[..size], now, sample)?;
                data = &data[size..];
                let left = left - size as u64;
                chunk = if left == 0 { Chunk::DataEnd } else { Chunk::Data { left } };
                continue;
            }
            data = rest;
            chunk = chunk.next(byte)?;
            if let Chunk::End = chunk {
                return Ok(self.done(data.is_empty()));
            }
        }
        self.state = State::Chunked(chunk);
        Ok(Progress::More)
    }

    /// Cuts the body into lines. An error's body is read to its end and looked at no further.
    fn text(&mut self, mut data: &[u8], now: Time, sample: &mut Sample) -> Result<(), Failure> {
        if !(200..=299).contains(&self.status) {
            return Ok(());
        }
        while let Some(end) = memchr::memchr(b'\n', data) {
            let (line, rest) = data.split_at(end);
            if self.partial.is_empty() {
                self.line(line, now, sample);
            } else {
                let mut whole = std::mem::take(&mut self.partial);
                whole.extend_from_slice(line);
                self.line(&whole, now, sample);
            }
            data = &rest[1..];
        }
        self.partial.extend_from_slice(data);
        if self.partial.len() > MAX_LINE { Err(Failure::Protocol) } else { Ok(()) }
    }

    fn line(&mut self, line: &[u8], now: Time, sample: &mut Sample) {
        let Some(event) = line.strip_prefix(b"data:").map(<[u8]>::trim_ascii) else { return };
        if event == b"[DONE]" {
            self.ended = true;
        } else if says_something(event) {
            sample.token(now);
        } else if let Some(tokens) = completion_tokens(event) {
            sample.output_tokens = Some(tokens);
        }
    }
}

impl Chunk {
    /// The place behind `byte`; not for data.
    fn next(self, byte: u8) -> Result<Chunk, Failure> {
        Ok(match (self, byte) {
            (Chunk::Size { digits: true, size } | Chunk::Extension { size }, b'\n') => match size {
                0 => Chunk::Trailer { empty: true },
                left => Chunk::Data { left },
            },
            (Chunk::Size { digits: true, size }, b';' | b'\r' | b' ') => Chunk::Extension { size },
            (Chunk::Size { size, .. }, digit) => {
                let digit = char::from(digit).to_digit(16).ok_or(Failure::Protocol)?;
                let size = size.checked_mul(16).ok_or(Failure::Protocol)? + u64::from(digit);
                Chunk::Size { size, digits: true }
            }
            (Chunk::Extension { size }, _) => Chunk::Extension { size },
            (Chunk::DataEnd, b'\r') => Chunk::DataEnd,
            (Chunk::DataEnd, b'\n') => Chunk::Size { size: 0, digits: false },
            (Chunk::DataEnd, _) => return Err(Failure::Protocol),
            (Chunk::Trailer { empty: true }, b'\n') => Chunk::End,
            (Chunk::Trailer { empty }, b'\r') => Chunk::Trailer { empty },
            (Chunk::Trailer { empty: false }, b'\n') => Chunk::Trailer { empty: true },
            (Chunk::Trailer { .. }, _) => Chunk::Trailer { empty: false },
            (Chunk::Data { .. } | Chunk::End, _) => unreachable!("data is taken whole, and nothing follows the end"),
        })
    }
}

/// Whether an event carries text: `"content":"x` or `"text":"x`, with spaces where JSON allows them.
fn says_something(event: &[u8]) -> bool {
    static CONTENT: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\"content\""));
    static TEXT: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\"text\""));
    let text_behind = |finder: &Finder<'_>| {
        let value = value_behind(event, finder)?;
        let text = value.strip_prefix(b"\"")?;
        Some(text.first().is_some_and(|b| *b != b'"'))
    };
    text_behind(&CONTENT).or_else(|| text_behind(&TEXT)).unwrap_or(false)
}

/// The count of output tokens in an event that tells the usage.
fn completion_tokens(event: &[u8]) -> Option<u32> {
    static TOKENS: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\"completion_tokens\""));
    let value = value_behind(event, &TOKENS)?;
    let digits = value.iter().take_while(|b| b.is_ascii_digit()).count();
    std::str::from_utf8(&value[..digits]).ok()?.parse().ok()
}

/// What stands behind a key and its colon.
fn value_behind<'a>(event: &'a [u8], key: &Finder<'_>) -> Option<&'a [u8]> {
    let behind = &event[key.find(event)? + key.needle().len()..];
    behind.trim_ascii_start().strip_prefix(b":").map(<[u8]>::trim_ascii_start)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads `raw` in pieces of `size`, each a nanosecond later.
    fn read(raw: &[u8], size: usize) -> (Sample, Result<Progress, Failure>, Result<(), Failure>) {
        let (mut answer, mut sample) = (Answer::new(), Sample::default());
        let mut progress = Ok(Progress::More);
        for (at, part) in (0..).zip(raw.chunks(size)) {
            progress = answer.push(part, Time::from_nanos(at), &mut sample);
            if progress != Ok(Progress::More) {
                break;
            }
        }
        let verdict = if progress == Ok(Progress::More) { answer.closed() } else { answer.verdict() };
        (sample, progress, verdict)
    }

    const EVENTS: &str = "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n\
        data: {\"choices\":[{\"delta\":{\"content\":\"abc \"}}]}\n\n\
        : a comment\r\n\
        data:{\"choices\": [{\"delta\": {\"content\": \"\\\"\"}}]}\r\n\r\n\
        data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\": 12}}\n\n\
        data: [DONE]\n\n";

    fn chunked(head: &str, body: &str, chunk: usize) -> Vec<u8> {
        let mut raw = format!("HTTP/1.1 200 OK\r\n{head}Transfer-Encoding: chunked\r\n\r\n");
        for part in body.as_bytes().chunks(chunk) {
            raw += &format!("{:x};x=y\r\n{}\r\n", part.len(), std::str::from_utf8(part).unwrap());
        }
        (raw + "0\r\nx-trailer: 1\r\n\r\n").into_bytes()
    }

    #[test]
    fn answers_are_read_wherever_the_bytes_are_cut() {
        let trace = "traceresponse: 00-000000000000000000000000000000ff-00000000000000aa-01\r\n";
        let whole = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n{trace}\r\n{EVENTS}", EVENTS.len());
        for raw in [chunked(trace, EVENTS, 7), chunked(trace, EVENTS, 4096), whole.into_bytes()] {
            for size in (1..80).chain([raw.len()]) {
                let (sample, progress, verdict) = read(&raw, size);
                assert_eq!((progress, verdict), (Ok(Progress::Done { reusable: true }), Ok(())), "pieces of {size}");
                assert_eq!((sample.sampled, sample.output_tokens), (true, Some(12)));
                assert_eq!(sample.gaps.len(), 1, "two pieces of text, and a role that is none");
                assert!(sample.first_byte <= sample.first_token && sample.first_token.is_some());
            }
        }
    }

    #[test]
    fn answers_end_well_or_not() {
        let check = |raw: &str, progress: Result<Progress, Failure>, verdict: Result<(), Failure>| {
            let (_, found, ended) = read(raw.as_bytes(), raw.len());
            assert_eq!((found, ended), (progress, verdict), "{raw:?}");
        };
        let done = |reusable| Ok(Progress::Done { reusable });
        check("HTTP/1.1 503 no\r\ncontent-length: 2\r\n\r\n{}", done(true), Err(Failure::Status(503)));
        check(
            "HTTP/1.1 503 no\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
            done(false),
            Err(Failure::Status(503)),
        );
        check("HTTP/1.1 200 OK\r\ncontent-length: 14\r\n\r\ndata: [DONE]\n\n", done(true), Ok(()));
        // More bytes than were announced.
        check("HTTP/1.1 200 OK\r\ncontent-length: 13\r\n\r\ndata: [DONE]\n\n", done(false), Ok(()));
        check("HTTP/1.0 200 OK\r\n\r\ndata: [DONE]\n\n", Ok(Progress::More), Ok(()));
        check("HTTP/1.1 200 OK\r\n\r\ndata: {}\n\n", Ok(Progress::More), Err(Failure::Disconnected));
        check("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\ndata", Ok(Progress::More), Err(Failure::Disconnected));
        check("HTTP/1.1 200", Ok(Progress::More), Err(Failure::Disconnected));
        let protocol = (Err(Failure::Protocol), Err(Failure::Status(0)));
        check("SSH-2.0-OpenSSH\r\n", protocol.0, protocol.1);
        let chunked = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
        check(&format!("{chunked}xyz\r\n"), Err(Failure::Protocol), Err(Failure::Disconnected));
        check(&format!("{chunked}2\r\nab?"), Err(Failure::Protocol), Err(Failure::Disconnected));
        check(&format!("{chunked}ffffffffffffffffff\r\n"), Err(Failure::Protocol), Err(Failure::Disconnected));
    }

    #[test]
    fn text_is_told_from_everything_else() {
        let check = |event: &str, expect| assert_eq!(says_something(event.as_bytes()), expect, "{event}");
        check(r#"{"choices":[{"delta":{"content":"a"}}]}"#, true);
        check(r#"{"choices":[{"delta":{"content" : "\""}}]}"#, true);
        check(r#"{"choices":[{"text":"a"}]}"#, true);
        check(r#"{"choices":[{"delta":{"content":""}}]}"#, false);
        check(r#"{"choices":[{"delta":{"content":null}}]}"#, false);
        check(r#"{"choices":[{"delta":{"reasoning_content":"a"}}]}"#, false);
        check(r#"{"choices":[],"usage":{"completion_tokens":3}}"#, false);
    }
}
