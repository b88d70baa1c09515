//! One hand-over that arrives, as a node's stream tasks and its machine treat it together: the gate is asked before a byte is written, what
//! stands in the slot is digested there, and the receiving machine judges by what stands behind the gate.

use millrace_core::identity::cell_digest;
use millrace_core::ids::{BlockHash, Generation, Slot, SlotRef, Time};
use millrace_core::transfer::gate::{Gate, Place};
use millrace_core::transfer::recv::{Input, Output, Receiver};
use millrace_core::transfer::{Grid, Span};
use millrace_kernels::slab::KvSlab;

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// To be decoded.
    Whole,
    /// Not to be decoded.
    Failed,
    /// Neither: it would wait for ever.
    Pending,
}

/// The receiving side.
pub struct Reception {
    machine: Receiver,
    gate: Gate,
    arrival: Arrival,
}

impl Reception {
    /// Of a sequence whose blocks have these slots and names.
    #[must_use]
    pub fn new((grid, have, generation, deadline): (Grid, u32, Generation, Time), slots: &[usize], names: &[BlockHash]) -> Self {
        let table = slots.iter().map(|slot| SlotRef { slot: Slot(*slot as u32), generation: Generation(1) }).collect();
        let gate = Gate::new(grid, have, generation, table, names.to_vec());
        Self { machine: Receiver::new(grid, have, generation, deadline), gate, arrival: Arrival::Pending }
    }

    /// What the sender may send.
    #[must_use]
    pub fn credit_bytes(&self) -> u64 {
        self.machine.credit_bytes()
    }

    /// One cell on a stream of its own.
    pub fn cell(&mut self, slab: &KvSlab, (generation, span): (Generation, Span), bytes: &[u8], expected: u64) {
        let (layer, block) = (span.layer, span.block);
        if self.gate.admit(generation, &span)
            && let Place::Write(slot, name) = self.gate.place(generation, layer, block)
        {
            let mut place = slab.write(slot.0 as usize, layer.into());
            place.copy_from_slice(bytes);
            self.gate.placed(layer, block, cell_digest(&name, layer, &place), expected);
        }
        self.gate.check();
        self.hear(Time(3), Input::Standing(self.gate.standing().clone()));
    }

    /// The sender's last word: how many cells, and the sum of their digests.
    pub fn manifest(&mut self, generation: Generation, (cells, digest_sum): (u64, u64)) {
        self.hear(Time(3), Input::Fin { generation, cells, digest_sum, first_token: 1, finished: false });
    }

    /// Time passes to the deadline; how it ended.
    pub fn end(&mut self, deadline: Time) -> Arrival {
        self.hear(deadline, Input::Tick);
        self.arrival
    }

    fn hear(&mut self, now: Time, input: Input) {
        self.machine.handle(now, input);
        self.machine.check();
        while let Some(output) = self.machine.poll() {
            match output {
                Output::Complete { .. } => self.arrival = Arrival::Whole,
                Output::Failed(..) => self.arrival = Arrival::Failed,
                Output::Credit(_) | Output::Granted | Output::Resumed | Output::Abort(..) => {}
            }
            if self.arrival != Arrival::Pending {
                self.gate.close();
            }
        }
    }
}
