//! The load harness: a plan first, then its execution, then figures that count from the moment a request was due.
//!
//! `plan` and the files it uses (`rng`, `arrivals`, `lengths`, `workload`, `trace`) decide what is asked and when; `verify` and `cache` say
//! what a plan promises.

pub mod arrivals;
pub mod cache;
pub mod command;
pub mod lengths;
pub mod plan;
pub mod rng;
pub mod trace;
pub mod verify;
pub mod workload;
