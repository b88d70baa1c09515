//! One hand-over that arrives, as a node's stream tasks and its loop treat it together: asked before a byte is written, digested where it
//! then stands, judged by the receiving machine.

use millrace_core::identity::cell_digest;
use millrace_core::ids::{BlockHash, Generation, Time};
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
    slots: Vec<usize>,
    names: Vec<BlockHash>,
    arrival: Arrival,
}

impl Reception {
    /// Of a sequence whose blocks have these slots and names.
    #[must_use]
    pub fn new(
        (grid, have, generation, deadline): (Grid, u32, Generation, Time),
        slots: Vec<usize>,
        names: Vec<BlockHash>,
    ) -> Self {
        Self { machine: Receiver::new(grid, have, generation, deadline), slots, names, arrival: Arrival::Pending }
    }

    /// What the sender may send.
    #[must_use]
    pub fn credit_bytes(&self) -> u64 {
        self.machine.credit_bytes()
    }

    /// One cell on a stream of its own.
    pub fn cell(&mut self, slab: &KvSlab, (generation, span): (Generation, Span), bytes: &[u8], expected: u64) {
        let (layer, block) = (span.layer, span.block);
        if self.machine.admit(generation, &span) && self.machine.may_write(generation, layer, block) {
            let mut place = slab.write(self.slots[block as usize], layer.into());
            place.copy_from_slice(bytes);
            let digest = cell_digest(&self.names[block as usize], layer, &place);
            let verified = digest == expected;
            self.machine.handle(Time(3), Input::Cell { generation, layer, block, digest, verified });
        }
        self.drain();
    }

    /// The sender's last word: how many cells, and the sum of their digests.
    pub fn manifest(&mut self, generation: Generation, (cells, digest_sum): (u64, u64)) {
        self.machine.handle(Time(3), Input::Fin { generation, cells, digest_sum, first_token: 1, finished: false });
        self.drain();
    }

    /// Time passes to the deadline; how it ended.
    pub fn end(&mut self, deadline: Time) -> Arrival {
        self.machine.handle(deadline, Input::Tick);
        self.drain();
        self.arrival
    }

    fn drain(&mut self) {
        self.machine.check();
        while let Some(output) = self.machine.poll() {
            match output {
                Output::Complete { .. } => self.arrival = Arrival::Whole,
                Output::Failed(..) => self.arrival = Arrival::Failed,
                Output::Credit(_) | Output::Abort(..) => {}
            }
        }
    }
}
