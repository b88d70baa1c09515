//! Tenants: whose requests there are, which keys speak for them, and how much they may ask.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use rkyv::{Archive, Deserialize, Serialize};

use super::{Policy, PolicyAnswer, PolicyError, no_tenant};
use crate::cluster::{Answer, NAME_BYTES_MAX, TENANTS_MAX};
use crate::identity::TenantKey;

/// API keys of one tenant; one more pushes out the oldest.
pub const API_KEYS_MAX: usize = 4;
/// Bytes of the name of a tenant that an operator makes.
const TENANT_NAME_BYTES_MAX: usize = 63;
/// The tenant of requests without a key. It is made by the first leader and stays.
const DEFAULT: &str = "default";

/// What the log keeps of an API key: nobody who reads the log can speak for the tenant.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ApiKeyDigest(pub [u8; 32]);

impl ApiKeyDigest {
    /// The digest of a key. Keys are 32 random bytes in text, so a fast hash hides them.
    #[must_use]
    pub fn of(key: &str) -> Self {
        Self(blake3::derive_key("millrace api key v1", key.as_bytes()))
    }

    /// The first digits of the digest, to tell keys apart on a screen.
    #[must_use]
    pub fn short(&self) -> String {
        self.0[..4].iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl core::fmt::Debug for ApiKeyDigest {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "ApiKeyDigest({}..)", self.short())
    }
}

/// How much a tenant may ask of each gateway; 0 is no limit.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Requests running at a time.
    pub running_max: u32,
    /// Prompt tokens in a minute.
    pub prompt_tokens_per_minute: u64,
    /// Tokens of one answer.
    pub answer_tokens_max: u32,
}

/// A tenant.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Tenant {
    /// Names its blocks.
    pub key: TenantKey,
    /// Who may speak for it, oldest first; at most [`API_KEYS_MAX`].
    pub api_keys: Vec<ApiKeyDigest>,
    /// How much it may ask.
    pub limits: Limits,
}

impl Policy {
    /// Makes a tenant without API key or limits unless it exists; answers the key that counts.
    pub(in crate::cluster) fn put_tenant(&mut self, name: &str, key: &TenantKey) -> Answer {
        if let Some(kept) = self.tenants.get(name) {
            return Answer::Tenant(kept.key);
        }
        if name.is_empty() || name.len() > NAME_BYTES_MAX {
            return Answer::Refused(format!("a tenant's name has 1 to {NAME_BYTES_MAX} bytes"));
        }
        if self.tenants.len() >= TENANTS_MAX {
            return Answer::Refused(format!("there are {TENANTS_MAX} tenants already"));
        }
        self.tenants.insert(name.to_string(), Tenant { key: *key, api_keys: Vec::new(), limits: Limits::default() });
        Answer::Tenant(*key)
    }

    pub(super) fn create(
        &mut self,
        name: &str,
        key: TenantKey,
        api_key: Option<ApiKeyDigest>,
        limits: Limits,
    ) -> Result<PolicyAnswer, PolicyError> {
        check_name(name)?;
        if let Some(kept) = self.tenants.get(name) {
            let repeated = api_key.is_some() && kept.api_keys.as_slice() == api_key.as_slice() && kept.limits == limits;
            let exists = || PolicyError::Conflict(format!("the tenant {name:?} exists already"));
            return if repeated { Ok(PolicyAnswer::Done) } else { Err(exists()) };
        }
        if self.tenants.len() >= TENANTS_MAX {
            return Err(PolicyError::Full(format!("there are {TENANTS_MAX} tenants already")));
        }
        if let Some(api_key) = api_key {
            self.check_fresh(&api_key)?;
            self.by_api_key.insert(api_key, name.to_string());
        }
        self.tenants.insert(name.to_string(), Tenant { key, api_keys: api_key.into_iter().collect(), limits });
        Ok(PolicyAnswer::Done)
    }

    fn check_fresh(&self, api_key: &ApiKeyDigest) -> Result<(), PolicyError> {
        match self.by_api_key.contains_key(api_key) {
            true => Err(PolicyError::Conflict("this API key is in use already".into())),
            false => Ok(()),
        }
    }

    pub(super) fn set_limits(&mut self, name: &str, limits: Limits) -> Result<PolicyAnswer, PolicyError> {
        self.tenants.get_mut(name).ok_or_else(|| no_tenant(name))?.limits = limits;
        Ok(PolicyAnswer::Done)
    }

    pub(super) fn rotate(&mut self, name: &str, api_key: ApiKeyDigest, keep: bool) -> Result<PolicyAnswer, PolicyError> {
        let tenant = self.tenants.get(name).ok_or_else(|| no_tenant(name))?;
        if tenant.api_keys.last() == Some(&api_key) {
            return Ok(PolicyAnswer::Done); // its answer was lost
        }
        self.check_fresh(&api_key)?;
        let tenant = self.tenants.get_mut(name).ok_or_else(|| no_tenant(name))?;
        let gone = if keep { (tenant.api_keys.len() + 1).saturating_sub(API_KEYS_MAX) } else { tenant.api_keys.len() };
        for old in tenant.api_keys.drain(..gone) {
            self.by_api_key.remove(&old);
        }
        tenant.api_keys.push(api_key);
        self.by_api_key.insert(api_key, name.to_string());
        Ok(PolicyAnswer::Done)
    }

    pub(super) fn delete(&mut self, name: &str) -> Result<PolicyAnswer, PolicyError> {
        if name == DEFAULT {
            return Err(PolicyError::Invalid("the default tenant stays: requests without a key are its".into()));
        }
        let gone = self.tenants.remove(name).ok_or_else(|| no_tenant(name))?;
        for key in &gone.api_keys {
            self.by_api_key.remove(key);
        }
        self.drop_pins(|pin| pin.tenant == name);
        Ok(PolicyAnswer::Done)
    }
}

fn check_name(name: &str) -> Result<(), PolicyError> {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_.".contains(c);
    if (1..=TENANT_NAME_BYTES_MAX).contains(&name.len()) && name.chars().all(allowed) {
        return Ok(());
    }
    let rule = format!("a tenant's name has 1 to {TENANT_NAME_BYTES_MAX} of a-z, 0-9, -, _ and .");
    Err(PolicyError::Invalid(rule))
}
