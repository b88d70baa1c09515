//! A JSON file with getters whose errors name file and field.

use crate::CheckpointError;
use crate::mapping::read_small;
use serde_json::Value;
use std::path::PathBuf;

type Result<T> = std::result::Result<T, CheckpointError>;

/// An object of a JSON file, with getters whose errors name file and field. `null` is the same as absent, as it is for transformers.
pub(crate) struct JsonFile {
    pub(crate) path: PathBuf,
    value: Value,
    /// Put before the field's name in errors.
    pub(crate) prefix: String,
}

impl JsonFile {
    /// Reads a JSON object, or `None` if there is no such file.
    pub(crate) fn open(path: PathBuf, bytes_max: u64) -> Result<Option<Self>> {
        let Some(bytes) = read_small(&path, bytes_max)? else { return Ok(None) };
        match serde_json::from_slice(&bytes) {
            Ok(value @ Value::Object(_)) => Ok(Some(Self { path, value, prefix: String::new() })),
            Ok(_) => Err(CheckpointError::malformed(&path, "JSON", "is not an object")),
            Err(e) => Err(CheckpointError::malformed(&path, "JSON", e.to_string())),
        }
    }

    pub(crate) fn get(&self, field: &str) -> Option<&Value> {
        self.value.get(field).filter(|v| !v.is_null())
    }

    /// Whether the field is written down, be it as `null`.
    pub(crate) fn has(&self, field: &str) -> bool {
        self.value.get(field).is_some()
    }

    /// Refuses a field that is anything but one of `allowed`; absent is allowed.
    pub(crate) fn only(&self, field: &str, allowed: &[&str]) -> Result<()> {
        match self.text(field)? {
            Some(other) if !allowed.contains(&other) => Err(CheckpointError::unsupported(&self.path, field, other)),
            _ => Ok(()),
        }
    }

    pub(crate) fn wrong<T>(&self, field: &str, reason: &str) -> Result<T> {
        Err(CheckpointError::malformed(&self.path, format!("{}{field}", self.prefix), reason))
    }

    pub(crate) fn object(&self, field: &str) -> Result<Option<Self>> {
        match self.get(field) {
            None => Ok(None),
            Some(value @ Value::Object(_)) => {
                Ok(Some(Self { path: self.path.clone(), value: value.clone(), prefix: format!("{field}.") }))
            }
            Some(_) => self.wrong(field, "is not an object"),
        }
    }

    pub(crate) fn text(&self, field: &str) -> Result<Option<&str>> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => self.wrong(field, "is not a string"),
        }
    }

    /// A count that must be there.
    pub(crate) fn needed(&self, field: &str) -> Result<usize> {
        self.need(field, self.count(field)?)
    }

    pub(crate) fn count(&self, field: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(count) => Ok(Some(count)),
            None => self.wrong(field, "is not a whole number of at least 0"),
        }
    }

    pub(crate) fn number(&self, field: &str) -> Result<Option<f64>> {
        match self.get(field) {
            None => Ok(None),
            Some(value) => value.as_f64().map_or_else(|| self.wrong(field, "is not a number"), |x| Ok(Some(x))),
        }
    }

    pub(crate) fn need<T>(&self, field: &str, found: Option<T>) -> Result<T> {
        found.map_or_else(|| self.wrong(field, "is missing"), Ok)
    }

    pub(crate) fn is_true(&self, field: &str) -> Result<bool> {
        self.flag(field, false)
    }

    /// Whether a field is true; `absent` where it is not there.
    pub(crate) fn flag(&self, field: &str, absent: bool) -> Result<bool> {
        match self.get(field) {
            None => Ok(absent),
            Some(Value::Bool(b)) => Ok(*b),
            Some(_) => self.wrong(field, "is not true or false"),
        }
    }

    /// One token id, a list of them, or nothing.
    pub(crate) fn tokens(&self, field: &str) -> Result<Option<Vec<u32>>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let list = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        let ids: Option<Vec<u32>> = list.iter().map(|v| u32::try_from(v.as_u64()?).ok()).collect();
        ids.map_or_else(|| self.wrong(field, "is not a token id or a list of them"), |ids| Ok(Some(ids)))
    }
}
