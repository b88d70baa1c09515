//! The cluster's settings: one table with each key's default, bounds and meaning, and the values that differ from it.
//!
//! A change is validated by the replica that is asked and again when the entry applies: both call [`Spec::check`] and [`Config::set`].

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use rkyv::{Archive, Deserialize, Serialize};

use super::PolicyError;
use crate::message::TOKENS_MAX;
use crate::route::{CostModel, Slo, TIE_PERCENT};

/// What a value counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Milliseconds.
    Ms,
    /// Microseconds.
    Us,
    /// Percent.
    Percent,
    /// Tokens.
    Tokens,
    /// Things.
    Count,
    /// `true` or `false`.
    Bool,
}

impl Kind {
    /// The word for it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ms => "ms",
            Self::Us => "us",
            Self::Percent => "%",
            Self::Tokens => "tokens",
            Self::Count => "count",
            Self::Bool => "bool",
        }
    }
}

/// A setting; its place in [`SETTINGS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Setting {
    /// See [`SETTINGS`].
    SloTtft,
    /// See [`SETTINGS`].
    SloTpot,
    /// See [`SETTINGS`].
    TiePercent,
    /// See [`SETTINGS`].
    HandoverUs,
    /// See [`SETTINGS`].
    AnswerTokens,
    /// See [`SETTINGS`].
    StepGrowth,
    /// See [`SETTINGS`].
    TbtWeight,
    /// See [`SETTINGS`].
    StallWeight,
    /// See [`SETTINGS`].
    SloWeight,
    /// See [`SETTINGS`].
    TokensMax,
    /// See [`SETTINGS`].
    RunningMax,
    /// See [`SETTINGS`].
    AuthRequired,
    /// See [`SETTINGS`].
    SpreadWeight,
}

/// One row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spec {
    /// Which.
    pub setting: Setting,
    /// Its name for operators.
    pub key: &'static str,
    /// What its value counts.
    pub kind: Kind,
    /// Its value when nobody set it.
    pub default: u64,
    /// The smallest value.
    pub min: u64,
    /// The largest value.
    pub max: u64,
    /// What it does, in one line.
    pub doc: &'static str,
}

const fn spec(setting: Setting, key: &'static str, kind: Kind, (default, min, max): (u64, u64, u64), doc: &'static str) -> Spec {
    Spec { setting, key, kind, default, min, max, doc }
}

/// Requests that one gateway runs at a time, at most and by default.
const RUNNING_MAX: u64 = 4096;

/// All settings. The order is that of [`Setting`]; a weight's default is the router's own.
pub const SETTINGS: [Spec; 13] = [
    spec(Setting::SloTtft, "slo.ttft_ms", Kind::Ms, (0, 0, 600_000), "time to the first token that routing holds; 0 for none"),
    spec(Setting::SloTpot, "slo.tpot_ms", Kind::Ms, (0, 0, 60_000), "time for each further token that routing holds; 0 for none"),
    spec(
        Setting::TiePercent,
        "route.tie_percent",
        Kind::Percent,
        (TIE_PERCENT, 0, 50),
        "plans within this share of the best are equally good: one falls by seed",
    ),
    spec(Setting::HandoverUs, "route.handover_us", Kind::Us, (2_000, 0, 10_000_000), "fixed cost of a hand-over"),
    spec(
        Setting::AnswerTokens,
        "route.answer_tokens",
        Kind::Tokens,
        (256, 1, 1 << 20),
        "tokens that an answer is expected to have when it may have more",
    ),
    spec(
        Setting::StepGrowth,
        "route.step_growth_percent",
        Kind::Percent,
        (5, 0, 1000),
        "how much one sequence more lengthens a decode step",
    ),
    spec(
        Setting::TbtWeight,
        "route.tbt_percent",
        Kind::Percent,
        (25, 0, 10_000),
        "weight of time between tokens, against time to the first",
    ),
    spec(
        Setting::StallWeight,
        "route.stall_percent",
        Kind::Percent,
        (25, 0, 10_000),
        "weight of time for which others' decoding stands still",
    ),
    spec(Setting::SloWeight, "route.slo_percent", Kind::Percent, (400, 0, 10_000), "weight of what exceeds the objective"),
    spec(
        Setting::TokensMax,
        "request.tokens_max",
        Kind::Tokens,
        (TOKENS_MAX as u64, 1, TOKENS_MAX as u64),
        "prompt and answer of one request together",
    ),
    spec(
        Setting::RunningMax,
        "request.running_max",
        Kind::Count,
        (RUNNING_MAX, 1, RUNNING_MAX),
        "requests that one gateway runs at a time; more get 429",
    ),
    spec(Setting::AuthRequired, "auth.required", Kind::Bool, (0, 0, 1), "whether a request without an API key is refused (401)"),
    spec(
        Setting::SpreadWeight,
        "route.spread_percent",
        Kind::Percent,
        (50, 0, 10_000),
        "weight of what a copy of a hot prefix will save; 0 makes none on purpose",
    ),
];

/// Why a value cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    /// Not a number, or not true or false.
    #[error("{key}: {got:?} is no {kind}")]
    Malformed {
        /// The key.
        key: &'static str,
        /// What was given.
        got: String,
        /// What is wanted.
        kind: &'static str,
    },
    /// Outside its bounds.
    #[error("{key}: {got} is not within {min}..={max}")]
    Range {
        /// The key.
        key: &'static str,
        /// What was given.
        got: u64,
        /// The smallest.
        min: u64,
        /// The largest.
        max: u64,
    },
}

impl Spec {
    /// The row of a key.
    #[must_use]
    pub fn of(key: &str) -> Option<&'static Self> {
        SETTINGS.iter().find(|spec| spec.key == key)
    }

    /// A value within the bounds.
    ///
    /// # Errors
    /// [`ValueError::Range`].
    pub fn check(&self, value: u64) -> Result<u64, ValueError> {
        let Self { key, min, max, .. } = *self;
        if (min..=max).contains(&value) { Ok(value) } else { Err(ValueError::Range { key, got: value, min, max }) }
    }

    /// A value as operators write it.
    ///
    /// # Errors
    /// See [`ValueError`].
    pub fn parse(&self, text: &str) -> Result<u64, ValueError> {
        let value = match (self.kind, text) {
            (Kind::Bool, "true") => Some(1),
            (Kind::Bool, "false") => Some(0),
            (Kind::Bool, _) => None,
            _ => text.parse().ok(),
        };
        let malformed = || ValueError::Malformed { key: self.key, got: text.to_string(), kind: self.kind.as_str() };
        self.check(value.ok_or_else(malformed)?)
    }

    /// A value as operators read it.
    #[must_use]
    pub fn show(&self, value: u64) -> String {
        match self.kind {
            Kind::Bool => (value != 0).to_string(),
            _ => value.to_string(),
        }
    }
}

/// A setting that changed.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Its key.
    pub key: String,
    /// Its value before.
    pub old: u64,
    /// Its value now.
    pub new: u64,
}

/// The settings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// Only what differs from the default.
    values: BTreeMap<Setting, u64>,
    version: u64,
}

impl Config {
    /// Grows with each change.
    #[must_use]
    pub const fn version(&self) -> u64 {
        self.version
    }

    /// The value of a setting.
    #[must_use]
    pub fn get(&self, setting: Setting) -> u64 {
        self.values.get(&setting).copied().unwrap_or(SETTINGS[setting as usize].default)
    }

    /// What differs from the defaults.
    pub fn changed(&self) -> impl Iterator<Item = (&'static Spec, u64)> {
        self.values.iter().map(|(setting, value)| (&SETTINGS[*setting as usize], *value))
    }

    /// What [`Self::set`] would change, without changing it.
    ///
    /// # Errors
    /// As [`Self::set`].
    pub fn plan(&self, if_version: Option<u64>, set: &[(String, Option<u64>)]) -> Result<Vec<Change>, PolicyError> {
        if let Some(expected) = if_version.filter(|version| *version != self.version) {
            let reason = format!("the settings have version {} now, not {expected}: somebody changed them", self.version);
            return Err(PolicyError::Conflict(reason));
        }
        let mut changes: Vec<Change> = Vec::new();
        for (key, value) in set {
            let spec = Spec::of(key).ok_or_else(|| PolicyError::NotFound(format!("no setting {key:?}")))?;
            let new = spec.check(value.unwrap_or(spec.default)).map_err(|e| PolicyError::Invalid(e.to_string()))?;
            if changes.iter().any(|change| change.key == *key) {
                return Err(PolicyError::Invalid(format!("{key} is set twice")));
            }
            changes.push(Change { key: key.clone(), old: self.get(spec.setting), new });
        }
        changes.retain(|change| change.old != change.new);
        Ok(changes)
    }

    /// Changes settings, all or none; answers what changed.
    ///
    /// # Errors
    /// An unknown key, a value out of bounds, a key twice, or another version than `if_version`.
    pub fn set(&mut self, if_version: Option<u64>, set: &[(String, Option<u64>)]) -> Result<Vec<Change>, PolicyError> {
        let changes = self.plan(if_version, set)?;
        for change in &changes {
            let spec = Spec::of(&change.key).expect("a planned change names a setting");
            match change.new == spec.default {
                true => self.values.remove(&spec.setting),
                false => self.values.insert(spec.setting, change.new),
            };
        }
        self.version += u64::from(!changes.is_empty());
        Ok(changes)
    }

    /// The objective that routing holds; `None` when there is none. A half that is off is never missed.
    #[must_use]
    pub fn slo(&self) -> Option<Slo> {
        let us = |setting| match self.get(setting) {
            0 => u64::MAX,
            ms => ms * 1000,
        };
        let slo = Slo { ttft_us: us(Setting::SloTtft), tpot_us: us(Setting::SloTpot) };
        (self.get(Setting::SloTtft) + self.get(Setting::SloTpot) > 0).then_some(slo)
    }

    /// Plans within this share of the best are equally good, percent.
    #[must_use]
    pub fn tie_percent(&self) -> u64 {
        self.get(Setting::TiePercent)
    }

    /// `base` with the weights that are settings.
    #[must_use]
    pub fn costs(&self, base: CostModel) -> CostModel {
        let small = |setting| self.get(setting) as u32; // the table's bounds fit
        CostModel {
            handover_us: self.get(Setting::HandoverUs),
            answer_tokens: small(Setting::AnswerTokens),
            step_growth_percent: small(Setting::StepGrowth),
            tbt_percent: small(Setting::TbtWeight),
            stall_percent: small(Setting::StallWeight),
            slo_percent: small(Setting::SloWeight),
            spread_percent: small(Setting::SpreadWeight),
            tie_percent: small(Setting::TiePercent),
            ..base
        }
    }

    /// Tokens of prompt and answer together that one request may have.
    #[must_use]
    pub fn tokens_max(&self) -> usize {
        self.get(Setting::TokensMax) as usize
    }

    /// Requests that one gateway runs at a time.
    #[must_use]
    pub fn running_max(&self) -> usize {
        self.get(Setting::RunningMax) as usize
    }

    /// Whether a request without an API key is refused.
    #[must_use]
    pub fn auth_required(&self) -> bool {
        self.get(Setting::AuthRequired) != 0
    }

    pub(super) fn restore(version: u64, values: &[(String, u64)]) -> Result<Self, &'static str> {
        let value = |(key, value): &(String, u64)| Spec::of(key).map(|spec| (spec.setting, *value)).ok_or("an unknown setting");
        let config = Self { values: values.iter().map(value).collect::<Result<_, _>>()?, version };
        if config.values.len() == values.len() { Ok(config) } else { Err("a setting is listed twice") }
    }

    pub(super) fn validate(&self) -> Result<(), &'static str> {
        let sound = |(spec, value): (&Spec, u64)| spec.check(value).is_ok() && value != spec.default;
        if self.changed().all(sound) { Ok(()) } else { Err("a setting is out of bounds, or kept at its default") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    fn set(key: &str, value: u64) -> (String, Option<u64>) {
        (key.into(), Some(value))
    }

    #[test]
    fn the_table_is_in_order_and_within_its_own_bounds() {
        for (i, spec) in SETTINGS.iter().enumerate() {
            assert_eq!(spec.setting as usize, i, "{}", spec.key);
            assert_eq!((spec.check(spec.default), Spec::of(spec.key)), (Ok(spec.default), Some(spec)));
            assert_eq!(spec.parse(&spec.show(spec.max)), Ok(spec.max));
            assert!(spec.check(spec.max + 1).is_err());
        }
    }

    #[test]
    fn changes_are_all_or_none_and_only_of_the_version_that_was_seen() {
        let mut config = Config::default();
        let changes = config.set(Some(0), &[set("slo.ttft_ms", 500), set("route.tie_percent", 3)]).unwrap();
        assert_eq!(changes, [Change { key: "slo.ttft_ms".into(), old: 0, new: 500 }], "a value that stays is no change");
        assert_eq!(config.version(), 1);
        let before = config.clone();
        assert!(matches!(config.set(Some(0), &[set("slo.tpot_ms", 5)]), Err(PolicyError::Conflict(_))));
        for bad in [vec![set("slo.tpot_ms", 5), set("x", 1)], vec![set("slo.tpot_ms", 5), set("auth.required", 2)]] {
            config.set(None, &bad).unwrap_err();
        }
        config.set(None, &[set("slo.tpot_ms", 5), set("slo.tpot_ms", 6)]).unwrap_err();
        assert_eq!(config, before);
        config.set(Some(1), &[("slo.ttft_ms".into(), None)]).unwrap();
        assert_eq!((config.changed().count(), config.version()), (0, 2));
    }

    #[test]
    fn settings_mean_what_they_say() {
        let mut config = Config::default();
        assert_eq!((config.slo(), config.costs(CostModel::default())), (None, CostModel::default()));
        config.set(None, &[set("slo.tpot_ms", 50), set("route.stall_percent", 7), set("auth.required", 1)]).unwrap();
        let slo = config.slo().unwrap();
        assert_eq!((slo.tpot_us, slo.ttft_us, config.auth_required()), (50_000, u64::MAX, true));
        assert_eq!(config.costs(CostModel::default()), CostModel { stall_percent: 7, ..CostModel::default() });
    }

    #[test]
    fn what_people_write_is_read() {
        let auth = Spec::of("auth.required").unwrap();
        assert_eq!((auth.parse("true"), auth.show(0).as_str()), (Ok(1), "false"));
        assert!(matches!(auth.parse("1"), Err(ValueError::Malformed { .. })));
        assert!(matches!(Spec::of("slo.ttft_ms").unwrap().parse("-1"), Err(ValueError::Malformed { .. })));
        assert!(matches!(Spec::of("slo.ttft_ms").unwrap().parse("9999999"), Err(ValueError::Range { .. })));
    }
}
