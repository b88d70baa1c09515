//! Planted bugs: each is run over seeds until enough of them show it, and must be found by an invariant that it breaks. A run that
//! goes wrong for another reason does not count, nor does a seed that goes wrong without the bug.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::panic::{self, PanicHookInfo, catch_unwind};

use millrace_core::planted::{Bug, plant};

use crate::{Options, run};

thread_local! {
    static LAST: RefCell<String> = const { RefCell::new(String::new()) };
}

/// What a run of mutants takes.
#[derive(Clone, Copy, Debug)]
pub struct Search {
    /// The first seed.
    pub seed: u64,
    /// Events of each run before faults and clients stop.
    pub steps: u64,
    /// Each bug is run over so many seeds.
    pub seeds: u64,
    /// A bug that they do not show is run over so many more.
    pub seeds_max: u64,
}

/// What became of one bug.
#[derive(Debug, Default)]
struct Finding {
    seeds: u64,
    first: Option<u64>,
    /// Seeds that found it, by invariant.
    by: BTreeMap<String, u64>,
    /// Seeds that went wrong in a way that the bug should not.
    otherwise: BTreeMap<String, u64>,
}

/// The invariants that a bug may break first: `I1` to `I8` as in [`crate::invariants`], or the machine whose `check()` stops.
const fn breaks(bug: Bug) -> &'static [&'static str] {
    match bug {
        Bug::SkipDigest | Bug::DecodeEarly | Bug::TokenOffByOne | Bug::PublishUnverified => &["I2"],
        Bug::HashWithoutParent | Bug::HashWithoutSalt | Bug::DigestWithoutPlace => &["I2"],
        Bug::HashWithoutTenant => &["I2", "I8"],
        Bug::DrawByStep | Bug::FinEarly => &["I2"],
        Bug::SendUncomputed => &["I2", "I5"],
        Bug::SkipOneBlock => &["I2", "send.rs"],
        Bug::AbortUnsaid | Bug::DeclineUnheard => &["I1"],
        Bug::AskKept => &["I1", "arriving.rs", "node.rs"],
        Bug::LossUnheard => &["I1", "I3"],
        Bug::GateLeftOpen | Bug::FreeUndrained => &["I1", "I2", "I5"],
        Bug::CancelIgnored => &["I1", "I3"],
        Bug::CreditWithheld | Bug::CordonIgnored => &["I3"],
        Bug::DoubtForGood => &["I1"],
        Bug::TurnKept => &["I1", "I3"],
        Bug::TurnAlways => &["pace.rs"],
        Bug::RefusalUnsaid => &["node.rs"],
        Bug::DeadRoutable | Bug::ExcludedChosen => &["I3"],
        Bug::CreditOverrun => &["send.rs", "I7"],
        Bug::GenerationKept => &["I5"],
        Bug::SlotTwice | Bug::EvictInUse | Bug::EvictPinned | Bug::HitUnheld => &["pool.rs", "batch.rs"],
        Bug::FreeTwice | Bug::FreeForgotten | Bug::DeadlineForgotten | Bug::CancelInFlight => &["batch.rs"],
        Bug::FreeEarly | Bug::PreemptSent => &["I2", "I5", "node.rs"],
        Bug::PublishEarly | Bug::RecomputeSkipped | Bug::NothingToCompute => &["sequence.rs"],
        Bug::ResumeIndex | Bug::IndexTwice | Bug::UsageWrong | Bug::EndUnseen => &["I4"],
        Bug::EvictionUnsaid | Bug::DeltaGap | Bug::StaleSnapshot | Bug::PrefixOffByOne | Bug::AckOfAnother => &["I6"],
        Bug::DigestAlwaysSame | Bug::RestartKeepsEpoch | Bug::EpochIgnored => &["I6"],
        Bug::LeaseEndless | Bug::DeadKeepsBlocks => &["cluster.rs"],
        Bug::SnapshotForgetsSeq | Bug::StaleRead | Bug::EarlyAck => &["I6"],
    }
}

/// Plants each bug (those of which the name has `only` in it), and prints what was found. True when all were.
pub fn search(what: &Search, only: &str) -> bool {
    let hook = panic::take_hook();
    panic::set_hook(Box::new(|info| LAST.with(|last| *last.borrow_mut() = reason(info))));
    println!("{:<20} {:<75} {:<22} {:>9}  first seed", "bug", "what is done wrong", "found by", "of seeds");
    let mut clean = BTreeMap::new();
    let chosen: Vec<Bug> = Bug::ALL.iter().copied().filter(|bug| format!("{bug:?}").contains(only)).collect();
    let missed = chosen.iter().filter(|bug| !report(**bug, &find(**bug, what, &mut clean))).count();
    panic::set_hook(hook);
    plant(None);
    println!("{} of {} bugs found", chosen.len() - missed, chosen.len());
    missed == 0
}

fn find(bug: Bug, what: &Search, clean: &mut BTreeMap<u64, bool>) -> Finding {
    let mut finding = Finding::default();
    let enough = |finding: &Finding| finding.seeds >= if finding.first.is_some() { what.seeds } else { what.seeds_max };
    while !enough(&finding) {
        let seed = what.seed + finding.seeds;
        finding.seeds += 1;
        let Some(reason) = wrong(Some(bug), seed, what.steps) else { continue };
        let right = breaks(bug).iter().any(|wanted| reason.starts_with(wanted));
        let shown = *clean.entry(seed).or_insert_with(|| wrong(None, seed, what.steps).is_none());
        if right && shown {
            finding.first.get_or_insert(seed);
            *finding.by.entry(reason.split([':', ' ']).next().unwrap_or_default().to_owned()).or_default() += 1;
        } else {
            let reason = if shown { reason } else { format!("without the bug too: {reason}") };
            let reason = reason.chars().filter(|c| !c.is_ascii_digit()).take(90).collect();
            *finding.otherwise.entry(reason).or_default() += 1;
        }
    }
    finding
}

/// Why a world goes wrong; `None` when it does not.
fn wrong(bug: Option<Bug>, seed: u64, steps: u64) -> Option<String> {
    plant(bug);
    let outcome = catch_unwind(|| run(Options { seed, steps, trace: false }));
    outcome.err().map(|_| LAST.with(RefCell::take))
}

/// The invariant's name and what it says, or the machine that stopped.
fn reason(info: &PanicHookInfo) -> String {
    let text = info.payload_as_str().unwrap_or_default();
    let text = text.split_once("` failed: ").map_or(text, |(_, said)| said);
    // A replica catches what stops its state and ends with the words.
    let caught = text.split_once("Invariant(\"").map(|(_, said)| said);
    let text = caught.unwrap_or(text);
    let named = text.starts_with('I') && text.as_bytes().get(1).is_some_and(u8::is_ascii_digit);
    let file = info.location().map_or("", |at| at.file()).rsplit('/').next().unwrap_or_default();
    let file = if caught.is_some() { "cluster.rs" } else { file };
    let text = text.replace('\n', " ");
    if named { text } else { format!("{file}: {text}") }
}

fn report(bug: Bug, finding: &Finding) -> bool {
    let found: u64 = finding.by.values().sum();
    let by: Vec<_> = finding.by.iter().map(|(by, seeds)| format!("{by} ({seeds})")).collect();
    let first = finding.first.map_or("NOT FOUND".to_owned(), |seed| seed.to_string());
    let name = format!("{bug:?}");
    println!("{name:<20} {:<75} {:<22} {:>9}  {first}", bug.what(), by.join(", "), format!("{found}/{}", finding.seeds));
    for (reason, seeds) in &finding.otherwise {
        println!("{:20} went wrong otherwise in {seeds}: {reason}", "");
    }
    finding.first.is_some()
}
