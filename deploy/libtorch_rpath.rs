// Shared body of the build scripts of every package that links LibTorch: each `build.rs` includes this file, because
// Cargo applies a link argument only to the package whose build script prints it.
//
// It gives the binaries and tests an absolute rpath of LibTorch's `lib` folder, so that they run with no environment
// variable and from any target directory. It neither finds nor fetches LibTorch: `LIBTORCH` comes from the environment
// or from `.cargo/libtorch.toml`, which `make setup` writes.

use std::env;
use std::path::{Path, PathBuf};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-env-changed=LIBTORCH_LIB");
    let Some(root) = env::var_os("LIBTORCH_LIB").or_else(|| env::var_os("LIBTORCH")) else {
        stop("LibTorch is not set up");
    };
    let lib = lib_folder(Path::new(&root));
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
}

/// The real path of `root/lib`; stops the build when LibTorch is not there.
fn lib_folder(root: &Path) -> PathBuf {
    let library = root.join("lib/libtorch_cpu.so");
    println!("cargo:rerun-if-changed={}", library.display());
    if !library.exists() {
        stop(&format!("there is no {}", library.display()));
    }
    match root.join("lib").canonicalize() {
        Ok(lib) => lib,
        Err(error) => stop(&format!("{}: {error}", root.display())),
    }
}

fn stop(reason: &str) -> ! {
    eprintln!("\n{reason}: run `make setup`, or set LIBTORCH to a LibTorch 2.11\n");
    std::process::exit(1)
}
