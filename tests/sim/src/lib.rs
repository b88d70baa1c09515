//! The whole cluster in one thread and one seed: the machines of `millrace-core` as they are, with shells, a network, clocks and an
//! engine that exist only here. Time is virtual; every delay, fault and request is drawn from the seed, so a failure repeats.
//!
//! What is real: `node` with all that is in it (`batch`, `transfer`, `publish`), `cluster`, `holders`, `route`, and the replicated log (`millrace-log`: raft-rs, its files, its
//! snapshots) of three replicas over disks that lose what was not synced. What is modelled: the shell of a node
//! ([`node`]), links and KV streams ([`net`]; in some worlds they are real QUIC, `quic`), what a replica does round its log ([`replica`]),
//! gateways ([`gateway`]), KV memory and the arithmetic of the `checksum` engine ([`memory`]), so that a lost, stale or misplaced
//! cell changes an answer.

pub mod aborts;
pub mod audit;
pub mod callers;
pub mod calm;
pub mod clients;
pub mod corruption;
pub mod event;
pub mod fault;
pub mod gateway;
pub mod invariants;
pub mod memory;
#[cfg(millrace_planted)]
pub mod mutants;
pub mod net;
pub mod node;
pub mod operators;
pub mod orders;
pub mod plan;
pub mod probe;
mod process;
mod quic;
pub mod random;
pub mod reception;
pub mod replica;
pub mod world;

pub use world::{Options, Outcome, run};
