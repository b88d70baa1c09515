//! Makes the directory of a replica whose log begins with a given state: how a cluster is restored from a saved one.

use std::path::Path;
use std::sync::Arc;

use raft::eraftpb::HardState;

use super::disk::{Disk, OsDisk, failed, random_name};
use super::handle::checked;
use super::members::Members;
use super::snapshot::{self, Meta};
use super::storage::encode_record;
use super::wal::{Identity, LogPoint, Wal};
use super::{RaftConfig, RaftStartError};

/// The term of the state; the first leader's is the next.
const FOUNDING_TERM: u64 = 1;

/// Makes `config.dir` so that [`super::start`] finds a log whose entries up to `index` are in `state`. The same call for each voter, with
/// the same state, makes a cluster.
///
/// # Errors
/// The configuration is impossible, the directory is not empty, or the disk fails. A directory that is half made does not start.
pub fn found(config: RaftConfig, index: u64, state: &[u8]) -> Result<(), RaftStartError> {
    let config = checked(config)?;
    let disk: Arc<dyn Disk> = Arc::new(OsDisk);
    let dir: &Path = &config.dir;
    disk.create_dir_all(dir).map_err(failed("create", dir))?;
    if index == 0 || !disk.list(dir).map_err(failed("list", dir))?.is_empty() {
        return Err(RaftStartError::Config("a log is founded in an empty directory, with at least one entry".into()));
    }
    let owner = Identity { cluster_id: config.cluster_id, node: config.id, log: random_name(disk.as_ref()) };
    let at = LogPoint { index, term: FOUNDING_TERM };
    let meta = Meta { at, members: Members { voters: config.founders, ..Members::default() } };
    let temporary = dir.join("founding.tmp");
    snapshot::write(disk.as_ref(), temporary.clone(), &owner, &meta, state)?;
    snapshot::adopt(disk.as_ref(), dir, &temporary)?;
    let hard = HardState { term: FOUNDING_TERM, vote: 0, commit: index, ..Default::default() };
    Wal::create(&disk, dir, 1, &owner, at, &[encode_record(&[], &hard)])?;
    Ok(())
}
