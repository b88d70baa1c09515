//! The arguments by which an operator chooses how a node computes. Both kinds of node share them.

use clap::Args;
use millrace_core::layout::KvDtype;

use crate::compute::{Compute, Switch, Weights};
use crate::device::DeviceChoice;

/// How the engine multiplies.
#[derive(Args, Clone, Debug)]
pub struct ComputeArgs {
    /// Tokens of a step above which LibTorch multiplies in place of the own kernels: a number, `never`, or `measured` at the start
    #[arg(long, env = "MILLRACE_LIBTORCH_ABOVE", default_value = "measured", value_parser = parse_switch)]
    libtorch_above: Switch,
    /// Give a sequence the same bits whatever else is computed with it; slower
    #[arg(long, env = "MILLRACE_BATCH_INVARIANT")]
    batch_invariant: bool,
    /// What the weights are kept as: `file`, `bf16`, or `q8_0`
    #[arg(long, env = "MILLRACE_WEIGHTS", default_value = "file", value_parser = parse_weights)]
    weights: Weights,
    /// What keys and values are cached as, the same on every node: `bf16`, `int8` or `f32`; as --dtype says if absent
    #[arg(long, env = "MILLRACE_KV_DTYPE", value_name = "TYPE")]
    kv_dtype: Option<KvDtype>,
    /// What computes: `cpu`, or `cuda:N`, which wants a LibTorch for CUDA on LD_LIBRARY_PATH
    #[arg(long, env = "MILLRACE_DEVICE", default_value_t)]
    device: DeviceChoice,
}

impl ComputeArgs {
    /// Where an engine is to compute.
    #[must_use]
    pub fn device(&self) -> DeviceChoice {
        self.device
    }

    /// What was chosen, on `threads` threads.
    #[must_use]
    pub fn compute(&self, threads: usize) -> Compute {
        let Self { libtorch_above: switch, batch_invariant, weights, kv_dtype, device: _ } = *self;
        Compute { threads, switch, batch_invariant, weights, kv_dtype }
    }
}

fn parse_switch(text: &str) -> Result<Switch, String> {
    match text {
        "measured" => Ok(Switch::Measured),
        "never" => Ok(Switch::Never),
        rows => rows.parse().map(Switch::Above).map_err(|_| "expected a number, `never` or `measured`".into()),
    }
}

fn parse_weights(text: &str) -> Result<Weights, String> {
    match text {
        "file" => Ok(Weights::Kept),
        "bf16" => Ok(Weights::Bf16),
        "q8_0" => Ok(Weights::Q8_0),
        _ => Err("expected `file`, `bf16` or `q8_0`".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn switches_are_read() {
        assert_eq!(parse_switch("measured"), Ok(Switch::Measured));
        assert_eq!(parse_switch("never"), Ok(Switch::Never));
        assert_eq!(parse_switch("64"), Ok(Switch::Above(64)));
        assert!(parse_switch("-1").is_err());
    }
}
