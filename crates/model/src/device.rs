//! Which device computes: the processor, or a CUDA device. LibTorch's CUDA half is opened here, when it is asked for: the program is linked
//! against the half for processors alone, so one build serves machines with and without a device.

use std::path::{Path, PathBuf};

use millrace_kernels::cuda::{LibraryError, open_library, open_nvrtc};
use tch::{Cuda, Device};

/// LibTorch's CUDA half, beside the half in use.
const CUDA_LIBRARY: &str = "libtorch_cuda.so";
/// What of LibTorch every node has loaded.
const CPU_LIBRARY: &str = "libtorch_cpu.so";

/// What an operator asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The processor.
    #[default]
    Cpu,
    /// A CUDA device, by number.
    Cuda(usize),
}

/// Why a device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// LibTorch is not loaded from a file that can be found.
    #[error("where LibTorch was loaded from cannot be told")]
    Unplaced,
    /// LibTorch's CUDA half is not there, or lacks something.
    #[error(
        "the LibTorch in use has no CUDA half that can be opened ({0}); set LD_LIBRARY_PATH to the lib folder of a LibTorch 2.11 for CUDA"
    )]
    Half(#[from] LibraryError),
    /// No device, or a driver that is too old for this LibTorch.
    #[error("LibTorch finds no CUDA device: is there one, and a driver for it?")]
    None,
    /// The number is too high.
    #[error("there is no cuda:{ordinal}: LibTorch finds {count}, from cuda:0 on")]
    Range {
        /// Asked for.
        ordinal: usize,
        /// Devices.
        count: usize,
    },
}

impl DeviceChoice {
    /// The device, ready for LibTorch. Comes before anything else asks LibTorch about devices: it looks for its CUDA half only once.
    ///
    /// # Errors
    /// [`DeviceError`] for a CUDA device that cannot be used.
    pub fn open(self) -> Result<Device, DeviceError> {
        let Self::Cuda(ordinal) = self else { return Ok(Device::Cpu) };
        let folder =
            libtorch_folder(&std::fs::read_to_string("/proc/self/maps").unwrap_or_default()).ok_or(DeviceError::Unplaced)?;
        open_library(&folder.join(CUDA_LIBRARY))?;
        open_nvrtc(&folder);
        match usize::try_from(Cuda::device_count()).unwrap_or(0) {
            0 => Err(DeviceError::None),
            count if ordinal >= count => Err(DeviceError::Range { ordinal, count }),
            _ => Ok(Device::Cuda(ordinal)),
        }
    }
}

impl std::str::FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("cuda:")) {
            ("cpu", _) => Ok(Self::Cpu),
            (_, Some(ordinal)) => ordinal.parse().map(Self::Cuda).map_err(|_| "expected cuda:N with a number N".into()),
            _ => Err("expected `cpu` or `cuda:N`".into()),
        }
    }
}

impl std::fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// The folder that LibTorch was loaded from, as the system's list of this process's mappings says.
fn libtorch_folder(mappings: &str) -> Option<PathBuf> {
    let paths = mappings.lines().filter_map(|line| Some(Path::new(&line[line.find('/')?..])));
    let mut found = paths.filter(|path| path.file_name().is_some_and(|name| name == CPU_LIBRARY));
    Some(found.next()?.parent()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_read_and_written() {
        for choice in [DeviceChoice::Cpu, DeviceChoice::Cuda(0), DeviceChoice::Cuda(7)] {
            assert_eq!(choice.to_string().parse(), Ok(choice));
        }
        for wrong in ["", "cuda", "cuda:", "cuda:-1", "cuda:x", "gpu:0", "CPU"] {
            assert!(wrong.parse::<DeviceChoice>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn libtorch_is_found_where_it_was_loaded_from() {
        let mappings = "55d0-55d1 r--p 0000 fe:00 12 /usr/bin/node\n\
                        7f00-7f10 r-xp 0000 fe:00 13                         /opt/a torch/lib/libtorch_cpu.so\n7ffd-7ffe rw-p 0 00:00 0 [stack]\n";
        assert_eq!(libtorch_folder(mappings), Some("/opt/a torch/lib".into()));
        assert_eq!(libtorch_folder("55d0-55d1 r--p 0000 fe:00 12 /usr/lib/libtorch_cpu.so.old\n"), None);
    }

    /// This LibTorch is the one that `make setup` fetches, unless the user brought one with CUDA.
    #[test]
    fn a_device_that_cannot_be_used_is_an_error_that_says_why() {
        assert_eq!(DeviceChoice::Cpu.open().expect("there is always a processor"), Device::Cpu);
        let error = DeviceChoice::Cuda(4096).open().expect_err("no machine has so many").to_string();
        assert!(["libtorch_cuda.so", "no CUDA device", "cuda:4096"].iter().any(|part| error.contains(part)), "{error}");
    }
}
