//! Identifiers and units as types, so that a block count is never taken for a token count.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// A trace id: 16 bytes, never all zero.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TraceId(u128);

/// A span id: 8 bytes, never all zero.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpanId(u64);

impl TraceId {
    /// The id with this value; `None` for zero, which W3C calls invalid.
    pub const fn new(value: u128) -> Option<TraceId> {
        if value == 0 { None } else { Some(TraceId(value)) }
    }
    /// The id as a number, most significant byte first on the wire.
    pub const fn get(self) -> u128 {
        self.0
    }
}

impl SpanId {
    /// The id with this value; `None` for zero, which W3C calls invalid.
    pub const fn new(value: u64) -> Option<SpanId> {
        if value == 0 { None } else { Some(SpanId(value)) }
    }
    /// The id as a number, most significant byte first on the wire.
    pub const fn get(self) -> u64 {
        self.0
    }
    /// The `n`-th id drawn from this one: folding needs no random numbers and repeats exactly.
    pub const fn derive(self, n: u64) -> SpanId {
        let id = crate::rng::mix64(self.0 ^ crate::rng::mix64(n));
        SpanId(if id == 0 { 1 } else { id })
    }
}

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}
impl fmt::Debug for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
impl fmt::Display for SpanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}
impl fmt::Debug for SpanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// An instance of a service: one OpenTelemetry Resource of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InstanceId(pub u16);

/// A request id as it may appear in spans and logs.
///
/// Ids come from callers, so they are capped: at most 128 bytes of `[A-Za-z0-9._-]`, anything else is replaced by its hash.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RequestId(Arc<str>);

impl RequestId {
    /// The longest id taken from a caller, in bytes.
    pub const MAX_BYTES: usize = 128;

    /// Takes an id from a caller.
    pub fn sanitise(raw: &str) -> RequestId {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        if !raw.is_empty() && raw.len() <= Self::MAX_BYTES && raw.bytes().all(plain) {
            RequestId(raw.into())
        } else {
            RequestId(format!("h-{:032x}", xxhash_rust::xxh3::xxh3_128(raw.as_bytes())).into())
        }
    }
    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_ids_are_capped() {
        assert_eq!(RequestId::sanitise("req-1.a_B").as_str(), "req-1.a_B");
        for bad in ["", "a b", "a\nb", "tell me a secret?", &"x".repeat(129)] {
            let id = RequestId::sanitise(bad);
            assert!(id.as_str().starts_with("h-") && id.as_str().len() == 34, "{id}");
        }
    }

    #[test]
    fn derived_span_ids_differ() {
        let root = SpanId::new(7).unwrap();
        let ids: std::collections::HashSet<_> = (0..1000).map(|n| root.derive(n)).collect();
        assert_eq!(ids.len(), 1000);
    }
}
