//! W3C trace context on HTTP headers: what a request brings and what it takes along.
//!
//! Written by hand because it is on the path of every request: no allocation unless there is a `tracestate`. Rules are those of
//! W3C Trace Context (Recommendation, level 1): a header that breaks them is treated as absent and counted, never an error.
//! `baggage` is not read at all; proxies forward it like any other header. Knows nothing of sampling or spans.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use http::header::{HeaderMap, HeaderName, HeaderValue};

use crate::ids::{SpanId, TraceId};

/// The header that carries trace id, parent span id and flags.
pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// The header that carries vendors' trace state.
pub const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// The most members of a `tracestate` (W3C Trace Context 3.3.1.1).
pub const MAX_STATE_MEMBERS: usize = 32;
/// The most bytes of a `tracestate` that are carried on (W3C asks for at least this many).
pub const MAX_STATE_BYTES: usize = 512;

/// Position in a trace: what is extracted from a caller and injected into a callee.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceContext {
    /// The trace.
    pub trace_id: TraceId,
    /// The span that the receiver becomes a child of.
    pub span_id: SpanId,
    /// Whether the trace is recorded.
    pub sampled: bool,
    /// Whether whoever began the trace vouches that the low 56 bits of its id are random (W3C Trace Context level 2); carried on
    /// as it came, and never claimed for traces that begin here.
    pub random: bool,
    /// The combined and validated `tracestate`; never empty.
    pub tracestate: Option<Arc<str>>,
}

impl TraceContext {
    /// The same trace from another span: what a client span injects.
    pub fn child(&self, span_id: SpanId) -> TraceContext {
        TraceContext { span_id, ..self.clone() }
    }

    /// The value of the `traceparent` header, version 00.
    pub fn traceparent(&self) -> HeaderValue {
        let text = self.traceparent_bytes();
        HeaderValue::from_bytes(&text).unwrap_or_else(|_| unreachable!("hex digits and dashes are a header value"))
    }

    fn traceparent_bytes(&self) -> [u8; 55] {
        let mut text = *b"00-00000000000000000000000000000000-0000000000000000-00";
        let trace = self.trace_id.get();
        text[3..19].copy_from_slice(&hex((trace >> 64) as u64));
        text[19..35].copy_from_slice(&hex(trace as u64));
        text[36..52].copy_from_slice(&hex(self.span_id.get()));
        text[54] = b'0' + (u8::from(self.random) << 1 | u8::from(self.sampled));
        text
    }
}

/// Which propagators are on (`OTEL_PROPAGATORS`), and how many malformed contexts were met.
#[derive(Debug, Default)]
pub struct Propagation {
    /// Whether trace context is read and written; without it every request is the root of its own trace.
    pub trace_context: bool,
    malformed: AtomicU64,
}

impl Propagation {
    /// Trace context on or off.
    pub const fn new(trace_context: bool) -> Propagation {
        Propagation { trace_context, malformed: AtomicU64::new(0) }
    }

    /// How many `traceparent` or `tracestate` values were dropped as malformed or too long.
    pub fn malformed(&self) -> u64 {
        self.malformed.load(Ordering::Relaxed)
    }

    fn count_malformed(&self) {
        self.malformed.fetch_add(1, Ordering::Relaxed);
    }
}

/// The caller's context, if the headers carry a valid one.
pub fn extract(headers: &HeaderMap, propagation: &Propagation) -> Option<TraceContext> {
    if !propagation.trace_context {
        return None;
    }
    let mut values = headers.get_all(TRACEPARENT).iter();
    let first = values.next()?;
    let parsed = if values.next().is_some() { None } else { parse_traceparent(first.as_bytes()) };
    let Some(context) = parsed else {
        propagation.count_malformed();
        return None;
    };
    let tracestate = match combine_state(headers) {
        Ok(state) => state,
        Err(MalformedState) => {
            propagation.count_malformed();
            None
        }
    };
    Some(TraceContext { tracestate, ..context })
}

/// Writes `context` into `headers` in place of whatever trace context they carried.
pub fn inject(context: &TraceContext, headers: &mut HeaderMap) {
    headers.insert(TRACEPARENT, context.traceparent());
    let state = context.tracestate.as_deref().and_then(|s| HeaderValue::from_str(s).ok());
    match state {
        Some(state) => {
            headers.insert(TRACESTATE, state);
        }
        None => drop(headers.remove(TRACESTATE)),
    }
}

/// The context of a `traceparent` value, without a trace state.
///
/// Version `ff` is invalid; a version above `00` is read like `00` and may have more fields after the flags.
fn parse_traceparent(value: &[u8]) -> Option<TraceContext> {
    let value = value.trim_ascii();
    let (head, tail) = (value.get(..55)?, &value[55..]);
    if head[2] != b'-' || head[35] != b'-' || head[52] != b'-' {
        return None;
    }
    let version = get_hex(&head[..2])?;
    let tail_allowed = if version == 0 { tail.is_empty() } else { tail.is_empty() || tail[0] == b'-' };
    if version == 0xff || !tail_allowed {
        return None;
    }
    let (high, low) = (get_hex(&head[3..19])?, get_hex(&head[19..35])?);
    let trace_id = TraceId::new(u128::from(high) << 64 | u128::from(low))?;
    let span_id = SpanId::new(get_hex(&head[36..52])?)?;
    let flags = get_hex(&head[53..55])?;
    Some(TraceContext { trace_id, span_id, sampled: flags & 1 != 0, random: flags & 2 != 0, tracestate: None })
}

/// The number written in at most 16 lower-case hex digits; W3C forbids upper case.
fn get_hex(digits: &[u8]) -> Option<u64> {
    /// Values of digits; 0xff for everything else.
    const VALUES: [u8; 256] = {
        let mut values = [0xff; 256];
        let mut i = 0;
        while i < 16 {
            values[DIGITS[i] as usize] = i as u8;
            i += 1;
        }
        values
    };
    let (mut number, mut seen) = (0, 0);
    for digit in digits {
        let value = VALUES[*digit as usize];
        seen |= value;
        number = number << 4 | u64::from(value & 15);
    }
    (seen <= 15).then_some(number)
}

const DIGITS: &[u8; 16] = b"0123456789abcdef";

/// A number as 16 lower-case hex digits, all at once: each byte of a 128-bit word becomes one digit.
fn hex(number: u64) -> [u8; 16] {
    const ONES: u128 = u128::MAX / 0xff;
    let mut word = u128::from(number);
    for (shift, keep) in [
        (32, 0x0000_0000_ffff_ffff_0000_0000_ffff_ffff),
        (16, 0x0000_ffff_0000_ffff_0000_ffff_0000_ffff),
        (8, 0x00ff_00ff_00ff_00ff_00ff_00ff_00ff_00ff),
        (4, 0x0f0f_0f0f_0f0f_0f0f_0f0f_0f0f_0f0f_0f0f),
    ] {
        word = (word | word << shift) & keep;
    }
    // A nibble above 9 carries into the next bit when 6 is added; letters follow digits at a distance of 39.
    let letters = ((word + ONES * 6) >> 4) & ONES;
    (word + ONES * u128::from(b'0') + letters * 39).to_be_bytes()
}

/// A `tracestate` that breaks the grammar or the limits.
#[derive(Debug, PartialEq, Eq)]
struct MalformedState;

/// All `tracestate` headers as one value, in order, without empty members and optional white space.
fn combine_state(headers: &HeaderMap) -> Result<Option<Arc<str>>, MalformedState> {
    if !headers.contains_key(TRACESTATE) {
        return Ok(None);
    }
    let mut combined = String::new();
    let mut members = 0;
    for value in headers.get_all(TRACESTATE) {
        let text = value.to_str().map_err(|_| MalformedState)?;
        for member in text.split(',').map(|m| m.trim_matches([' ', '\t'])).filter(|m| !m.is_empty()) {
            let (key, value) = member.split_once('=').ok_or(MalformedState)?;
            members += 1;
            if !is_state_key(key) || !is_state_value(value) || members > MAX_STATE_MEMBERS {
                return Err(MalformedState);
            }
            if !combined.is_empty() {
                combined.push(',');
            }
            combined.push_str(member);
            if combined.len() > MAX_STATE_BYTES {
                return Err(MalformedState);
            }
        }
    }
    Ok(if combined.is_empty() { None } else { Some(combined.into()) })
}

/// `simple-key` or `tenant@system` (W3C Trace Context 3.3.1.3.1).
fn is_state_key(key: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'_' | b'-' | b'*' | b'/');
    let part = |text: &str, max: usize, digit_first: bool| {
        let first_ok =
            text.bytes().next().is_some_and(|b| b.is_ascii_lowercase() || (digit_first && b.is_ascii_digit()));
        first_ok && text.len() <= max && text.bytes().all(plain)
    };
    match key.split_once('@') {
        None => part(key, 256, false),
        Some((tenant, system)) => part(tenant, 241, true) && part(system, 14, false),
    }
}

/// 1 to 256 printable characters without `,` and `=`, the last one not a space.
fn is_state_value(value: &str) -> bool {
    let allowed = |b: u8| matches!(b, 0x20..=0x7e) && b != b',' && b != b'=';
    !value.is_empty() && value.len() <= 256 && !value.ends_with(' ') && value.bytes().all(allowed)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
    const SPAN: &str = "b7ad6b7169203331";

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.append(*name, HeaderValue::from_str(value).unwrap());
        }
        map
    }

    /// The context as `traceparent tracestate`, `-` if absent, and the count of malformed values.
    fn check(pairs: &[(&'static str, &str)], expect: &str, malformed: u64) {
        let propagation = Propagation::new(true);
        let found = extract(&headers(pairs), &propagation).map_or("-".to_owned(), |c| {
            let flag = if c.sampled { "sampled" } else { "unsampled" };
            assert_eq!((c.trace_id.to_string().as_str(), c.span_id.to_string().as_str()), (TRACE, SPAN));
            c.tracestate.map_or(flag.to_owned(), |s| format!("{flag} {s}"))
        });
        assert_eq!((found.as_str(), propagation.malformed()), (expect, malformed), "{pairs:?}");
    }

    #[test]
    fn traceparent_cases_of_the_specification() {
        let ids = format!("{TRACE}-{SPAN}");
        for (value, expect) in [
            (format!("00-{ids}-01"), "sampled"),
            (format!("00-{ids}-00"), "unsampled"),
            (format!("00-{ids}-02"), "unsampled"),
            (format!("00-{ids}-ff"), "sampled"),
            (format!("\t 00-{ids}-01 "), "sampled"),
            (format!("01-{ids}-01"), "sampled"),
            (format!("cc-{ids}-01-what-the-future-brings"), "sampled"),
            (format!("cc-{ids}-01."), "-"),
            (format!("cc-{ids}-01what"), "-"),
            (format!("00-{ids}-01-what"), "-"),
            (format!("00-{ids}-01-"), "-"),
            (format!("ff-{ids}-01"), "-"),
            (format!("0-{ids}-01"), "-"),
            (format!("000-{ids}-01"), "-"),
            (format!("0G-{ids}-01"), "-"),
            (format!("00-{}-{SPAN}-01", "0".repeat(32)), "-"),
            (format!("00-{TRACE}-{}-01", "0".repeat(16)), "-"),
            (format!("00-{}-01", ids.to_uppercase()), "-"),
            (format!("00-{ids}-1"), "-"),
            (format!("00-{ids}-001"), "-"),
            (format!("00-{ids}-.0"), "-"),
            (format!("00_{ids}_01"), "-"),
            (format!("00-{ids}"), "-"),
            (String::new(), "-"),
        ] {
            check(&[("traceparent", &value)], expect, u64::from(expect == "-"));
        }
        check(&[], "-", 0);
        let good = format!("00-{ids}-01");
        check(&[("traceparent", &good), ("traceparent", &good)], "-", 1);
    }

    #[test]
    fn tracestate_cases_of_the_specification() {
        let parent = format!("00-{TRACE}-{SPAN}-01");
        let run = |states: &[&str], expect: &str| {
            let mut pairs = vec![("traceparent", parent.as_str())];
            pairs.extend(states.iter().map(|s| ("tracestate", *s)));
            let (expect, malformed) = match expect {
                "malformed" => ("sampled".to_owned(), 1),
                "" => ("sampled".to_owned(), 0),
                state => (format!("sampled {state}"), 0),
            };
            check(&pairs, &expect, malformed);
        };
        run(&["foo=1"], "foo=1");
        run(&["foo=1,bar=2"], "foo=1,bar=2");
        run(&["foo=1", "bar=2"], "foo=1,bar=2");
        run(&["foo=1 \t , \t bar=2, \t baz=3"], "foo=1,bar=2,baz=3");
        run(&["foo=1,", ",bar=2,,"], "foo=1,bar=2");
        run(&["foo=1", ""], "foo=1");
        run(&[""], "");
        run(&["foo= 1"], "foo= 1");
        run(&["foo@bar=1,0t@s-1=x", "a_-*/9=!~"], "foo@bar=1,0t@s-1=x,a_-*/9=!~");
        for bad in [
            "foo",
            "foo=",
            "=1",
            "FOO=1",
            "foo@=1",
            "@bar=1",
            "foo@bar@baz=1",
            "1foo=1",
            "foo@0bar=1",
            "foo.bar=1",
            "foo =1",
            "foo=1=2",
        ] {
            run(&[bad], "malformed");
        }
        run(&[&format!("{}=1", "z".repeat(256))], &format!("{}=1", "z".repeat(256)));
        run(&[&format!("{}=1", "z".repeat(257))], "malformed");
        run(
            &[&format!("{}@{}=1", "t".repeat(241), "v".repeat(14))],
            &format!("{}@{}=1", "t".repeat(241), "v".repeat(14)),
        );
        run(&[&format!("{}@v=1", "t".repeat(242))], "malformed");
        run(&[&format!("t@{}=1", "v".repeat(15))], "malformed");
        run(&[&format!("a={}", "v".repeat(256))], &format!("a={}", "v".repeat(256)));
        run(&[&format!("a={}", "v".repeat(257))], "malformed");
        let many = |n: usize| (0..n).map(|i| format!("bar{i:02}={i:02}")).collect::<Vec<_>>().join(",");
        run(&[&many(32)], &many(32));
        run(&[&many(33)], "malformed");
        run(
            &[&format!("a={},b={}", "v".repeat(254), "v".repeat(253))],
            &format!("a={},b={}", "v".repeat(254), "v".repeat(253)),
        );
        run(&[&format!("a={},b={}", "v".repeat(254), "v".repeat(254))], "malformed");
    }

    #[test]
    fn flags_that_are_known_are_carried_on() {
        for (found, expect) in [("00", "00"), ("01", "01"), ("02", "02"), ("03", "03"), ("ff", "03"), ("fc", "00")] {
            let parent = format!("00-{TRACE}-{SPAN}-{found}");
            let context = extract(&headers(&[("traceparent", &parent)]), &Propagation::new(true)).unwrap();
            let child = context.child(SpanId::new(1).unwrap());
            assert_eq!(child.traceparent(), format!("00-{TRACE}-0000000000000001-{expect}"), "{found}");
        }
    }

    #[test]
    fn a_tracestate_alone_is_ignored() {
        check(&[("tracestate", "foo=1")], "-", 0);
    }

    #[test]
    fn nothing_is_read_when_the_propagator_is_off() {
        let map = headers(&[("traceparent", "rubbish")]);
        let off = Propagation::new(false);
        assert_eq!((extract(&map, &off), off.malformed()), (None, 0));
    }

    #[test]
    fn injection_replaces_what_was_there() {
        let context = TraceContext {
            trace_id: TraceId::new(0x1).unwrap(),
            span_id: SpanId::new(0x2).unwrap(),
            sampled: false,
            random: false,
            tracestate: None,
        };
        let mut map =
            headers(&[("traceparent", "old"), ("traceparent", "older"), ("tracestate", "a=1"), ("baggage", "k=v")]);
        inject(&context, &mut map);
        let all: Vec<_> = map.iter().map(|(k, v)| format!("{k}: {}", v.to_str().unwrap())).collect();
        assert_eq!(all, ["traceparent: 00-00000000000000000000000000000001-0000000000000002-00", "baggage: k=v"]);
    }

    proptest! {
        #[test]
        fn a_context_survives_the_wire(
            trace in 1u128.., span in 1u64.., sampled: bool, random: bool,
            state in proptest::option::of("[a-z][a-z0-9_*/-]{0,10}=[!-+.-<>-~]{1,20}(,[a-z0-9]{1,8}@[a-z]{1,8}=[a-zA-Z0-9:;]{1,12}){0,5}"),
        ) {
            let sent = TraceContext {
                trace_id: TraceId::new(trace).unwrap(),
                span_id: SpanId::new(span).unwrap(),
                sampled,
                random,
                tracestate: state.map(Into::into),
            };
            let mut map = HeaderMap::new();
            inject(&sent, &mut map);
            let propagation = Propagation::new(true);
            prop_assert_eq!(extract(&map, &propagation), Some(sent));
            prop_assert_eq!(propagation.malformed(), 0);
        }

        #[test]
        fn rubbish_is_never_an_error(parent in "[ -~]{0,70}", state in "[ -~]{0,80}") {
            let map = headers(&[("traceparent", &parent), ("tracestate", &state)]);
            let propagation = Propagation::new(true);
            if let Some(context) = extract(&map, &propagation) {
                prop_assert!(context.tracestate.is_none_or(|s| !s.is_empty() && s.len() <= MAX_STATE_BYTES));
            }
        }
    }
}
