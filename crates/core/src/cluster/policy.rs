//! What operators decide for the whole cluster: settings, tenants and pins. Part of the replicated state, changed by
//! [`PolicyCommand`]s in the log only.
//!
//! Decided here: which changes are allowed and what they change. Not here: how a gateway enforces a limit (`coordinator`'s `http`), how a
//! pool keeps a pinned block ([`crate::pool`]), what a setting does to a decision ([`crate::route`]).

mod config;
mod pins;
mod tenants;

pub use config::{Change, Config, Kind, SETTINGS, Setting, Spec, ValueError};
pub use pins::{PIN_BLOCKS_MAX, PINNED_BLOCKS_MAX, PINS_MAX, Pin};
pub use tenants::{API_KEYS_MAX, ApiKeyDigest, Limits, Tenant};

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use rkyv::{Archive, Deserialize, Serialize};

use super::{Answer, TENANTS_MAX};
use crate::identity::TenantKey;
use crate::ids::BlockHash;

/// A change of policy, as an entry of the log. Append variants only.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub enum PolicyCommand {
    /// Changes settings, all or none. Answers [`PolicyAnswer::Config`].
    SetConfig {
        /// Only if the settings have this version; `None` whatever they have.
        if_version: Option<u64>,
        /// Each key with its new value; `None` for its default.
        set: Vec<(String, Option<u64>)>,
    },
    /// A new tenant. The same again, with the same API key, changes nothing and is no error: its answer was lost.
    CreateTenant {
        /// Its name.
        name: String,
        /// 32 random bytes that name its blocks.
        key: TenantKey,
        /// Its first API key, if it has one.
        api_key: Option<ApiKeyDigest>,
        /// Its limits.
        limits: Limits,
    },
    /// Other limits for a tenant.
    SetLimits {
        /// Whose.
        name: String,
        /// All of them.
        limits: Limits,
    },
    /// A new API key for a tenant.
    RotateKey {
        /// Whose.
        name: String,
        /// The new one.
        api_key: ApiKeyDigest,
        /// The older ones stay valid, up to [`API_KEYS_MAX`] in all, the oldest going first.
        keep: bool,
    },
    /// Forgets a tenant, its keys and its pins: its blocks cannot be named any more and age out.
    DeleteTenant {
        /// Which.
        name: String,
    },
    /// Keeps a chain of blocks from eviction. Answers [`PolicyAnswer::Pinned`].
    Pin {
        /// Whose blocks.
        tenant: String,
        /// What the operator calls it.
        label: String,
        /// The blocks of a prompt, from its first.
        names: Vec<BlockHash>,
        /// How long, in log time from now; `None` until it is taken back.
        ttl_us: Option<u64>,
    },
    /// Takes a pin back.
    Unpin {
        /// Which.
        pin: u64,
    },
}

/// What a [`PolicyCommand`] gives back.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub enum PolicyAnswer {
    /// It is so now.
    Done,
    /// The settings have this version now, and this is what changed.
    Config {
        /// Their version.
        version: u64,
        /// What is different from before.
        changes: Vec<Change>,
    },
    /// The pin's number.
    Pinned {
        /// The number.
        pin: u64,
    },
    /// Nothing was changed, and why.
    Refused(PolicyError),
}

/// Why a change of policy is refused.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// What was named does not exist.
    #[error("{0}")]
    NotFound(String),
    /// Somebody else changed it first, or it exists already.
    #[error("{0}")]
    Conflict(String),
    /// It makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// It would exceed a bound.
    #[error("{0}")]
    Full(String),
}

/// Settings, tenants and pins.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    config: Config,
    tenants: BTreeMap<String, Tenant>,
    /// Whose an API key is; derived from `tenants`.
    by_api_key: BTreeMap<ApiKeyDigest, String>,
    pins: BTreeMap<u64, Pin>,
    last_pin: u64,
    pins_version: u64,
}

/// A policy as it is written: sorted lists, nothing that can be derived.
#[derive(Archive, Serialize, Deserialize)]
pub(super) struct PolicyImage {
    config_version: u64,
    config: Vec<(String, u64)>,
    tenants: Vec<(String, Tenant)>,
    pins: Vec<(u64, Pin)>,
    last_pin: u64,
    pins_version: u64,
}

impl Policy {
    /// The settings.
    #[must_use]
    pub const fn config(&self) -> &Config {
        &self.config
    }

    /// A tenant by its name.
    #[must_use]
    pub fn tenant(&self, name: &str) -> Option<&Tenant> {
        self.tenants.get(name)
    }

    /// All tenants, by name.
    pub fn tenants(&self) -> impl Iterator<Item = (&str, &Tenant)> {
        self.tenants.iter().map(|(name, tenant)| (name.as_str(), tenant))
    }

    /// Whose an API key is.
    #[must_use]
    pub fn tenant_of(&self, api_key: &ApiKeyDigest) -> Option<(&str, &Tenant)> {
        let name = self.by_api_key.get(api_key)?;
        self.tenants.get(name).map(|tenant| (name.as_str(), tenant))
    }

    /// All pins, by number.
    pub fn pins(&self) -> impl Iterator<Item = (u64, &Pin)> {
        self.pins.iter().map(|(id, pin)| (*id, pin))
    }

    /// Grows with each change of the pins: what a node was told is compared with it.
    #[must_use]
    pub const fn pins_version(&self) -> u64 {
        self.pins_version
    }

    /// Applies a change. `smallest_pool` is the slots of the smallest live node's pool, if there is a node.
    pub(super) fn apply(&mut self, now_us: u64, smallest_pool: Option<u32>, command: &PolicyCommand) -> Answer {
        let done = match command {
            PolicyCommand::SetConfig { if_version, set } => self.config.set(*if_version, set).map(|changes| {
                let version = self.config.version();
                PolicyAnswer::Config { version, changes }
            }),
            PolicyCommand::CreateTenant { name, key, api_key, limits } => self.create(name, *key, *api_key, *limits),
            PolicyCommand::SetLimits { name, limits } => self.set_limits(name, *limits),
            PolicyCommand::RotateKey { name, api_key, keep } => self.rotate(name, *api_key, *keep),
            PolicyCommand::DeleteTenant { name } => self.delete(name),
            PolicyCommand::Pin { tenant, label, names, ttl_us } => {
                let pin = Pin { tenant: tenant.clone(), label: label.clone(), names: names.clone(), until_us: None };
                self.pin(pin, ttl_us.map(|ttl| now_us.saturating_add(ttl)), smallest_pool)
            }
            PolicyCommand::Unpin { pin } => self.unpin(*pin),
        };
        Answer::Policy(done.unwrap_or_else(PolicyAnswer::Refused))
    }

    pub(super) fn image(&self) -> PolicyImage {
        PolicyImage {
            config_version: self.config.version(),
            config: self.config.changed().map(|(spec, value)| (spec.key.into(), value)).collect(),
            tenants: self.tenants.iter().map(|(name, tenant)| (name.clone(), tenant.clone())).collect(),
            pins: self.pins.iter().map(|(id, pin)| (*id, pin.clone())).collect(),
            last_pin: self.last_pin,
            pins_version: self.pins_version,
        }
    }

    pub(super) fn restore(image: PolicyImage) -> Result<Self, &'static str> {
        let listed = (image.tenants.len(), image.pins.len());
        let config = Config::restore(image.config_version, &image.config)?;
        let tenants: BTreeMap<String, Tenant> = image.tenants.into_iter().collect();
        let keys = tenants.iter().flat_map(|(name, tenant)| tenant.api_keys.iter().map(|key| (*key, name.clone())));
        let policy = Self {
            by_api_key: keys.collect(),
            config,
            tenants,
            pins: image.pins.into_iter().collect(),
            last_pin: image.last_pin,
            pins_version: image.pins_version,
        };
        if listed != (policy.tenants.len(), policy.pins.len()) {
            return Err("a tenant or a pin is listed twice");
        }
        Ok(policy)
    }

    /// What does not hold, if anything.
    pub(super) fn validate(&self) -> Result<(), &'static str> {
        let keys: usize = self.tenants.values().map(|tenant| tenant.api_keys.len()).sum();
        let owned = |(key, name): (&ApiKeyDigest, &String)| self.tenants.get(name).is_some_and(|t| t.api_keys.contains(key));
        if self.tenants.len() > TENANTS_MAX || self.by_api_key.len() != keys || !self.by_api_key.iter().all(owned) {
            return Err("API keys and tenants do not match");
        }
        if self.tenants.values().any(|tenant| tenant.api_keys.len() > API_KEYS_MAX) {
            return Err("a tenant has too many API keys");
        }
        let sound = |(id, pin): (&u64, &Pin)| {
            *id <= self.last_pin
                && !pin.names.is_empty()
                && pin.names.len() <= PIN_BLOCKS_MAX
                && self.tenants.contains_key(&pin.tenant)
        };
        if self.pins.len() > PINS_MAX || !self.pins.iter().all(sound) || self.pinned_names().len() > PINNED_BLOCKS_MAX {
            return Err("a pin is over a bound, or of no tenant");
        }
        self.config.validate()
    }
}

fn no_tenant(name: &str) -> PolicyError {
    PolicyError::NotFound(format!("no tenant {name:?}"))
}
