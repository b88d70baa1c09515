//! Measures what the project claims: each figure is the median of several runs, with the least and the greatest, printed as a row that
//! can be pasted into `docs/benchmarks.md`. It judges nothing and writes no file of its own.
//!
//! `engine` and `handover` start a whole local cluster and measure it through its HTTP door; `wire` moves cells between two processes beside
//! other ways of doing so; `route`, `raft` (with `rebuild`) and `index` measure one part each, in this process; `faults` loses a cluster's
//! leader under load; `exposed` and `beside` hand over on links that are slowed down. `millload` is the load harness. LibTorch is not linked: engines are reached as users reach them.

pub mod beside;
pub mod cluster;
pub mod engine;
pub mod events;
pub mod exposed;
pub mod faults;
pub mod handover;
pub mod index;
pub mod local;
pub mod machine;
pub mod millload;
pub mod raft;
pub mod rebuild;
pub mod report;
pub mod route;
pub mod wire;
