//! Proves what a plan promises: two prompts have exactly the tokens of their equal leading pieces in common.
//!
//! With prompts sorted by their tokens, the common prefix of any two is the least of those between neighbours in between. Equal pieces are
//! equal tokens, so if tokens and pieces agree between all neighbours, they agree between all pairs: n comparisons for n^2 claims.

use anyhow::Result;

use super::plan::{Piece, Plan};

/// What was found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Prompts looked at.
    pub requests: usize,
    /// Tokens of all prompts.
    pub prompt_tokens: u64,
    /// Tokens of all answers.
    pub output_tokens: u64,
    /// Neighbours that share more whole blocks than their pieces say: sharing is not exact.
    pub wrong: usize,
    /// Neighbours that share some tokens more, but no whole block: without effect on any cache. Only where a piece has more siblings than the
    /// vocabulary has tokens.
    pub blurred: usize,
}

/// Tokens that two prompts should share.
fn planned_common(a: &[Piece], b: &[Piece]) -> usize {
    let mut common = 0;
    for (a, b) in a.iter().zip(b) {
        if a.key != b.key {
            break;
        }
        common += a.tokens.min(b.tokens) as usize;
        if a.tokens != b.tokens {
            break;
        }
    }
    common
}

/// Looks at every pair of prompts. O(tokens x log requests); holds all tokens in memory.
///
/// # Errors
/// None today; a plan in memory is well formed.
pub fn verify(plan: &Plan) -> Result<Verified> {
    let mut prompts: Vec<(Vec<u32>, &[Piece])> = plan.requests.iter().map(|r| (plan.prompt(r, &[]), r.prompt.as_slice())).collect();
    prompts.sort_by(|a, b| a.0.cmp(&b.0));
    let mut found = Verified { requests: prompts.len(), ..Verified::default() };
    found.prompt_tokens = prompts.iter().map(|(tokens, _)| tokens.len() as u64).sum();
    found.output_tokens = plan.requests.iter().map(|request| u64::from(request.out)).sum();
    let block = plan.header.block_tokens as usize;
    for pair in prompts.windows(2) {
        let shared = pair[0].0.iter().zip(&pair[1].0).take_while(|(a, b)| a == b).count();
        let planned = planned_common(pair[0].1, pair[1].1);
        found.wrong += usize::from(shared / block != planned / block || shared < planned);
        found.blurred += usize::from(shared > planned && shared / block == planned / block);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::super::plan::tests::{header, planned};
    use super::*;

    #[test]
    fn a_planted_collision_is_found() {
        let requests = vec![planned(0, 0, &[(1, 32), (2, 16)], 1), planned(1, 0, &[(1, 32), (3, 16)], 1)];
        let plan = Plan::new(header(), requests.clone()).unwrap();
        assert_eq!(verify(&plan).unwrap().wrong, 0);
        // One token to choose from: every block is equal to every other.
        let blind = Plan::new(super::super::plan::Header { vocabulary: (5, 6), ..header() }, requests).unwrap();
        assert_eq!(verify(&blind).unwrap().wrong, 1);
    }
}
