//! How an edge tells the services it called which traces it keeps: ids as hexadecimal digits, one in a line.

use std::fmt::Write;

use crate::ids::TraceId;

/// Where services take verdicts, by POST.
pub const KEEP_PATH: &str = "/internal/sampling/keep";
/// The header or trailer in which an engine of ours says how often it preempted a candidate, if it did.
pub const PREEMPTIONS: &str = "x-igsim-preemptions";
/// The most ids in one message.
pub const MAX_IDS: usize = 512;
/// The longest message, in bytes.
pub const MAX_BYTES: usize = MAX_IDS * 33;

/// The ids as a body; those beyond [`MAX_IDS`] are for the next one.
pub fn write(ids: &[TraceId]) -> String {
    let mut text = String::with_capacity(ids.len().min(MAX_IDS) * 33);
    for id in ids.iter().take(MAX_IDS) {
        writeln!(text, "{id}").expect("writing to memory does not fail");
    }
    text
}

/// The ids of a body; `None` if it holds anything else, or too many.
pub fn read(body: &[u8]) -> Option<Vec<TraceId>> {
    if body.len() > MAX_BYTES {
        return None;
    }
    let digits = |line: &str| line.len() == 32 && line.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let id = |line: &str| {
        let number = digits(line).then(|| u128::from_str_radix(line, 16).ok()).flatten()?;
        TraceId::new(number)
    };
    std::str::from_utf8(body).ok()?.lines().map(id).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_survive_the_wire() {
        let ids: Vec<_> = (1..=MAX_IDS as u128).map(|n| TraceId::new(n << 70 | n).unwrap()).collect();
        let body = write(&ids);
        assert_eq!(body.len(), MAX_BYTES);
        assert_eq!(read(body.as_bytes()), Some(ids.clone()));
        assert_eq!(read(write(&[&ids[..], &ids[..]].concat()).as_bytes()), Some(ids), "no more than a body holds");
        assert_eq!(read(b""), Some(Vec::new()));
    }

    #[test]
    fn anything_else_is_refused() {
        let zero = "0".repeat(32);
        for bad in
            ["1", &zero, "0123456789abcdef0123456789abcdeF", "+123456789abcdef0123456789abcdef", "\n", "\u{fffd}"]
        {
            assert_eq!(read(bad.as_bytes()), None, "{bad:?}");
        }
        assert_eq!(read("a".repeat(MAX_BYTES + 1).as_bytes()), None);
    }
}
