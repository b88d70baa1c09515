//! The portable reference of the CUDA kernels: the same copies and the same attention with LibTorch's operations, on any device that it
//! computes on. Slow, plain, and what the tensor engine is tested with where there is no CUDA device.
//!
//! A layer's cells are `[slots, parts, kv_heads, block_tokens, head_dim]`; tables and places are as `kernels/cuda/*.cu` says.

use millrace_kernels::DecodeShape;
use millrace_kernels::slab::SharedCell;
use tch::{Kind, Tensor};

use crate::tensor::plan::SingleTokens;
use crate::{ModelError, tensors};

/// New keys and values, `[tokens, parts * kv_heads, head_dim]`, to their places.
pub(super) fn scatter(cells: &Tensor, new: &Tensor, places: &Tensor) -> Result<(), ModelError> {
    let sides = cells.size();
    let [_, parts, kv_heads, block, dim] = sides[..] else { return Err(shape_error(&sides)) };
    let places = places.f_to_kind(Kind::Int64)?;
    let slots = places.f_divide_scalar_mode(block, "floor")?;
    let offsets = places.f_remainder(block)?;
    let new = new.f_reshape([-1, parts, kv_heads, dim])?;
    let _ = cells.f_permute([0, 3, 1, 2, 4])?.f_index_put_(&[Some(slots), Some(offsets)], &new, false)?;
    Ok(())
}

/// What a sequence has cached, dense: `[parts, kv_heads, tokens, head_dim]`.
pub(super) fn gather(cells: &Tensor, table: &Tensor, tokens: i64) -> Result<Tensor, ModelError> {
    let sides = cells.size();
    let [_, parts, kv_heads, _, dim] = sides[..] else { return Err(shape_error(&sides)) };
    let blocks = cells.f_index_select(0, &table.f_to_kind(Kind::Int64)?)?;
    Ok(blocks.f_permute([1, 2, 0, 3, 4])?.f_reshape([parts, kv_heads, -1, dim])?.f_narrow(2, 0, tokens)?)
}

/// Tokens `first..first + count` of a cell `[parts, kv_heads, block_tokens, head_dim]`, to the same tokens of `to`.
pub(super) fn spill(cell: &Tensor, first: usize, count: usize, to: &mut [u8]) -> Result<(), ModelError> {
    let token_bytes = cell.size()[3] as usize * cell.kind().elt_size_in_bytes();
    let run_bytes = cell.size()[2] as usize * token_bytes;
    let new = cell.f_narrow(2, first as i64, count as i64)?.f_contiguous()?;
    let mut bytes = vec![0u8; to.len() / run_bytes * count * token_bytes];
    new.f_copy_data_u8(&mut bytes, new.numel())?;
    for (run, new) in to.chunks_exact_mut(run_bytes).zip(bytes.chunks_exact(count * token_bytes)) {
        run[first * token_bytes..][..new.len()].copy_from_slice(new);
    }
    Ok(())
}

/// The cells of a slot, all layers, to `[layers, parts, kv_heads, block_tokens, head_dim]`.
pub(super) fn load(slot: &Tensor, cells: &[SharedCell]) -> Result<(), ModelError> {
    for (layer, cell) in cells.iter().enumerate() {
        let mut to = slot.f_select(0, layer as i64)?;
        to.f_copy_(&tensors::from_bytes(cell.as_ref(), &to.size(), to.kind(), to.device())?)?;
    }
    Ok(())
}

/// Attention of single tokens over their contexts, in f32, one after the other. `queries`: `[singles, heads, head_dim]`.
pub(super) fn attend(cells: &Tensor, queries: &Tensor, singles: &SingleTokens, shape: &DecodeShape) -> Result<Tensor, ModelError> {
    let mut attended = Vec::new();
    let no_mask: Option<&Tensor> = None;
    for index in 0..queries.size()[0] {
        let context = singles.contexts.f_select(0, index)?;
        let (begin, end) = (context.f_int64_value(&[0])?, context.f_int64_value(&[1])?);
        let blocks = (end as usize).div_ceil(shape.block_tokens) as i64;
        let table = singles.tables.f_select(0, index)?.f_narrow(0, 0, blocks)?;
        let seen = gather(cells, &table, end)?.f_narrow(2, begin, end - begin)?.f_to_kind(Kind::Float)?;
        let query = queries.f_narrow(0, index, 1)?.f_unsqueeze(2)?;
        let (keys, values) = (seen.f_narrow(0, 0, 1)?, seen.f_narrow(0, 1, 1)?);
        let (scale, grouped) = (f64::from(shape.scale), shape.heads > shape.kv_heads);
        let out = Tensor::f_scaled_dot_product_attention(&query, &keys, &values, no_mask, 0.0, false, scale, grouped)?;
        attended.push(out.f_squeeze_dim(2)?);
    }
    Ok(Tensor::f_cat(&attended, 0)?.f_to_kind(cells.kind())?)
}

fn shape_error(sides: &[i64]) -> ModelError {
    ModelError::Numbers { got: sides.len(), shape: sides.to_vec() }
}
