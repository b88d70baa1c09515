//! What a step reads and writes, once for all layers: tokens, places, contexts, as lists here and as tensors on the device.

use std::ops::Range;

use millrace_core::engine::{Row, Step};
use millrace_core::layout::KvLayout;
use millrace_kernels::cuda::{part_tokens, parts};
use tch::{Device, Tensor};

use crate::{ModelError, tensors};

/// A step, planned.
pub(super) struct Plan {
    /// Tokens of the step, row by row: `[tokens]`.
    pub(super) ids: Tensor,
    /// Their positions: `[tokens]`.
    pub(super) positions: Tensor,
    /// Where the KV of each goes: slot times tokens of a block, plus the place in it.
    pub(super) places: Tensor,
    /// What the step writes of each cell.
    pub(super) written: Vec<Written>,
    /// The same, three numbers each.
    pub(super) spans: Tensor,
    /// For each window that layers have.
    batches: Vec<(Option<usize>, Batch)>,
}

/// Tokens of one cell that a step writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Written {
    pub(super) slot: usize,
    pub(super) first: usize,
    pub(super) count: usize,
}

/// What the tokens of a step see in layers of one window.
pub(super) struct Batch {
    /// Rows of several tokens, and all rows where the kernel for single tokens is not for the model.
    pub(super) chunks: Vec<Chunk>,
    /// Rows of one token.
    pub(super) singles: Option<SingleTokens>,
}

/// A row of several tokens.
pub(super) struct Chunk {
    /// Its tokens in the step.
    pub(super) tokens: Range<i64>,
    /// Slots from the first position that is gathered on.
    pub(super) table: Tensor,
    /// Positions that are gathered.
    pub(super) gathered: i64,
    /// `[tokens, gathered]`, whether a token sees a position; `None` where that is all that are before it.
    pub(super) mask: Option<Tensor>,
}

/// Rows of one token, for the paged kernel.
pub(super) struct SingleTokens {
    /// Their indices in the step; `None` when they are the step.
    pub(super) index: Option<Tensor>,
    /// Slots of each.
    pub(super) tables: Tensor,
    /// First position, end, positions of a part.
    pub(super) contexts: Tensor,
    /// Parts of the longest context.
    pub(super) parts_max: usize,
}

/// What a plan follows from beside the step.
#[derive(Clone, Copy)]
pub(super) struct Ground<'a> {
    pub(super) layout: &'a KvLayout,
    /// Of each layer.
    pub(super) windows: &'a [Option<usize>],
    /// Whether the paged kernel is for this model.
    pub(super) pages: bool,
    pub(super) device: Device,
}

impl Plan {
    pub(super) fn new(step: &Step, ground: Ground<'_>) -> Result<Self, ModelError> {
        let block = usize::from(ground.layout.block_tokens);
        let each =
            || step.rows.iter().flat_map(|row| row.tokens.iter().zip(row.start..).map(move |(id, at)| (row, *id, at as usize)));
        let place = |(row, _, at): (&Row, u32, usize)| (row.table[at / block].0 as usize * block + at % block) as i32;
        let long = |numbers: Vec<i64>| whole(&numbers, ground.device);
        let written: Vec<Written> = step.rows.iter().flat_map(|row| written(row, block)).collect();
        let spans = written.iter().flat_map(|span| [span.slot, span.first, span.count]).map(|n| n as i32).collect::<Vec<_>>();
        let mut windows = ground.windows.to_vec();
        windows.sort_unstable();
        windows.dedup();
        let batch = |window: Option<usize>| Ok((window, Batch::new(step, ground, window)?));
        Ok(Self {
            ids: long(each().map(|(_, id, _)| id.into()).collect())?,
            positions: long(each().map(|(_, _, at)| at as i64).collect())?,
            places: small(&each().map(place).collect::<Vec<_>>(), ground.device)?,
            spans: small(&spans, ground.device)?,
            written,
            batches: windows.into_iter().map(batch).collect::<Result<_, ModelError>>()?,
        })
    }

    /// Tokens of the step.
    pub(super) fn tokens(&self) -> i64 {
        self.ids.size()[0]
    }

    /// What tokens see in a layer with this window.
    pub(super) fn of(&self, window: Option<usize>) -> &Batch {
        let (_, batch) = self.batches.iter().find(|(of, _)| *of == window).expect("made for each window");
        batch
    }
}

impl Batch {
    fn new(step: &Step, ground: Ground<'_>, window: Option<usize>) -> Result<Self, ModelError> {
        let (mut chunks, mut singles, mut first) = (Vec::new(), Vec::new(), 0);
        for row in &step.rows {
            if row.tokens.len() == 1 && ground.pages {
                singles.push((row, first));
            } else {
                chunks.push(Chunk::new(row, first, ground, window)?);
            }
            first += row.tokens.len() as i64;
        }
        let singles = if singles.is_empty() { None } else { Some(SingleTokens::new(&singles, first, ground, window)?) };
        Ok(Self { chunks, singles })
    }
}

/// What a token at `position` sees.
fn context(position: usize, window: Option<usize>) -> Range<usize> {
    let end = position + 1;
    window.map_or(0, |window| end.saturating_sub(window))..end
}

impl Chunk {
    fn new(row: &Row, first: i64, ground: Ground<'_>, window: Option<usize>) -> Result<Self, ModelError> {
        let (start, end, tokens) = (row.start as usize, row.end() as usize, row.tokens.len());
        let block = usize::from(ground.layout.block_tokens);
        let from = context(start, window).start / block * block;
        let table: Vec<i32> = row.table[from / block..ground.layout.blocks(end)].iter().map(|slot| slot.0 as i32).collect();
        let masked = start > 0 || window.is_some_and(|window| tokens > window);
        let mask = if masked { Some(mask(start..end, from, window, ground.device)?) } else { None };
        Ok(Self { tokens: first..first + tokens as i64, table: small(&table, ground.device)?, gathered: (end - from) as i64, mask })
    }
}

impl SingleTokens {
    fn new(rows: &[(&Row, i64)], tokens: i64, ground: Ground<'_>, window: Option<usize>) -> Result<Self, ModelError> {
        let contexts: Vec<Range<usize>> = rows.iter().map(|(row, _)| context(row.start as usize, window)).collect();
        let longest = contexts.iter().map(|context| ground.layout.blocks(context.end)).max().unwrap_or(0);
        // A slot that is not read stands in for those that a shorter sequence does not have.
        let slots = |(row, context): (&(&Row, i64), &Range<usize>)| {
            let own = row.0.table[..ground.layout.blocks(context.end)].iter().map(|slot| slot.0 as i32);
            own.chain(std::iter::repeat(0)).take(longest).collect::<Vec<_>>()
        };
        let tables: Vec<i32> = rows.iter().zip(&contexts).flat_map(slots).collect();
        let numbers = contexts.iter().flat_map(|context| [context.start, context.end, part_tokens(context.len())]);
        let index: Vec<i64> = rows.iter().map(|(_, first)| *first).collect();
        Ok(Self {
            index: if index.len() as i64 == tokens { None } else { Some(whole(&index, ground.device)?) },
            tables: small(&tables, ground.device)?.f_reshape([rows.len() as i64, longest as i64])?,
            contexts: small(&numbers.map(|n| n as i32).collect::<Vec<_>>(), ground.device)?.f_reshape([rows.len() as i64, 3])?,
            parts_max: contexts.iter().map(|context| parts(context.len())).max().unwrap_or(0),
        })
    }
}

/// Whether each token at `positions` sees each position from `from` on.
fn mask(positions: Range<usize>, from: usize, window: Option<usize>, device: Device) -> Result<Tensor, ModelError> {
    let long = (tch::Kind::Int64, device);
    let token = Tensor::f_arange_start(positions.start as i64, positions.end as i64, long)?.f_unsqueeze(1)?;
    let seen = Tensor::f_arange_start(from as i64, positions.end as i64, long)?.f_unsqueeze(0)?;
    let past = seen.f_le_tensor(&token)?;
    let Some(window) = window else { return Ok(past) };
    Ok(past.f_logical_and(&seen.f_gt_tensor(&token.f_sub_scalar(window as i64)?)?)?)
}

/// What a row writes of each of its cells.
fn written(row: &Row, block: usize) -> Vec<Written> {
    let (start, end) = (row.start as usize, row.end() as usize);
    let of_block = |index: usize| {
        let (from, to) = (start.max(index * block), end.min((index + 1) * block));
        Written { slot: row.table[index].0 as usize, first: from - index * block, count: to - from }
    };
    (start / block..end.div_ceil(block)).map(of_block).collect()
}

pub(super) fn whole(numbers: &[i64], device: Device) -> Result<Tensor, ModelError> {
    tensors::from_bytes(bytemuck::cast_slice(numbers), &[numbers.len() as i64], tch::Kind::Int64, device)
}

fn small(numbers: &[i32], device: Device) -> Result<Tensor, ModelError> {
    tensors::from_bytes(bytemuck::cast_slice(numbers), &[numbers.len() as i64], tch::Kind::Int, device)
}

#[cfg(test)]
mod tests {
    use millrace_core::ids::{AttemptId, Slot};

    use super::*;

    #[test]
    fn a_row_writes_runs_within_its_blocks() {
        let row = |start, tokens| Row {
            attempt: AttemptId::default(),
            tokens: vec![1; tokens],
            start,
            table: [7, 3, 9].map(Slot).to_vec(),
            sample: None,
        };
        let runs = |row: &Row| written(row, 16).iter().map(|w| (w.slot, w.first, w.count)).collect::<Vec<_>>();
        assert_eq!(runs(&row(0, 1)), [(7, 0, 1)]);
        assert_eq!(runs(&row(14, 20)), [(7, 14, 2), (3, 0, 16), (9, 0, 2)]);
        assert_eq!(runs(&row(16, 16)), [(3, 0, 16)]);
    }

    #[test]
    fn masks_show_what_is_before_and_within_the_window() {
        let seen = |window| {
            let mask = mask(4..6, 2, window, Device::Cpu).unwrap().f_to_kind(tch::Kind::Float).unwrap();
            tensors::to_f32(&mask).unwrap()
        };
        assert_eq!(seen(None), [1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0]);
        assert_eq!(seen(Some(2)), [0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0]);
    }
}
