//! Lets what this package builds find LibTorch at run time; the shared body says how.

include!("../deploy/libtorch_rpath.rs");
