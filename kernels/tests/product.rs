//! Products of every format and instruction set against plain sums in f64, and against one another.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use half::{bf16, f16};
use millrace_kernels::{Format, Into, Isa, Matrix, Norm, Precision, Products, Source};

const FORMATS: [Format; 5] = [Format::F32, Format::Bf16, Format::Q8_0, Format::Q4_0, Format::Q4_1];
const EXACT: Precision = Precision { exact: true, bytes_rows_max: 0 };
const BYTES: Precision = Precision { exact: false, bytes_rows_max: usize::MAX };
const FEW_BYTES: Precision = Precision { exact: false, bytes_rows_max: 16 };
const HALVES: Precision = Precision { exact: false, bytes_rows_max: 0 };

/// Numbers from a counter.
struct Noise(u64);

impl Noise {
    fn bits(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }

    /// In [-1, 1).
    fn next(&mut self) -> f32 {
        self.bits() as f32 / (1u32 << 30) as f32 - 1.0
    }

    fn below(&mut self, end: usize) -> usize {
        self.bits() as usize % end
    }

    fn vector(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.next()).collect()
    }

    /// Rows of weights as a file has them.
    fn weights(&mut self, format: Format, rows: usize, columns: usize) -> Vec<u8> {
        match format {
            Format::F32 => self.vector(rows * columns).iter().flat_map(|x| x.to_le_bytes()).collect(),
            Format::Bf16 => self.vector(rows * columns).iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
            _ => (0..rows * columns / 32).flat_map(|_| self.block(format)).collect(),
        }
    }

    fn block(&mut self, format: Format) -> Vec<u8> {
        let mut block = f16::from_f32(self.next() / if format == Format::Q8_0 { 128.0 } else { 8.0 }).to_le_bytes().to_vec();
        if format == Format::Q4_1 {
            block.extend(f16::from_f32(self.next()).to_le_bytes());
        }
        while block.len() < format.block_bytes() {
            block.push(self.bits() as u8);
        }
        block
    }
}

/// What the bytes say, by the formats' definitions.
fn numbers(format: Format, bytes: &[u8]) -> Vec<f64> {
    let half = |b: &[u8]| f16::from_le_bytes([b[0], b[1]]).to_f64();
    let nibbles = |b: &[u8]| b.iter().map(|b| b & 15).chain(b.iter().map(|b| b >> 4)).map(f64::from).collect::<Vec<_>>();
    let block = |b: &[u8]| -> Vec<f64> {
        match format {
            Format::F32 => b.chunks(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap()))).collect(),
            Format::Bf16 => b.chunks(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f64()).collect(),
            Format::Q8_0 => b[2..].iter().map(|q| f64::from(*q as i8) * half(b)).collect(),
            Format::Q4_0 => nibbles(&b[2..]).iter().map(|q| (q - 8.0) * half(b)).collect(),
            Format::Q4_1 => nibbles(&b[4..]).iter().map(|q| q * half(b) + half(&b[2..])).collect(),
        }
    };
    let size = if format.is_quantised() { format.block_bytes() } else { format.block_bytes() / 32 };
    bytes.chunks(size).flat_map(block).collect()
}

/// One product and what it must be.
struct Case {
    matrix: Matrix,
    x: Vec<f32>,
    /// `[rows, outputs]`, and for each the sum of the sizes of its products.
    want: Vec<(f64, f64)>,
    outputs: usize,
}

fn case(format: Format, count: usize, outputs: usize, columns: usize, noise: &mut Noise) -> Case {
    let bytes = noise.weights(format, outputs, columns);
    let x = noise.vector(count * columns);
    let weights = numbers(format, &bytes);
    let sum = |x: &[f32], w: &[f64]| {
        x.iter().zip(w).fold((0.0, 0.0), |(sum, size), (x, w)| (sum + f64::from(*x) * w, size + (f64::from(*x) * w).abs()))
    };
    let want = x.chunks(columns).flat_map(|x| weights.chunks(columns).map(move |w| sum(x, w))).collect();
    Case { matrix: Matrix::new(columns, &[Source { format, bytes: &bytes }]).unwrap(), x, want, outputs }
}

impl Case {
    fn run(&self, isa: Isa, precision: Precision, threads: usize) -> Vec<f32> {
        let mut out = vec![f32::NAN; self.want.len()];
        Products::new(threads, isa, precision).multiply(&self.x, None, &self.matrix, Into::Set(&mut out));
        out
    }

    fn assert_near(&self, out: &[f32], tolerance: f64, note: &str) {
        for (i, (got, (want, size))) in out.iter().zip(&self.want).enumerate() {
            assert!((f64::from(*got) - want).abs() <= tolerance * (size + 1e-3), "{note} [{i}]: {got}, not {want}");
        }
    }
}

/// Each way to round, and how far off it may be, relative to the sizes of what is summed.
fn ways(format: Format) -> Vec<(Precision, f64)> {
    let bytes = if format.is_quantised() { 0.02 } else { 5e-3 };
    vec![(EXACT, 2e-6), (HALVES, 8e-3), (BYTES, bytes)]
}

fn columns(format: Format, noise: &mut Noise) -> usize {
    if format.is_quantised() { 32 * (1 + noise.below(7)) } else { 1 + noise.below(200) }
}

#[test]
fn every_format_and_instruction_set_is_near_the_plain_sum() {
    let mut noise = Noise(1);
    for format in FORMATS {
        for count in (1..=20).chain([31, 32, 33, 40]) {
            let columns = columns(format, &mut noise);
            let case = case(format, count, 1 + noise.below(90), columns, &mut noise);
            for isa in Isa::available() {
                for (precision, tolerance) in ways(format) {
                    let note = format!("{format:?} {isa:?} {precision:?}, {count} x {} x {columns}", case.outputs);
                    case.assert_near(&case.run(isa, precision, 2), tolerance, &note);
                }
            }
        }
    }
}

#[test]
fn more_rows_than_one_item_takes() {
    let mut noise = Noise(2);
    for (format, precision) in [(Format::Bf16, HALVES), (Format::Q4_1, HALVES), (Format::Q4_0, BYTES), (Format::F32, EXACT)] {
        let case = case(format, 1100, 50, 64, &mut noise);
        case.assert_near(&case.run(Isa::best(), precision, 2), 0.02, &format!("{format:?}"));
    }
}

#[test]
fn instruction_sets_agree_to_the_rounding_of_their_sums() {
    let mut noise = Noise(3);
    for format in FORMATS {
        let case = case(format, 5, 70, 192, &mut noise);
        for (precision, _) in ways(format) {
            let portable = case.run(Isa::Portable, precision, 1);
            for isa in Isa::available() {
                for (i, (a, b)) in case.run(isa, precision, 1).iter().zip(&portable).enumerate() {
                    let size = case.want[i].1 as f32 + 1e-3;
                    assert!((a - b).abs() <= 2e-6 * size, "{format:?} {isa:?} {precision:?} [{i}]: {a} {b}");
                }
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_any_company_on_any_threads() {
    let mut noise = Noise(4);
    for format in FORMATS {
        let columns = if format.is_quantised() { 160 } else { 150 };
        let case = case(format, 40, 75, columns, &mut noise);
        for isa in Isa::available() {
            for precision in [EXACT, HALVES, BYTES] {
                let together = case.run(isa, precision, 3);
                for first in [0, 1, 7, 8, 15, 16, 39] {
                    for count in [1, 2, 3, 8, 9, 16, 17] {
                        let last = 40.min(first + count);
                        let mut out = vec![0.0; (last - first) * case.outputs];
                        let x = &case.x[first * columns..last * columns];
                        Products::new(1, isa, precision).multiply(x, None, &case.matrix, Into::Set(&mut out));
                        let same = &together[first * case.outputs..last * case.outputs];
                        assert!(out.iter().zip(same).all(|(a, b)| a.to_bits() == b.to_bits()), "{format:?} {isa:?} {precision:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn norm_sum_and_swiglu_on_the_way() {
    let mut noise = Noise(5);
    for (gate_format, up_format) in [(Format::F32, Format::F32), (Format::Q4_1, Format::Q8_0), (Format::Q4_0, Format::Bf16)] {
        let (count, half, columns) = (3, 45, 64);
        let sources = [noise.weights(gate_format, half, columns), noise.weights(up_format, half, columns)];
        let [gate, up] = [Source { format: gate_format, bytes: &sources[0] }, Source { format: up_format, bytes: &sources[1] }];
        let matrix = Matrix::new(columns, &[gate, up]).unwrap();
        let (x, weight) = (noise.vector(count * columns), noise.vector(columns));
        for isa in Isa::available() {
            for precision in [EXACT, BYTES] {
                let mut products = Products::new(2, isa, precision);
                let norm = Norm { weight: &weight, bias: None, eps: 1e-5 };
                let (mut plain, mut added, mut gated) =
                    (vec![0.0; count * 2 * half], vec![1.5; count * 2 * half], vec![0.0; count * half]);
                let mut normed = x.clone();
                millrace_kernels::elementwise::norm(isa, norm, &mut normed);
                products.multiply(&normed, None, &matrix, Into::Set(&mut plain));
                products.multiply(&x, Some(norm), &matrix, Into::Add(&mut added));
                assert!(plain.iter().zip(&added).all(|(a, b)| a + 1.5 == *b), "{isa:?} {precision:?}");
                products.multiply(&x, Some(norm), &matrix, Into::SwiGlu(&mut gated));
                for (i, got) in gated.iter().enumerate() {
                    let (row, column) = (i / half, i % half);
                    let (gate, up) = (f64::from(plain[row * 2 * half + column]), f64::from(plain[row * 2 * half + half + column]));
                    let want = gate / (1.0 + (-gate).exp()) * up;
                    let tolerance = if precision.exact || gate_format == up_format { 1e-5 } else { 0.2 };
                    assert!(
                        (f64::from(*got) - want).abs() <= tolerance * (1.0 + want.abs()),
                        "{isa:?} {precision:?} [{i}]: {got} {want}"
                    );
                }
            }
        }
    }
}

#[test]
fn rows_of_a_matrix_are_what_their_bytes_say() {
    let mut noise = Noise(6);
    for format in FORMATS {
        let columns = columns(format, &mut noise);
        let sources = [noise.weights(format, 21, columns), noise.weights(Format::F32, 5, columns)];
        let parts = [Source { format, bytes: &sources[0] }, Source { format: Format::F32, bytes: &sources[1] }];
        let matrix = Matrix::new(columns, &parts).unwrap();
        let want: Vec<f64> = numbers(format, &sources[0]).into_iter().chain(numbers(Format::F32, &sources[1])).collect();
        let mut got = vec![0.0; columns];
        for row in 0..26 {
            matrix.row(row, &mut got);
            for (got, want) in got.iter().zip(&want[row * columns..]) {
                assert!((f64::from(*got) - want).abs() <= 1e-6 * want.abs().max(1.0), "{format:?} row {row}: {got} {want}");
            }
        }
    }
}

#[test]
fn what_is_not_a_number_is_not_lost() {
    let mut noise = Noise(7);
    for format in FORMATS {
        let mut case = case(format, 2, 20, 64, &mut noise);
        for (bad, at) in [(f32::NAN, 3), (f32::NAN, 31), (f32::INFINITY, 40), (f32::NEG_INFINITY, 16)] {
            case.x[at] = bad;
            for isa in Isa::available() {
                for precision in [EXACT, HALVES, BYTES] {
                    let out = case.run(isa, precision, 1);
                    assert!(out[..20].iter().all(|x| !x.is_finite()), "{format:?} {isa:?} {precision:?}");
                    assert!(out[20..].iter().all(|x| x.is_finite()), "{format:?} {isa:?} {precision:?}");
                }
            }
            case.x[at] = 0.5;
        }
    }
}

/// What is between the products is rounded as the second product would round it: not a bit differs from two products.
#[test]
fn a_gated_layer_is_its_two_products() {
    let mut noise = Noise(77);
    for (format, columns, width, counts) in
        [(Format::Bf16, 50, 90, [1, 16, 33, 70]), (Format::Q8_0, 64, 96, [2, 17, 40, 520]), (Format::F32, 20, 33, [1, 5, 32, 64])]
    {
        let [gate, up] = [0, 1].map(|_| noise.weights(format, width, columns));
        let down_bytes = noise.weights(format, columns, width);
        let source = |bytes| Source { format, bytes };
        let gate_up = Matrix::new(columns, &[source(&gate), source(&up)]).unwrap();
        let down = Matrix::new(width, &[source(&down_bytes)]).unwrap();
        let weight = noise.vector(columns);
        let norm = Norm { weight: &weight, bias: None, eps: 1e-5 };
        for (count, (isa, precision)) in counts.into_iter().flat_map(|count| {
            Isa::available().into_iter().flat_map(move |isa| [EXACT, HALVES, BYTES, FEW_BYTES].map(|p| (count, (isa, p))))
        }) {
            let hidden = noise.vector(count * columns);
            let mut products = Products::new(2, isa, precision);
            let (mut together, mut apart, mut gated) = (hidden.clone(), hidden.clone(), vec![f32::NAN; count * width]);
            products.add_gated(&mut together, norm, &gate_up, &down, &mut Vec::new());
            products.multiply(&hidden, Some(norm), &gate_up, Into::SwiGlu(&mut gated));
            products.multiply(&gated, None, &down, Into::Add(&mut apart));
            assert!(together.iter().all(|x| x.is_finite()) && together != hidden);
            assert_eq!(together, apart, "{format:?} {isa:?} {precision:?} {count}");
        }
    }
}
