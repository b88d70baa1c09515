//! Who asks. A request's tenant and salt follow from its number, and the engine's words from them: a sequence that reads a block of another
//! tenant, or under another salt, draws other tokens. Prompts begin like each other across tenants, so a name that does not keep
//! them apart does harm at once.

use millrace_core::identity::TenantKey;
use millrace_core::ids::RequestId;

use crate::event::Client;
use crate::gateway::client;

/// The tenants, by number.
pub const TENANTS: [&str; 3] = ["default", "second", "third"];
/// Salts that a caller may send; the first is none.
const SALTS: [&[u8]; 2] = [b"", b"salt"];

/// Whose a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Number of the tenant.
    pub tenant: usize,
    /// What narrows sharing further.
    pub salt: &'static [u8],
}

impl Caller {
    /// Who sent this request.
    #[must_use]
    pub fn of(id: RequestId) -> Self {
        Self::of_client(client(id))
    }

    /// Who sent the request of this number.
    #[must_use]
    pub fn of_client(number: Client) -> Self {
        let number = number as usize;
        Self { tenant: number % TENANTS.len(), salt: SALTS[usize::from(number.is_multiple_of(7))] }
    }

    /// What the caller's KV is tainted with.
    #[must_use]
    pub fn taint(&self) -> u64 {
        (self.tenant as u64) << 8 | self.salt.len() as u64
    }
}

/// The key that the log keeps for a tenant.
#[must_use]
pub const fn tenant_key(tenant: usize) -> TenantKey {
    TenantKey([9 + tenant as u8; 32])
}
