//! What of a step still matters once the last layer has stored its keys and values. No later layer reads what that layer makes of a token, so it is
//! computed only for tokens that something is drawn after: of a prompt one token at most (decision 80).

use millrace_core::engine::{Row, Step};

/// The end of a step.
pub(crate) struct Tail {
    /// The last token of each row that samples, each a row of its own, in order. Who draws goes by the whole step.
    pub(crate) step: Step,
    /// Which tokens of the whole step these are.
    pub(crate) tokens: Vec<usize>,
}

impl Tail {
    /// `None` where it is the whole step, as it is of one that only decodes.
    pub(crate) fn of(step: &Step) -> Option<Self> {
        if step.rows.iter().all(|row| row.tokens.len() == 1 && row.sample.is_some()) {
            return None;
        }
        let ends = step.rows.iter().scan(0, |end, row| {
            *end += row.tokens.len();
            Some(*end)
        });
        let sampled = step.rows.iter().zip(ends).filter(|(row, _)| row.sample.is_some());
        let (rows, tokens) = sampled.filter_map(|(row, end)| Some((last(row)?, end - 1))).unzip();
        Some(Self { step: Step { rows }, tokens })
    }

    /// Leaves of `numbers`, `width` for each token of the whole step, those of this part.
    pub(crate) fn keep(&self, numbers: &mut Vec<f32>, width: usize) {
        for (to, from) in self.tokens.iter().enumerate() {
            numbers.copy_within(from * width..(from + 1) * width, to * width);
        }
        numbers.truncate(self.tokens.len() * width);
    }
}

/// The row of a row's last token.
fn last(row: &Row) -> Option<Row> {
    let token = *row.tokens.last()?;
    Some(Row { attempt: row.attempt, tokens: vec![token], start: row.end() - 1, table: row.table.clone(), sample: None })
}

#[cfg(test)]
mod tests {
    use millrace_core::ids::{AttemptId, Slot};
    use millrace_core::sampling::Sampling;

    use super::*;

    fn row(tokens: &[u32], start: u32, samples: bool) -> Row {
        let drawn = Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 0, max_new: 1, eos: vec![], ignore_eos: true };
        let sample = samples.then_some(drawn);
        Row { attempt: AttemptId::default(), tokens: tokens.to_vec(), start, table: vec![Slot(3), Slot(1)], sample }
    }

    #[test]
    fn only_the_ends_of_rows_that_sample_are_left() {
        let step = Step { rows: vec![row(&[1, 2, 3], 4, true), row(&[4, 5], 0, false), row(&[6], 9, true), row(&[7], 0, false)] };
        let tail = Tail::of(&step).unwrap();
        let rows: Vec<_> = tail.step.rows.iter().map(|row| (row.tokens.clone(), row.start, row.table.len())).collect();
        assert_eq!((rows, &tail.tokens), (vec![(vec![3], 6, 2), (vec![6], 9, 2)], &vec![2, 5]));
        let mut numbers: Vec<f32> = (0..14).map(|n| n as f32).collect();
        tail.keep(&mut numbers, 2);
        assert_eq!(numbers, [4.0, 5.0, 10.0, 11.0]);
    }

    #[test]
    fn a_step_that_only_decodes_is_its_own_and_one_that_draws_nothing_has_none() {
        assert!(Tail::of(&Step { rows: vec![row(&[1], 0, true), row(&[2], 5, true)] }).is_none());
        let nothing = Tail::of(&Step { rows: vec![row(&[1, 2], 0, false)] }).unwrap();
        let mut numbers = vec![1.0; 2];
        nothing.keep(&mut numbers, 1);
        assert!(nothing.tokens.is_empty() && numbers.is_empty());
    }
}
