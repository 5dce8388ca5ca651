//! A batch of KV events in MessagePack, byte for byte as vLLM's msgspec encodes it (`vllm/distributed/kv_events.py`).
//!
//! A batch is the array `[ts, [event, ...], data_parallel_rank]`. An event is a map with a `type`, or in the older form an array that
//! begins with the type. Fields that have a default and hold it are left out of maps.

use rmp::encode::{self, ByteBuf};
use shared::tokens::TokenId;

use crate::core::config::EventFormat;
use crate::core::kv_events::{BlockName, CacheEvent, StoredContent};

/// How events are written.
#[derive(Clone, Copy, Debug)]
pub struct Form {
    /// Map or array.
    pub format: EventFormat,
    /// Whether hashes are integers of 64 bits, else bytes.
    pub int_hashes: bool,
}

/// The medium of an engine's own cache.
const MEDIUM: &str = "GPU";
/// The one group of a model whose layers are all alike, and what they are.
const GROUP: u64 = 0;
const SPEC_KIND: &str = "full_attention";
/// Engines here are their own and only data-parallel rank.
const RANK: u64 = 0;
/// MessagePack's header of a map with a length of 16 bits.
const MAP16: u8 = 0xde;
const NEVER: &str = "writing to memory does not fail";

/// The payload of a batch made at `unix` seconds.
pub fn payload(unix: f64, events: &[CacheEvent], form: Form) -> Vec<u8> {
    let tokens: usize = events.iter().map(size_hint).sum();
    let mut out = Out { buf: ByteBuf::with_capacity(64 + tokens), form };
    out.array(3);
    encode::write_f64(&mut out.buf, unix).expect(NEVER);
    out.array(events.len());
    for event in events {
        out.event(event);
    }
    out.uint(RANK);
    out.buf.into_vec()
}

fn size_hint(event: &CacheEvent) -> usize {
    match event {
        CacheEvent::Stored { blocks, content, .. } => {
            256 + 33 * blocks.len() + content.as_ref().map_or(0, |c| 5 * c.tokens.len())
        }
        CacheEvent::Removed(_) | CacheEvent::Cleared => 96,
    }
}

struct Out {
    buf: ByteBuf,
    form: Form,
}

impl Out {
    fn event(&mut self, event: &CacheEvent) {
        let map = self.form.format == EventFormat::Map;
        match event {
            CacheEvent::Stored { blocks, parent, block_size, content } => {
                let none = StoredContent::default();
                let content = content.as_deref().unwrap_or(&none);
                if map {
                    self.stored_map(blocks, *parent, *block_size, content);
                } else {
                    self.stored_array(blocks, *parent, *block_size, content);
                }
            }
            CacheEvent::Removed(block) => {
                self.head(4, "BlockRemoved");
                self.field("block_hashes");
                self.array(1);
                self.name(*block);
                self.field("medium");
                self.text(MEDIUM);
                self.field("group_idx");
                self.uint(GROUP);
            }
            CacheEvent::Cleared => self.head(1, "AllBlocksCleared"),
        }
    }

    fn stored_map(&mut self, blocks: &[BlockName], parent: Option<BlockName>, size: u32, content: &StoredContent) {
        // A struct with more than 15 fields has this header in msgspec, however many of them are left out.
        let fields = 11 + u8::from(content.session.is_some());
        self.buf.as_mut_vec().extend_from_slice(&[MAP16, 0, fields]);
        self.text("type");
        self.text("BlockStored");
        self.stored_fields(blocks, parent, size, content);
        if let Some(session) = &content.session {
            self.field("session_id");
            self.text(session);
        }
    }

    fn stored_array(&mut self, blocks: &[BlockName], parent: Option<BlockName>, size: u32, content: &StoredContent) {
        self.head(12, "BlockStored");
        self.stored_fields(blocks, parent, size, content);
        // No sliding window.
        self.nil();
    }

    fn stored_fields(&mut self, blocks: &[BlockName], parent: Option<BlockName>, size: u32, content: &StoredContent) {
        self.field("block_hashes");
        self.array(blocks.len());
        blocks.iter().for_each(|b| self.name(*b));
        self.field("parent_block_hash");
        match parent {
            Some(parent) => self.name(parent),
            None => self.nil(),
        }
        self.field("token_ids");
        self.tokens(&content.tokens);
        self.field("block_size");
        self.uint(u64::from(size));
        self.field("lora_id");
        match content.lora_id {
            Some(id) => self.uint(u64::from(id)),
            None => self.nil(),
        }
        self.field("medium");
        self.text(MEDIUM);
        self.field("lora_name");
        match &content.lora_name {
            Some(name) => self.text(name),
            None => self.nil(),
        }
        self.field("extra_keys");
        self.extra_keys(blocks.len(), content);
        self.field("group_idx");
        self.uint(GROUP);
        self.field("kv_cache_spec_kind");
        self.text(SPEC_KIND);
    }

    /// One entry a block: the values that enter its hash beside tokens, without the tags they have there.
    fn extra_keys(&mut self, blocks: usize, content: &StoredContent) {
        self.array(blocks);
        for block in 0..blocks {
            let salt = content.cache_salt.as_deref().filter(|_| block == 0);
            let keys = [content.lora_name.as_deref(), salt];
            match keys.iter().flatten().count() {
                0 => self.nil(),
                n => {
                    self.array(n);
                    keys.into_iter().flatten().for_each(|key| self.text(key));
                }
            }
        }
    }

    /// Opens an event: a map of so many fields or an array of so many elements, the type among them.
    fn head(&mut self, len: usize, kind: &str) {
        match self.form.format {
            EventFormat::Map => {
                encode::write_map_len(&mut self.buf, len as u32).expect(NEVER);
            }
            EventFormat::Array => self.array(len),
        }
        self.field("type");
        self.text(kind);
    }

    /// A field's key; arrays have none.
    fn field(&mut self, name: &str) {
        if self.form.format == EventFormat::Map {
            self.text(name);
        }
    }

    fn name(&mut self, name: BlockName) {
        match (name, self.form.int_hashes) {
            (BlockName::Key(key), true) => self.uint(key.event_hash()),
            (BlockName::Key(key), false) => self.bytes(&key.0.to_be_bytes()),
            (BlockName::Digest(digest), true) => self.uint(shared::block_hash::key_of(&digest).event_hash()),
            (BlockName::Digest(digest), false) => self.bytes(&digest),
        }
    }

    fn tokens(&mut self, tokens: &[TokenId]) {
        self.array(tokens.len());
        for t in tokens {
            self.uint(u64::from(t.0));
        }
    }

    fn array(&mut self, len: usize) {
        let len = u32::try_from(len).expect("a batch has fewer than four billion elements");
        encode::write_array_len(&mut self.buf, len).expect(NEVER);
    }

    fn uint(&mut self, value: u64) {
        encode::write_uint(&mut self.buf, value).expect(NEVER);
    }

    fn text(&mut self, text: &str) {
        encode::write_str(&mut self.buf, text).expect(NEVER);
    }

    fn bytes(&mut self, bytes: &[u8]) {
        encode::write_bin(&mut self.buf, bytes).expect(NEVER);
    }

    fn nil(&mut self) {
        encode::write_nil(&mut self.buf).expect(NEVER);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde::Deserialize;
    use shared::block_hash::BlockKey;

    use super::*;

    /// Made by msgspec 0.22 from structs declared as vLLM's are: with `array_like` off (0.33) and on (before 0.26).
    #[derive(Deserialize)]
    struct Case {
        array: bool,
        raw: bool,
        hex: String,
    }

    fn name(n: u64, raw: bool) -> BlockName {
        if raw {
            BlockName::Digest(std::array::from_fn(|i| n as u8 + i as u8))
        } else {
            // 97 * 1000003 * 1000003 * n: as the script that made the bytes has it.
            BlockName::Key(BlockKey(u128::from(97 * 1_000_003 * 1_000_003 * n)))
        }
    }

    fn stored(blocks: Vec<BlockName>, parent: Option<BlockName>, content: StoredContent) -> CacheEvent {
        CacheEvent::Stored { blocks, parent, block_size: 2, content: Some(Box::new(content)) }
    }

    fn tokens(ids: &[u32]) -> Vec<TokenId> {
        ids.iter().copied().map(TokenId).collect()
    }

    fn events(raw: bool) -> Vec<CacheEvent> {
        let salted = StoredContent {
            tokens: tokens(&[1, 127, 128, 70_000]),
            cache_salt: Some("salt".into()),
            ..StoredContent::default()
        };
        let adapted = StoredContent {
            tokens: tokens(&[255, 256]),
            lora_id: Some(4),
            lora_name: Some("ad".into()),
            ..StoredContent::default()
        };
        vec![
            stored(vec![name(1, raw), name(2, raw)], None, salted),
            stored(vec![name(3, raw)], Some(name(2, raw)), adapted),
            CacheEvent::Removed(name(1, raw)),
            CacheEvent::Cleared,
        ]
    }

    #[test]
    fn batches_are_the_bytes_that_vllms_encoder_makes() {
        let cases: Vec<Case> = serde_json::from_str(include_str!("../../../tests/fixtures/kv_events.json")).unwrap();
        assert_eq!(cases.len(), 4);
        for Case { array, raw, hex } in cases {
            let format = if array { EventFormat::Array } else { EventFormat::Map };
            let bytes = payload(1_767_225_600.25, &events(raw), Form { format, int_hashes: !raw });
            let found: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
            assert_eq!(found, hex, "array {array}, raw {raw}");
        }
    }

    #[test]
    fn a_session_is_the_last_field_and_counted() {
        let content = StoredContent { session: Some(Arc::from("s-1")), ..StoredContent::default() };
        let form = Form { format: EventFormat::Map, int_hashes: true };
        let bytes = payload(0.0, &[stored(vec![name(1, false)], None, content)], form);
        let value = rmpv::decode::read_value(&mut bytes.as_slice()).unwrap();
        let fields = value[1][0].as_map().unwrap();
        assert_eq!(fields.len(), 12);
        assert_eq!(fields.last().unwrap(), &("session_id".into(), "s-1".into()));
    }

    #[test]
    fn the_low_bits_of_a_key_are_its_hash_and_all_of_them_its_bytes() {
        let event = [CacheEvent::Removed(BlockName::Key(BlockKey(0x0102 << 64 | 0x0304)))];
        let hash = |int_hashes| {
            let bytes = payload(0.0, &event, Form { format: EventFormat::Array, int_hashes });
            rmpv::decode::read_value(&mut bytes.as_slice()).unwrap()[1][0][1][0].clone()
        };
        assert_eq!(hash(true), rmpv::Value::from(0x0304));
        let bytes = [0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0, 3, 4];
        assert_eq!(hash(false), rmpv::Value::from(bytes.as_slice()));
    }
}
