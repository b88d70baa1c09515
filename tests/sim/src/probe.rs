//! After a run, when everything is at rest and whole again: requests that must be answered at once, at the first attempt. A node that was
//! left in a state which it cannot leave, with too few blocks or with credit that never comes, shows here.

use crate::event::Client;
use crate::gateway::End;
use crate::world::World;

/// Requests that are sent, one after the other.
const PROBES: usize = 6;
/// Each must be whole within this, microseconds.
const PROBE_MAX_US: u64 = 10_000_000;
/// By then both ends of a link that was cut have noticed, microseconds.
const NOTICE_MAX_US: u64 = 3_000_000;

impl World {
    /// Sends the probes.
    ///
    /// # Panics
    /// When one is not answered whole, at the first attempt, in time.
    pub(crate) fn probe(&mut self) {
        (self.plan.split_bias, self.plan.whole) = (1_000_000, 0); // a hand-over each time
        let noticed = self.now.after(NOTICE_MAX_US);
        while self.now < noticed {
            self.step();
        }
        for _ in 0..PROBES {
            let broken = self.gateway.broken.clone();
            let id = self.ask(PROBE_MAX_US);
            self.run_until_ended(id);
            assert_eq!(self.gateway.broken, broken, "I3: a calm cluster breaks an attempt");
            self.come_to_rest();
        }
    }

    fn run_until_ended(&mut self, id: Client) {
        while self.gateway.requests[&id].end.is_none() {
            self.step();
        }
        let request = &self.gateway.requests[&id];
        assert_eq!(request.end, Some(End::Whole), "I3: a calm cluster does not answer: {request:?}");
    }
}
