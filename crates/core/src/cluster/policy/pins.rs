//! Pins: chains of blocks that nodes which hold them do not evict. The log says which; each node is told by the leader.
//!
//! Bounded so that every live node could hold all of them: together at most [`PIN_PERCENT_MAX`] of the smallest pool.

use alloc::collections::BTreeSet;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use rkyv::{Archive, Deserialize, Serialize};

use super::{Policy, PolicyAnswer, PolicyError, no_tenant};
use crate::cluster::NAME_BYTES_MAX;
use crate::ids::BlockHash;
use crate::pool::{PIN_PERCENT_MAX, pins_max};

/// Pins; a further one is refused.
pub const PINS_MAX: usize = 1024;
/// Blocks of one pin; a longer one is refused.
pub const PIN_BLOCKS_MAX: usize = 8192;
/// Blocks of all pins, each counted once: what one message to a node carries, 512 KiB.
pub const PINNED_BLOCKS_MAX: usize = 1 << 15;

/// A chain of blocks that stays.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct Pin {
    /// Whose blocks.
    pub tenant: String,
    /// What the operator calls it.
    pub label: String,
    /// From the first block of a prompt on.
    pub names: Vec<BlockHash>,
    /// Log time at which it ends, microseconds; `None` for never.
    pub until_us: Option<u64>,
}

impl Policy {
    /// All pinned blocks, each once, each after the one before it in its chain. O(blocks log blocks).
    #[must_use]
    pub fn pinned_names(&self) -> Vec<BlockHash> {
        let mut seen = BTreeSet::new();
        self.pins.values().flat_map(|pin| &pin.names).copied().filter(|name| seen.insert(*name)).collect()
    }

    pub(super) fn pin(&mut self, pin: Pin, until_us: Option<u64>, smallest_pool: Option<u32>) -> Result<PolicyAnswer, PolicyError> {
        if !self.tenants.contains_key(&pin.tenant) {
            return Err(no_tenant(&pin.tenant));
        }
        let blocks = pin.names.len();
        if blocks == 0 {
            return Err(PolicyError::Invalid("the prompt has no full block: there is nothing to pin".into()));
        }
        if blocks > PIN_BLOCKS_MAX || pin.label.len() > NAME_BYTES_MAX {
            let rule = format!("{blocks} blocks in one pin, {PIN_BLOCKS_MAX} are allowed, and {NAME_BYTES_MAX} bytes of label");
            return Err(PolicyError::Full(rule));
        }
        if let Some((id, known)) = self.pins.iter_mut().find(|(_, known)| known.names == pin.names) {
            (known.until_us, known.label) = (until_us, pin.label);
            return Ok(PolicyAnswer::Pinned { pin: *id });
        }
        self.check_room(&pin.names, smallest_pool)?;
        self.last_pin += 1;
        self.pins_version += 1;
        self.pins.insert(self.last_pin, Pin { until_us, ..pin });
        Ok(PolicyAnswer::Pinned { pin: self.last_pin })
    }

    fn check_room(&self, names: &[BlockHash], smallest_pool: Option<u32>) -> Result<(), PolicyError> {
        if self.pins.len() >= PINS_MAX {
            return Err(PolicyError::Full(format!("there are {PINS_MAX} pins already")));
        }
        let mut all: BTreeSet<BlockHash> = self.pinned_names().into_iter().collect();
        let before = all.len();
        all.extend(names);
        if all.len() > PINNED_BLOCKS_MAX {
            return Err(PolicyError::Full(format!("{} blocks would be pinned, {PINNED_BLOCKS_MAX} are allowed", all.len())));
        }
        match smallest_pool.filter(|slots| all.len() > pins_max(*slots) as usize) {
            Some(slots) => Err(PolicyError::Full(format!(
                "{before} blocks are pinned and {} more would be: over {PIN_PERCENT_MAX} % of the smallest pool, which has {slots} slots",
                all.len() - before
            ))),
            None => Ok(()),
        }
    }

    pub(super) fn unpin(&mut self, pin: u64) -> Result<PolicyAnswer, PolicyError> {
        if self.pins.remove(&pin).is_none() {
            return Err(PolicyError::NotFound(format!("no pin {pin}")));
        }
        self.pins_version += 1;
        Ok(PolicyAnswer::Done)
    }

    /// Ends the pins whose time is over.
    pub(in crate::cluster) fn expire(&mut self, now_us: u64) {
        self.drop_pins(|pin| pin.until_us.is_some_and(|until| until <= now_us));
    }

    pub(super) fn drop_pins(&mut self, gone: impl Fn(&Pin) -> bool) {
        let before = self.pins.len();
        self.pins.retain(|_, pin| !gone(pin));
        self.pins_version += u64::from(self.pins.len() != before);
    }
}
