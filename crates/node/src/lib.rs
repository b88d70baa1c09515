//! `millrace-node` talks: everything that a process of the cluster does with sockets, certificates, signals and logs.
//!
//! From the wire up: [`socket`] (UDP, segmentation capped), [`transport`] (QUIC's settings), [`endpoint`] (QUIC with mutual TLS; [`pki`] says who is who, [`renew`] takes new
//! certificates),
//! [`frame`] (bytes to messages), [`link`] (one peer's control messages; [`dial`] keeps one up), [`lane`] (connections for KV
//! beside it), [`cells`] (KV on them).
//! [`shutdown`] and [`telemetry`] serve every binary. What a message means is decided in `millrace-core`, never here.
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test may stop at what it did not expect"))]

pub mod cells;
pub mod dial;
pub mod endpoint;
pub mod frame;
pub mod lane;
pub mod link;
pub mod pki;
pub mod renew;
pub mod serve;
pub mod shutdown;
pub mod socket;
pub mod telemetry;
mod threads;
pub mod transport;
