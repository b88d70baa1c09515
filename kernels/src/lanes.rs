//! Sixteen floats at a time, in plain Rust that the compiler turns into the vectors of the calling function's instruction set.
//! Everything is `inline(always)`, so that it takes the `target_feature` of its caller.

/// Floats handled together: one AVX-512 register, two of AVX2.
pub(crate) const LANES: usize = 16;

/// A vector of [`LANES`] floats.
pub(crate) type Lanes = [f32; LANES];

/// `a * b + c`; one rounding where `FUSED` (the caller then runs with FMA), two otherwise.
#[inline(always)]
pub(crate) fn fma<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}

/// Sum of the lanes by halving: the same order on every machine.
#[inline(always)]
pub(crate) fn sum(lanes: &Lanes) -> f32 {
    let mut lanes = *lanes;
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// `e^x` for `x <= 0`, relative error below 3e-7; 0 where the result would be subnormal.
/// Cody and Waite's reduction by ln 2 in two parts, then the degree 6 polynomial of Cephes `expf`.
#[inline(always)]
pub(crate) fn exp<const FUSED: bool>(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = if x < -87.0 { -87.0 } else { x }; // not NaN: that goes through
    let shifted = fma::<FUSED>(clamped, std::f32::consts::LOG2_E, ROUND);
    let whole = shifted - ROUND;
    let rest = fma::<FUSED>(whole, -LN2_LOW, fma::<FUSED>(whole, -LN2_HIGH, clamped));
    let mut poly = 1.987_569_1e-4_f32;
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        poly = fma::<FUSED>(poly, rest, coefficient);
    }
    let value = fma::<FUSED>(poly, rest * rest, rest + 1.0);
    let scaled = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23)) * value;
    if x < -87.0 { 0.0 } else { scaled }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close() {
        for i in 0..200_000u32 {
            let x = -(i as f32) * 4.3e-4;
            let (got, want) = (f64::from(exp::<false>(x)), f64::from(x).exp());
            assert!((got - want).abs() <= 3e-7 * want, "exp({x}) = {got}, not {want}");
        }
        assert_eq!(exp::<false>(0.0), 1.0);
        assert_eq!(exp::<false>(f32::NEG_INFINITY), 0.0);
        assert!(exp::<false>(f32::NAN).is_nan());
    }

    #[test]
    fn sum_adds_each_lane_once() {
        let lanes: Lanes = std::array::from_fn(|i| (1u32 << i) as f32);
        assert_eq!(sum(&lanes), 65_535.0);
    }
}
