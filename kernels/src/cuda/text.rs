//! The text of the kernels for one shape, and the numbers that whoever launches them must know. Says nothing of devices.

use crate::attention::DecodeShape;
use crate::element::Element;

/// Threads of a block, in every kernel.
pub const THREADS: usize = 128;
/// Numbers that say what a token sees: its first position, the end, and the positions of one part.
pub const CONTEXT_NUMBERS: usize = 3;
/// Numbers of a span that is spilled: slot, first token in the block, tokens.
pub const SPAN_NUMBERS: usize = 3;
/// Query heads that one block of `attend` takes, at most.
const GROUP_MAX: usize = 8;
/// Positions of a part, while a context has few.
const PART_TOKENS: usize = 128;
/// Parts of a context; longer ones have longer parts.
const PARTS_MAX: usize = 64;
/// Widest head that `attend` keeps in registers.
const HEAD_DIM_MAX: usize = 256;
/// Bytes that a lane loads at a time.
const VECTOR_BYTES: usize = 16;

/// The kernels of one shape, as NVRTC takes them; none for 8-bit cells, which devices do not keep.
#[must_use]
pub fn text(shape: &DecodeShape) -> Option<String> {
    let element = match shape.element {
        Element::F32 => "float",
        Element::Bf16 => "Bf16",
        Element::Int8 => return None,
    };
    let parts = if shape.latent.is_some() { 1 } else { 2 };
    let numbers = [
        ("HEADS", shape.heads),
        ("KV_HEADS", shape.kv_heads),
        ("PARTS", parts),
        ("HEAD_DIM", shape.head_dim),
        ("BLOCK_TOKENS", shape.block_tokens),
    ];
    let mut text = format!("#define ELEMENT {element}\n");
    numbers.iter().for_each(|(name, number)| text += &format!("#define {name} {number}\n"));
    text += include_str!("../../cuda/common.cuh");
    text += include_str!("../../cuda/scatter.cu");
    text += include_str!("../../cuda/gather.cu");
    text += include_str!("../../cuda/spill.cu");
    if can_attend(shape) {
        text += include_str!("../../cuda/paged_attention.cu");
    }
    Some(text)
}

/// Whether `attend` and `merge` are there for a shape: keys and values of their own, of whole vectors, that fit registers.
#[must_use]
pub fn can_attend(shape: &DecodeShape) -> bool {
    let whole = shape.element.vector_bytes(shape.head_dim).is_multiple_of(VECTOR_BYTES);
    shape.element != Element::Int8 && shape.latent.is_none() && whole && shape.head_dim <= HEAD_DIM_MAX
}

/// Positions of one part of a context of `tokens` positions. Follows from the context alone, so a token's sums do not depend on its neighbours.
#[must_use]
pub const fn part_tokens(tokens: usize) -> usize {
    let least = tokens.div_ceil(PARTS_MAX).next_multiple_of(PART_TOKENS);
    if least == 0 { PART_TOKENS } else { least }
}

/// Parts of a context of `tokens` positions.
#[must_use]
pub const fn parts(tokens: usize) -> usize {
    tokens.div_ceil(part_tokens(tokens))
}

/// The grid of `attend` for `singles` tokens, the longest context of which has `parts` parts.
#[must_use]
pub fn attend_grid(shape: &DecodeShape, parts: usize, singles: usize) -> [usize; 3] {
    let sharing = shape.heads / shape.kv_heads;
    [shape.kv_heads * sharing.div_ceil(sharing.min(GROUP_MAX)), parts, singles]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contexts_are_cut_by_their_own_length() {
        assert_eq!([1, 128, 129, 8192, 8193, 131_072].map(part_tokens), [128, 128, 128, 128, 256, 2048]);
        assert_eq!([1, 128, 129, 8192, 8193, 131_072].map(parts), [1, 1, 2, 64, 33, 64]);
        assert!((1..200_000).step_by(97).all(|tokens| parts(tokens) <= PARTS_MAX));
    }
}
