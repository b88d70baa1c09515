//! What replicas and operators bring into the replicated state: commands, answers, whole states, and states saved to files.

use std::fs;

use coordinator::saved::{self, Head, Writer};
use millrace_core::cluster::{self, Cluster, Command};
use millrace_core::ids::{Epoch, NodeId};
use millrace_core::message::Role;

use super::{Parser, Target, mutate, same, times};
use crate::mutate::Random;
use crate::samples;

pub(super) const COMMAND: Target = Target {
    name: "command",
    what: "a command, forwarded by any replica, and what it does to the state",
    examples: || samples::commands().iter().map(cluster::encode).collect(),
    spoil: mutate::bytes,
    open: || {
        let base = samples::cluster();
        Box::new(move |bytes| command(&base, bytes))
    },
    // A copy of the state is made for each input.
    memory_max: |len| (2 << 20) + 64 * len,
    caught: &[],
    short_runs: 20_000,
};

pub(super) const ANSWER: Target = Target {
    name: "answer",
    what: "the answer to a forwarded command, from the leader",
    examples: || samples::answers().iter().map(cluster::encode_answer).collect(),
    spoil: mutate::bytes,
    open: || {
        Box::new(|bytes| {
            let Ok(answer) = cluster::decode_answer(bytes) else { return Ok(false) };
            same("an answer", &cluster::decode_answer(&cluster::encode_answer(&answer)).ok(), &Some(answer))?;
            Ok(true)
        })
    },
    memory_max: times::<24>,
    caught: &[],
    short_runs: 40_000,
};

pub(super) const SNAPSHOT: Target = Target {
    name: "snapshot",
    what: "a whole state, from the leader of the term",
    examples: || vec![samples::cluster().snapshot(), Cluster::new().snapshot()],
    spoil: mutate::bytes,
    open: || Box::new(snapshot),
    memory_max: |len| (4 << 20) + 64 * len,
    caught: &[],
    short_runs: 10_000,
};

pub(super) const SAVED: Target = Target {
    name: "saved",
    what: "a file of `millctl snapshot save`",
    examples: saved_states,
    spoil: sealed,
    open: saved_file,
    memory_max: |len| (4 << 20) + 64 * len,
    caught: &[],
    short_runs: 6_000,
};

fn command(base: &Cluster, bytes: &[u8]) -> Result<bool, String> {
    let Ok(command) = cluster::decode(bytes) else { return Ok(false) };
    same("a command", &cluster::decode(&cluster::encode(&command)).ok().as_ref(), &Some(&command))?;
    let mut state = base.clone();
    let answer = state.apply(base.applied() + 1, &command);
    state.check();
    same("an answer", &cluster::decode_answer(&cluster::encode_answer(&answer)).ok(), &Some(answer))?;
    carries_on(state)?;
    Ok(true)
}

/// A state that was let in must bear what comes next, and be the same on a replica that gets it whole.
fn carries_on(mut state: Cluster) -> Result<(), String> {
    let next = [
        Command::Join(samples::join("decode-9", Role::Decode)),
        Command::Renew { elapsed_us: u64::MAX, nodes: vec![(NodeId(1), Epoch(1))] },
        Command::Renew { elapsed_us: 1, nodes: Vec::new() },
    ];
    for command in next {
        state.apply(state.applied().saturating_add(1), &command);
        state.check();
    }
    let bytes = state.snapshot();
    let restored = Cluster::restore(&bytes).map_err(|error| format!("a state that is not read again: {error}"))?;
    same("a state", &restored.snapshot(), &bytes)
}

fn snapshot(bytes: &[u8]) -> Result<bool, String> {
    let Ok(state) = Cluster::restore(bytes) else { return Ok(false) };
    state.check();
    let mut anew = state.clone();
    anew.refound();
    anew.check();
    carries_on(anew)?;
    carries_on(state)?;
    Ok(true)
}

fn saved_states() -> Vec<Vec<u8>> {
    let (dir, cluster) = (tempfile::tempdir().expect("a scratch directory"), samples::cluster());
    let (path, state) = (dir.path().join("state"), cluster.snapshot());
    let head =
        Head { cluster: "fuzz".into(), replica: "c-1".into(), applied: cluster.applied(), fresh: true, bytes: state.len() as u64 };
    let mut writer = Writer::create(&path, &head).expect("a scratch file");
    writer.push(&state).and_then(|()| writer.finish()).expect("a scratch file");
    vec![fs::read(path).expect("a scratch file")]
}

/// Spoils what is before the checksum, mostly, and makes the checksum right.
fn sealed(bytes: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    let honest = !random.once_in(8) && bytes.len() > 4;
    if honest {
        bytes.truncate(bytes.len() - 4);
    }
    mutate::bytes(bytes, other, random);
    if honest {
        let crc = crc32fast::hash(bytes);
        bytes.extend_from_slice(&crc.to_le_bytes());
    }
}

fn saved_file() -> Parser {
    let dir = tempfile::tempdir().expect("a scratch directory");
    Box::new(move |bytes| {
        let path = dir.path().join("state");
        fs::write(&path, bytes).map_err(|error| error.to_string())?;
        let Ok((head, cluster)) = saved::read(&path) else { return Ok(false) };
        cluster.check();
        if head.applied != cluster.applied() {
            return Err("the head tells of another state".into());
        }
        Ok(true)
    })
}
