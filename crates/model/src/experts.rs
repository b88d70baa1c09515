//! A mixture of experts: which experts compute a token, with which weights, and the sum of what they say.
//!
//! Sources: DeepSeek-V2 (arXiv 2405.04434, section 2.2), DeepSeek-V3 (arXiv 2412.19437, section 2.1.2); transformers
//! `modeling_deepseek_v2.py`, `modeling_deepseek_v3.py`. Scores are computed in f32 whatever the engine's type, and a token's experts are summed in
//! the order of their numbers, so its neighbours change nothing.

use millrace_checkpoint::{Experts as Shape, Groups, Router, Score};
use millrace_kernels::{Into, Norm};

use crate::ModelError;
use crate::compute::Multiplier;
use crate::feed::SwiGlu;
use crate::linear::{Linear, Loader};

/// Added to a sum of weights before they are divided by it.
const SUM_EPS: f32 = 1e-20;

/// The weights.
pub(crate) struct Experts {
    router: Router,
    chosen: usize,
    /// `[experts, hidden]`.
    gate: Linear,
    bias: Option<Vec<f32>>,
    experts: Vec<SwiGlu>,
    /// What all tokens go through.
    shared: Option<SwiGlu>,
}

impl Experts {
    pub(crate) fn load(loader: &Loader<'_>, prefix: &str, shape: &Shape) -> Result<Self, ModelError> {
        let name = |part: &str| format!("{prefix}mlp.{part}");
        let expert = |index: usize| SwiGlu::load(loader, &name(&format!("experts.{index}.")));
        Ok(Self {
            router: shape.router,
            chosen: shape.chosen,
            gate: loader.exact(&name("gate.weight"))?,
            bias: if shape.router.bias { Some(loader.numbers(&name("gate.e_score_correction_bias"))?) } else { None },
            experts: (0..shape.count).map(expert).collect::<Result<_, _>>()?,
            shared: if shape.shared_width > 0 { Some(SwiGlu::load(loader, &name("shared_experts."))?) } else { None },
        })
    }

    /// `hidden += shared(norm(hidden)) + sum over a token's experts of weight * expert(norm(hidden))`.
    pub(crate) fn add(
        &self,
        hidden: &mut [f32],
        norm: Norm<'_>,
        multiplier: &mut Multiplier,
        gated: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let width = self.gate.matrix.columns();
        let mut logits = vec![0.0; hidden.len() / width * self.experts.len()];
        multiplier.multiply(hidden, Some(norm), &self.gate, Into::Set(&mut logits))?;
        let mut sum = vec![0.0; hidden.len()];
        let tokens = tokens_of_experts(&self.router, self.chosen, self.bias.as_deref(), self.experts.len(), &logits);
        for (expert, tokens) in self.experts.iter().zip(tokens) {
            let x: Vec<f32> = tokens.iter().flat_map(|(token, _)| &hidden[token * width..][..width]).copied().collect();
            if x.is_empty() {
                continue;
            }
            expert.gate(&x, norm, multiplier, gated)?;
            let mut out = vec![0.0; x.len()];
            multiplier.multiply(gated, None, &expert.down, Into::Set(&mut out))?;
            for ((token, weight), out) in tokens.into_iter().zip(out.chunks_exact(width)) {
                sum[token * width..][..width].iter_mut().zip(out).for_each(|(sum, x)| *sum += weight * x);
            }
        }
        if let Some(shared) = &self.shared {
            shared.add(hidden, norm, multiplier, gated)?;
        }
        hidden.iter_mut().zip(sum).for_each(|(hidden, sum)| *hidden += sum);
        Ok(())
    }

    /// The linear layers that LibTorch may multiply: those that see all tokens.
    pub(crate) fn linears(&mut self) -> Vec<&mut Linear> {
        self.shared.iter_mut().flat_map(|shared| [&mut shared.gate_up, &mut shared.down]).collect()
    }

    /// Bytes of weights that a step of one row reads: as many experts as a token has.
    pub(crate) fn bytes(&self) -> usize {
        let experts: usize = self.experts.iter().take(self.chosen).map(SwiGlu::bytes).sum();
        experts + self.gate.matrix.bytes() + self.shared.as_ref().map_or(0, SwiGlu::bytes)
    }
}

/// For each of `experts` experts its tokens, with their weights; `logits`: `[tokens, experts]`.
pub(crate) fn tokens_of_experts(
    router: &Router,
    chosen: usize,
    bias: Option<&[f32]>,
    experts: usize,
    logits: &[f32],
) -> Vec<Vec<(usize, f32)>> {
    let mut all = vec![Vec::new(); experts];
    for (token, logits) in logits.chunks_exact(experts).enumerate() {
        for (expert, weight) in choose(router, chosen, bias, logits) {
            all[expert].push((token, weight));
        }
    }
    all
}

/// A token's experts and their weights. Equal scores: the lower number first.
fn choose(router: &Router, chosen: usize, bias: Option<&[f32]>, logits: &[f32]) -> Vec<(usize, f32)> {
    let scores = scores(router.score, logits);
    let mut wanted = scores.clone();
    bias.into_iter().flatten().zip(&mut wanted).for_each(|(bias, wanted)| *wanted += bias);
    let candidates = match router.groups {
        None => (0..scores.len()).collect(),
        Some(groups) => of_best_groups(groups, &wanted),
    };
    let experts = best(candidates, chosen, |expert| wanted[expert]);
    let sum: f32 = experts.iter().map(|&expert| scores[expert]).sum();
    let divisor = if router.normalised { sum + SUM_EPS } else { 1.0 };
    experts.into_iter().map(|expert| (expert, scores[expert] / divisor * router.scale as f32)).collect()
}

fn scores(score: Score, logits: &[f32]) -> Vec<f32> {
    match score {
        Score::Sigmoid => logits.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
        Score::Softmax => {
            let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let exponentials: Vec<f32> = logits.iter().map(|x| (x - largest).exp()).collect();
            let sum: f32 = exponentials.iter().sum();
            exponentials.into_iter().map(|x| x / sum).collect()
        }
    }
}

/// The experts of the best groups.
fn of_best_groups(groups: Groups, wanted: &[f32]) -> Vec<usize> {
    let size = wanted.len() / groups.count;
    let score = |group: usize| -> f32 {
        let members = (group * size..(group + 1) * size).collect();
        best(members, groups.best, |expert| wanted[expert]).into_iter().map(|expert| wanted[expert]).sum()
    };
    let scores: Vec<f32> = (0..groups.count).map(score).collect();
    let chosen = best((0..groups.count).collect(), groups.chosen, |group| scores[group]);
    chosen.into_iter().flat_map(|group| group * size..(group + 1) * size).collect()
}

/// The `count` of them with the highest scores, in their own order.
fn best(mut all: Vec<usize>, count: usize, score: impl Fn(usize) -> f32) -> Vec<usize> {
    all.sort_by(|&a, &b| score(b).total_cmp(&score(a)).then(a.cmp(&b)));
    all.truncate(count);
    all.sort_unstable();
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Router = Router { score: Score::Softmax, bias: false, groups: None, normalised: false, scale: 1.0 };

    #[test]
    fn the_best_by_softmax() {
        let chosen = choose(&PLAIN, 2, None, &[0.0, 2.0, 1.0, 2.0]);
        let total = 1.0 + 2.0 * 2f32.exp() + 1f32.exp();
        assert_eq!(chosen.iter().map(|(expert, _)| *expert).collect::<Vec<_>>(), [1, 3]);
        assert!(chosen.iter().all(|(_, weight)| (weight - 2f32.exp() / total).abs() < 1e-6));
    }

    #[test]
    fn a_bias_changes_the_choice_and_not_the_weight() {
        let router = Router { score: Score::Sigmoid, bias: true, normalised: true, scale: 2.5, ..PLAIN };
        let chosen = choose(&router, 2, Some(&[10.0, 0.0, 0.0]), &[-1.0, 0.0, 1.0]);
        assert_eq!(chosen.iter().map(|(expert, _)| *expert).collect::<Vec<_>>(), [0, 2]);
        let sigmoid = |x: f32| 1.0 / (1.0 + (-x).exp());
        assert!((chosen[0].1 - 2.5 * sigmoid(-1.0) / (sigmoid(-1.0) + sigmoid(1.0))).abs() < 1e-6);
        assert!((chosen.iter().map(|(_, weight)| weight).sum::<f32>() - 2.5).abs() < 1e-6);
    }

    #[test]
    fn only_the_best_groups_count() {
        // By its best the first group wins, by the sum of its best two the second.
        let logits = [3.0, -9.0, 1.5, 1.4, -9.0, -9.0];
        let groups = |best| Router { groups: Some(Groups { count: 3, chosen: 1, best }), ..PLAIN };
        let experts = |best| choose(&groups(best), 2, None, &logits).into_iter().map(|(expert, _)| expert).collect::<Vec<_>>();
        assert_eq!(experts(1), [0, 1]);
        let sigmoid = Router { score: Score::Sigmoid, ..groups(2) };
        assert_eq!(choose(&sigmoid, 2, None, &logits).into_iter().map(|(expert, _)| expert).collect::<Vec<_>>(), [2, 3]);
    }

    #[test]
    fn logits_that_are_not_numbers_choose_somebody() {
        assert_eq!(choose(&PLAIN, 2, None, &[f32::NAN; 4]).len(), 2);
    }
}
