//! The command line of a replica, parsed once into values that cannot be wrong.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context, ensure};
use clap::Parser;
use millrace_core::ids::ReplicaId;
use millrace_core::layout::{Dtype, KvDtype};
use millrace_core::route::policy::Policy;

use millrace_log::{CLUSTER_ID_BYTES_MAX, VOTERS_MAX};

/// Longest name of a process, in bytes.
pub const NAME_BYTES_MAX: usize = 64;

/// A replica of the Millrace coordinator: keeps the cluster's state with its peers and serves the OpenAI API.
#[derive(Parser, Clone, Debug)]
#[command(name = "coordinator", version)]
pub struct Args {
    /// This replica's number, one of --peers unless it joins
    #[arg(long)]
    pub id: u64,
    /// This replica's name, as its certificate says; must end in "-" and the number, so that replicas know each other
    #[arg(long)]
    pub name: String,
    /// The first replicas and where their QUIC endpoints listen: 1=127.0.0.1:7001,2=127.0.0.1:7002; for one that joins, some
    /// that there are. Once the log exists, it knows better
    #[arg(long, value_delimiter = ',', value_parser = parse_peer, required = true)]
    pub peers: Vec<(u64, SocketAddr)>,
    /// Join a cluster that there is, as a member that an operator has added, and learn everything from its leader
    #[arg(long)]
    pub join: bool,
    /// Where this replica's QUIC endpoint listens
    #[arg(long)]
    pub listen: SocketAddr,
    /// Where the OpenAI API listens; port 0 takes a free one
    #[arg(long, default_value = "127.0.0.1:0")]
    pub http: SocketAddr,
    /// Folder of the replicated log; created if absent
    #[arg(long)]
    pub dir: PathBuf,
    /// Folder of the certificates
    #[arg(long)]
    pub certs: PathBuf,
    /// The cluster's name
    #[arg(long)]
    pub cluster: String,
    /// Model directory or GGUF file; only its tokenizer, chat template and shape are used
    #[arg(long)]
    pub model: PathBuf,
    /// The model's public name; from the path if absent
    #[arg(long)]
    pub model_name: Option<String>,
    /// Element type of the nodes' weights and activations, bf16 or f32; and of cached KV where --kv-dtype does not say another
    #[arg(long, default_value = "bf16")]
    pub dtype: Dtype,
    /// What keys and values are cached as, the same on every node: bf16, int8 or f32; as --dtype says if absent
    #[arg(long, env = "MILLRACE_KV_DTYPE", value_name = "TYPE")]
    pub kv_dtype: Option<KvDtype>,
    /// Tokens of one block, a power of two from 16 to 128, the same on every node
    #[arg(long, default_value_t = 16, value_parser = parse_block_tokens)]
    pub block_tokens: u16,
    /// How requests are placed: auto; or a simpler rule, to compare with: cache, round-robin, least-loaded, split, whole
    #[arg(long, default_value = "auto", value_parser = parse_policy)]
    pub route: Policy,
    /// Stop when the parent process ends
    #[arg(long)]
    pub exit_with_parent: bool,
}

/// A valid configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// The parsed command line.
    pub args: Args,
    /// This replica.
    pub me: ReplicaId,
    /// The other replicas' endpoints.
    pub others: BTreeMap<ReplicaId, SocketAddr>,
    /// What all replicas' names begin with, before "-" and the number.
    family: String,
}

impl Config {
    /// Checks what the fields promise one another.
    ///
    /// # Errors
    /// Names the argument that is wrong.
    pub fn new(args: Args) -> anyhow::Result<Self> {
        let mut all = BTreeMap::new();
        for &(id, address) in &args.peers {
            ensure!(id != 0, "--peers: replica numbers start at 1");
            ensure!(all.insert(ReplicaId(id), address).is_none(), "--peers names replica {id} twice");
        }
        ensure!(all.len() <= VOTERS_MAX, "--peers: at most {VOTERS_MAX} replicas");
        let me = ReplicaId(args.id);
        ensure!(me.0 != 0, "--id: replica numbers start at 1");
        let listed = all.remove(&me).is_some();
        ensure!(listed || args.join, "--id {} is not one of --peers", args.id);
        ensure!(!args.join || !all.is_empty(), "--peers: --join needs a replica to join");
        check_name("--name", &args.name, NAME_BYTES_MAX)?;
        check_name("--cluster", &args.cluster, CLUSTER_ID_BYTES_MAX)?;
        let family = args.name.strip_suffix(&format!("-{}", args.id)).filter(|family| !family.is_empty());
        let family =
            family.with_context(|| format!("--name {:?} must end in \"-{}\", as --id says", args.name, args.id))?.to_owned();
        Ok(Self { args, me, others: all, family })
    }

    /// The name of a replica, as its certificate must say.
    #[must_use]
    pub fn replica_name(&self, id: ReplicaId) -> String {
        format!("{}-{id}", self.family)
    }

    /// The number of the replica of this name, whether there is one or not.
    #[must_use]
    pub fn replica_of(&self, name: &str) -> Option<ReplicaId> {
        let id = name.strip_prefix(&self.family)?.strip_prefix('-')?.parse().ok().map(ReplicaId)?;
        (id != ReplicaId(0) && self.replica_name(id) == name).then_some(id)
    }

    /// The first voters, ascending; none for a replica that joins.
    #[must_use]
    pub fn founders(&self) -> Vec<u64> {
        if self.args.join {
            return Vec::new();
        }
        let mut all: Vec<u64> = self.others.keys().map(|id| id.0).collect();
        all.push(self.me.0);
        all.sort_unstable();
        all
    }

    /// How other processes reach this replica's endpoint: as `--peers` says, else where it listens.
    #[must_use]
    pub fn quic(&self) -> SocketAddr {
        self.args.peers.iter().find(|(id, _)| *id == self.me.0).map_or(self.args.listen, |&(_, address)| address)
    }
}

fn check_name(what: &str, name: &str, bytes_max: usize) -> anyhow::Result<()> {
    ensure!(!name.is_empty() && name.len() <= bytes_max, "{what}: 1 to {bytes_max} bytes");
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    ensure!(name.chars().all(plain), "{what}: only letters, digits, '-', '_' and '.'");
    Ok(())
}

fn parse_peer(text: &str) -> Result<(u64, SocketAddr), String> {
    let (id, address) = text.split_once('=').ok_or("expected ID=IP:PORT")?;
    let id = id.trim().parse().map_err(|e| format!("replica number {id:?}: {e}"))?;
    let address = address.trim().parse().map_err(|e| format!("address {address:?}: {e}"))?;
    Ok((id, address))
}

fn parse_policy(text: &str) -> Result<Policy, String> {
    Policy::from_word(text).ok_or_else(|| format!("expected one of {}", Policy::WORDS.map(|(word, _)| word).join(", ")))
}

fn parse_block_tokens(text: &str) -> Result<u16, String> {
    match text.parse() {
        Ok(tokens @ (16 | 32 | 64 | 128)) => Ok(tokens),
        _ => Err("expected 16, 32, 64 or 128".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(peers: &str, id: &str) -> Result<Args, clap::Error> {
        let fixed = "coordinator --name c-1 --listen 127.0.0.1:1 --dir d --certs c --cluster x --model m";
        Args::try_parse_from(fixed.split(' ').chain(["--peers", peers, "--id", id]))
    }

    #[test]
    fn peers_name_every_replica_once() {
        let config = Config::new(args("2=127.0.0.1:2,1=127.0.0.1:1", "1").unwrap()).unwrap();
        assert_eq!(config.founders(), [1, 2]);
        assert_eq!(config.others.keys().copied().collect::<Vec<_>>(), [ReplicaId(2)]);
        assert_eq!((config.replica_name(ReplicaId(2)), config.replica_of("c-2")), ("c-2".into(), Some(ReplicaId(2))));
        assert_eq!((config.replica_of("c-7"), config.replica_of("x-2")), (Some(ReplicaId(7)), None));
        assert_eq!((config.replica_of("c-0"), config.replica_of("c-02"), config.replica_of("c")), (None, None, None));
        assert!(Config::new(args("2=127.0.0.1:2", "1").unwrap()).is_err());
        assert!(Config::new(args("2=127.0.0.1:2", "2").unwrap()).is_err(), "c-1 is not replica 2's name");
        assert!(Config::new(args("1=127.0.0.1:2,1=127.0.0.1:3", "1").unwrap()).is_err());
        assert!(args("1=nowhere", "1").is_err());
    }

    #[test]
    fn who_joins_need_not_be_listed() {
        let joins = |peers, id| Config::new(Args { join: true, name: format!("c-{id}"), ..args(peers, id).unwrap() });
        let config = joins("2=127.0.0.1:2,1=127.0.0.1:1", "4").unwrap();
        assert_eq!((config.founders(), config.others.len()), (vec![], 2));
        assert_eq!(config.quic(), config.args.listen);
        assert!(joins("4=127.0.0.1:4", "4").is_err(), "nobody to join");
        assert!(joins("1=127.0.0.1:1", "0").is_err());
    }

    #[test]
    fn names_are_plain() {
        assert!(check_name("x", "prefill-0", 64).is_ok());
        for bad in ["", "a b", "a/b", "ü"] {
            assert!(check_name("x", bad, 64).is_err(), "{bad:?}");
        }
    }
}
