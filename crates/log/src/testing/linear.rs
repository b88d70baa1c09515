//! Is a history of reads and writes of registers linearizable? The search of Wing and Gong, with Lowe's memory of states seen, register
//! by register (linearizability is local: Herlihy and Wing 1990).
//!
//! Each value is written at most once. A write whose outcome is unknown may take effect at any time after its call, or never.

use std::collections::{BTreeMap, HashSet};

/// What was asked of a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// This value.
    Write(u64),
    /// What it answered; `None`: nothing was ever written.
    Read(Option<u64>),
}

/// One operation; times are any that order calls and returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Op {
    /// Which register.
    pub key: u8,
    /// What was asked.
    pub kind: Kind,
    /// When.
    pub call: u64,
    /// When it was answered; `None`: it was not.
    pub ret: Option<u64>,
}

/// Operations in flight at a time, beyond which a history is not searched.
const WINDOW_MAX: usize = 128;

/// Whether there is an order.
///
/// # Errors
/// The shortest run of calls of one register for which there is none.
///
/// # Panics
/// When more operations are in flight than can be searched.
pub fn check(history: &[Op]) -> Result<(), Vec<Op>> {
    let mut registers: BTreeMap<u8, Vec<Op>> = BTreeMap::new();
    history.iter().for_each(|op| registers.entry(op.key).or_default().push(*op));
    registers.into_values().try_for_each(|mut ops| {
        ops.sort_by_key(|op| op.call);
        let read: HashSet<Option<u64>> =
            ops.iter().filter_map(|op| if let Kind::Read(v) = op.kind { Some(v) } else { None }).collect();
        // A write that nobody has read and nobody has been told of might as well not have happened.
        ops.retain(|op| op.ret.is_some() || matches!(op.kind, Kind::Write(v) if read.contains(&Some(v))));
        if linearizable(&ops) { Ok(()) } else { Err(shortest(&ops)) }
    })
}

fn shortest(ops: &[Op]) -> Vec<Op> {
    let known = |n: usize| {
        let mut run = ops[..n].to_vec();
        let end = run.last().map_or(0, |op| op.call);
        // What had not returned by then was not known then.
        run.iter_mut().for_each(|op| op.ret = op.ret.filter(|ret| *ret <= end || op.call == end));
        run.retain(|op| op.ret.is_some() || matches!(op.kind, Kind::Write(_)));
        run
    };
    (1..=ops.len()).map(known).find(|run| !linearizable(run)).unwrap_or_else(|| ops.to_vec())
}

/// How far an order has come: all before `first` and those whose bit is set are in it, and the register holds `value`.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Place {
    first: usize,
    done: u128,
    value: Option<u64>,
}

fn linearizable(ops: &[Op]) -> bool {
    let start = Place { first: 0, done: 0, value: None };
    let (mut seen, mut open) = (HashSet::from([start.clone()]), vec![start]);
    while let Some(place) = open.pop() {
        let done = |i: usize| place.done.checked_shr((i - place.first) as u32).unwrap_or(0) & 1 == 1;
        let left = || ops.iter().enumerate().skip(place.first).filter(|(i, _)| !done(*i));
        let Some(first_return) = left().filter_map(|(_, op)| op.ret).min() else { return true };
        for (i, op) in left().take_while(|(_, op)| op.call < first_return) {
            assert!(i - place.first < WINDOW_MAX, "too much in flight to search");
            let value = match op.kind {
                Kind::Write(value) => Some(value),
                Kind::Read(value) if value == place.value => value,
                Kind::Read(_) => continue,
            };
            let mut next = Place { value, done: place.done | 1 << (i - place.first), ..place };
            let whole = next.done.trailing_ones();
            next.first += whole as usize;
            next.done = next.done.checked_shr(whole).unwrap_or(0);
            if seen.insert(next.clone()) {
                open.push(next);
            }
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op(kind: Kind, call: u64, ret: u64) -> Op {
        Op { key: 0, kind, call, ret: (ret > 0).then_some(ret) }
    }

    #[test]
    fn histories_of_textbooks_are_judged_rightly() {
        use Kind::{Read, Write};
        let good: [&[Op]; 5] = [
            &[],
            &[op(Write(1), 1, 2), op(Read(Some(1)), 3, 4)],
            &[op(Write(1), 1, 6), op(Read(None), 2, 3), op(Read(Some(1)), 4, 5)],
            &[op(Write(1), 1, 0), op(Read(None), 2, 3), op(Read(Some(1)), 8, 9)],
            &[op(Write(1), 1, 9), op(Write(2), 2, 8), op(Read(Some(2)), 3, 4), op(Read(Some(1)), 5, 6)],
        ];
        let bad: [&[Op]; 5] = [
            &[op(Read(Some(1)), 1, 2)],
            &[op(Write(1), 1, 2), op(Read(None), 3, 4)],
            &[op(Write(1), 1, 6), op(Read(Some(1)), 2, 3), op(Read(None), 4, 5)],
            &[op(Write(1), 1, 2), op(Write(2), 3, 4), op(Read(Some(1)), 5, 6)],
            &[op(Write(1), 1, 0), op(Write(2), 3, 4), op(Read(Some(1)), 5, 6), op(Read(Some(2)), 7, 8)],
        ];
        good.iter().for_each(|history| assert_eq!(check(history), Ok(())));
        bad.iter().for_each(|history| assert!(check(history).is_err(), "{history:?}"));
        let two_registers = [op(Write(1), 1, 2), Op { key: 1, ..op(Kind::Read(None), 3, 4) }];
        assert_eq!(check(&two_registers), Ok(()));
    }
}
