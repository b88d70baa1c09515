//! The holders of one block in eight bytes: up to [`INLINE`] in place, more in a list beside the table.

use alloc::vec::Vec;

use crate::message::Tier;

/// Holders of one block that need no list.
pub(super) const INLINE: usize = 4;
/// Bits of a location: the holder's incarnation, and its tier in the lowest two.
const LOCATION_BITS: usize = 14;
const LOCATION_MASK: u64 = (1 << LOCATION_BITS) - 1;
/// Incarnations that the index can tell apart at a time.
pub(super) const INCARNATIONS_MAX: usize = 1 << (LOCATION_BITS - 2);
/// The topmost byte of a place: how many locations are in it, or that it names a list.
const COUNT_SHIFT: usize = 56;
const LISTED: u64 = 0xff;

/// An incarnation of a node, as the index numbers it: below [`INCARNATIONS_MAX`].
pub(super) type Incarnation = u16;

/// One incarnation has the block in one tier. Ordered by incarnation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Location(u16);

impl Location {
    pub fn new(holder: Incarnation, tier: Tier) -> Self {
        Self(holder << 2 | tier as u16)
    }

    pub const fn holder(self) -> Incarnation {
        self.0 >> 2
    }

    pub const fn tier(self) -> Tier {
        match self.0 & 3 {
            0 => Tier::Device,
            1 => Tier::Host,
            _ => Tier::Disk,
        }
    }
}

/// Where a block is: locations sorted by incarnation, or the number of a list of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Place(u64);

impl Place {
    const fn is_listed(self) -> bool {
        self.0 >> COUNT_SHIFT == LISTED
    }

    const fn list(self) -> usize {
        self.0 as u32 as usize
    }

    const fn listed(list: usize) -> Self {
        Self(LISTED << COUNT_SHIFT | list as u64)
    }

    fn inline(locations: &[Location]) -> Self {
        let packed = locations.iter().rev().fold(0, |packed, l| packed << LOCATION_BITS | u64::from(l.0));
        Self((locations.len() as u64) << COUNT_SHIFT | packed)
    }

    fn unpack(self) -> ([Location; INLINE], usize) {
        let at = |i: usize| Location((self.0 >> (i * LOCATION_BITS) & LOCATION_MASK) as u16);
        (core::array::from_fn(at), (self.0 >> COUNT_SHIFT) as usize)
    }

    pub const fn is_empty(self) -> bool {
        self.0 >> COUNT_SHIFT == 0
    }
}

/// The locations of a place, sorted.
#[derive(Clone, Copy, Debug)]
pub(super) enum Locations<'a> {
    Inline([Location; INLINE], usize),
    Listed(&'a [Location]),
}

impl Locations<'_> {
    pub const NONE: Self = Self::Inline([Location(0); INLINE], 0);

    pub fn as_slice(&self) -> &[Location] {
        match self {
            Self::Inline(locations, len) => &locations[..*len],
            Self::Listed(locations) => locations,
        }
    }

    /// The tier in which `holder` has the block, if it has it.
    pub fn tier(&self, holder: Incarnation) -> Option<Tier> {
        match self {
            Self::Inline(locations, len) => locations[..*len].iter().find(|l| l.holder() == holder).map(|l| l.tier()),
            Self::Listed(locations) => find(locations, holder).ok().map(|at| locations[at].tier()),
        }
    }
}

/// The lists of a shard's places that do not fit in eight bytes.
#[derive(Clone, Debug, Default)]
pub(super) struct Lists {
    lists: Vec<Vec<Location>>,
    /// Numbers of lists that no place names.
    free: Vec<u32>,
}

impl Lists {
    pub fn locations(&self, place: Place) -> Locations<'_> {
        if place.is_listed() {
            return Locations::Listed(&self.lists[place.list()]);
        }
        let (locations, len) = place.unpack();
        Locations::Inline(locations, len)
    }

    /// Adds a location or changes its tier; gives the tier that it had.
    pub fn insert(&mut self, place: &mut Place, new: Location) -> Option<Tier> {
        if place.is_listed() {
            return insert_in(&mut self.lists[place.list()], new);
        }
        let (locations, len) = place.unpack();
        let (mut more, mut count) = ([Location(0); INLINE + 1], len);
        more[..len].copy_from_slice(&locations[..len]);
        let old = match find(&more[..len], new.holder()) {
            Ok(at) => Some(core::mem::replace(&mut more[at], new).tier()),
            Err(at) => {
                more.copy_within(at..len, at + 1);
                more[at] = new;
                count += 1;
                None
            }
        };
        *place = if count <= INLINE { Place::inline(&more[..count]) } else { Place::listed(self.list(more.to_vec())) };
        old
    }

    /// Keeps the locations that `keep` approves. A list that has become short moves into the place.
    pub fn retain(&mut self, place: &mut Place, mut keep: impl FnMut(Location) -> bool) {
        if !place.is_listed() {
            let (mut locations, len) = place.unpack();
            let mut kept = 0;
            for at in 0..len {
                if keep(locations[at]) {
                    locations[kept] = locations[at];
                    kept += 1;
                }
            }
            *place = Place::inline(&locations[..kept]);
            return;
        }
        let list = &mut self.lists[place.list()];
        list.retain(|location| keep(*location));
        if list.len() <= INLINE {
            let short = core::mem::take(list);
            self.free.push(place.list() as u32);
            *place = Place::inline(&short);
        }
    }

    /// Takes `holder` out; gives the tier in which it had the block.
    pub fn remove(&mut self, place: &mut Place, holder: Incarnation) -> Option<Tier> {
        let old = self.locations(*place).tier(holder)?;
        self.retain(place, |location| location.holder() != holder);
        Some(old)
    }

    fn list(&mut self, locations: Vec<Location>) -> usize {
        match self.free.pop() {
            Some(list) => {
                self.lists[list as usize] = locations;
                list as usize
            }
            None => {
                self.lists.push(locations);
                self.lists.len() - 1
            }
        }
    }

    /// Lists that are in use.
    pub fn used(&self) -> usize {
        self.lists.len() - self.free.len()
    }

    /// Whether `place` names a list.
    pub const fn has_list(place: Place) -> bool {
        place.is_listed()
    }
}

fn find(locations: &[Location], holder: Incarnation) -> Result<usize, usize> {
    locations.binary_search_by_key(&holder, |location| location.holder())
}

fn insert_in(list: &mut Vec<Location>, new: Location) -> Option<Tier> {
    match find(list, new.holder()) {
        Ok(at) => Some(core::mem::replace(&mut list[at], new).tier()),
        Err(at) => {
            list.insert(at, new);
            None
        }
    }
}
