//! The text of the CUDA kernels, run on the processor as C++ behind `cuda/processor.h`: bit for bit against plain copies, and against the naive
//! attention in f64. And compiled by the real NVRTC, where there is one.

#![allow(clippy::unwrap_used, unsafe_code, reason = "a failed unwrap is a failed test; compiled C++ is called")]

use std::ops::Range;
use std::path::Path;
use std::process::Command;

use half::bf16;
use libloading::Library;
use millrace_kernels::cuda::{THREADS, attend_grid, can_attend, part_tokens, parts, text};
use millrace_kernels::{DecodeShape, Element};

/// Numbers in [-1, 1) from a counter.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 40) as f32) / (1u64 << 23) as f32 - 1.0
    }
}

fn shape(heads: usize, kv_heads: usize, head_dim: usize, block_tokens: usize, element: Element) -> DecodeShape {
    DecodeShape { heads, kv_heads, head_dim, latent: None, block_tokens, element, scale: 1.0 / (head_dim as f32).sqrt() }
}

/// `Launch` of `launches.h`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Launch {
    x: u32,
    y: u32,
    z: u32,
    threads: u32,
    backwards: u32,
}

fn launch(grid: [usize; 3], backwards: bool) -> Launch {
    let [x, y, z] = grid.map(|side| side as u32);
    Launch { x, y, z, threads: THREADS as u32, backwards: backwards.into() }
}

type Scatter = unsafe extern "C" fn(Launch, *const u8, u64, *const u32, u32, *mut u8, u64);
type Gather = unsafe extern "C" fn(Launch, *const u8, u64, *const u32, u32, *mut u8);
type Spill = unsafe extern "C" fn(Launch, *const u8, *mut u8, u64, *const u32, u32);
type Attend = unsafe extern "C" fn(Launch, *const f32, *const u8, u64, *const u32, u32, *const u32, f32, *mut f32);
type Merge = unsafe extern "C" fn(Launch, *const f32, u32, *const u32, *mut u8);

/// The kernels of one shape, compiled.
struct Kernels {
    compiled: Library,
    shape: DecodeShape,
    _folder: tempfile::TempDir,
}

impl Kernels {
    fn new(shape: DecodeShape) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (source, library) = (folder.path().join("kernels.cpp"), folder.path().join("kernels.so"));
        let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda");
        let attends = if can_attend(&shape) { "#define ATTENDS\n" } else { "" };
        let include = |file: &str| format!("#include \"{}\"\n", beside.join(file).display());
        let whole = [attends, &include("processor.h"), &text(&shape).unwrap(), &include("launches.h")].concat();
        std::fs::write(&source, whole).unwrap();
        let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
        let flags = ["-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas", "-shared", "-fPIC", "-o"];
        let output = Command::new(&compiler).args(flags).arg(&library).arg(&source).output();
        let output = output.unwrap_or_else(|error| panic!("{compiler}: {error}"));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Self { compiled: unsafe { Library::new(&library) }.unwrap(), shape, _folder: folder }
    }

    fn get<T: Copy>(&self, name: &str) -> T {
        *unsafe { self.compiled.get::<T>(name.as_bytes()) }.unwrap()
    }
}

/// Cells of several layers with random numbers; a block's slot is not its number.
struct Cells {
    shape: DecodeShape,
    layers: usize,
    slots: usize,
    bytes: Vec<u8>,
}

impl Cells {
    fn new(shape: DecodeShape, layers: usize, slots: usize, noise: &mut Noise) -> Self {
        let numbers = layers * slots * shape.cell_bytes() / shape.element.vector_bytes(1);
        let bytes = match shape.element {
            Element::F32 => (0..numbers).flat_map(|_| noise.next().to_le_bytes()).collect(),
            Element::Bf16 => (0..numbers).flat_map(|_| bf16::from_f32(noise.next()).to_le_bytes()).collect(),
            Element::Int8 => unreachable!("devices do not keep 8-bit cells"),
        };
        Self { shape, layers, slots, bytes }
    }

    fn slot_bytes(&self) -> u64 {
        (self.layers * self.shape.cell_bytes()) as u64
    }

    fn parts(&self) -> usize {
        if self.shape.latent.is_some() { 1 } else { 2 }
    }

    /// Bytes of a run: of one vector of one token.
    fn run(&self) -> usize {
        self.shape.element.vector_bytes(self.shape.head_dim)
    }

    /// Where run `run` of a place lies.
    fn at(&self, layer: usize, slot: usize, run: usize, offset: usize) -> Range<usize> {
        let cell = (slot * self.layers + layer) * self.shape.cell_bytes();
        let begin = cell + (run * self.shape.block_tokens + offset) * self.run();
        begin..begin + self.run()
    }

    fn layer(&self, layer: usize) -> *const u8 {
        self.bytes[layer * self.shape.cell_bytes()..].as_ptr()
    }

    fn layer_mut(&mut self, layer: usize) -> *mut u8 {
        self.bytes[layer * self.shape.cell_bytes()..].as_mut_ptr()
    }

    fn number(&self, at: Range<usize>, i: usize) -> f64 {
        let bytes = &self.bytes[at];
        match self.shape.element {
            Element::F32 => f64::from(f32::from_le_bytes(bytes[4 * i..4 * i + 4].try_into().unwrap())),
            Element::Bf16 => bf16::from_le_bytes(bytes[2 * i..2 * i + 2].try_into().unwrap()).to_f64(),
            Element::Int8 => unreachable!("devices do not keep 8-bit cells"),
        }
    }

    /// Attention of one query head over positions of a sequence.
    fn attend(&self, layer: usize, table: &[u32], query: &[f32], kv_head: usize, context: Range<usize>) -> Vec<f64> {
        let block = self.shape.block_tokens;
        let of = |part: usize, token: usize, i: usize| {
            self.number(self.at(layer, table[token / block] as usize, part * self.shape.kv_heads + kv_head, token % block), i)
        };
        let dot = |token| query.iter().enumerate().map(|(i, q)| f64::from(*q) * of(0, token, i)).sum::<f64>();
        let scores: Vec<f64> = context.clone().map(|token| dot(token) * f64::from(self.shape.scale)).collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
        let total: f64 = weights.iter().sum();
        let value = |i| weights.iter().zip(context.clone()).map(|(w, token)| w * of(1, token, i)).sum::<f64>() / total;
        (0..query.len()).map(value).collect()
    }
}

/// Slots of `blocks` blocks, none in its place.
fn table(blocks: usize, slots: usize, from: usize) -> Vec<u32> {
    (0..blocks).map(|block| ((block * 7 + from * 3 + 1) % slots) as u32).collect()
}

/// Shapes for copies: units of 16, 4 and 2 bytes, and a latent.
fn copied_shapes() -> Vec<DecodeShape> {
    let latent = DecodeShape { latent: Some(16), ..shape(4, 1, 24, 16, Element::Bf16) };
    vec![shape(4, 2, 64, 16, Element::Bf16), shape(3, 3, 6, 16, Element::Bf16), shape(2, 1, 5, 32, Element::Bf16), latent]
}

#[test]
fn scatter_and_gather_are_copies() {
    let mut noise = Noise(1);
    for shape in copied_shapes() {
        let kernels = Kernels::new(shape);
        let (scatter, gather): (Scatter, Gather) = (kernels.get("run_scatter"), kernels.get("run_gather"));
        let mut cells = Cells::new(shape, 3, 13, &mut noise);
        let (run, runs) = (cells.run(), cells.parts() * shape.kv_heads);
        let (tokens, extra) = (37, 3 * run);
        let rows: Vec<u8> = (0..tokens * (runs * run + extra)).map(|i| (i * 31 % 251) as u8).collect();
        let table = table(tokens.div_ceil(shape.block_tokens) + 1, 13, 2);
        let start = shape.block_tokens - 1;
        let place = |i: usize| {
            table[(start + i) / shape.block_tokens] * shape.block_tokens as u32 + ((start + i) % shape.block_tokens) as u32
        };
        let places: Vec<u32> = (0..tokens).map(place).collect();
        let mut want = Cells { bytes: cells.bytes.clone(), ..cells };
        for (token, place) in places.iter().enumerate() {
            for r in 0..runs {
                let from = &rows[token * (runs * run + extra) + r * run..][..run];
                let at = want.at(1, *place as usize / shape.block_tokens, r, *place as usize % shape.block_tokens);
                want.bytes[at].copy_from_slice(from);
            }
        }
        let slot_bytes = cells.slot_bytes();
        for backwards in [false, true] {
            let how = launch([2, 1, 1], backwards);
            let row_bytes = (runs * run + extra) as u64;
            unsafe { scatter(how, rows.as_ptr(), row_bytes, places.as_ptr(), tokens as u32, cells.layer_mut(1), slot_bytes) };
            assert!(cells.bytes == want.bytes, "{shape:?}");
            let end = start + tokens;
            let mut dense = vec![0xaau8; runs * end * run];
            unsafe { gather(how, cells.layer(1), slot_bytes, table.as_ptr(), end as u32, dense.as_mut_ptr()) };
            for (i, bytes) in dense.chunks_exact(run).enumerate() {
                let (r, token) = (i / end, i % end);
                let at = cells.at(1, table[token / shape.block_tokens] as usize, r, token % shape.block_tokens);
                assert!(*bytes == cells.bytes[at], "{shape:?}: run {r} of token {token}");
            }
        }
    }
}

#[test]
fn a_spill_changes_its_spans_and_nothing_else() {
    let mut noise = Noise(2);
    for shape in copied_shapes() {
        let kernels = Kernels::new(shape);
        let spill: Spill = kernels.get("run_spill");
        let cells = Cells::new(shape, 2, 9, &mut noise);
        let block = shape.block_tokens;
        let spans = [(8, 0, block), (3, 2, 1), (0, block - 3, 3), (5, 1, block - 2)];
        let flat: Vec<u32> = spans.iter().flat_map(|(slot, first, count)| [*slot, *first as u32, *count as u32]).collect();
        for backwards in [false, true] {
            let mut host = Cells::new(shape, 2, 9, &mut noise);
            let mut want = host.bytes.clone();
            for &(slot, first, count) in &spans {
                for (run, offset) in (0..cells.parts() * shape.kv_heads).flat_map(|r| (first..first + count).map(move |o| (r, o))) {
                    let at = cells.at(1, slot as usize, run, offset);
                    want[at.clone()].copy_from_slice(&cells.bytes[at]);
                }
            }
            let (how, count) = (launch([3, 1, 1], backwards), spans.len() as u32);
            unsafe { spill(how, cells.layer(1), host.layer_mut(1), cells.slot_bytes(), flat.as_ptr(), count) };
            assert!(host.bytes == want, "{shape:?}");
        }
    }
}

/// Attention of tokens with these contexts, all in one launch, `parts_of` long parts where one is given; compared with the naive one.
fn check_attention(kernels: &Kernels, contexts: &[Range<usize>], part_of: Option<usize>, noise: &mut Noise) {
    let shape = kernels.shape;
    let (attend, merge): (Attend, Merge) = (kernels.get("run_attend"), kernels.get("run_merge"));
    let longest = contexts.iter().map(|context| context.end).max().unwrap();
    let blocks = longest.div_ceil(shape.block_tokens);
    let cells = Cells::new(shape, 2, blocks * 2 + 5, noise);
    let tables: Vec<u32> = (0..contexts.len()).flat_map(|i| table(blocks, cells.slots, i)).collect();
    let width = shape.heads * shape.head_dim;
    let queries: Vec<f32> = (0..contexts.len() * width).map(|_| noise.next() * 3.0).collect();
    let length = |context: &Range<usize>| part_of.unwrap_or_else(|| part_tokens(context.len()));
    let numbers: Vec<u32> = contexts.iter().flat_map(|c| [c.start as u32, c.end as u32, length(c) as u32]).collect();
    let parts_max = contexts.iter().map(|c| part_of.map_or_else(|| parts(c.len()), |of| c.len().div_ceil(of))).max().unwrap();
    let mut bits: Vec<Vec<u8>> = Vec::new();
    for backwards in [false, true] {
        // What no block writes is not read either.
        let mut left = vec![f32::NAN; contexts.len() * parts_max * shape.heads * (shape.head_dim + 2)];
        let mut out = vec![0u8; contexts.len() * shape.element.vector_bytes(width)];
        let how = launch(attend_grid(&shape, parts_max, contexts.len()), backwards);
        let (layer, slot_bytes, table_len) = (cells.layer(1), cells.slot_bytes(), blocks as u32);
        unsafe {
            attend(
                how,
                queries.as_ptr(),
                layer,
                slot_bytes,
                tables.as_ptr(),
                table_len,
                numbers.as_ptr(),
                shape.scale,
                left.as_mut_ptr(),
            );
            let how = launch([shape.heads, contexts.len(), 1], backwards);
            merge(how, left.as_ptr(), parts_max as u32, numbers.as_ptr(), out.as_mut_ptr());
        }
        bits.push(out);
    }
    assert!(bits[0] == bits[1], "{shape:?}: the order of threads shows");
    let attended = Cells { shape, layers: 1, slots: 1, bytes: bits.remove(0) };
    let room = if shape.element == Element::F32 { 2e-5 } else { 6e-3 };
    for (single, context) in contexts.iter().enumerate() {
        for head in 0..shape.heads {
            let query = &queries[single * width + head * shape.head_dim..][..shape.head_dim];
            let kv_head = head / (shape.heads / shape.kv_heads);
            let want = cells.attend(1, &tables[single * blocks..][..blocks], query, kv_head, context.clone());
            for (i, want) in want.iter().enumerate() {
                let got = attended.number(0..attended.bytes.len(), single * width + head * shape.head_dim + i);
                assert!((got - want).abs() < room, "{shape:?} {context:?} head {head} [{i}]: {got} {want}");
            }
        }
    }
}

#[test]
fn paged_attention_agrees_with_the_naive_one() {
    let mut noise = Noise(3);
    let shapes =
        [(4, 1, 64, 16), (2, 2, 128, 16), (10, 1, 64, 32), (3, 1, 128, 128), (4, 2, 16, 16), (2, 1, 80, 16), (3, 1, 256, 16)];
    for (heads, kv_heads, head_dim, block) in shapes {
        for element in [Element::Bf16, Element::F32] {
            let kernels = Kernels::new(shape(heads, kv_heads, head_dim, block, element));
            // Alone, whole blocks and not, one block of threads and several.
            check_attention(&kernels, &[0..1, 0..16, 0..17, 0..127, 0..150], None, &mut noise);
            // A window begins within a block; parts of other lengths, the last of one token.
            check_attention(&kernels, &[5..6, 30..75, 0..61, 13..141], Some(30), &mut noise);
        }
    }
}

#[test]
fn what_attend_is_not_for_is_said() {
    assert!(!can_attend(&shape(4, 2, 6, 16, Element::Bf16)));
    assert!(!can_attend(&shape(4, 2, 512, 16, Element::Bf16)));
    assert!(!can_attend(&DecodeShape { latent: Some(64), ..shape(4, 1, 80, 16, Element::Bf16) }));
    assert!(can_attend(&shape(32, 8, 128, 16, Element::Bf16)));
    assert_eq!((text(&shape(4, 2, 64, 16, Element::Int8)), can_attend(&shape(4, 2, 64, 16, Element::Int8))), (None, false));
    assert!(!text(&shape(4, 2, 6, 16, Element::F32)).unwrap().contains("attend("));
}

/// NVRTC needs no device. It is not fetched by anything here: where it is not installed this says so, and passes.
#[test]
fn nvrtc_compiles_the_text_where_there_is_nvrtc() {
    if !std::panic::catch_unwind(|| unsafe { cudarc::nvrtc::sys::is_culib_present() }).unwrap_or(false) {
        eprintln!("skipped: no libnvrtc on the loader's path");
        return;
    }
    let latent = DecodeShape { latent: Some(512), ..shape(16, 1, 576, 16, Element::Bf16) };
    for shape in
        [shape(32, 8, 128, 16, Element::Bf16), shape(9, 3, 64, 16, Element::F32), shape(8, 8, 80, 32, Element::Bf16), latent]
    {
        for architecture in ["compute_80", "compute_90"] {
            let options = vec![format!("--gpu-architecture={architecture}"), "--std=c++17".to_owned()];
            let options = cudarc::nvrtc::CompileOptions { options, ..Default::default() };
            let ptx = cudarc::nvrtc::compile_ptx_with_opts(text(&shape).unwrap(), options);
            let ptx = ptx.unwrap_or_else(|error| panic!("{shape:?} for {architecture}: {error}")).to_src();
            for name in ["scatter", "gather", "spill"] {
                assert!(ptx.contains(&format!(".entry {name}(")), "{name} of {shape:?} for {architecture}");
            }
            assert_eq!(ptx.contains(".entry attend("), can_attend(&shape));
        }
    }
}
