//! Floats to bfloat16 and back, over slices. Rounds to nearest, ties to even, as LibTorch does.

use half::bf16;

/// `out[i] = bf16(values[i])`.
///
/// # Panics
/// When the lengths differ.
pub fn to_bf16(values: &[f32], out: &mut [bf16]) {
    assert_eq!(values.len(), out.len());
    for (value, out) in values.iter().zip(out) {
        let bits = value.to_bits();
        let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1))) >> 16;
        let quiet_nan = (bits >> 16) | 0x40;
        *out = bf16::from_bits(if value.is_nan() { quiet_nan } else { rounded } as u16);
    }
}

/// `out[i] = f32(values[i])`, exactly.
///
/// # Panics
/// When the lengths differ.
pub fn to_f32(values: &[bf16], out: &mut [f32]) {
    assert_eq!(values.len(), out.len());
    for (value, out) in values.iter().zip(out) {
        *out = f32::from_bits(u32::from(value.to_bits()) << 16);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_as_half_does() {
        let values: Vec<f32> = (0..=u16::MAX)
            .flat_map(|high| [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff].map(|low| f32::from_bits(u32::from(high) << 16 | low)))
            .collect();
        let mut out = vec![bf16::ZERO; values.len()];
        to_bf16(&values, &mut out);
        for (value, out) in values.iter().zip(&out) {
            assert_eq!(out.to_bits(), bf16::from_f32(*value).to_bits(), "{:08x}", value.to_bits());
        }
        let mut back = vec![0.0; out.len()];
        to_f32(&out, &mut back);
        assert!(out.iter().zip(&back).all(|(a, b)| a.to_f32().to_bits() == b.to_bits()));
    }
}
