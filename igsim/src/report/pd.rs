//! What routing sidecars did, added up over all of them: the same for live and virtual runs.

use gateway::pd_proxy::core::{Done, Reason};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::stats::{Distribution, Quantiles, Unit};

/// What the routing sidecars did.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PdFigures {
    /// Requests that ended at a sidecar.
    pub requests: u64,
    /// Of these: prefilled by another engine whose cache was then used.
    pub disaggregated: u64,
    /// Not to be prefilled elsewhere.
    pub passed: u64,
    /// Prefilled elsewhere for nothing: the answer did not say where the cache is.
    pub no_transfer_params: u64,
    /// Refused: no such engine in the pool, or nothing that can be prefilled elsewhere.
    pub refused: u64,
    /// Given up because the prefill failed.
    pub prefill_failed: u64,
    /// Further attempts at a prefill.
    pub prefill_retries: u64,
    /// Time of prefills, all attempts and pauses, in milliseconds.
    pub prefill_ms: Quantiles,
    /// Time of decodes, from the end of the prefill to the end of the answer, in milliseconds.
    pub decode_ms: Quantiles,
    /// From arrival to the first byte that is passed on, in milliseconds: the true time to first token behind the gateway.
    pub time_to_first_token_ms: Quantiles,
    /// From arrival to the start of the decode, without the calls of the prefill, in milliseconds.
    pub coordination_ms: Quantiles,
}

/// The same while a run goes on.
#[derive(Debug, Default)]
pub struct PdTally {
    figures: PdFigures,
    prefill: Distribution,
    decode: Distribution,
    first_byte: Distribution,
    coordination: Distribution,
}

impl PdTally {
    /// Adds a request.
    pub fn add(&mut self, done: &Done) {
        let f = &mut self.figures;
        f.requests += 1;
        match done.reason {
            Reason::PrefillHeader if done.prefill_failed => f.prefill_failed += 1,
            // One that its caller gave up before the decode was not disaggregated yet.
            Reason::PrefillHeader => f.disaggregated += u64::from(done.times.decode.is_some()),
            Reason::NoPrefillHeader => f.passed += 1,
            Reason::NoTransferParams => f.no_transfer_params += 1,
            Reason::ForbiddenTarget | Reason::BadTarget | Reason::BadBody | Reason::Undecided => f.refused += 1,
        }
        f.prefill_retries += u64::from(done.prefill_attempts.saturating_sub(1));
        let t = &done.times;
        for (value, all) in [
            (t.prefill, &mut self.prefill),
            (t.decode, &mut self.decode),
            (t.first_byte, &mut self.first_byte),
            (t.coordination, &mut self.coordination),
        ] {
            if let Some(value) = value {
                all.record(value);
            }
        }
    }

    /// The figures so far.
    pub fn figures(&self) -> PdFigures {
        let ms = |all: &Distribution| all.summary(Unit::Millis);
        PdFigures {
            prefill_ms: ms(&self.prefill),
            decode_ms: ms(&self.decode),
            time_to_first_token_ms: ms(&self.first_byte),
            coordination_ms: ms(&self.coordination),
            ..self.figures.clone()
        }
    }
}

#[cfg(test)]
mod tests {
    use gateway::pd_proxy::core::{Failure, Times};
    use shared::time::Dur;

    use super::*;

    #[test]
    fn every_request_is_counted_once() {
        let ms = |n| Some(Dur::from_millis(n));
        let times =
            Times { prefill: ms(20), decode: ms(80), first_byte: ms(30), coordination: ms(1), ..Times::default() };
        let done = |reason| Done {
            reason,
            prefill_attempts: 0,
            prefill_failed: false,
            status: Some(200),
            failure: None,
            times: Times::default(),
        };
        let mut tally = PdTally::default();
        tally.add(&Done { prefill_attempts: 3, times, ..done(Reason::PrefillHeader) });
        tally.add(&Done { prefill_failed: true, failure: Some(Failure::Connect), ..done(Reason::PrefillHeader) });
        for reason in [Reason::NoPrefillHeader, Reason::NoTransferParams, Reason::ForbiddenTarget, Reason::BadBody] {
            tally.add(&done(reason));
        }
        let f = tally.figures();
        assert_eq!((f.requests, f.disaggregated, f.passed, f.no_transfer_params), (6, 1, 1, 1));
        assert_eq!((f.refused, f.prefill_failed, f.prefill_retries), (2, 1, 2));
        assert_eq!((f.prefill_ms.count, f.prefill_ms.mean, f.coordination_ms.mean), (1, 20.0, 1.0));
    }
}
