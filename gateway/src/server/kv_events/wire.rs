//! A batch of KV events out of MessagePack, in both forms that vLLM writes (`vllm/distributed/kv_events.py`): events as maps with a
//! `type`, and, before vLLM 0.26, as arrays that begin with it.
//!
//! A batch is the array `[seconds, [event, ...], data_parallel_rank]`. What is not known of an event is left out; token ids go to
//! the index and nowhere else.

use std::sync::Arc;

use rmpv::ValueRef;
use shared::tokens::TokenId;

use crate::core::kv_index::events::{Batch, CacheEvent, EngineHash, Stored, Tier};

/// Larger payloads are not read, in bytes: far above what one step of an engine stores.
pub(super) const MAX_PAYLOAD: usize = 64 << 20;
/// A batch nests five deep (events, an event's lists, the keys of a block, what is in one of them), and the reader counts values and
/// their data for two.
const MAX_DEPTH: usize = 24;
/// The first group of layers: all of them, where layers are alike.
const GROUP: u64 = 0;

/// A payload that is no batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a batch of KV events cannot be read: {0}")]
pub(super) struct Malformed(&'static str);

/// Reads the batch with this number.
pub(super) fn batch(seq: u64, payload: &[u8]) -> Result<Batch, Malformed> {
    if payload.len() > MAX_PAYLOAD {
        return Err(Malformed("it is too large"));
    }
    let mut rest = payload;
    let value = rmpv::decode::read_value_ref_with_max_depth(&mut rest, MAX_DEPTH);
    let ValueRef::Array(parts) = value.map_err(|_| Malformed("it is no MessagePack"))? else {
        return Err(Malformed("it is no array"));
    };
    let [seconds, ValueRef::Array(events), ..] = parts.as_slice() else {
        return Err(Malformed("it is not a time and a list"));
    };
    let seconds = match seconds {
        ValueRef::F64(s) => *s,
        other => other.to_owned().as_f64().ok_or(Malformed("its time is no number"))?,
    };
    // Events of types that nobody here knows say nothing of blocks.
    let events = events.iter().filter_map(|e| event(e).transpose()).collect::<Result<_, _>>()?;
    Ok(Batch { seq, made: 1000 * (seconds.max(0.0) * 1e6).round() as u64, events })
}

/// An event's fields by name, in whichever form it came.
struct Fields<'v, 'b> {
    event: &'v ValueRef<'b>,
    /// Names of an array's elements.
    order: &'static [&'static str],
}

const STORED: &[&str] = &[
    "type",
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
    "lora_name",
    "extra_keys",
    "group_idx",
    "kv_cache_spec_kind",
];
const REMOVED: &[&str] = &["type", "block_hashes", "medium", "group_idx"];

impl<'v, 'b> Fields<'v, 'b> {
    /// A field that is there and not nil.
    fn get(&self, name: &str) -> Option<&'v ValueRef<'b>> {
        let found = match self.event {
            ValueRef::Map(pairs) => pairs.iter().find(|(k, _)| text(k) == Some(name)).map(|(_, v)| v),
            ValueRef::Array(values) => values.get(self.order.iter().position(|n| *n == name)?),
            _ => None,
        };
        found.filter(|v| !matches!(v, ValueRef::Nil))
    }

    fn list(&self, name: &str) -> Option<&'v [ValueRef<'b>]> {
        match self.get(name)? {
            ValueRef::Array(list) => Some(list),
            _ => None,
        }
    }

    fn text(&self, name: &str) -> Option<&'v str> {
        self.get(name).and_then(text)
    }

    fn number(&self, name: &str) -> Option<u64> {
        self.get(name).and_then(number)
    }
}

fn text<'v>(value: &'v ValueRef<'_>) -> Option<&'v str> {
    match value {
        ValueRef::String(text) => text.as_str(),
        _ => None,
    }
}

fn number(value: &ValueRef<'_>) -> Option<u64> {
    match value {
        ValueRef::Integer(n) => n.as_u64(),
        _ => None,
    }
}

/// A block's hash: an integer, or bytes of which the last eight count.
fn hash(value: &ValueRef<'_>) -> Option<EngineHash> {
    match value {
        ValueRef::Integer(n) => n.as_u64().or_else(|| n.as_i64().map(|n| n as u64)).map(EngineHash),
        ValueRef::Binary(bytes) => Some(EngineHash(u64::from_be_bytes(*bytes.last_chunk()?))),
        _ => None,
    }
}

fn hashes(list: &[ValueRef<'_>]) -> Result<Vec<EngineHash>, Malformed> {
    list.iter().map(hash).collect::<Option<_>>().ok_or(Malformed("a hash is neither a number nor bytes"))
}

fn event(event: &ValueRef<'_>) -> Result<Option<CacheEvent>, Malformed> {
    let kind = Fields { event, order: &["type"] }.text("type").ok_or(Malformed("an event has no type"))?;
    match kind {
        "BlockStored" => stored(&Fields { event, order: STORED }).map(Some),
        "BlockRemoved" => removed(&Fields { event, order: REMOVED }),
        "AllBlocksCleared" => Ok(Some(CacheEvent::Cleared)),
        _ => Ok(None),
    }
}

fn removed(fields: &Fields<'_, '_>) -> Result<Option<CacheEvent>, Malformed> {
    let blocks = hashes(fields.list("block_hashes").ok_or(Malformed("removed blocks have no hashes"))?)?;
    let tier = Tier::of_medium(fields.text("medium")).filter(|_| of_first_group(fields));
    Ok(tier.map(|tier| CacheEvent::Removed { blocks, tier }))
}

fn stored(fields: &Fields<'_, '_>) -> Result<CacheEvent, Malformed> {
    let blocks = hashes(fields.list("block_hashes").ok_or(Malformed("stored blocks have no hashes"))?)?;
    let parent = fields.get("parent_block_hash").map(hash);
    let tokens = fields.list("token_ids").ok_or(Malformed("stored blocks have no tokens"))?;
    let token = |t: &ValueRef<'_>| number(t).and_then(|t| u32::try_from(t).ok()).map(TokenId);
    let tokens: Option<Vec<TokenId>> = tokens.iter().map(token).collect();
    let size = fields.number("block_size").and_then(|n| u32::try_from(n).ok());
    let (tier, adapter) = (Tier::of_medium(fields.text("medium")), fields.text("lora_name"));
    // The oldest form knows an adapter by its number only, and a request by its name only.
    let nameless = adapter.is_none() && fields.get("lora_id").is_some();
    let (salt, others) = extra_keys(fields, adapter, parent.is_none());
    let all_layers = fields.text("kv_cache_spec_kind").is_none_or(|k| k.contains("full") || k.contains("mla"));
    Ok(CacheEvent::Stored(Stored {
        blocks,
        parent: parent.map(|p| p.ok_or(Malformed("a parent is neither a number nor bytes"))).transpose()?,
        tokens: tokens.ok_or(Malformed("a token is no number"))?,
        block_tokens: size.ok_or(Malformed("a block has no size"))?,
        opaque: nameless || others || !all_layers || tier.is_none() || !of_first_group(fields),
        tier: tier.unwrap_or_default(),
        adapter: adapter.map(Arc::from),
        salt,
    }))
}

fn of_first_group(fields: &Fields<'_, '_>) -> bool {
    fields.number("group_idx").is_none_or(|group| group == GROUP)
}

/// The salt of a prompt that begins here, and whether there are keys besides it and the adapter's name.
fn extra_keys(fields: &Fields<'_, '_>, adapter: Option<&str>, first: bool) -> (Option<Arc<str>>, bool) {
    let (mut salt, mut others) = (None, false);
    for (n, keys) in fields.list("extra_keys").unwrap_or_default().iter().enumerate() {
        let ValueRef::Array(keys) = keys else { continue };
        let mut rest = keys.iter().filter(|key| adapter.is_none() || text(key) != adapter);
        match (rest.next(), rest.next()) {
            (None, _) => {}
            (Some(key), None) if n == 0 && first && text(key).is_some() => salt = text(key).map(Arc::from),
            (Some(_), _) => others = true,
        }
    }
    (salt, others)
}

#[cfg(test)]
mod tests {
    use rmpv::Value;

    use super::*;

    /// What vLLM's encoder made (see `engine-sim/src/server/kv_events/wire.rs`): a stored block with a salt, one with an adapter, a
    /// removed one, and an emptied cache; both forms of events, both forms of hashes.
    #[derive(serde::Deserialize)]
    struct Case {
        array: bool,
        raw: bool,
        hex: String,
    }

    fn bytes(hex: &str) -> Vec<u8> {
        (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect()
    }

    fn name(n: u64, raw: bool) -> EngineHash {
        // The last eight of 32 bytes that count up from n, or the number that the script used.
        let last = std::array::from_fn(|i| n as u8 + 24 + i as u8);
        EngineHash(if raw { u64::from_be_bytes(last) } else { 97 * 1_000_003 * 1_000_003 * n })
    }

    fn tokens(ids: &[u32]) -> Vec<TokenId> {
        ids.iter().copied().map(TokenId).collect()
    }

    #[test]
    fn what_vllms_encoder_makes_is_read() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../engine-sim/tests/fixtures/kv_events.json");
        let cases: Vec<Case> = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        assert_eq!(cases.len(), 4);
        for Case { array, raw, hex } in cases {
            let read = batch(7, &bytes(&hex)).unwrap();
            let salted = Stored {
                blocks: vec![name(1, raw), name(2, raw)],
                tokens: tokens(&[1, 127, 128, 70_000]),
                block_tokens: 2,
                salt: Some("salt".into()),
                ..Stored::default()
            };
            let adapted = Stored {
                blocks: vec![name(3, raw)],
                parent: Some(name(2, raw)),
                tokens: tokens(&[255, 256]),
                block_tokens: 2,
                adapter: Some("ad".into()),
                ..Stored::default()
            };
            let removed = CacheEvent::Removed { blocks: vec![name(1, raw)], tier: Tier::Gpu };
            let events = vec![CacheEvent::Stored(salted), CacheEvent::Stored(adapted), removed, CacheEvent::Cleared];
            assert_eq!(read.events, events, "array {array}, raw {raw}");
            assert_eq!((read.seq, read.made), (7, 1_767_225_600_250_000_000));
        }
    }

    fn encoded(events: Value) -> Vec<u8> {
        let batch = Value::Array(vec![Value::F64(1.0), events, Value::from(0)]);
        let mut out = Vec::new();
        rmpv::encode::write_value(&mut out, &batch).unwrap();
        out
    }

    fn map(pairs: &[(&str, Value)]) -> Value {
        Value::Map(pairs.iter().map(|(k, v)| (Value::from(*k), v.clone())).collect())
    }

    fn one(event: Value) -> Result<Vec<CacheEvent>, Malformed> {
        batch(0, &encoded(Value::Array(vec![event]))).map(|b| b.events)
    }

    fn plain(more: &[(&str, Value)]) -> Value {
        let list = |n: i64| Value::Array(vec![Value::from(n)]);
        let mut pairs = vec![
            ("type", Value::from("BlockStored")),
            ("block_hashes", list(1)),
            ("parent_block_hash", Value::Nil),
            ("token_ids", list(5)),
            ("block_size", Value::from(1)),
        ];
        pairs.extend_from_slice(more);
        map(&pairs)
    }

    #[test]
    fn what_a_request_cannot_name_is_opaque() {
        let check = |more: &[(&str, Value)], expect: bool| {
            let events = one(plain(more)).unwrap();
            let [CacheEvent::Stored(stored)] = events.as_slice() else { panic!("{events:?}") };
            assert_eq!(stored.opaque, expect, "{more:?}");
        };
        let keys = |keys: &[Value]| Value::Array(vec![Value::Array(keys.to_vec())]);
        check(&[], false);
        check(&[("medium", "CPU".into())], false);
        check(&[("medium", "DISK".into())], true);
        check(&[("group_idx", 1.into())], true);
        check(&[("kv_cache_spec_kind", "full_attention".into())], false);
        check(&[("kv_cache_spec_kind", "sliding_window".into())], true);
        check(&[("lora_id", 3.into())], true);
        check(&[("lora_id", 3.into()), ("lora_name", "a".into()), ("extra_keys", keys(&["a".into()]))], false);
        check(&[("extra_keys", keys(&["salt".into()]))], false);
        check(&[("extra_keys", keys(&[Value::Array(vec!["image".into(), 0.into()])]))], true);
        check(&[("extra_keys", keys(&["image".into(), "salt".into()]))], true);
    }

    #[test]
    fn the_oldest_arrays_are_shorter() {
        let list = |n: i64| Value::Array(vec![Value::from(n)]);
        let stored = Value::Array(vec!["BlockStored".into(), list(-1), Value::Nil, list(5), 1.into(), Value::Nil]);
        let events = one(stored).unwrap();
        let [CacheEvent::Stored(stored)] = events.as_slice() else { panic!("{events:?}") };
        assert_eq!((stored.blocks[0], stored.opaque), (EngineHash(u64::MAX), false));
        let removed = one(Value::Array(vec!["BlockRemoved".into(), list(1)])).unwrap();
        assert_eq!(removed, [CacheEvent::Removed { blocks: vec![EngineHash(1)], tier: Tier::Gpu }]);
        assert_eq!(one(Value::Array(vec!["SomethingNew".into()])).unwrap(), []);
    }

    #[test]
    fn what_is_no_batch_is_refused() {
        let deep = (0..50).fold(Value::Nil, |inner, _| Value::Array(vec![inner]));
        let wrong = [
            Vec::new(),
            vec![0xc1],
            encoded(Value::from(1)),
            encoded(deep),
            encoded(Value::Array(vec![Value::from(1)])),
            encoded(Value::Array(vec![map(&[("type", "BlockStored".into())])])),
            encoded(Value::Array(vec![plain(&[]), map(&[("type", "BlockRemoved".into())])])),
            encoded(Value::Array(vec![map(&[
                ("type", "BlockStored".into()),
                ("block_hashes", Value::Array(vec!["text".into()])),
            ])])),
        ];
        for payload in wrong {
            assert!(batch(0, &payload).is_err(), "{payload:?}");
        }
        assert_eq!(batch(0, &vec![0; MAX_PAYLOAD + 1]).unwrap_err(), Malformed("it is too large"));
    }
}
