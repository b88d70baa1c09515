//! One CUDA device with one model's KV pool: compiles the kernels, launches them, and copies cells between the pool and the node's memory.
//!
//! Streams and their order. LibTorch computes on the device's legacy default stream (nothing in this process makes it use another), in the primary
//! context, which is the one that is opened here. The kernels that LibTorch's work depends on are launched on that very stream, so
//! the order of calls is the order of work. Spilling has a stream of its own that does not wait for the default one; an event makes it wait for the
//! layer that it spills, and its [`Landing`] says when the cells stand.

#![allow(unsafe_code)]

use std::ffi::{c_uint, c_void};
use std::marker::PhantomData;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaEvent, CudaFunction, CudaModule, CudaStream, DriverError, LaunchConfig, PushKernelArg, sys};
use cudarc::nvrtc::{CompileError, CompileOptions, compile_ptx_with_opts};

use super::text::{CONTEXT_NUMBERS, SPAN_NUMBERS, THREADS, attend_grid, can_attend, text};
use crate::attention::DecodeShape;
use crate::piece::Piece;
use crate::slab::{CELL_ALIGN, KvSlab, SeizedCell, SharedCell};

/// Blocks of threads that spill: enough to fill the bus, few enough to leave the multiprocessors to the next layer.
const SPILL_BLOCKS: usize = 16;
/// Blocks of threads that copy within the device, at most.
const COPY_BLOCKS_MAX: usize = 4096;

/// Why a device cannot be used, or what it refused.
#[derive(Debug, thiserror::Error)]
pub enum GpuError {
    /// Neither in the system's folders nor on the loader's path, or too old to have what is needed.
    #[error("the library {0} of NVIDIA's cannot be opened, or is too old")]
    Library(&'static str),
    /// The driver refused.
    #[error("{doing}: {error}")]
    Driver {
        /// What was asked of it.
        doing: &'static str,
        /// What it said.
        error: DriverError,
    },
    /// NVRTC refused the kernels.
    #[error("compiling the kernels: {0}")]
    Compile(String),
    /// Cells of 8-bit numbers.
    #[error("a device does not keep 8-bit cells")]
    Element,
    /// Numbers that do not fit one another.
    #[error("{what}: {got}, expected {expected}")]
    Shape {
        /// Which.
        what: &'static str,
        /// What it was.
        got: usize,
        /// What it should be, or at least be.
        expected: usize,
    },
}

/// Gives a refusal of the driver the name of what was asked.
fn doing<T>(doing: &'static str, result: Result<T, DriverError>) -> Result<T, GpuError> {
    result.map_err(|error| GpuError::Driver { doing, error })
}

/// Numbers of `T` in the memory of a device: the address and the length of a tensor. Whoever makes one keeps the tensor, on the device that the
/// [`Gpu`] is of, until what was launched with it is through; LibTorch keeps memory that was let go for work on the same stream.
#[derive(Debug)]
pub struct OnDevice<T> {
    address: u64,
    len: usize,
    numbers: PhantomData<T>,
}

impl<T> Clone for OnDevice<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for OnDevice<T> {}

impl<T> OnDevice<T> {
    /// `len` numbers from `address` on.
    #[must_use]
    pub fn new(address: u64, len: usize) -> Self {
        Self { address, len, numbers: PhantomData }
    }

    fn at_least(self, what: &'static str, expected: usize) -> Result<u64, GpuError> {
        if self.len < expected { Err(GpuError::Shape { what, got: self.len, expected }) } else { Ok(self.address) }
    }
}

/// The device's pool: a cell for each slot and layer, slot by slot, as in the node's memory.
#[derive(Clone, Copy, Debug)]
pub struct Pool {
    /// Its bytes.
    pub cells: OnDevice<u8>,
    /// Layers of a slot.
    pub layers: usize,
    /// Slots.
    pub slots: usize,
}

/// Tokens that attend alone.
#[derive(Clone, Copy, Debug)]
pub struct Singles {
    /// How many.
    pub count: usize,
    /// `[count, heads, head_dim]`.
    pub queries: OnDevice<f32>,
    /// `[count, table_len]`: each token's slots.
    pub tables: OnDevice<i32>,
    /// Slots of each.
    pub table_len: usize,
    /// `[count, 3]`: first position, end, positions of one part.
    pub contexts: OnDevice<i32>,
    /// Parts of the longest context.
    pub parts_max: usize,
    /// Room for `[count, parts_max, heads, head_dim + 2]`.
    pub parts: OnDevice<f32>,
    /// `[count, heads, head_dim]` in the cells' type, as bytes.
    pub out: OnDevice<u8>,
}

/// The kernels.
struct Functions {
    scatter: CudaFunction,
    gather: CudaFunction,
    spill: CudaFunction,
    /// `attend` and `merge`, for shapes that they are for.
    attention: Option<(CudaFunction, CudaFunction)>,
}

/// Memory of the node, page-locked and mapped for the device as long as this lives.
struct Mapped {
    piece: Arc<Piece>,
    /// Where the device sees it.
    address: u64,
    context: Arc<CudaContext>,
}

/// A device, its kernels, and the two places where a cell is kept. See the module text.
pub struct Gpu {
    shape: DecodeShape,
    pool: Pool,
    compute: Arc<CudaStream>,
    copies: Arc<CudaStream>,
    functions: Functions,
    mapped: Mapped,
}

/// Cells on their way, locked until they have landed.
pub struct Landing {
    event: CudaEvent,
    _written: Vec<SeizedCell>,
    _read: Vec<SharedCell>,
}

impl Landing {
    /// Whether they stand.
    #[must_use]
    pub fn done(&self) -> bool {
        self.event.is_complete()
    }

    /// Waits until they stand.
    ///
    /// # Errors
    /// [`GpuError`] when the device failed.
    pub fn wait(&self) -> Result<(), GpuError> {
        doing("waiting for cells", self.event.synchronize())
    }
}

impl Drop for Landing {
    /// The locks go only when the device is through with the cells.
    fn drop(&mut self) {
        let _ = self.event.synchronize();
    }
}

impl Gpu {
    /// Opens device `ordinal` in the context that LibTorch has there, compiles the kernels of `shape` and maps `slab`.
    ///
    /// # Errors
    /// [`GpuError`]: no driver, no NVRTC, no such device, or the slab cannot be page-locked.
    pub fn open(ordinal: usize, shape: DecodeShape, pool: Pool, slab: &KvSlab) -> Result<Self, GpuError> {
        let slot_bytes = pool.layers * shape.cell_bytes();
        pool.cells.at_least("bytes of the device's pool", pool.slots * slot_bytes)?;
        let sizes = [
            ("bytes of a cell", slab.cell_bytes(), shape.cell_bytes()),
            ("layers", slab.layers(), pool.layers),
            ("slots", slab.slots(), pool.slots),
        ];
        if let Some((what, got, expected)) = sizes.into_iter().find(|(_, got, expected)| got != expected) {
            return Err(GpuError::Shape { what, got, expected });
        }
        if !shape.cell_bytes().is_multiple_of(CELL_ALIGN) {
            return Err(GpuError::Shape { what: "bytes of a cell", got: shape.cell_bytes(), expected: CELL_ALIGN });
        }
        let context = open_context(ordinal)?;
        let functions = Functions::load(&context, &shape)?;
        let compute = context.default_stream();
        let copies = doing("making a stream", context.new_stream())?;
        let piece = slab.piece();
        let mapped = Mapped::new(piece, &context)?;
        Ok(Self { shape, pool, compute, copies, functions, mapped })
    }

    /// Copies new keys and values to their cells: `from` has `tokens` rows of `row_bytes` bytes, `places` a place for each.
    ///
    /// # Errors
    /// [`GpuError`] when sizes do not fit or the driver refuses.
    pub fn scatter(
        &self,
        layer: usize,
        from: OnDevice<u8>,
        row_bytes: usize,
        places: OnDevice<i32>,
        tokens: usize,
    ) -> Result<(), GpuError> {
        let token_bytes = self.token_bytes();
        if row_bytes < token_bytes {
            return Err(GpuError::Shape { what: "bytes of a row", got: row_bytes, expected: token_bytes });
        }
        let from = from.at_least("bytes of new keys and values", tokens.saturating_sub(1) * row_bytes + token_bytes)?;
        let places = places.at_least("places", tokens)?;
        let (cells, slot_bytes) = self.cells(layer)?;
        let (row_bytes, count) = (row_bytes as u64, tokens as u32);
        let mut launch = self.compute.launch_builder(&self.functions.scatter);
        launch.arg(&from).arg(&row_bytes).arg(&places).arg(&count).arg(&cells).arg(&slot_bytes);
        // SAFETY: the arguments are those of `scatter` in scatter.cu; the lengths are checked, the places are the engine's checked step.
        doing("scatter", unsafe { launch.launch(copying(tokens * token_bytes)) }).map(drop)
    }

    /// Copies `tokens` tokens of a sequence to `to`, `[parts, kv_heads, tokens, head_dim]`; `table`: its slots from the first token's block on.
    ///
    /// # Errors
    /// As [`Gpu::scatter`].
    pub fn gather(&self, layer: usize, table: OnDevice<i32>, tokens: usize, to: OnDevice<u8>) -> Result<(), GpuError> {
        let table = table.at_least("slots", tokens.div_ceil(self.shape.block_tokens))?;
        let to = to.at_least("bytes for keys and values", tokens * self.token_bytes())?;
        let (cells, slot_bytes) = self.cells(layer)?;
        let count = tokens as u32;
        let mut launch = self.compute.launch_builder(&self.functions.gather);
        launch.arg(&cells).arg(&slot_bytes).arg(&table).arg(&count).arg(&to);
        // SAFETY: the arguments are those of `gather` in gather.cu; the lengths are checked, the slots are the engine's checked step.
        doing("gather", unsafe { launch.launch(copying(tokens * self.token_bytes())) }).map(drop)
    }

    /// Whether [`Gpu::attend`] is for this shape.
    #[must_use]
    pub fn can_attend(&self) -> bool {
        self.functions.attention.is_some()
    }

    /// Attention of single tokens over their contexts.
    ///
    /// # Errors
    /// As [`Gpu::scatter`].
    pub fn attend(&self, layer: usize, singles: &Singles) -> Result<(), GpuError> {
        let shape = &self.shape;
        let unfit = || GpuError::Shape { what: "numbers of a head", got: shape.head_dim, expected: 8 };
        let (attend, merge) = self.functions.attention.as_ref().ok_or_else(unfit)?;
        let Singles { count, table_len, parts_max, .. } = *singles;
        let width = count * shape.heads * shape.head_dim;
        let queries = singles.queries.at_least("numbers of queries", width)?;
        let tables = singles.tables.at_least("slots", count * table_len)?;
        let contexts = singles.contexts.at_least("numbers of contexts", count * CONTEXT_NUMBERS)?;
        let left = count * parts_max * shape.heads * (shape.head_dim + 2);
        let parts = singles.parts.at_least("numbers for parts", left)?;
        let out = singles.out.at_least("bytes for what was attended", shape.element.vector_bytes(width))?;
        let (cells, slot_bytes) = self.cells(layer)?;
        let (table_len, parts_of, scale) = (table_len as u32, parts_max as u32, shape.scale);
        let mut launch = self.compute.launch_builder(attend);
        launch.arg(&queries).arg(&cells).arg(&slot_bytes).arg(&tables).arg(&table_len).arg(&contexts).arg(&scale).arg(&parts);
        // SAFETY: the arguments are those of `attend` in paged_attention.cu; the lengths are checked, contexts and slots are the engine's checked step.
        doing("attend", unsafe { launch.launch(config(attend_grid(shape, parts_max, count))) })?;
        let mut launch = self.compute.launch_builder(merge);
        launch.arg(&parts).arg(&parts_of).arg(&contexts).arg(&out);
        // SAFETY: as above, for `merge`.
        doing("merge", unsafe { launch.launch(config([shape.heads, count, 1])) }).map(drop)
    }

    /// Copies what a step wrote of a layer to the node's memory, beside what the device computes next: `spans` has `count` spans, `cells` are the cells
    /// that they are in.
    ///
    /// # Errors
    /// As [`Gpu::scatter`].
    pub fn spill(&self, layer: usize, spans: OnDevice<i32>, count: usize, cells: Vec<SeizedCell>) -> Result<Landing, GpuError> {
        let spans = spans.at_least("numbers of spans", count * SPAN_NUMBERS)?;
        let (from, slot_bytes) = self.cells(layer)?;
        let to = self.mapped.address + (layer * self.shape.cell_bytes()) as u64;
        doing("ordering streams", self.copies.join(&self.compute))?;
        let count = count as u32;
        let mut launch = self.copies.launch_builder(&self.functions.spill);
        launch.arg(&from).arg(&to).arg(&slot_bytes).arg(&spans).arg(&count);
        let grid = config([SPILL_BLOCKS.min(count.max(1) as usize), 1, 1]);
        // SAFETY: the arguments are those of `spill` in spill.cu; pool and mapped memory have one shape (`open`). The cells that are written are locked
        // by `cells`, which the landing holds until the device is through; were it leaked, so would be the memory.
        doing("spill", unsafe { launch.launch(grid) })?;
        let event = doing("recording an event", self.copies.record_event(None))?;
        Ok(Landing { event, _written: cells, _read: Vec::new() })
    }

    /// Copies a slot's cells, all layers in order, from the node's memory to the pool, before anything that is launched later.
    ///
    /// # Errors
    /// As [`Gpu::scatter`].
    pub fn load(&self, slot: usize, cells: Vec<SharedCell>) -> Result<Landing, GpuError> {
        let (bytes, layers) = (self.shape.cell_bytes(), self.pool.layers);
        if cells.len() != layers || slot >= self.pool.slots {
            return Err(GpuError::Shape { what: "cells of a slot", got: cells.len(), expected: layers });
        }
        // SAFETY: offset within the piece, whose shape is that of the pool (`open`).
        let from = unsafe { self.mapped.piece.start().add(slot * layers * bytes) };
        assert!(cells.first().is_none_or(|cell| cell.as_ref().as_ptr() == from.as_ptr()), "cells of another slot");
        let to = self.pool.cells.address + (slot * layers * bytes) as u64;
        doing("choosing the device", self.compute.context().bind_to_thread())?;
        // SAFETY: the slot's cells lie one after the other, and are locked against writing by `cells` until the copy is through.
        let copy = unsafe { sys::cuMemcpyHtoDAsync_v2(to, from.as_ptr().cast(), layers * bytes, self.compute.cu_stream()) };
        doing("copying a block to the device", copy.result())?;
        let event = doing("recording an event", self.compute.record_event(None))?;
        Ok(Landing { event, _written: Vec::new(), _read: cells })
    }

    /// Bytes of one token in one layer.
    fn token_bytes(&self) -> usize {
        self.shape.cell_bytes() / self.shape.block_tokens
    }

    /// Where the cell of slot 0 of a layer begins, and the bytes from slot to slot.
    fn cells(&self, layer: usize) -> Result<(u64, u64), GpuError> {
        if layer >= self.pool.layers {
            return Err(GpuError::Shape { what: "layer", got: layer, expected: self.pool.layers - 1 });
        }
        let bytes = self.shape.cell_bytes();
        Ok((self.pool.cells.address + (layer * bytes) as u64, (self.pool.layers * bytes) as u64))
    }
}

impl Functions {
    fn load(context: &Arc<CudaContext>, shape: &DecodeShape) -> Result<Self, GpuError> {
        let (major, minor) = doing("asking for the device's kind", context.compute_capability())?;
        let options = vec![format!("--gpu-architecture=compute_{major}{minor}"), "--std=c++17".to_owned()];
        let options = CompileOptions { options, ..CompileOptions::default() };
        // `cudarc` panics where there is no NVRTC, or one that lacks a function.
        let text = text(shape).ok_or(GpuError::Element)?;
        let compiled = std::panic::catch_unwind(|| compile_ptx_with_opts(text, options));
        let ptx = compiled.map_err(|_| GpuError::Library("libnvrtc.so"))?.map_err(|error| GpuError::Compile(explained(&error)))?;
        let module = doing("loading the kernels", context.load_module(ptx))?;
        let function = |module: &Arc<CudaModule>, name| doing("finding a kernel", module.load_function(name));
        let attention = can_attend(shape).then(|| Ok((function(&module, "attend")?, function(&module, "merge")?)));
        Ok(Self {
            scatter: function(&module, "scatter")?,
            gather: function(&module, "gather")?,
            spill: function(&module, "spill")?,
            attention: attention.transpose()?,
        })
    }
}

impl Mapped {
    fn new(piece: &Arc<Piece>, context: &Arc<CudaContext>) -> Result<Self, GpuError> {
        let (memory, flags) =
            (piece.start().as_ptr().cast::<c_void>(), sys::CU_MEMHOSTREGISTER_DEVICEMAP | sys::CU_MEMHOSTREGISTER_PORTABLE);
        doing("choosing the device", context.bind_to_thread())?;
        // SAFETY: the piece is ours, as long as it says, and lives as long as this.
        let locked = unsafe { sys::cuMemHostRegister_v2(memory, piece.bytes(), flags as c_uint) };
        doing("page-locking the KV memory", locked.result())?;
        let mut mapped = Self { piece: Arc::clone(piece), address: 0, context: Arc::clone(context) };
        // SAFETY: the memory was registered above, for the device too.
        let address = unsafe { sys::cuMemHostGetDevicePointer_v2(&raw mut mapped.address, memory, 0) };
        doing("mapping the KV memory", address.result())?;
        Ok(mapped)
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let _ = self.context.synchronize();
        // SAFETY: it was registered when this was made; nothing runs on the device any more.
        let _ = unsafe { sys::cuMemHostUnregister(self.piece.start().as_ptr().cast()) };
    }
}

/// What the driver calls a device.
///
/// # Errors
/// [`GpuError`] when there is no driver, or no such device.
pub fn device_name(ordinal: usize) -> Result<String, GpuError> {
    doing("asking for the device's name", open_context(ordinal)?.name())
}

/// The primary context of a device: LibTorch's own.
fn open_context(ordinal: usize) -> Result<Arc<CudaContext>, GpuError> {
    // `cudarc` panics where there is no driver, or one that lacks a function.
    let context = std::panic::catch_unwind(|| CudaContext::new(ordinal)).map_err(|_| GpuError::Library("libcuda.so.1"))?;
    doing("opening the device", context)
}

/// What NVRTC said, without what it was given.
fn explained(error: &CompileError) -> String {
    match error {
        CompileError::CompileError { log, .. } => log.to_string_lossy().into_owned(),
        other => other.to_string(),
    }
}

fn config(grid: [usize; 3]) -> LaunchConfig {
    let [x, y, z] = grid.map(|side| side as u32);
    LaunchConfig { grid_dim: (x, y, z), block_dim: (THREADS as u32, 1, 1), shared_mem_bytes: 0 }
}

/// For kernels that copy so many bytes, 16 by a thread.
fn copying(bytes: usize) -> LaunchConfig {
    config([bytes.div_ceil(16 * THREADS).clamp(1, COPY_BLOCKS_MAX), 1, 1])
}
