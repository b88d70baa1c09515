//! Answers of a run against those of another of the same plan, so that speed is never bought with wrong tokens. Equal requests at temperature
//! 0 must have equal answers; in f32 that is exact, in bf16 near ties may fall the other way.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::record::Record;

/// Differing requests that are named.
pub const NAMED_MAX: usize = 16;

/// What the comparison found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compared {
    /// Equal answers.
    pub same: u64,
    /// Different ones.
    pub different: u64,
    /// Requests without a whole answer in either run.
    pub incomparable: u64,
    /// The first that differ.
    pub named: Vec<u32>,
}

/// Compares the whole answers of both runs, request by request.
#[must_use]
pub fn compare(golden: &[Record], records: &[Record]) -> Compared {
    let known: HashMap<u32, u64> = golden.iter().filter(|r| r.ok()).filter_map(|r| Some((r.i, r.answer?))).collect();
    let mut found = Compared::default();
    for record in records {
        match (known.get(&record.i), record.answer.filter(|_| record.ok())) {
            (Some(golden), Some(answer)) if *golden == answer => found.same += 1,
            (Some(_), Some(_)) => {
                found.different += 1;
                if found.named.len() < NAMED_MAX {
                    found.named.push(record.i);
                }
            }
            _ => found.incomparable += 1,
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::super::record::Outcome;
    use super::super::summary::tests::known;
    use super::*;

    #[test]
    fn one_wrong_answer_is_found() {
        let (_, _, golden) = known(10);
        let mut records = golden.clone();
        records[4].answer = Some(99);
        records[5].outcome = Outcome::Closed;
        let found = compare(&golden, &records);
        assert_eq!(found, Compared { same: 8, different: 1, incomparable: 1, named: vec![4] });
    }
}
