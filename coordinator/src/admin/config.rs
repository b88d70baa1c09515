//! The cluster's settings, for operators.

use std::collections::BTreeMap;

use millrace_core::cluster::{Change, Config, Kind, PolicyAnswer, PolicyCommand, SETTINGS, Spec};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Admin, refusal};

/// A question or change. Its JSON has `"op"`: the variant in snake case.
#[derive(Debug, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub(super) enum ConfigQuery {
    Get {
        /// One setting; all if absent.
        key: Option<String>,
    },
    Set {
        /// Key to value as text; null for its default.
        set: BTreeMap<String, Option<String>>,
        /// Only if the settings have this version.
        if_version: Option<u64>,
        #[serde(default)]
        dry_run: bool,
    },
}

impl Admin {
    pub(super) async fn settings(&self, query: ConfigQuery) -> Result<Value, String> {
        match query {
            ConfigQuery::Get { key } => get(self.proposer.cluster.read().config(), key.as_deref()),
            ConfigQuery::Set { set, if_version, dry_run } => {
                let set = parse(&set)?;
                let planned = {
                    let cluster = self.proposer.cluster.read();
                    let config = cluster.config();
                    // What can be seen to be wrong here need not go through the log; a version that is behind may only be ours.
                    let seen = if_version.filter(|version| *version <= config.version());
                    let changes = config.plan(seen, &set).map_err(|error| refusal(&error))?;
                    changed(config.version(), true, &changes)
                };
                if dry_run {
                    return Ok(planned);
                }
                match self.change(PolicyCommand::SetConfig { if_version, set }).await? {
                    PolicyAnswer::Config { version, changes } => Ok(changed(version, false, &changes)),
                    other => Err(format!("unexpected answer {other:?}")),
                }
            }
        }
    }
}

fn parse(set: &BTreeMap<String, Option<String>>) -> Result<Vec<(String, Option<u64>)>, String> {
    let one = |(key, text): (&String, &Option<String>)| {
        let spec = spec(key)?;
        let value = text.as_ref().map(|text| spec.parse(text)).transpose();
        Ok((key.clone(), value.map_err(|error| format!("usage: {error}"))?))
    };
    set.iter().map(one).collect()
}

fn spec(key: &str) -> Result<&'static Spec, String> {
    Spec::of(key).ok_or_else(|| {
        let keys: Vec<&str> = SETTINGS.iter().map(|spec| spec.key).collect();
        format!("not found: no setting {key:?}; there are {}", keys.join(", "))
    })
}

fn get(config: &Config, key: Option<&str>) -> Result<Value, String> {
    let only = key.map(spec).transpose()?;
    let wanted = SETTINGS.iter().filter(|spec| only.is_none_or(|only| only.key == spec.key));
    let settings: Vec<Value> = wanted
        .map(|spec| {
            let value = config.get(spec.setting);
            json!({
                "key": spec.key, "value": shown(spec, value), "default": shown(spec, spec.default), "changed": value != spec.default,
                "min": spec.min, "max": spec.max, "unit": spec.kind.as_str(), "doc": spec.doc,
            })
        })
        .collect();
    Ok(json!({"version": config.version(), "settings": settings}))
}

fn changed(version: u64, dry_run: bool, changes: &[Change]) -> Value {
    let one = |change: &Change| {
        let show = |value| Spec::of(&change.key).map(|spec| shown(spec, value));
        json!({"key": change.key, "old": show(change.old), "new": show(change.new)})
    };
    json!({"version": version, "dry_run": dry_run, "changes": changes.iter().map(one).collect::<Vec<_>>()})
}

fn shown(spec: &Spec, value: u64) -> Value {
    if spec.kind == Kind::Bool { json!(value != 0) } else { json!(value) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_shown_with_what_they_mean() {
        let mut config = Config::default();
        config.set(None, &[("auth.required".into(), Some(1))]).unwrap();
        let all = get(&config, None).unwrap();
        assert_eq!((all["settings"].as_array().unwrap().len(), &all["version"]), (SETTINGS.len(), &json!(1)));
        let one = get(&config, Some("auth.required")).unwrap();
        let auth = &one["settings"][0];
        assert_eq!((&auth["value"], &auth["default"], &auth["changed"]), (&json!(true), &json!(false), &json!(true)));
        assert!(get(&config, Some("x")).is_err_and(|reason| reason.starts_with("not found:") && reason.contains("slo.ttft_ms")));
    }

    #[test]
    fn values_are_read_by_their_kind() {
        let set = |key: &str, text: Option<&str>| parse(&BTreeMap::from([(key.to_owned(), text.map(str::to_owned))]));
        assert_eq!(set("slo.ttft_ms", Some("250")).unwrap(), [("slo.ttft_ms".into(), Some(250))]);
        assert_eq!(set("auth.required", None).unwrap(), [("auth.required".into(), None)]);
        assert!(set("slo.ttft_ms", Some("fast")).is_err_and(|reason| reason.starts_with("usage:")));
    }
}
