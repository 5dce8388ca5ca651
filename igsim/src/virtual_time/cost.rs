//! What the gateway's and the engine's own code costs in virtual time, where no clock can be read.
//!
//! The figures are medians of the benches named beside them, rounded, on a two-core virtual machine; they are a model of a
//! gateway on such a machine and of no other. `cargo bench -p benches` prints today's.
//! Those of the index of KV events were read on one that took 2.2 times as long for `gateway_parse/256`, and are divided by that.

use shared::time::{Dur, Stage, Stopwatch, Time};

/// Parsing a body and hashing its prompt: a fixed part (bench `gateway_parse/256`).
const PARSE_NS: u64 = 320;
/// The same in picoseconds per byte (bench `gateway_parse/65536`).
const PARSE_PS_PER_BYTE: u64 = 190;
/// Admission and the list of candidates (bench `schedule`, its part that depends on neither plugins nor endpoints).
const ADMIT_NS: u64 = 100;
/// One of seven plugins: a fixed part and picoseconds per endpoint (bench `schedule/5` to `schedule/100`).
const PLUGIN_NS: u64 = 37;
const PLUGIN_PS_PER_ENDPOINT: u64 = 1_600;
/// Finding who holds a block of a prompt, in picoseconds (bench `kv_index/walk`).
const KV_WALK_PS_PER_BLOCK: u64 = 9_000;
/// Rating the endpoints by one block, in picoseconds per block and endpoint (bench `kv_index/score`).
const KV_SCORE_PS: u64 = 400;
/// Taking a block of a KV event into the index, in picoseconds (bench `kv_index/apply`: 450 stored and taken out again).
const KV_APPLY_PS_PER_BLOCK: u64 = 56_000;
/// Naming the blocks of a prompt in the engine: a fixed part and picoseconds per token (bench `prepare_prompt`).
const INPUTS_NS: u64 = 20;
const INPUTS_PS_PER_TOKEN: u64 = 865;
/// Reading the members of a body and writing it with others: a fixed part (bench `pd_proxy_edit/256`).
const EDIT_NS: u64 = 325;
/// The same in picoseconds per byte (bench `pd_proxy_edit/65536`).
const EDIT_PS_PER_BYTE: u64 = 150;

/// What one stage of the gateway costs.
pub fn stage(stage: Stage) -> Dur {
    let plugin = |endpoints: u32| PLUGIN_NS + PLUGIN_PS_PER_ENDPOINT * u64::from(endpoints) / 1000;
    Dur::from_nanos(match stage {
        Stage::Parse { bytes } => PARSE_NS + u64::from(bytes) * PARSE_PS_PER_BYTE / 1000,
        Stage::Admit => ADMIT_NS,
        Stage::KvLookup { blocks } => PLUGIN_NS + KV_WALK_PS_PER_BLOCK * u64::from(blocks) / 1000,
        Stage::KvScore { blocks, endpoints } => {
            PLUGIN_NS + KV_SCORE_PS * u64::from(blocks) * u64::from(endpoints) / 1000
        }
        Stage::KvEvents { blocks } => PLUGIN_NS + KV_APPLY_PS_PER_BLOCK * u64::from(blocks) / 1000,
        // A decider looks at one endpoint.
        Stage::Decide => plugin(1),
        Stage::Filter { endpoints } | Stage::Score { endpoints } | Stage::Pick { endpoints } => plugin(endpoints),
    })
}

/// What processing a prompt costs the engine's front end.
pub fn process_inputs(prompt_tokens: u32) -> Dur {
    Dur::from_nanos(INPUTS_NS + u64::from(prompt_tokens) * INPUTS_PS_PER_TOKEN / 1000)
}

/// What reading a body's members and writing it anew costs a sidecar.
pub fn edit_body(bytes: u32) -> Dur {
    Dur::from_nanos(EDIT_NS + u64::from(bytes) * EDIT_PS_PER_BYTE / 1000)
}

/// Bytes of a request's body around its prompt: the JSON that the load client writes.
const BODY_FRAME: usize = 200;

/// Size of the body of a request with a prompt of so many tokens.
pub fn body_bytes(prompt_tokens: usize) -> u32 {
    u32::try_from(BODY_FRAME + prompt_tokens * shared::tokens::BYTES_PER_TOKEN).unwrap_or(u32::MAX)
}

/// A stopwatch that charges for stages.
#[derive(Clone, Copy, Debug)]
pub struct CostWatch(pub Time);

impl Stopwatch for CostWatch {
    fn lap(&mut self, done: Stage) -> Time {
        self.0 += stage(done);
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_watch_charges_every_stage_once() {
        let mut watch = CostWatch(Time::from_nanos(1_000));
        watch.lap(Stage::Admit);
        let end = watch.lap(Stage::Filter { endpoints: 10 });
        let charged = stage(Stage::Admit) + stage(Stage::Filter { endpoints: 10 });
        assert_eq!(end, Time::from_nanos(1_000) + charged);
        assert!(stage(Stage::Score { endpoints: 100 }) > stage(Stage::Score { endpoints: 5 }));
        assert!(process_inputs(8192) > process_inputs(1));
    }
}
