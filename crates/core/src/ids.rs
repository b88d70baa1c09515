//! Names of things: small newtypes, so that an index, a count and a byte size cannot be mixed up.

use core::fmt;
use rkyv::{Archive, Deserialize, Serialize};

/// A token of the model's vocabulary.
pub type TokenId = u32;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id!(
    /// A node's number, granted by the log at its first join and kept for its name.
    NodeId(u16)
);
id!(
    /// A node's incarnation, granted by the log at each join. Cluster-wide, strictly growing, never 0.
    Epoch(u64)
);
id!(
    /// A coordinator replica's raft id, from 1.
    ReplicaId(u64)
);
id!(
    /// A place in a node's pool that can hold one block.
    Slot(u32)
);
id!(
    /// Counts how often a slot was given out. A write or read that names an old generation has no effect.
    Generation(u32)
);
id!(
    /// Microseconds on one process's monotonic clock. Never compared between machines.
    Time(u64)
);

impl Time {
    /// This moment plus `us` microseconds.
    #[must_use]
    pub const fn after(self, us: u64) -> Self {
        Self(self.0.saturating_add(us))
    }

    /// Microseconds since `earlier`; 0 when `earlier` is later.
    #[must_use]
    pub const fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// A request, as the gateway named it: 128 random bits made by the server, never by the client.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u128);

/// One attempt at one request. Everything a node does for a request is named by its attempt, so that
/// what an older attempt still sends cannot be taken for the newer one's.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AttemptId {
    /// The request.
    pub request: RequestId,
    /// Counts the tickets made for it, from 0.
    pub attempt: u16,
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Display for AttemptId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.request, self.attempt)
    }
}

/// A slot together with the generation it was given out under.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotRef {
    /// The place.
    pub slot: Slot,
    /// The incarnation of its content.
    pub generation: Generation,
}

/// The name of a full block: first 128 bits of a keyed BLAKE3 chain over its tokens and all before (see [`crate::identity`]).
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[rkyv(derive(PartialEq, Eq))]
pub struct BlockHash(pub [u8; 16]);

impl fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}
