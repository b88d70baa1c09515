//! Fuzzing: every parser that a peer, a client or an operator can reach gets valid examples that were spoiled, and must refuse or
//! take them without a panic, without a hang, without more memory than it may, and without losing what it took.
//!
//! `mutate` and `json` spoil examples, `samples` holds one of everything that goes over a wire, [`targets`] names the parsers and their
//! promises, `run` holds one target to its promises, `corpus` keeps the inputs that once broke one. An input depends on the seed and its
//! number alone, so that any run can be repeated; there is no feedback from coverage, because that takes a nightly compiler (decision
//! 50). A target is a function from bytes, to which such an engine could be put as well.
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test may stop at what it did not expect"))]

pub mod corpus;
mod json;
mod mutate;
pub mod run;
mod samples;
pub mod targets;

use std::alloc::System;

use peakmem_alloc::{INSTRUMENTED_SYSTEM, PeakMemAlloc};

/// Counts what is allocated, so that a target's promise about memory can be held against it.
#[global_allocator]
static MEMORY: &PeakMemAlloc<System> = &INSTRUMENTED_SYSTEM;
