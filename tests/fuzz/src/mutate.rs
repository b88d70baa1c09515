//! Spoils bytes: flips, numbers at the edge of their range, pieces taken out, doubled, moved, or put in from another example.

use millrace_core::sampling::mix;

/// Changes of one input at most, on top of the first.
const CHANGES_MAX: usize = 7;
/// Longest piece that is taken out, put in or moved, in bytes.
const PIECE_MAX: usize = 256;
/// Numbers that code gets wrong.
const EDGES: [u64; 18] = [
    0,
    1,
    2,
    0x7f,
    0x80,
    0xff,
    0x7fff,
    0xffff,
    0x1_0000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_fffe,
    0xffff_ffff,
    0x1_0000_0000,
    1 << 62,
    i64::MAX as u64,
    1 << 63,
    u64::MAX,
];

/// SplitMix64: the same numbers for the same seed on every machine.
pub struct Random(u64);

impl Random {
    /// The numbers of one input: `number` counts the inputs of a seed.
    pub fn new(seed: u64, number: u64) -> Self {
        Self(mix(mix(seed).wrapping_add(number)))
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// True once in `n` times.
    pub fn once_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }

    /// A number at an edge, or near one.
    pub fn edge(&mut self) -> u64 {
        self.pick(&EDGES).wrapping_add(self.below(3) as u64).wrapping_sub(1)
    }
}

/// Spoils `bytes` in a few places; `other` is another example to take pieces from.
pub fn bytes(bytes: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    let mut changes = 1;
    while changes <= CHANGES_MAX && random.once_in(2) {
        changes += 1;
    }
    (0..changes).for_each(|_| one(bytes, other, random));
}

fn one(bytes: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    if bytes.is_empty() {
        return bytes.push(random.next() as u8);
    }
    let at = random.below(bytes.len());
    let len = 1 + random.below((bytes.len() - at).min(PIECE_MAX));
    match random.below(12) {
        0 => bytes[at] ^= 1 << random.below(8),
        1 => bytes[at] = random.next() as u8,
        2..=4 => number(bytes, at, random),
        5 => drop(bytes.drain(at..at + len)),
        6 => {
            let piece = bytes[at..at + len].to_vec();
            let to = random.below(bytes.len());
            bytes.splice(to..to, piece);
        }
        7 => {
            let to = random.below(bytes.len() - len + 1);
            bytes.copy_within(at..at + len, to);
        }
        8 => bytes[at..at + len].fill(*random.pick(&[0, 0xff, b'[', b'"', b'0'])),
        9 => bytes.truncate(at),
        _ => splice(bytes, at, len, other, random),
    }
}

/// Puts a number at an edge, or the old one changed a little, where a number may be.
fn number(bytes: &mut [u8], at: usize, random: &mut Random) {
    let width = *random.pick(&[1, 2, 4, 4, 8]);
    // Fields lie at multiples of their width in all formats but text.
    let at = if random.once_in(4) { at } else { at / width * width };
    let Some(place) = bytes.get_mut(at..at + width) else { return };
    let mut old = [0; 8];
    old[..width].copy_from_slice(place);
    let old = u64::from_le_bytes(old);
    let new = match random.below(3) {
        0 => old.wrapping_add(1 + random.below(16) as u64),
        1 => old.wrapping_sub(1 + random.below(16) as u64),
        _ => random.edge(),
    };
    place.copy_from_slice(&new.to_le_bytes()[..width]);
}

/// Puts a piece of `other` over a piece.
fn splice(bytes: &mut Vec<u8>, at: usize, len: usize, other: &[u8], random: &mut Random) {
    if other.is_empty() {
        return;
    }
    // From the same place as often as from any: two examples of one format have the same fields there.
    let from = if random.once_in(2) { at.min(other.len() - 1) } else { random.below(other.len()) };
    let piece = 1 + random.below((other.len() - from).min(PIECE_MAX));
    let end = if random.once_in(2) { at + len } else { (at + piece).min(bytes.len()) };
    bytes.splice(at..end, other[from..from + piece].iter().copied());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_number_spoils_alike_and_another_does_not() {
        let spoiled = |number| {
            let mut example: Vec<u8> = (0..200).collect();
            bytes(&mut example, b"another example", &mut Random::new(3, number));
            example
        };
        assert_eq!(spoiled(5), spoiled(5));
        let different: std::collections::HashSet<Vec<u8>> = (0..1000).map(spoiled).collect();
        assert!(different.len() > 800, "{} of 1000 differ", different.len());
    }

    #[test]
    fn nothing_is_too_short_to_be_spoiled() {
        for number in 0..2000 {
            let mut random = Random::new(1, number);
            for len in [0, 1, 2, 7] {
                bytes(&mut vec![7; len], &[], &mut random);
                bytes(&mut vec![7; len], b"x", &mut random);
            }
        }
    }
}
