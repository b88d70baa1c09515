//! The KV pool on the device, and its agreement with the node's memory.
//!
//! Every cell is kept twice: here, where kernels read it, and in the slab, where hand-overs do. What a step computes goes to both, layer by layer.
//! What came from another node stands in the slab alone: the slab counts others' writes slot by slot, and a slot whose count is not the one
//! that was last copied is copied before the step that reads it. So nobody has to tell the engine what arrived.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use millrace_core::engine::Step;
use millrace_core::layout::KvLayout;
use millrace_kernels::cuda::{Gpu, OnDevice, Pool as GpuPool, SPAN_NUMBERS, Singles};
use millrace_kernels::slab::{SeizedCell, SharedCell};
use millrace_kernels::{DecodeShape, KvSlab};
use tch::{Device, Kind, Tensor};

use crate::ModelError;
use crate::tensor::plan::{Plan, SingleTokens};
use crate::tensor::reference;
use crate::tensor::spills::{Landing, Spills};

/// The two places of a cell. See the module text.
pub(super) struct Pool {
    kernels: Kernels,
    slab: Arc<KvSlab>,
    layout: KvLayout,
    shape: DecodeShape,
    /// `[slots, layers, parts, kv_heads, block_tokens, head_dim]`.
    cells: Tensor,
    /// Of each slot how often it had been written by others when the two places last agreed.
    agreed: Vec<u64>,
}

/// Cells of one layer, by slot.
type Seized = BTreeMap<usize, SeizedCell>;

/// Who copies and attends.
enum Kernels {
    /// Our own, on a CUDA device.
    Gpu(Box<Gpu>),
    /// LibTorch's operations, on any device.
    Reference,
}

impl Pool {
    /// A pool as large as the slab, of numbers of `kind`.
    pub(super) fn new(
        shape: DecodeShape,
        (layout, kind): (KvLayout, Kind),
        slab: &Arc<KvSlab>,
        device: Device,
    ) -> Result<Self, ModelError> {
        let sides = [slab.slots(), slab.layers(), layout.parts.count(), shape.kv_heads, shape.block_tokens, shape.head_dim];
        let cells = Tensor::f_zeros(sides.map(|side| side as i64), (kind, device))?;
        let kernels = match device {
            Device::Cuda(ordinal) => {
                let pool = GpuPool { cells: on_device(&cells), layers: slab.layers(), slots: slab.slots() };
                Kernels::Gpu(Box::new(Gpu::open(ordinal, shape, pool, slab)?))
            }
            _ => Kernels::Reference,
        };
        Ok(Self { kernels, slab: slab.clone(), layout, shape, cells, agreed: vec![0; slab.slots()] })
    }

    /// The shape of attention.
    pub(super) fn shape(&self) -> &DecodeShape {
        &self.shape
    }

    /// Brings to the device what a step reads and others wrote. The landings hold the cells until they are through.
    pub(super) fn arrive(&mut self, step: &Step) -> Result<Vec<Landing>, ModelError> {
        let mut landings = Vec::new();
        for row in &step.rows {
            let (read, end) = (self.layout.blocks(row.start as usize), self.layout.blocks(row.end() as usize));
            for slot in row.table[..read].iter().map(|slot| slot.0 as usize) {
                let writes = self.slab.writes(slot);
                if self.agreed[slot] != writes {
                    landings.push(self.load(slot)?);
                    self.agreed[slot] = writes;
                }
            }
            // Nothing is read of the others before it is written here.
            row.table[read..end].iter().for_each(|slot| self.agreed[slot.0 as usize] = self.slab.writes(slot.0 as usize));
        }
        Ok(landings)
    }

    fn load(&self, slot: usize) -> Result<Landing, ModelError> {
        let cells: Vec<SharedCell> = (0..self.slab.layers()).map(|layer| self.slab.share(slot, layer)).collect();
        match &self.kernels {
            Kernels::Gpu(gpu) => Ok(Landing::Device(gpu.load(slot, cells)?)),
            Kernels::Reference => {
                reference::load(&self.cells.f_select(0, slot as i64)?, &cells)?;
                Ok(Landing::Here { written: Vec::new(), _read: cells })
            }
        }
    }

    /// Writes a layer's new keys and values, `[tokens, parts * kv_heads, head_dim]` in the engine's type, to the device's cells.
    pub(super) fn store(&self, layer: usize, new: &Tensor, plan: &Plan) -> Result<(), ModelError> {
        match &self.kernels {
            Kernels::Gpu(gpu) => {
                let row_bytes = self.layout.token_bytes();
                Ok(gpu.scatter(layer, on_device(new), row_bytes, on_device(&plan.places), plan.tokens() as usize)?)
            }
            Kernels::Reference => reference::scatter(&self.layer(layer)?, new, &plan.places),
        }
    }

    /// Brings what the step wrote of a layer to the slab; `spills` reports the layer when it stands there.
    pub(super) fn spill(
        &self,
        layer: usize,
        plan: &Plan,
        spills: &mut Spills,
        on_layer: &mut dyn FnMut(u16),
    ) -> Result<(), ModelError> {
        let slots: BTreeSet<usize> = plan.written.iter().map(|span| span.slot).collect();
        let cells: Option<Seized> = slots.iter().map(|&slot| Some((slot, self.slab.try_seize(slot, layer)?))).collect();
        if let Some(cells) = cells {
            spills.push(self.copy_out(layer, plan, 0..plan.written.len(), cells)?);
            return Ok(());
        }
        // Somebody reads one of these cells. Who waits for it holds no other.
        spills.wait(on_layer)?;
        for (index, span) in plan.written.iter().enumerate() {
            let cell = Seized::from([(span.slot, self.slab.seize(span.slot, layer))]);
            self.copy_out(layer, plan, index..index + 1, cell)?.wait()?;
        }
        spills.push(Landing::nothing());
        Ok(())
    }

    /// Copies some of the spans that a step wrote of a layer to the cells that they are in.
    fn copy_out(&self, layer: usize, plan: &Plan, spans: Range<usize>, mut cells: Seized) -> Result<Landing, ModelError> {
        match &self.kernels {
            Kernels::Gpu(gpu) => {
                let at = plan.spans.f_slice(0, (spans.start * SPAN_NUMBERS) as i64, None, 1)?;
                Ok(Landing::Device(gpu.spill(layer, on_device(&at), spans.len(), cells.into_values().collect())?))
            }
            Kernels::Reference => {
                let pool = self.layer(layer)?;
                for span in &plan.written[spans] {
                    let cell = cells.get_mut(&span.slot).expect("the cell of each span is seized");
                    reference::spill(&pool.f_select(0, span.slot as i64)?, span.first, span.count, cell)?;
                }
                Ok(Landing::Here { written: cells.into_values().collect(), _read: Vec::new() })
            }
        }
    }

    /// What a sequence has cached at `tokens` positions, from the first slot of `table` on: `[parts, kv_heads, tokens, head_dim]`.
    pub(super) fn gather(&self, layer: usize, table: &Tensor, tokens: i64) -> Result<Tensor, ModelError> {
        match &self.kernels {
            Kernels::Reference => reference::gather(&self.layer(layer)?, table, tokens),
            Kernels::Gpu(gpu) => {
                let sides = [self.layout.parts.count() as i64, self.shape.kv_heads as i64, tokens, self.shape.head_dim as i64];
                let to = Tensor::f_empty(sides, (self.cells.kind(), self.cells.device()))?;
                gpu.gather(layer, on_device(table), tokens as usize, on_device(&to))?;
                Ok(to)
            }
        }
    }

    /// Attention of single tokens; `queries`: `[singles, heads, head_dim]` in f32. Gives the same in the engine's type.
    pub(super) fn attend(&self, layer: usize, queries: &Tensor, singles: &SingleTokens) -> Result<Tensor, ModelError> {
        match &self.kernels {
            Kernels::Reference => reference::attend(&self.layer(layer)?, queries, singles, &self.shape),
            Kernels::Gpu(gpu) => {
                let (queries, count) = (queries.f_contiguous()?, queries.size()[0]);
                let out = Tensor::f_empty(queries.size(), (self.cells.kind(), self.cells.device()))?;
                let numbers = count * (singles.parts_max * self.shape.part_numbers()) as i64;
                let parts = Tensor::f_empty([numbers], (Kind::Float, self.cells.device()))?;
                let launched = Singles {
                    count: count as usize,
                    queries: on_device(&queries),
                    tables: on_device(&singles.tables),
                    table_len: singles.tables.size()[1] as usize,
                    contexts: on_device(&singles.contexts),
                    parts_max: singles.parts_max,
                    parts: on_device(&parts),
                    out: on_device(&out),
                };
                gpu.attend(layer, &launched)?;
                Ok(out)
            }
        }
    }

    /// `[slots, parts, kv_heads, block_tokens, head_dim]`.
    fn layer(&self, layer: usize) -> Result<Tensor, ModelError> {
        Ok(self.cells.f_select(1, layer as i64)?)
    }
}

/// A contiguous tensor as the kernels take it, in numbers of `T`.
fn on_device<T>(tensor: &Tensor) -> OnDevice<T> {
    let bytes = tensor.numel() * tensor.kind().elt_size_in_bytes();
    OnDevice::new(tensor.data_ptr() as u64, bytes / size_of::<T>())
}
