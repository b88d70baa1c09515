//! What caches would give on a plan: one that never forgets, and one that keeps so many blocks and forgets the least recently used.
//!
//! Requests in the order in which they are due, one shared cache, no concurrency; a prompt is in the cache as soon as it arrived, and where
//! sessions carry the real answers, answers too. Only whole blocks count, and one token is always computed. A real cluster that has the room
//! comes close to the first; what it lacks was evicted, lay at another node, or was not stored yet.

use std::collections::{BTreeMap, HashMap};

use super::plan::{Answers, Plan, Planned};
use super::rng::mix;

/// Reuse on a plan.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reuse {
    /// Leading tokens of each prompt that the cache has.
    pub cached_tokens: Vec<u32>,
    /// Blocks that went in.
    pub distinct_blocks: usize,
}

/// A block's name: its own tokens and all before it. 64 bits: chance equality of a million blocks is one in 30 million.
fn names(tokens: &[u32], block: usize) -> Vec<u64> {
    let mut chain = 0x6d69_6c6c;
    let name = |tokens: &[u32]| {
        chain = tokens.iter().fold(mix(chain), |hash, token| mix(hash.rotate_left(7) ^ u64::from(*token)));
        chain
    };
    tokens.chunks_exact(block).map(name).collect()
}

/// Blocks by how recently they were used.
#[derive(Debug, Default)]
struct Blocks {
    stamps: HashMap<u64, u64>,
    by_stamp: BTreeMap<u64, u64>,
    next: u64,
    capacity: Option<usize>,
    inserted: usize,
}

impl Blocks {
    /// Leading blocks that are here.
    fn leading(&self, names: &[u64]) -> usize {
        names.iter().take_while(|name| self.stamps.contains_key(name)).count()
    }

    /// Uses blocks, from the last to the first, so that a deeper block goes before those that it needs.
    fn touch(&mut self, names: &[u64]) {
        for name in names.iter().rev() {
            self.next += 1;
            match self.stamps.insert(*name, self.next) {
                Some(old) => drop(self.by_stamp.remove(&old)),
                None => self.inserted += 1,
            }
            if self.capacity.is_some() {
                self.by_stamp.insert(self.next, *name);
            }
        }
        while self.capacity.is_some_and(|capacity| self.stamps.len() > capacity) {
            if let Some((_, name)) = self.by_stamp.pop_first() {
                self.stamps.remove(&name);
            }
        }
    }
}

/// Reuse in a cache of `capacity` blocks; `None` never forgets. O(tokens x log blocks).
#[must_use]
pub fn reuse(plan: &Plan, capacity: Option<usize>) -> Reuse {
    let block = plan.header.block_tokens as usize;
    let mut blocks = Blocks { capacity, ..Blocks::default() };
    let next_turn: HashMap<(u32, u32), &Planned> =
        plan.requests.iter().filter_map(|request| Some(((request.session?, request.turn), request))).collect();
    let mut order: Vec<&Planned> = plan.requests.iter().collect();
    order.sort_by_key(|request| (request.due_ns, request.i));
    let mut cached_tokens = vec![0; plan.requests.len()];
    for request in order {
        let tokens = plan.prompt(request, &[]);
        let names_of = names(&tokens, block);
        let most = tokens.len().saturating_sub(1) / block;
        cached_tokens[request.i as usize] = (blocks.leading(&names_of).min(most) * block) as u32;
        let follower = request.session.and_then(|session| next_turn.get(&(session, request.turn + 1)));
        match follower.filter(|_| plan.header.answers == Answers::Real) {
            // The last token of an answer was drawn but never computed.
            Some(after) => {
                let known = (tokens.len() + request.out as usize).saturating_sub(1);
                let carried = plan.prompt(after, &[]);
                blocks.touch(&names(&carried[..known.min(carried.len())], block));
            }
            None => blocks.touch(&names_of),
        }
    }
    Reuse { cached_tokens, distinct_blocks: blocks.inserted }
}

impl Reuse {
    /// Cached tokens over all tokens, of the requests that `counts` names; NaN of none.
    #[must_use]
    pub fn share(&self, plan: &Plan, counts: impl Fn(u32) -> bool) -> f64 {
        let counted = || plan.requests.iter().filter(|request| counts(request.i));
        let cached: u64 = counted().map(|request| u64::from(self.cached_tokens[request.i as usize])).sum();
        let all: u64 = counted().map(Planned::prompt_tokens).sum();
        if all == 0 { f64::NAN } else { cached as f64 / all as f64 }
    }
}

#[cfg(test)]
mod tests {
    use super::super::plan::Role;
    use super::super::plan::tests::{header, planned};
    use super::*;

    fn plan(prompts: &[&[(u64, u32)]]) -> Plan {
        let requests = prompts.iter().zip(0..).map(|(prompt, i)| planned(i, u64::from(i), prompt, 8)).collect();
        Plan::new(header(), requests).unwrap()
    }

    #[test]
    fn leading_whole_blocks_count_and_one_token_is_computed() {
        let plan = plan(&[&[(1, 16), (2, 16), (3, 5)], &[(1, 16), (2, 16), (4, 9)], &[(5, 16), (2, 16)], &[(1, 16), (2, 16)]]);
        let reuse = reuse(&plan, None);
        assert_eq!(reuse.cached_tokens, [0, 32, 0, 16]);
        assert_eq!(reuse.share(&plan, |_| true), 48.0 / (37.0 + 41.0 + 32.0 + 32.0));
        assert_eq!(reuse.distinct_blocks, 4);
    }

    #[test]
    fn a_small_cache_forgets_the_deepest_block_of_the_oldest_path() {
        let a: &[(u64, u32)] = &[(1, 16), (2, 16), (3, 16), (9, 1)];
        let b: &[(u64, u32)] = &[(4, 16), (9, 1)];
        let plan = plan(&[a, b, a]);
        assert_eq!(reuse(&plan, Some(3)).cached_tokens, [0, 0, 32], "b took the place of a's third block");
        assert_eq!(reuse(&plan, Some(4)).cached_tokens, [0, 0, 48]);
        assert_eq!(reuse(&plan, Some(1)).cached_tokens, [0, 0, 0]);
    }

    #[test]
    fn real_answers_are_cached_too() {
        let mut turns = vec![planned(0, 0, &[(1, 16)], 17), planned(1, 1, &[(1, 16), (2, 17), (3, 4)], 1)];
        turns[1].prompt[1].role = Role::Answer;
        turns.iter_mut().zip(0..).for_each(|(turn, at)| (turn.session, turn.turn) = (Some(0), at));
        let real = Plan::new(header(), turns.clone()).unwrap();
        assert_eq!(reuse(&real, None).cached_tokens, [0, 32]);
        let planned = Plan::new(super::super::plan::Header { answers: Answers::Planned, ..header() }, turns).unwrap();
        assert_eq!(reuse(&planned, None).cached_tokens, [0, 16]);
    }
}
