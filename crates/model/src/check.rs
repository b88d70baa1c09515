//! Whether a step can be computed at all. Both engines ask this first, so that a wrong step is an error and not a panic.

use millrace_core::engine::{Row, Step};
use millrace_core::layout::KvLayout;

use crate::ModelError;

/// What a row must stay within.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Token ids are below this.
    pub vocab: usize,
    /// Positions are below this.
    pub positions: usize,
    /// Slots are below this.
    pub slots: usize,
}

/// Checks every row of a step.
pub(crate) fn step(step: &Step, layout: &KvLayout, limits: Limits) -> Result<(), ModelError> {
    for (index, row) in step.rows.iter().enumerate() {
        check_row(row, layout, limits).map_err(|what| ModelError::Row { row: index, what })?;
    }
    Ok(())
}

fn check_row(row: &Row, layout: &KvLayout, limits: Limits) -> Result<(), String> {
    if row.tokens.is_empty() {
        return Err("no tokens".into());
    }
    if let Some(token) = row.tokens.iter().find(|&&token| token as usize >= limits.vocab) {
        return Err(format!("token {token} is not below the vocabulary's {}", limits.vocab));
    }
    let end = row.start as usize + row.tokens.len();
    if end > limits.positions {
        return Err(format!("position {end} is over the context of {}", limits.positions));
    }
    let needed = layout.blocks(end);
    if row.table.len() < needed {
        return Err(format!("a table of {} blocks, {needed} needed", row.table.len()));
    }
    match row.table[..needed].iter().find(|slot| slot.0 as usize >= limits.slots) {
        Some(slot) => Err(format!("slot {slot} is not below {}", limits.slots)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use millrace_core::ids::{AttemptId, Slot};
    use millrace_core::layout::{KvDtype, KvParts};

    #[test]
    fn each_wrong_row_is_refused() {
        let layout =
            KvLayout { layers: 1, parts: KvParts::KeysValues, kv_heads: 1, head_dim: 2, block_tokens: 4, dtype: KvDtype::F32 };
        let limits = Limits { vocab: 10, positions: 12, slots: 3 };
        let good = Row { attempt: AttemptId::default(), tokens: vec![1, 9], start: 3, table: vec![Slot(2), Slot(0)], sample: None };
        let ask = |change: fn(&mut Row)| {
            let mut row = good.clone();
            change(&mut row);
            step(&Step { rows: vec![good.clone(), row] }, &layout, limits).map_err(|e| e.to_string())
        };
        assert_eq!(ask(|_| ()), Ok(()));
        assert_eq!(ask(|r| r.tokens.clear()), Err("row 1: no tokens".into()));
        assert!(ask(|r| r.tokens[1] = 10).unwrap_err().contains("token 10"));
        assert!(ask(|r| r.start = 11).unwrap_err().contains("position 13"));
        assert!(ask(|r| r.start = u32::MAX).unwrap_err().contains("position"));
        assert!(ask(|r| r.table.truncate(1)).unwrap_err().contains("table of 1"));
        assert!(ask(|r| r.table[1] = Slot(3)).unwrap_err().contains("slot 3"));
    }
}
