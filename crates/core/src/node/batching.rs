//! What the batch wants done, and the step in flight.

use alloc::vec::Vec;

use super::{Effect, Flight, Node};
use crate::batch::{Input, Output};
use crate::engine::{EngineError, Sampled};
use crate::message::{Message, TokenOut};
use crate::transfer::{Grid, send};

impl Node {
    pub(super) fn grid(&self, tokens: usize) -> Grid {
        let layout = &self.layout;
        Grid { layers: layout.layers, blocks: layout.blocks(tokens) as u32, cell_bytes: layout.cell_bytes() as u64 }
    }

    pub(super) fn drain_batch(&mut self) {
        while let Some(output) = self.batch.poll() {
            self.on_batch(output);
        }
    }

    fn on_batch(&mut self, output: Output) {
        match output {
            Output::Admitted { attempt, table, names, cached_blocks } => self.on_admitted(attempt, table, names, cached_blocks),
            Output::Reserved { attempt, table, names, have_blocks } => self.on_reserved(attempt, table, names, have_blocks),
            Output::Refused { attempt, kind, detail } => match self.asking.remove(&attempt) {
                Some(asking) => self.send(asking.link, Message::Declined { attempt, kind, detail }),
                None => self.fail(attempt, kind, detail),
            },
            Output::Token(token) => self.on_token(token),
            Output::Failed(failed) => {
                // the gateway is told why first: to end the hand-over may say less
                self.fail(failed.attempt, failed.kind, failed.detail.clone());
                self.end(failed.attempt, failed.kind, &failed.detail);
            }
            Output::Block(op) => self.uplinks.publish(self.now, op),
        }
    }

    fn on_token(&mut self, mut token: TokenOut) {
        if let Some(stats) = &mut token.prefill {
            stats.node.clone_from(&self.name);
        }
        let (attempt, first_token, finished) = (token.attempt, token.token, token.finish.is_some());
        if let Some(replica) = self.gateways.get(&attempt).copied() {
            self.tell(replica, Message::Token(token));
        }
        if self.leaving.contains_key(&attempt) {
            self.send_input(attempt, send::Input::Computed { first_token, finished });
        } else if finished {
            self.gateways.remove(&attempt);
        }
    }

    /// Begins the next step, if there is none and something to compute. Whatever admission has to say is heard first, so that the layers of
    /// this very step find their hand-over.
    pub(super) fn begin_step(&mut self) {
        if self.in_flight.is_some() {
            return;
        }
        let Some(step) = self.batch.next_step(self.now) else { return };
        self.drain_batch();
        let known = |attempt| self.leaving_tokens(attempt).unwrap_or(0);
        let flight = step.rows.iter().map(|row| Flight { attempt: row.attempt, end: row.end(), known: known(row.attempt) });
        self.in_flight = Some(flight.collect());
        self.rates.begun(&step);
        self.effects.push_back(Effect::Step(step));
    }

    /// After the last token of a sequence whose KV leaves, its unfinished block is ready too.
    pub(super) fn on_layer(&mut self, layer: u16) {
        let block_tokens = u32::from(self.layout.block_tokens);
        let Some(rows) = self.in_flight.take() else { return };
        for &Flight { attempt, end, known } in &rows {
            let blocks = if end == known { end.div_ceil(block_tokens) } else { end / block_tokens };
            self.send_input(attempt, send::Input::Ready { layer, blocks });
        }
        self.in_flight = Some(rows);
    }

    pub(super) fn on_stepped(&mut self, result: Result<Vec<Sampled>, EngineError>, elapsed_us: u64) {
        self.in_flight = None;
        self.rates.stepped(elapsed_us);
        self.batch.handle(self.now, Input::Stepped(result));
    }
}
