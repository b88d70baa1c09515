//! The whole cluster in one thread and one seed: the machines of `millrace-core` as they are, with shells, a network, clocks and an
//! engine that exist only here. Time is virtual; every delay, fault and request is drawn from the seed, so a failure repeats.
//!
//! What is real: `node` with all that is in it (`batch`, `transfer`, `publish`), `cluster`, `holders`, `route`. What is modelled: the shell of a
//! node ([`node`]), links and KV streams ([`net`]), the log as one ordered queue ([`coordinator`]), one
//! gateway ([`gateway`]), KV memory and the arithmetic of the `checksum` engine ([`memory`]), so that a lost, stale or misplaced
//! cell changes an answer. Not here yet: quinn-proto and raft-rs; they take the places of [`net`] and of the ordered queue.

pub mod calm;
pub mod coordinator;
pub mod event;
pub mod fault;
pub mod gateway;
pub mod memory;
pub mod net;
pub mod node;
pub mod plan;
pub mod random;
pub mod world;

pub use world::{Options, Outcome, run};
