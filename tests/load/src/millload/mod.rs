//! The load harness: a plan first, then its execution, then figures that count from the moment a request was due.
//!
//! `plan` and the files it uses (`rng`, `arrivals`, `lengths`, `workload`, `trace`) decide what is asked and when; `verify` and `cache` say
//! what a plan promises. `run` executes a plan through `client`; `record` is what it notes of each request. `summary`, `figures`, `golden`
//! and `compare` make figures of records; `report` and `screen` show them. `faults` harms a local cluster on time (`network` cuts it); `server` is a server
//! whose truth is known.

pub mod arrivals;
pub mod cache;
pub mod client;
pub mod clock;
pub mod command;
pub mod compare;
pub mod faults;
pub mod figures;
pub mod golden;
pub mod lengths;
pub mod live;
pub mod network;
pub mod plan;
pub mod record;
pub mod report;
pub mod rng;
pub mod run;
pub mod screen;
pub mod search;
pub mod server;
pub mod summary;
pub mod trace;
pub mod verify;
pub mod workload;
