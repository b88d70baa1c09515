//! Who asks: `Authorization: Bearer KEY` names the tenant. Nothing in a body does.

use axum::http::{HeaderMap, StatusCode, header};
use millrace_core::cluster::{ApiKeyDigest, Limits, Policy};

use super::error::ApiError;
use crate::dispatch::DEFAULT_TENANT;

/// Bytes of an API key; a longer one is not looked up.
pub const API_KEY_BYTES_MAX: usize = 512;

/// Whoever sent a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The tenant.
    pub tenant: String,
    /// How much it may ask.
    pub limits: Limits,
}

/// The tenant that a request's headers name.
///
/// # Errors
/// 401: an unknown or malformed key, or none where one is needed.
pub fn authenticate(policy: &Policy, headers: &HeaderMap) -> Result<Caller, ApiError> {
    let Some(value) = headers.get(header::AUTHORIZATION) else {
        let limits = policy.tenant(DEFAULT_TENANT).map(|tenant| tenant.limits).unwrap_or_default();
        return match policy.config().auth_required() {
            true => Err(refused("You didn't provide an API key: send `Authorization: Bearer KEY`")),
            false => Ok(Caller { tenant: DEFAULT_TENANT.into(), limits }),
        };
    };
    let key = value.to_str().ok().and_then(bearer).filter(|key| key.len() <= API_KEY_BYTES_MAX);
    let key = key.ok_or_else(|| refused("the Authorization header is not `Bearer KEY`"))?;
    // The key itself is not repeated: answers end up in logs.
    let (name, tenant) = policy.tenant_of(&ApiKeyDigest::of(key)).ok_or_else(|| refused("Incorrect API key provided"))?;
    Ok(Caller { tenant: name.to_owned(), limits: tenant.limits })
}

fn bearer(value: &str) -> Option<&str> {
    let (scheme, key) = value.split_once(' ')?;
    let key = key.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !key.is_empty()).then_some(key)
}

fn refused(message: &str) -> ApiError {
    ApiError::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message)
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;
    use millrace_core::cluster::{Cluster, Command, PolicyCommand};
    use millrace_core::identity::TenantKey;

    use super::*;

    fn cluster() -> Cluster {
        let mut cluster = Cluster::new();
        let limits = Limits { running_max: 3, ..Limits::default() };
        let (key, api_key) = (TenantKey([2; 32]), Some(ApiKeyDigest::of("secret")));
        cluster.apply(1, &Command::PutTenant { name: DEFAULT_TENANT.into(), key: TenantKey([1; 32]) });
        cluster.apply(2, &Command::Policy(PolicyCommand::CreateTenant { name: "acme".into(), key, api_key, limits }));
        cluster
    }

    fn ask(cluster: &Cluster, authorization: Option<&str>) -> Result<String, StatusCode> {
        let mut headers = HeaderMap::new();
        authorization.map(|value| headers.insert(header::AUTHORIZATION, HeaderValue::from_str(value).unwrap()));
        authenticate(cluster.policy(), &headers).map(|caller| caller.tenant).map_err(|error| error.status)
    }

    #[test]
    fn a_key_names_its_tenant_and_nothing_else_does() {
        let mut cluster = cluster();
        assert_eq!(ask(&cluster, None).as_deref(), Ok(DEFAULT_TENANT));
        assert_eq!(ask(&cluster, Some("Bearer secret")).as_deref(), Ok("acme"));
        assert_eq!(ask(&cluster, Some("bearer  secret ")).as_deref(), Ok("acme"));
        for wrong in ["Bearer other", "Bearer ", "Bearer", "Basic secret", "secret", &format!("Bearer {}", "x".repeat(600))] {
            assert_eq!(ask(&cluster, Some(wrong)), Err(StatusCode::UNAUTHORIZED), "{wrong:?}");
        }
        let set = vec![("auth.required".into(), Some(1))];
        cluster.apply(3, &Command::Policy(PolicyCommand::SetConfig { if_version: None, set }));
        assert_eq!(ask(&cluster, None), Err(StatusCode::UNAUTHORIZED));
        assert_eq!(ask(&cluster, Some("Bearer secret")).as_deref(), Ok("acme"));
    }

    #[test]
    fn a_refusal_has_openais_shape_and_does_not_repeat_the_key() {
        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, HeaderValue::from_static("Bearer very-secret"));
        let body = authenticate(cluster().policy(), &headers).unwrap_err().body();
        assert_eq!((&body["error"]["code"], &body["error"]["type"]), (&"invalid_api_key".into(), &"invalid_request_error".into()));
        assert!(!body.to_string().contains("very-secret"));
    }
}
