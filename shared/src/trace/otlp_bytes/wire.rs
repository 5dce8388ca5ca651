//! Protobuf on the wire: tags, lengths and OTLP's `KeyValue`, appended to a buffer.
//!
//! Field numbers are those of opentelemetry-proto 1.x (`common/v1/common.proto`); a tag is `number << 3 | wire type`. Lengths are
//! written before their content is known: one byte is left for them, and content that turns out longer than 127 bytes is moved.

use crate::trace::fold::Val;
use crate::trace::span::Value;

/// `KeyValue.key`
const KEY: u8 = 0x0a;
/// `KeyValue.value`
const VALUE: u8 = 0x12;
/// `AnyValue.string_value`
const STRING: u8 = 0x0a;
/// `AnyValue.bool_value`
const BOOL: u8 = 0x10;
/// `AnyValue.int_value`
const INT: u8 = 0x18;
/// `AnyValue.double_value`
const DOUBLE: u8 = 0x21;
/// `AnyValue.array_value`
const ARRAY: u8 = 0x2a;
/// `ArrayValue.values`
const ITEM: u8 = 0x0a;

/// The longest key and the longest text for which all lengths of an attribute fit into one byte each.
const SHORT: usize = 58;

/// The longest varint.
const MAX_VARINT: usize = 10;

/// A varint and how many of its bytes count.
pub(crate) fn varint(mut value: u64) -> ([u8; MAX_VARINT], usize) {
    let mut bytes = [0; MAX_VARINT];
    let mut n = 0;
    while value >= 0x80 {
        bytes[n] = value as u8 | 0x80;
        value >>= 7;
        n += 1;
    }
    bytes[n] = value as u8;
    (bytes, n + 1)
}

/// A tag with the length of what follows.
pub(crate) fn prefix(out: &mut Vec<u8>, tag: u8, len: usize) {
    if len < 0x80 {
        out.extend_from_slice(&[tag, len as u8]);
    } else {
        let (bytes, n) = varint(len as u64);
        out.push(tag);
        out.extend_from_slice(&bytes[..n]);
    }
}

/// How many bytes [`prefix`] takes.
pub(crate) fn prefix_len(len: usize) -> usize {
    1 + varint(len as u64).1
}

/// A text field; empty text is left out, as proto3 does.
pub(crate) fn text(out: &mut Vec<u8>, tag: u8, text: &str) {
    if !text.is_empty() {
        prefix(out, tag, text.len());
        out.extend_from_slice(text.as_bytes());
    }
}

/// A message field that `write` fills. Returns where its content starts.
pub(crate) fn message(out: &mut Vec<u8>, tag: u8, write: impl FnOnce(&mut Vec<u8>)) -> usize {
    out.extend_from_slice(&[tag, 0]);
    let at = out.len();
    write(out);
    let len = out.len() - at;
    if len < 0x80 {
        out[at - 1] = len as u8;
        return at;
    }
    let (bytes, n) = varint(len as u64);
    out.splice(at - 1..at, bytes[..n].iter().copied());
    at - 1 + n
}

/// An attribute: a `KeyValue` in the field `tag`.
#[inline]
pub(crate) fn attribute(out: &mut Vec<u8>, tag: u8, key: &str, value: Val<'_>) {
    match value {
        Val::Static(v) => text_attribute(out, tag, key, v),
        Val::Text(v) => text_attribute(out, tag, key, v),
        Val::Shared(v) => text_attribute(out, tag, key, v),
        Val::Int(v) => int_attribute(out, tag, key, v),
        Val::F64(v) => {
            let [a, b, c, d, e, f, g, h] = v.to_le_bytes();
            number_attribute(out, tag, key, &[VALUE, 9, DOUBLE, a, b, c, d, e, f, g, h]);
        }
        Val::Bool(v) => number_attribute(out, tag, key, &[VALUE, 2, BOOL, u8::from(v)]),
        Val::Statics(v) => texts_attribute(out, tag, key, v.iter().copied()),
        Val::Names(v) => texts_attribute(out, tag, key, v.iter().map(|t| &**t)),
        Val::F64s(v) => doubles_attribute(out, tag, key, v),
    }
}

/// Like [`attribute`], for the values that resources have.
pub(crate) fn owned_attribute(out: &mut Vec<u8>, tag: u8, key: &str, value: &Value) {
    match value {
        Value::Str(v) => text_attribute(out, tag, key, v),
        Value::Shared(v) => text_attribute(out, tag, key, v),
        Value::Int(v) => attribute(out, tag, key, Val::Int(*v)),
        Value::F64(v) => attribute(out, tag, key, Val::F64(*v)),
        Value::Bool(v) => attribute(out, tag, key, Val::Bool(*v)),
        Value::StrList(v) => texts_attribute(out, tag, key, v.iter().map(|t| &**t)),
        Value::F64List(v) => doubles_attribute(out, tag, key, v),
    }
}

fn text_attribute(out: &mut Vec<u8>, tag: u8, key: &str, value: &str) {
    let (k, v) = (key.len(), value.len());
    if k <= SHORT && v <= SHORT && k > 0 {
        out.reserve(k + v + 8);
        out.extend_from_slice(&[tag, (k + v + 6) as u8, KEY, k as u8]);
        out.extend_from_slice(key.as_bytes());
        out.extend_from_slice(&[VALUE, (v + 2) as u8, STRING, v as u8]);
        out.extend_from_slice(value.as_bytes());
    } else {
        general_attribute(out, tag, key, |out| string(out, value));
    }
}

/// A string value; unlike a plain field it is written even if it is empty, because it is the chosen one of several.
fn string(out: &mut Vec<u8>, value: &str) {
    prefix(out, STRING, value.len());
    out.extend_from_slice(value.as_bytes());
}

fn int_attribute(out: &mut Vec<u8>, tag: u8, key: &str, value: i64) {
    // Negative numbers take ten bytes, as protobuf's int64 does.
    let (bytes, n) = varint(value as u64);
    let mut field = [0; 3 + MAX_VARINT];
    (field[0], field[1], field[2]) = (VALUE, n as u8 + 1, INT);
    field[3..].copy_from_slice(&bytes);
    number_attribute(out, tag, key, &field[..3 + n]);
}

/// An attribute whose value field is ready and short.
fn number_attribute(out: &mut Vec<u8>, tag: u8, key: &str, field: &[u8]) {
    let k = key.len();
    if k <= SHORT && k > 0 {
        out.reserve(k + field.len() + 4);
        out.extend_from_slice(&[tag, (k + field.len() + 2) as u8, KEY, k as u8]);
        out.extend_from_slice(key.as_bytes());
        out.extend_from_slice(field);
    } else {
        message(out, tag, |out| {
            text(out, KEY, key);
            out.extend_from_slice(field);
        });
    }
}

#[cold]
fn general_attribute(out: &mut Vec<u8>, tag: u8, key: &str, value: impl FnOnce(&mut Vec<u8>)) {
    message(out, tag, |out| {
        text(out, KEY, key);
        message(out, VALUE, value);
    });
}

fn texts_attribute<'a>(out: &mut Vec<u8>, tag: u8, key: &str, values: impl Iterator<Item = &'a str>) {
    list_attribute(out, tag, key, |out| {
        values.for_each(|v| {
            message(out, ITEM, |out| string(out, v));
        });
    });
}

fn doubles_attribute(out: &mut Vec<u8>, tag: u8, key: &str, values: &[f64]) {
    list_attribute(out, tag, key, |out| {
        for value in values {
            out.extend_from_slice(&[ITEM, 9, DOUBLE]);
            out.extend_from_slice(&value.to_le_bytes());
        }
    });
}

fn list_attribute(out: &mut Vec<u8>, tag: u8, key: &str, items: impl FnOnce(&mut Vec<u8>)) {
    message(out, tag, |out| {
        text(out, KEY, key);
        message(out, VALUE, |out| {
            message(out, ARRAY, items);
        });
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(write: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut out = Vec::new();
        write(&mut out);
        out
    }

    /// Examples of protobuf's encoding guide, and the bounds of one-byte and two-byte varints.
    #[test]
    fn varints() {
        for (value, expect) in [
            (1, &[0x01][..]),
            (127, &[0x7f]),
            (128, &[0x80, 0x01]),
            (150, &[0x96, 0x01]),
            (16_383, &[0xff, 0x7f]),
            (16_384, &[0x80, 0x80, 0x01]),
            (-2i64 as u64, &[0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01]),
        ] {
            let (bytes, n) = varint(value);
            assert_eq!(&bytes[..n], expect, "{value}");
        }
    }

    #[test]
    fn a_message_starts_where_its_length_ends() {
        for (len, start) in [(0, 2), (127, 2), (128, 3), (16_383, 3), (16_384, 4)] {
            let mut out = Vec::new();
            let at = message(&mut out, 0x0a, |out| out.extend(std::iter::repeat_n(7, len)));
            assert_eq!((at, out.len()), (start, start + len));
            assert_eq!(out, bytes(|out| (prefix(out, 0x0a, len), out.extend(vec![7; len])).1));
            assert_eq!(prefix_len(len), start);
        }
    }

    #[test]
    fn the_short_way_and_the_general_way_agree() {
        for key in [1, SHORT - 1, SHORT, SHORT + 1, 200].map(|n| "k".repeat(n)) {
            for value in [0, 1, SHORT - 1, SHORT, SHORT + 1, 127, 128, 20_000].map(|n| "v".repeat(n)) {
                let short = bytes(|out| text_attribute(out, 0x4a, &key, &value));
                let general = bytes(|out| general_attribute(out, 0x4a, &key, |out| string(out, &value)));
                assert!(short == general, "key {}, value {}", key.len(), value.len());
            }
        }
    }
}
