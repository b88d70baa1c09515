//! Checks and measures a CUDA device: the tiny models against their golden rows, hand-overs between the processor and the device, then prefill
//! and decode of a random model of Llama-8B's shape beside what the device could do.
//!
//! `make gpu-check` builds it; `deploy/gpu-check` runs it with the LibTorch of the machine's Python. With `--device cpu` the first half
//! runs anywhere, with the reference set of kernels.

#[path = "../../tests/support/mod.rs"]
mod support;

#[path = "../../tests/support/correct.rs"]
mod correct;
mod speed;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use millrace_model::DeviceChoice;
use tch::Device;

/// Checks and measures a CUDA device.
#[derive(Parser)]
struct Args {
    /// The device: cuda:N; with `cpu` only what is computed is checked, not how fast
    #[arg(long, default_value = "cuda:0")]
    device: DeviceChoice,
    /// Folder of the tiny models with their golden rows
    #[arg(long)]
    models: Option<PathBuf>,
    /// Do not measure
    #[arg(long)]
    no_speed: bool,
    /// Do not check
    #[arg(long)]
    no_check: bool,
    /// Layers of the measured model; fewer take less memory, and less time to make
    #[arg(long, default_value_t = 32)]
    layers: usize,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("gpu-check: {reason}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<(), String> {
    let device = args.device.open().map_err(|error| error.to_string())?;
    println!("device {}: {}", args.device, name(device)?);
    if !args.no_check {
        correct::check(device, args.models.as_deref())?;
    }
    match device {
        Device::Cuda(ordinal) if !args.no_speed => speed::measure(ordinal, args.layers).map_err(|error| error.to_string()),
        _ => Ok(()),
    }
}

fn name(device: Device) -> Result<String, String> {
    match device {
        Device::Cuda(ordinal) => millrace_kernels::cuda::device_name(ordinal).map_err(|error| error.to_string()),
        _ => Ok("LibTorch's operations in place of CUDA's kernels".into()),
    }
}
