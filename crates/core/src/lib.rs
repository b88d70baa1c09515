//! `millrace-core` decides. It holds every rule of the cluster as pure state machines and pure functions:
//! no clock, no socket, no file, no thread; the compiler refuses them (`no_std`), and time and randomness come in as inputs.
//!
//! The one shape of a machine: `handle(now, input)` is the only mutator, `poll()` is drained to `None` after it,
//! `deadline()` says when to come back, `check()` asserts every invariant. The idea is quinn-proto's and str0m's.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod batch;
pub mod cluster;
pub mod engine;
pub mod holders;
pub mod identity;
pub mod ids;
pub mod layout;
pub mod message;
pub mod node;
pub mod planted;
pub mod pool;
pub mod publish;
pub mod quota;
pub mod route;
pub mod sampling;
pub mod top;
pub mod transfer;
