//! Bugs that are planted on purpose, to see that the simulator finds them. A bug that it does not find is a missing test.
//!
//! In the product [`planted`] is the constant `false` and its marks compile to nothing: the switch is `--cfg millrace_planted`, which
//! only `make sim MUTANTS=1` sets, and no Cargo feature, which some build of the whole workspace could switch on for all. Where a mark
//! stands it says how the rule beside it is easily got wrong; what each bug breaks and who finds it is in `tests/sim/src/mutants.rs`.

/// Lists the bugs once.
macro_rules! bugs {
    ($($(#[doc = $what:literal])+ $bug:ident,)+) => {
        /// A bug. One is planted at a time.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Bug {
            $($(#[doc = $what])+ $bug,)+
        }

        impl Bug {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$bug,)+];

            /// What is done wrong.
            #[must_use]
            pub fn what(self) -> &'static str {
                match self {
                    $(Self::$bug => concat!($($what),+).trim(),)+
                }
            }
        }
    };
}

bugs! {
    // The hand-over, receiving.
    /// A cell whose digest is wrong counts as arrived.
    SkipDigest,
    /// A hand-over is whole when its manifest is there.
    DecodeEarly,
    /// Credit is given once and never extended.
    CreditWithheld,
    /// The receiver gives up without a word to the sender.
    AbortUnsaid,
    /// Streams may write after the slots were given away.
    GateLeftOpen,
    /// A ticket that asks for slots outlives its attempt.
    AskKept,
    // The hand-over, sending.
    /// Cells leave whether or not the receiver's credit allows.
    CreditOverrun,
    /// The receiver's refusal is not heard.
    DeclineUnheard,
    /// The manifest leaves before the last cells.
    FinEarly,
    /// Cells leave before they are computed.
    SendUncomputed,
    /// A sender does not hear that the link is gone.
    LossUnheard,
    /// Blocks are given back while streams still read them.
    FreeUndrained,
    /// The first block that the receiver lacks is not sent.
    SkipOneBlock,
    /// A link's turn is never given back.
    TurnKept,
    /// Spans leave however many bytes of a link are on their way.
    TurnAlways,
    /// A node that did not answer once is refused for ever.
    DoubtForGood,
    /// A ticket that found no room for its hand-over in time is dropped without a word.
    RefusalUnsaid,
    // The pool.
    /// A slot is given out again under its old generation.
    GenerationKept,
    /// A slot that is given out stays on the free list.
    SlotTwice,
    /// A block that comes into use stays in the order of eviction.
    EvictInUse,
    /// A pinned block counts as nobody's.
    EvictPinned,
    /// A cached block is used without a reference.
    HitUnheld,
    /// An eviction is not told.
    EvictionUnsaid,
    // The batch.
    /// A sequence gives its slots back twice.
    FreeTwice,
    /// A sequence ends and keeps its slots.
    FreeForgotten,
    /// Slots of a sequence that failed are given away while streams may read them.
    FreeEarly,
    /// A cancelled attempt computes on when a step is in flight.
    CancelIgnored,
    /// A cancelled attempt gives back the slots that the step in flight writes.
    CancelInFlight,
    /// A reserved block can be found before anything has arrived in it.
    PublishUnverified,
    /// A block can be found before it is computed.
    PublishEarly,
    /// A sequence that computes or arrives has no deadline.
    DeadlineForgotten,
    /// A sequence that is being sent can be preempted.
    PreemptSent,
    /// A preempted sequence counts as computed.
    RecomputeSkipped,
    /// A prompt that is cached to its last token computes nothing.
    NothingToCompute,
    /// A step computes the token before the one that is meant.
    TokenOffByOne,
    /// A resumed answer counts its tokens from 0 again.
    ResumeIndex,
    /// A token is delivered twice.
    IndexTwice,
    /// The token that ends an answer does not end it.
    EndUnseen,
    /// All of a prompt counts as found cached.
    UsageWrong,
    // Identity and drawing.
    /// The name of a block does not depend on the blocks before it.
    HashWithoutParent,
    /// The name of a block does not depend on the tenant.
    HashWithoutTenant,
    /// The name of a block does not depend on the salt.
    HashWithoutSalt,
    /// The digest of a cell does not depend on its place.
    DigestWithoutPlace,
    /// A seeded draw counts the tokens of the step instead of the positions of the sequence.
    DrawByStep,
    // What caches say of themselves.
    /// An old acknowledgement counts for the report that is under way.
    AckOfAnother,
    /// A report is applied though one before it is missing.
    DeltaGap,
    /// A snapshot that reports have overtaken is applied.
    StaleSnapshot,
    /// The digest of a cache always agrees with the index.
    DigestAlwaysSame,
    /// The end of a leading run of blocks is taken for one later.
    PrefixOffByOne,
    // The cluster.
    /// An old incarnation speaks for the current one.
    EpochIgnored,
    /// A process that starts anew gets the incarnation of the one before.
    RestartKeepsEpoch,
    /// Leases do not end.
    LeaseEndless,
    /// The blocks of a dead node stay in the index.
    DeadKeepsBlocks,
    /// A snapshot of the state forgets how far a node's reports were applied.
    SnapshotForgetsSeq,
    /// A cordoned or draining node takes new requests.
    CordonIgnored,
    /// A node that is not to be used is routed to.
    DeadRoutable,
    /// A node that failed this request gets it again though others can do it.
    ExcludedChosen,
    // The log: planted in `millrace-log`, which knows nothing of this list, by whoever opens a replica.
    /// A read is answered without asking the quorum.
    StaleRead,
    /// Appends are acknowledged before they are synced.
    EarlyAck,
}

/// Whether `bug` is planted: never in the product.
#[cfg(not(millrace_planted))]
#[inline(always)]
#[must_use]
pub const fn planted(_: Bug) -> bool {
    false
}

#[cfg(millrace_planted)]
mod chosen {
    use core::sync::atomic::{AtomicUsize, Ordering};

    use super::Bug;

    /// Number of the bug and 1; 0 for none.
    static CHOSEN: AtomicUsize = AtomicUsize::new(0);

    /// Whether `bug` is planted.
    #[must_use]
    pub fn planted(bug: Bug) -> bool {
        CHOSEN.load(Ordering::Relaxed) == bug as usize + 1
    }

    /// Plants a bug in this process in place of the one before, or none.
    pub fn plant(bug: Option<Bug>) {
        CHOSEN.store(bug.map_or(0, |bug| bug as usize + 1), Ordering::Relaxed);
    }
}

#[cfg(millrace_planted)]
pub use chosen::{plant, planted};
