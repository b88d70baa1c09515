//! Taking nodes in: what this replica answers to a node that asks to be a member.
//!
//! The log decides about names, models and bounds. Here is only what the log cannot see: that the process is who its certificate
//! says, that it serves what this replica serves, and that no other live process has its name.

use std::time::Instant;

use millrace_core::cluster::{Answer, Command};
use millrace_core::ids::{Epoch, NodeId};
use millrace_core::message::{Join, Message, ModelIdentity, Role};

use crate::propose::{NoAnswer, Proposer, name_is_held};

/// Joins that one replica handles at a time; one more is told to come again.
pub const JOINS_MAX: usize = 64;

/// What the node's link proved.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The name in its certificate.
    pub name: String,
    /// The role in its certificate.
    pub role: Role,
    /// The instance in its `Hello`.
    pub instance: u128,
}

/// The outcome of a join.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is a member.
    Joined(NodeId, Epoch),
    /// It is not.
    Refused {
        /// Why.
        reason: String,
        /// Whether trying again may help.
        retry: bool,
    },
    /// The cluster has no answer now, for this reason; nothing is wrong with the node.
    NotNow(String),
}

impl Outcome {
    /// As a message to the node.
    #[must_use]
    pub fn message(self) -> Message {
        match self {
            Self::Joined(node, epoch) => Message::Joined { node, epoch },
            Self::Refused { reason, retry } => Message::JoinRefused { reason, retry },
            Self::NotNow(reason) => Message::JoinRefused { reason, retry: true },
        }
    }
}

/// Whether the join fits who asks and what is served here; the reason if not.
///
/// # Errors
/// Why not. Trying again does not help.
pub fn check(who: &Identity, join: &Join, model: &ModelIdentity) -> Result<(), String> {
    if join.name != who.name {
        return Err(format!("the certificate says {:?}, the join {:?}", who.name, join.name));
    }
    if join.role != who.role {
        return Err(format!("the certificate says {}, the join {}", who.role.as_str(), join.role.as_str()));
    }
    if join.instance != who.instance {
        return Err("the instance is not the one of this link".into());
    }
    match model.differs(&join.model) {
        Some(field) => {
            Err(format!("the cluster serves {:?}, and {field} of this node's {:?} differs", model.name, join.model.name))
        }
        None => Ok(()),
    }
}

/// Takes a node in, or says why not.
pub async fn join(proposer: &Proposer, who: &Identity, join: Join, model: &ModelIdentity) -> Outcome {
    if let Err(reason) = check(who, &join, model) {
        return Outcome::Refused { reason, retry: false };
    }
    if let Some(reason) = name_is_held(&proposer.nodes, &proposer.cluster, Instant::now(), &join) {
        return Outcome::Refused { reason, retry: true };
    }
    outcome(proposer.propose(&Command::Join(join)).await)
}

fn outcome(answer: Result<Answer, NoAnswer>) -> Outcome {
    match answer {
        Ok(Answer::Joined { node, epoch }) => Outcome::Joined(node, epoch),
        Ok(Answer::Refused(reason)) => Outcome::Refused { reason, retry: false },
        Ok(other) => Outcome::NotNow(format!("unexpected answer {other:?}")),
        Err(error) => Outcome::NotNow(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use millrace_core::layout::{KvDtype, KvLayout, KvParts};
    use parking_lot::RwLock;

    use super::*;
    use crate::nodes::{FRESH, Nodes};
    use crate::state::SharedCluster;

    fn model() -> ModelIdentity {
        let layout =
            KvLayout { layers: 2, parts: KvParts::KeysValues, kv_heads: 1, head_dim: 8, block_tokens: 16, dtype: KvDtype::F32 };
        ModelIdentity { name: "m".into(), weights: [1; 32], tokenizer: [2; 32], layout }
    }

    fn asks(instance: u128) -> Join {
        let address = "127.0.0.1:9".into();
        Join { name: "prefill-0".into(), role: Role::Prefill, address, instance, pid: 77, model: model(), slots: 4 }
    }

    fn who(instance: u128) -> Identity {
        Identity { name: "prefill-0".into(), role: Role::Prefill, instance }
    }

    #[test]
    fn a_join_must_fit_its_link_and_the_model() {
        assert_eq!(check(&who(1), &asks(1), &model()), Ok(()));
        type Spoil = fn(&mut Join);
        let cases: [(Spoil, &str); 6] = [
            (|j| j.name = "prefill-1".into(), "certificate"),
            (|j| j.role = Role::Decode, "certificate"),
            (|j| j.instance = 2, "instance"),
            (|j| j.model.weights = [9; 32], "weights"),
            (|j| j.model.layout.dtype = KvDtype::Bf16, "kv_dtype"),
            (|j| j.model.layout.dtype = KvDtype::Int8, "kv_dtype"),
        ];
        for (spoil, word) in cases {
            let mut join = asks(1);
            spoil(&mut join);
            let reason = check(&who(1), &join, &model()).unwrap_err();
            assert!(reason.contains(word), "{reason}");
        }
    }

    #[test]
    fn a_live_process_keeps_its_name() {
        let (nodes, now) = (Nodes::default(), Instant::now());
        let cluster: SharedCluster = Arc::new(RwLock::default());
        let Answer::Joined { node, epoch } = cluster.write().apply(1, &Command::Join(asks(1))) else { panic!("joined") };
        let link = nodes.attach(now, "prefill-0", 1, Arc::new(|_| true));
        nodes.joined("prefill-0", link, (node, epoch));
        let reason = name_is_held(&nodes, &cluster, now, &asks(2)).unwrap();
        assert_eq!(reason, "identity prefill-0 is held by a live process (pid 77, last heard 0 ms ago)");
        assert_eq!(name_is_held(&nodes, &cluster, now, &asks(1)), None, "it is its own");
        assert_eq!(name_is_held(&nodes, &cluster, now + FRESH * 2, &asks(2)), None, "it is silent");
    }

    #[test]
    fn only_the_log_refuses_for_good() {
        let joined = Answer::Joined { node: NodeId(1), epoch: Epoch(2) };
        assert_eq!(outcome(Ok(joined)), Outcome::Joined(NodeId(1), Epoch(2)));
        assert!(matches!(outcome(Ok(Answer::Refused("no".into()))), Outcome::Refused { retry: false, .. }));
        let later = outcome(Err(NoAnswer::NoLeader));
        assert_eq!(later, Outcome::NotNow("there is no leader now".into()));
        assert!(matches!(later.message(), Message::JoinRefused { retry: true, .. }));
    }
}
