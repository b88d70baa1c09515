//! New certificates without a restart: looks at a process's certificate files and gives changed ones to its endpoint.
//!
//! Files are looked at, not watched: that sees a file that was replaced, a folder that was swapped by a link (as secrets of a container
//! are) and a change on a network disk alike, and needs nobody to send a signal. Connections that are open keep the certificates
//! that they were made with; a certificate's end does not end them.

use std::path::PathBuf;
use std::time::Duration;

use tokio::time::MissedTickBehavior;
use tracing::{info, warn};

use crate::endpoint::Endpoint;
use crate::pki::{self, Identity, PkiError};
use crate::shutdown::Shutdown;

/// How often processes look.
pub const LOOK_INTERVAL: Duration = Duration::from_secs(2);

/// Keeps `endpoint` on the certificates in `dir`, until shutdown. What cannot be used is said once and leaves things as they are.
pub async fn keep_renewed(endpoint: Endpoint, dir: PathBuf, look_interval: Duration, shutdown: Shutdown) {
    let mut look = tokio::time::interval(look_interval);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut used = None;
    loop {
        tokio::select! {
            _ = look.tick() => {}
            _ = shutdown.wait() => return,
        }
        // A file may be missing for the moment in which a folder is swapped.
        let Ok(files) = pki::files(&dir) else { continue };
        let first = used.is_none();
        if used.as_ref() == Some(&files) {
            continue;
        }
        match take(&endpoint, &dir) {
            Ok(serial) if !first => info!(serial, dir = %dir.display(), "new certificates are in use"),
            Ok(_) => {}
            Err(error) => warn!(%error, dir = %dir.display(), "new certificates are not used"),
        }
        used = Some(files);
    }
}

fn take(endpoint: &Endpoint, dir: &std::path::Path) -> Result<String, PkiError> {
    let identity = Identity::load(dir)?;
    endpoint.renew(&identity)?;
    Ok(identity.leaf()?.serial)
}
