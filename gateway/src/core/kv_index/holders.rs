//! Which endpoints hold which block of a prompt, and where.

use rustc_hash::FxHashMap;
use shared::time::Time;

use super::events::Tier;
use crate::core::pool::EndpointId;

/// One endpoint that holds a block, or is expected to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Holder {
    pub(super) endpoint: EndpointId,
    /// By its own word: one bit for each tier.
    tiers: u8,
    /// Expected until then.
    until: Time,
}

const fn bit(tier: Tier) -> u8 {
    match tier {
        Tier::Gpu => 1,
        Tier::Cpu => 2,
    }
}

impl Holder {
    /// The best tier it holds the block in at `now`; what is only expected counts as the GPU's, as in llm-d. `None` if it holds
    /// nothing any more.
    pub(super) fn tier(&self, now: Time) -> Option<Tier> {
        if self.tiers & bit(Tier::Gpu) != 0 || self.until > now {
            Some(Tier::Gpu)
        } else if self.tiers & bit(Tier::Cpu) != 0 {
            Some(Tier::Cpu)
        } else {
            None
        }
    }
}

/// Blocks and their holders; bounded in both.
#[derive(Debug)]
pub(super) struct Holders {
    max_blocks: usize,
    max_endpoints: usize,
    blocks: FxHashMap<u64, Vec<Holder>>,
}

impl Holders {
    pub(super) fn new(max_blocks: u32, max_endpoints: u32) -> Holders {
        Holders { max_blocks: max_blocks as usize, max_endpoints: max_endpoints as usize, blocks: FxHashMap::default() }
    }

    pub(super) fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Who holds a block.
    pub(super) fn of(&self, key: u64) -> &[Holder] {
        self.blocks.get(&key).map_or(&[], Vec::as_slice)
    }

    /// An endpoint holds a block; `false` if there is no room to remember it.
    pub(super) fn hold(&mut self, key: u64, endpoint: EndpointId, tier: Tier) -> bool {
        self.entry(key, endpoint).map(|h| h.tiers |= bit(tier)).is_some()
    }

    /// An endpoint is expected to hold a block; `false` if there is no room to remember it.
    pub(super) fn expect(&mut self, key: u64, endpoint: EndpointId, until: Time) -> bool {
        self.entry(key, endpoint).map(|h| h.until = h.until.max(until)).is_some()
    }

    /// The place of an endpoint among the holders of a block; a new one takes that of the longest there if all are taken.
    fn entry(&mut self, key: u64, endpoint: EndpointId) -> Option<&mut Holder> {
        if self.blocks.len() >= self.max_blocks && !self.blocks.contains_key(&key) {
            return None;
        }
        let holders = self.blocks.entry(key).or_default();
        let place = match holders.iter().position(|h| h.endpoint == endpoint) {
            Some(place) => place,
            None => {
                if holders.len() >= self.max_endpoints {
                    holders.remove(0);
                }
                holders.push(Holder { endpoint, tiers: 0, until: Time::ZERO });
                holders.len() - 1
            }
        };
        holders.get_mut(place)
    }

    /// An endpoint holds a block no more in this tier.
    pub(super) fn release(&mut self, key: u64, endpoint: EndpointId, tier: Tier) {
        self.change(key, endpoint, |h| h.tiers &= !bit(tier));
    }

    /// What was expected until `until` is over.
    pub(super) fn expire(&mut self, key: u64, endpoint: EndpointId, until: Time) {
        self.change(key, endpoint, |h| {
            if h.until <= until {
                h.until = Time::ZERO;
            }
        });
    }

    /// Forgets all that is known of a block at an endpoint.
    pub(super) fn forget(&mut self, key: u64, endpoint: EndpointId) {
        self.change(key, endpoint, |h| (h.tiers, h.until) = (0, Time::ZERO));
    }

    fn change(&mut self, key: u64, endpoint: EndpointId, change: impl FnOnce(&mut Holder)) {
        let Some(holders) = self.blocks.get_mut(&key) else { return };
        let Some(place) = holders.iter().position(|h| h.endpoint == endpoint) else { return };
        change(&mut holders[place]);
        if holders[place].tiers == 0 && holders[place].until == Time::ZERO {
            holders.remove(place);
        }
        if holders.is_empty() {
            self.blocks.remove(&key);
        }
    }
}
