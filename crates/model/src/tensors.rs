//! The crossing between slices and tensors, sizes checked: LibTorch itself would read past the end of a short slice.

use half::bf16;
use millrace_kernels::convert;
use tch::{Device, Kind, Tensor};

use crate::{Dtype, ModelError};

/// LibTorch's name of a type.
pub(crate) fn kind(dtype: Dtype) -> Kind {
    match dtype {
        Dtype::F32 => Kind::Float,
        Dtype::Bf16 => Kind::BFloat16,
    }
}

/// A tensor of `shape` from the bytes of numbers of `kind`.
pub(crate) fn from_bytes(bytes: &[u8], shape: &[i64], kind: Kind, device: Device) -> Result<Tensor, ModelError> {
    let numbers = shape.iter().try_fold(1usize, |product, &side| product.checked_mul(usize::try_from(side).ok()?));
    if numbers.and_then(|n| n.checked_mul(kind.elt_size_in_bytes())) != Some(bytes.len()) {
        return Err(ModelError::Numbers { got: bytes.len() / kind.elt_size_in_bytes(), shape: shape.to_vec() });
    }
    Ok(Tensor::f_from_data_size(bytes, shape, kind)?.f_to_device(device)?)
}

/// A tensor of `shape` and `kind` from floats.
pub(crate) fn from_f32(values: &[f32], shape: &[i64], kind: Kind, device: Device) -> Result<Tensor, ModelError> {
    if kind != Kind::BFloat16 {
        return Ok(from_bytes(bytemuck::cast_slice(values), shape, Kind::Float, device)?.f_to_kind(kind)?);
    }
    from_bytes(bytemuck::cast_slice(&convert::rounded(values)), shape, kind, device)
}

/// The numbers of a tensor in row-major order.
pub(crate) fn to_f32(tensor: &Tensor) -> Result<Vec<f32>, ModelError> {
    let plain = tensor.f_contiguous()?;
    let count = plain.numel();
    if plain.f_kind()? == Kind::BFloat16 {
        let mut halves = vec![bf16::ZERO; count];
        plain.f_copy_data_u8(bytemuck::cast_slice_mut(&mut halves), count)?;
        return Ok(convert::widened(&halves));
    }
    let mut values = vec![0.0f32; count];
    plain.f_to_kind(Kind::Float)?.f_copy_data(&mut values, count)?;
    Ok(values)
}
