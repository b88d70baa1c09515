//! Clients: what they ask, which gateway they ask, when they leave; and the gateways' part of events.

use millrace_core::ids::{NodeId, TokenId};
use millrace_core::message::Message;
use millrace_core::sampling::Sampling;

use crate::callers::{Caller, TENANTS};
use crate::event::{Client, Event, Host, RequestEvent};
use crate::gateway::{End, name};
use crate::memory::{RESERVED_TOKENS, undisturbed};
use crate::plan::REPLICAS;
use crate::world::World;

/// How long the front waits when no gateway is alive, microseconds.
const NO_GATEWAY_US: u64 = 100_000;

impl World {
    /// A client asks something, and when the next one does.
    pub(crate) fn client(&mut self) {
        if self.calm {
            return;
        }
        let after_us = self.random.between(self.plan.request_gap_us);
        self.schedule(after_us, Event::Client);
        if self.gateway.live.len() >= self.plan.live_max {
            return;
        }
        let budget_us = self.random.between(self.plan.budget_us);
        let id = self.ask(budget_us);
        if self.random.chance(self.plan.faults.client_leaves) {
            let after_us = self.random.below(budget_us.min(self.plan.leaves_us));
            self.schedule(after_us, Event::Request(id, RequestEvent::ClientLeaves));
        }
    }

    /// A client sends a request.
    pub(crate) fn ask(&mut self, budget_us: u64) -> Client {
        let prompt = self.prompt();
        let sampling = Sampling {
            temperature: if self.random.chance(self.plan.sampled) { 0.7 } else { 0.0 },
            top_p: 1.0,
            top_k: 0,
            seed: self.random.word(),
            max_new: self.random.between(self.plan.answer_tokens) as u32,
            eos: self.plan.eos.clone(),
            ignore_eos: self.random.chance(100),
        };
        let id = self.gateway.requests.len() as Client + 1;
        let expected = undisturbed(name(id, 0), &prompt, &sampling, (self.plan.model.layout.layers, self.plan.vocab));
        let whose = (TENANTS[Caller::of_client(id).tenant], self.random.below(REPLICAS as u64) as Host);
        self.gateway.open(whose, prompt, sampling, expected, self.now.after(budget_us));
        self.schedule(budget_us, Event::Request(id, RequestEvent::Deadline));
        id
    }

    /// A new prompt; often one that begins like an earlier one.
    fn prompt(&mut self) -> Vec<TokenId> {
        let length = self.random.between(self.plan.prompt_tokens) as usize;
        let earlier = self.gateway.requests.len() as u64;
        let mut prompt = Vec::new();
        if earlier > 0 && self.random.chance(self.plan.shared) {
            let id = self.random.below(earlier) + 1;
            let model = self.gateway.requests[&id].prompt();
            let take = self.random.below(model.len() as u64 + 1) as usize;
            prompt.extend_from_slice(&model[..take.min(length)]);
        }
        let fresh = u64::from(self.plan.vocab - RESERVED_TOKENS);
        prompt.resize_with(length, || RESERVED_TOKENS + self.random.below(fresh) as TokenId);
        prompt
    }

    /// Something about a request.
    pub(crate) fn request(&mut self, id: Client, event: RequestEvent) {
        let home = self.gateway.requests[&id].home;
        let mut gateway = std::mem::take(&mut self.gateway);
        let desk = self.desk(home);
        match (event, desk) {
            (RequestEvent::Place, Some(desk)) => gateway.place(self.now, id, desk, &self.plan),
            (RequestEvent::Place, None) => {
                let host = self.random.below(REPLICAS as u64) as Host;
                gateway.seek(id, host, NO_GATEWAY_US);
            }
            (RequestEvent::ClientLeaves, desk) => gateway.end(id, End::ClientLeft, desk),
            (RequestEvent::Deadline, desk) => gateway.end(id, End::Deadline, desk),
        }
        self.gateway = gateway;
    }

    /// A node says something to the gateway on a host.
    pub(crate) fn tell_gateway(&mut self, host: Host, from: NodeId, message: Message) {
        let mut gateway = std::mem::take(&mut self.gateway);
        if let Some(desk) = self.desk(host) {
            match message {
                Message::Token(token) => gateway.token(from, token, desk),
                Message::Failed(failed) => gateway.failed(from, failed, desk),
                Message::Handover(stats) => gateway.handed_over(stats.attempt),
                other => panic!("a gateway got {other:?}"),
            }
        }
        self.gateway = gateway;
    }

    /// The gateway on a host looks after its requests.
    pub(crate) fn sweep(&mut self, host: Host) {
        let mut gateway = std::mem::take(&mut self.gateway);
        if let Some(desk) = self.desk(host) {
            gateway.sweep(desk);
        }
        self.gateway = gateway;
    }
}
