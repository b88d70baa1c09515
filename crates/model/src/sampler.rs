//! Chooses the next token from logits. Same logits, parameters, seed and position: same token, on every machine.
//!
//! Order as in transformers: temperature, then top-k, then top-p. No sort of the whole vocabulary.

use std::cmp::Ordering;

use millrace_core::engine::{EngineError, Row, Sampled, Step};
use millrace_core::ids::TokenId;
use millrace_core::sampling::{Sampling, uniform};
use millrace_kernels::{Isa, Team, logits};

/// A chosen token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// Its id.
    pub token: TokenId,
    /// Natural log of its probability under the unmodified distribution.
    pub logprob: f32,
}

/// Tokens first considered for a nucleus; grows fourfold until the nucleus is inside.
const NUCLEUS_FIRST: usize = 64;

/// A token that may be drawn.
#[derive(Clone, Copy)]
struct Candidate {
    logit: f32,
    token: TokenId,
}

/// Draws for each row of a step that samples; `logits`: `[rows that sample, vocab]`.
///
/// # Errors
/// A row's logits are not numbers.
pub(crate) fn draw_rows(step: &Step, logits: &[f32], vocab: usize, team: &Team) -> Result<Vec<Sampled>, EngineError> {
    let rows: Vec<(&Row, &Sampling)> = step.rows.iter().filter_map(|row| Some((row, row.sample.as_ref()?))).collect();
    let mut drawn = vec![None; rows.len()];
    team.chunks(&mut drawn, 1, 1, |index, drawn| {
        let (row, sampling) = rows[index];
        drawn[0] = draw(&logits[index * vocab..][..vocab], sampling, row.draw_position());
    });
    let sampled = |((row, _), draw): (&(&Row, &Sampling), Option<Draw>)| {
        let draw = draw.ok_or_else(|| EngineError("a row's logits are not numbers".into()))?;
        Ok(Sampled { attempt: row.attempt, token: draw.token, logprob: draw.logprob })
    };
    rows.iter().zip(drawn).map(sampled).collect()
}

/// Draws the token for `position`. `None` when a logit is NaN or none is finite.
#[must_use]
pub fn draw(logits: &[f32], sampling: &Sampling, position: u32) -> Option<Draw> {
    let summary = logits::summary(Isa::best(), logits)?;
    let token = match sampling.temperature > 0.0 {
        true => stochastic(logits, summary.largest, sampling, position),
        false => summary.best as TokenId,
    };
    let logprob = (f64::from(logits[token as usize] - summary.largest) - summary.total.ln()) as f32;
    Some(Draw { token, logprob })
}

/// Temperature, top-k, top-p and the draw.
fn stochastic(logits: &[f32], max: f32, sampling: &Sampling, position: u32) -> TokenId {
    let weight = |candidate: &Candidate| (f64::from(candidate.logit - max) / f64::from(sampling.temperature)).exp();
    let mut kept: Vec<Candidate> =
        logits.iter().enumerate().map(|(token, &logit)| Candidate { logit, token: token as TokenId }).collect();
    let k = sampling.top_k as usize;
    if k > 0 && k < kept.len() {
        top(&mut kept, k);
        kept.truncate(k);
    }
    if sampling.top_p < 1.0 {
        let total: f64 = kept.iter().map(weight).sum();
        nucleus(&mut kept, f64::from(sampling.top_p) * total, weight);
    }
    let total: f64 = kept.iter().map(weight).sum();
    let mut left = uniform(sampling.seed, u64::from(position)) * total;
    for candidate in &kept {
        left -= weight(candidate);
        if left < 0.0 {
            return candidate.token;
        }
    }
    // Rounding can leave a remainder at the very end of the distribution: the last token that has any weight takes it.
    kept.iter().rev().find(|candidate| weight(candidate) > 0.0).map_or(0, |candidate| candidate.token)
}

/// Likelier first; of equal ones the lower id.
fn order(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.total_cmp(&a.logit).then(a.token.cmp(&b.token))
}

/// Brings the `k` likeliest to the front, in order.
fn top(candidates: &mut [Candidate], k: usize) {
    if k < candidates.len() {
        candidates.select_nth_unstable_by(k, order);
    }
    let k = k.min(candidates.len());
    candidates[..k].sort_unstable_by(order);
}

/// Keeps the shortest run of likeliest candidates whose weights reach `mass`; at least one.
fn nucleus(candidates: &mut Vec<Candidate>, mass: f64, weight: impl Fn(&Candidate) -> f64) {
    let mut considered = NUCLEUS_FIRST;
    loop {
        top(candidates, considered);
        let mut sum = 0.0;
        let reached = candidates.iter().take(considered).position(|candidate| {
            sum += weight(candidate);
            sum >= mass
        });
        if let Some(last) = reached {
            candidates.truncate(last + 1);
            return;
        }
        if considered >= candidates.len() {
            return;
        }
        considered *= 4;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling(temperature: f32, top_k: u32, top_p: f32, seed: u64) -> Sampling {
        Sampling { temperature, top_p, top_k, seed, max_new: 1, eos: vec![], ignore_eos: false }
    }

    /// How often each token is drawn over many positions.
    fn shares(logits: &[f32], sampling: &Sampling) -> Vec<f64> {
        let mut counts = vec![0.0; logits.len()];
        for position in 0..20_000 {
            counts[draw(logits, sampling, position).unwrap().token as usize] += 1.0 / 20_000.0;
        }
        counts
    }

    fn close(got: &[f64], want: &[f64]) {
        assert!(got.iter().zip(want).all(|(a, b)| (a - b).abs() < 0.015), "{got:?} {want:?}");
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals_and_tells_its_logprob() {
        let draw = draw(&[0.0, 2.0, 2.0, 1.0], &sampling(0.0, 0, 1.0, 0), 5).unwrap();
        assert_eq!(draw.token, 1);
        let total = 1.0 + 2.0 * 2f64.exp() + 1f64.exp();
        assert!((f64::from(draw.logprob) - (2.0 - total.ln())).abs() < 1e-6);
    }

    #[test]
    fn what_is_not_a_number_draws_nothing() {
        assert_eq!(draw(&[0.0, f32::NAN], &sampling(0.0, 0, 1.0, 0), 0), None);
        assert_eq!(draw(&[f32::NEG_INFINITY; 3], &sampling(1.0, 0, 1.0, 0), 0), None);
        assert_eq!(draw(&[], &sampling(1.0, 0, 1.0, 0), 0), None);
        assert_eq!(draw(&[f32::NEG_INFINITY, 0.0], &sampling(1.0, 0, 1.0, 0), 0).unwrap().token, 1);
    }

    #[test]
    fn shares_follow_temperature_top_k_and_top_p() {
        let logits = [0.5f64, 0.125, 0.25, 0.125].map(|p| p.ln() as f32);
        close(&shares(&logits, &sampling(1.0, 0, 1.0, 7)), &[0.5, 0.125, 0.25, 0.125]);
        close(&shares(&logits, &sampling(0.5, 0, 1.0, 7)), &[16.0 / 22.0, 1.0 / 22.0, 4.0 / 22.0, 1.0 / 22.0]);
        close(&shares(&logits, &sampling(1.0, 2, 1.0, 7)), &[2.0 / 3.0, 0.0, 1.0 / 3.0, 0.0]);
        close(&shares(&logits, &sampling(1.0, 3, 1.0, 7)), &[4.0 / 7.0, 1.0 / 7.0, 2.0 / 7.0, 0.0]);
        close(&shares(&logits, &sampling(1.0, 0, 0.7, 7)), &[2.0 / 3.0, 0.0, 1.0 / 3.0, 0.0]);
        close(&shares(&logits, &sampling(1.0, 0, 0.0, 7)), &[1.0, 0.0, 0.0, 0.0]);
        close(&shares(&logits, &sampling(1e-6, 0, 1.0, 7)), &[1.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn a_wide_nucleus_is_the_one_a_full_sort_finds() {
        let logits: Vec<f32> = (0..5_000).map(|i| ((i * 7919) % 5_000) as f32 / 2_500.0).collect();
        let mut kept: Vec<Candidate> =
            logits.iter().enumerate().map(|(token, &logit)| Candidate { logit, token: token as TokenId }).collect();
        let mut sorted = kept.clone();
        sorted.sort_by(order);
        let weight = |c: &Candidate| f64::from(c.logit).exp();
        let mass = 0.8 * sorted.iter().map(weight).sum::<f64>();
        nucleus(&mut kept, mass, weight);
        let before: f64 = kept[..kept.len() - 1].iter().map(weight).sum();
        assert!(before < mass && before + weight(&kept[kept.len() - 1]) >= mass);
        assert!(kept.iter().zip(&sorted).all(|(a, b)| a.token == b.token));
    }

    #[test]
    fn the_draw_depends_on_seed_and_position_alone() {
        let logits: Vec<f32> = (0..1000).map(|i| (i as f32).sin()).collect();
        let tokens = |seed| (0..50).map(|p| draw(&logits, &sampling(1.0, 50, 0.9, seed), p).unwrap().token).collect::<Vec<_>>();
        assert_eq!(tokens(1), tokens(1));
        assert_ne!(tokens(1), tokens(2));
    }
}
