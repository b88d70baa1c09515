//! What tests of the log, and of what is built on it, have in common: a disk that behaves badly ([`simdisk`]) and a judge of histories
//! ([`linear`]). Nothing of a running replica uses it.

pub mod linear;
pub mod simdisk;
