//! The rotary turn of queries and keys, half-split as Hugging Face stores Llama: element `i` turns with element `i + head_dim / 2`.
//! Which angles (base, scaling) is the model's business; they come in as cosines and sines.

/// Turns each head of one token in place.
///
/// `heads`: `[n, head_dim]`; `cos`, `sin`: `[head_dim / 2]`, of that token's position.
///
/// # Panics
/// When the lengths do not fit.
pub fn rotate(heads: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    assert_eq!(sin.len(), half);
    assert!(half > 0 && heads.len().is_multiple_of(2 * half));
    for head in heads.chunks_exact_mut(2 * half) {
        let (low, high) = head.split_at_mut(half);
        for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
            let (a, b) = (*low, *high);
            *low = a * cos - b * sin;
            *high = b * cos + a * sin;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_pairs_and_keeps_length() {
        let mut heads = vec![1.0, 2.0, 3.0, 4.0, -1.0, 0.0, 0.5, 0.0];
        let angles = [0.3f32, 1.1];
        rotate(&mut heads, &angles.map(f32::cos), &angles.map(f32::sin));
        for (head, before) in heads.chunks(4).zip([[1.0f32, 2.0, 3.0, 4.0], [-1.0, 0.0, 0.5, 0.0]]) {
            for i in 0..2 {
                let turn = head[i + 2].atan2(head[i]) - before[i + 2].atan2(before[i]);
                let length = head[i].hypot(head[i + 2]) - before[i].hypot(before[i + 2]);
                assert!(length.abs() < 1e-6);
                assert!(before[i].hypot(before[i + 2]) == 0.0 || ((turn - angles[i]).sin().abs() < 1e-6));
            }
        }
    }
}
