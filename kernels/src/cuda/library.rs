//! Opening shared libraries for good: LibTorch's CUDA half registers itself with LibTorch when it is opened, and NVRTC is found by name
//! afterwards only when it is open already.

#![allow(unsafe_code)]

use std::error::Error;
use std::path::{Path, PathBuf};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

/// A library could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
pub struct LibraryError {
    /// Which.
    pub path: PathBuf,
    /// What the loader said; it names the file.
    pub reason: String,
}

/// Opens a library with everything that it needs, for as long as the process lives.
///
/// # Errors
/// [`LibraryError`]: it, or a library that it needs, is not there or cannot be used.
pub fn open_library(path: &Path) -> Result<(), LibraryError> {
    // SAFETY: opening runs the library's own initialisers. The callers name LibTorch's and NVIDIA's libraries beside the LibTorch in use.
    let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) };
    // The loader's own words are the error's source.
    let said = |error: libloading::Error| error.source().map_or_else(|| error.to_string(), ToString::to_string);
    let library = library.map_err(|error| LibraryError { path: path.to_owned(), reason: said(error) })?;
    std::mem::forget(library);
    Ok(())
}

/// Opens NVRTC where Python's packages put it, seen from the `lib` folder of their LibTorch. Where there is none, it has to be on the loader's own path.
pub fn open_nvrtc(libtorch: &Path) {
    for package in ["../../nvidia/cu13/lib", "../../nvidia/cuda_nvrtc/lib"].map(|folder| libtorch.join(folder)) {
        let Ok(entries) = std::fs::read_dir(package) else { continue };
        let mut found: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| is_nvrtc(path)).collect();
        // The built-in functions before NVRTC, which looks for them by name.
        found.sort();
        found.iter().for_each(|path| drop(open_library(path)));
    }
}

/// `libnvrtc.so.13` or `libnvrtc-builtins.so.13.0`.
fn is_nvrtc(path: &Path) -> bool {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    name.starts_with("libnvrtc.so.") || name.starts_with("libnvrtc-builtins.so.")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_there_is_named() {
        let error = open_library(Path::new("/nowhere/libtorch_cuda.so")).unwrap_err();
        assert!(error.to_string().contains("/nowhere/libtorch_cuda.so"), "{error}");
        assert_eq!(error.path, Path::new("/nowhere/libtorch_cuda.so"));
        open_nvrtc(Path::new("/nowhere"));
        let named = ["libnvrtc.so.13", "libnvrtc-builtins.so.13.0", "libnvrtc.alt.so.13", "libnvrtc_static.a"];
        assert_eq!(named.map(|name| is_nvrtc(Path::new(name))), [true, true, false, false]);
    }
}
