//! Tenants, for operators. API keys are made by the operator's tool: only their digests come here.

use millrace_core::cluster::{ApiKeyDigest, Limits, PolicyCommand, Tenant};
use millrace_core::identity::TenantKey;
use millrace_core::message::{CacheTask, Evict};
use serde::Deserialize;
use serde_json::{Value, json};

use super::Admin;

/// A question or change. Its JSON has `"op"`: the variant in snake case.
#[derive(Debug, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub(super) enum TenantQuery {
    List,
    Show {
        name: String,
    },
    Create {
        name: String,
        /// Digest of its first API key, hexadecimal.
        api_key: Option<String>,
        #[serde(flatten)]
        limits: Wanted,
    },
    Set {
        name: String,
        #[serde(flatten)]
        limits: Wanted,
    },
    RotateKey {
        name: String,
        api_key: String,
        #[serde(default)]
        keep: bool,
    },
    Delete {
        name: String,
    },
}

/// Limits of which some are given; 0 is none.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Wanted {
    running_max: Option<u32>,
    prompt_tokens_per_minute: Option<u64>,
    answer_tokens_max: Option<u32>,
}

impl Wanted {
    fn over(&self, limits: Limits) -> Limits {
        Limits {
            running_max: self.running_max.unwrap_or(limits.running_max),
            prompt_tokens_per_minute: self.prompt_tokens_per_minute.unwrap_or(limits.prompt_tokens_per_minute),
            answer_tokens_max: self.answer_tokens_max.unwrap_or(limits.answer_tokens_max),
        }
    }
}

impl Admin {
    pub(super) async fn tenants(&self, query: TenantQuery) -> Result<Value, String> {
        match query {
            TenantQuery::List => {
                let cluster = self.proposer.cluster.read();
                let tenants: Vec<Value> = cluster.policy().tenants().map(|(name, tenant)| tenant_json(name, tenant)).collect();
                Ok(json!({"tenants": tenants, "auth_required": cluster.config().auth_required()}))
            }
            TenantQuery::Show { name } => Ok(tenant_json(&name, &self.known_tenant(&name)?)),
            TenantQuery::Create { name, api_key, limits } => {
                let api_key = api_key.as_deref().map(digest).transpose()?;
                let (key, limits) = (TenantKey(rand::random()), limits.over(Limits::default()));
                self.change(PolicyCommand::CreateTenant { name: name.clone(), key, api_key, limits }).await?;
                Ok(tenant_json(&name, &Tenant { key, api_keys: api_key.into_iter().collect(), limits }))
            }
            TenantQuery::Set { name, limits } => {
                let tenant = self.known_tenant(&name)?;
                let limits = limits.over(tenant.limits);
                self.change(PolicyCommand::SetLimits { name: name.clone(), limits }).await?;
                Ok(tenant_json(&name, &Tenant { limits, ..tenant }))
            }
            TenantQuery::RotateKey { name, api_key, keep } => {
                let api_key = digest(&api_key)?;
                self.change(PolicyCommand::RotateKey { name: name.clone(), api_key, keep }).await?;
                Ok(json!({"name": name, "api_key": api_key.short(), "kept": keep}))
            }
            TenantQuery::Delete { name } => self.delete_tenant(name).await,
        }
    }

    /// Deletes a tenant, and asks the nodes to drop its blocks, which nobody can name any more: what they do not drop ages out.
    async fn delete_tenant(&self, name: String) -> Result<Value, String> {
        let owner = self.known_tenant(&name)?.key.owner();
        self.change(PolicyCommand::DeleteTenant { name: name.clone() }).await?;
        let task = CacheTask::Evict { what: Evict::Owner(owner), dry_run: false };
        let (nodes, dropped) = self.evict_on(None, task).await?;
        Ok(json!({"name": name, "deleted": true, "dropped": dropped, "nodes": nodes}))
    }

    fn known_tenant(&self, name: &str) -> Result<Tenant, String> {
        let tenant = self.proposer.cluster.read().policy().tenant(name).cloned();
        tenant.ok_or_else(|| format!("not found: tenant {name:?}"))
    }
}

fn tenant_json(name: &str, tenant: &Tenant) -> Value {
    let keys: Vec<String> = tenant.api_keys.iter().map(ApiKeyDigest::short).collect();
    let Limits { running_max, prompt_tokens_per_minute, answer_tokens_max } = tenant.limits;
    json!({
        "name": name,
        "api_keys": keys,
        "running_max": running_max,
        "prompt_tokens_per_minute": prompt_tokens_per_minute,
        "answer_tokens_max": answer_tokens_max,
    })
}

fn digest(hex: &str) -> Result<ApiKeyDigest, String> {
    let wrong = || "usage: api_key: 64 hexadecimal digits of its digest".to_owned();
    if hex.len() != 64 || !hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(wrong());
    }
    let mut bytes = [0; 32];
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).map_err(|_| wrong())?;
    }
    Ok(ApiKeyDigest(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_sixty_four_hexadecimal_digits() {
        let key = ApiKeyDigest::of("k");
        let hex: String = key.0.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(digest(&hex), Ok(key));
        for wrong in ["", "zz", &hex[1..], &format!("é{}", &hex[2..]), &"+1".repeat(32)] {
            assert!(digest(wrong).is_err_and(|reason| reason.starts_with("usage:")), "{wrong:?}");
        }
    }

    #[test]
    fn limits_that_are_not_given_stay() {
        let wanted: Wanted = serde_json::from_value(json!({"running_max": 0, "answer_tokens_max": 9})).unwrap();
        let before = Limits { running_max: 4, prompt_tokens_per_minute: 5, answer_tokens_max: 6 };
        assert_eq!(wanted.over(before), Limits { running_max: 0, prompt_tokens_per_minute: 5, answer_tokens_max: 9 });
    }
}
