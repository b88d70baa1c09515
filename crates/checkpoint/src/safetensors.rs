//! The header of a safetensors file: names, types, shapes and places.
//!
//! Written here and not taken from the crate of that name: the crate's errors often do not name the tensor, its sums can overflow (which
//! stops a process built with overflow checks), and it lets a repeated name win silently.
//! Format: <https://huggingface.co/docs/safetensors>: u64 length, JSON header, data without holes or overlaps.

use crate::mapping::MappedFile;
use crate::weights::{Order, Slot};
use crate::{CheckpointError, TensorType};
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use std::collections::BTreeSet;
use std::path::Path;

/// Longest JSON header, the limit of the format's own reader.
pub const SAFETENSORS_HEADER_BYTES_MAX: u64 = 100_000_000;
/// Most sides of a tensor.
const SIDES_MAX: usize = 8;

/// The tensors of `file`, which is number `index` among the model's files.
pub(crate) fn read_header(file: &MappedFile, index: usize) -> Result<Vec<(String, Slot)>, CheckpointError> {
    let (path, bytes) = (file.path(), file.bytes());
    let length = bytes.first_chunk::<8>().map(|b| u64::from_le_bytes(*b));
    let Some(length) = length else {
        return Err(CheckpointError::malformed(path, "header length", "the file is shorter than 8 bytes"));
    };
    if length > SAFETENSORS_HEADER_BYTES_MAX {
        return Err(CheckpointError::limit(path, "header length", length, SAFETENSORS_HEADER_BYTES_MAX));
    }
    let data_start = 8 + length as usize;
    let Some(header) = bytes.get(8..data_start) else {
        let reason = format!("{length} bytes, but the file has only {}", bytes.len());
        return Err(CheckpointError::malformed(path, "header length", reason));
    };
    let Header(tensors) = serde_json::from_slice(header).map_err(|e| CheckpointError::malformed(path, "header", e.to_string()))?;
    check_places(path, &tensors, bytes.len() - data_start)?;
    tensors.into_iter().map(|(name, info)| Ok((name.clone(), info.slot(path, &name, index, data_start)?))).collect()
}

#[derive(serde::Deserialize)]
struct Info {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

impl Info {
    fn slot(self, path: &Path, name: &str, file: usize, data_start: usize) -> Result<Slot, CheckpointError> {
        let dtype = match self.dtype.as_str() {
            "F32" => TensorType::F32,
            "F16" => TensorType::F16,
            "BF16" => TensorType::BF16,
            _ => return Err(CheckpointError::TensorType { file: path.into(), tensor: name.into(), found: self.dtype }),
        };
        let (start, end) = self.data_offsets;
        if self.shape.len() > SIDES_MAX || dtype.bytes_for(&self.shape) != Some(end - start) {
            let reason = format!("shape {:?} of {} does not take {} bytes", self.shape, self.dtype, end - start);
            return Err(CheckpointError::malformed(path, format!("tensor {name}"), reason));
        }
        Ok(Slot { file, range: data_start + start..data_start + end, dtype, shape: self.shape, order: Order::Canonical })
    }
}

/// Places must lie in the data one after the other and fill it; that also bounds every number used later.
fn check_places(path: &Path, tensors: &[(String, Info)], data_bytes: usize) -> Result<(), CheckpointError> {
    let mut names = BTreeSet::new();
    let mut by_place: Vec<_> = tensors.iter().map(|(name, info)| (info.data_offsets, name)).collect();
    by_place.sort();
    let mut filled = 0;
    for ((start, end), name) in by_place {
        let broken = |reason: String| Err(CheckpointError::malformed(path, format!("tensor {name}"), reason));
        if !names.insert(name) {
            return broken("is there twice".into());
        }
        if start > end || end > data_bytes {
            return broken(format!("data_offsets {start}..{end} do not lie in {data_bytes} bytes of data"));
        }
        if start != filled {
            return broken(format!("data_offsets start at {start}, expected {filled} (a hole or an overlap)"));
        }
        filled = end;
    }
    if filled != data_bytes {
        let reason = format!("tensors fill {filled} bytes of {data_bytes}");
        return Err(CheckpointError::malformed(path, "data", reason));
    }
    Ok(())
}

/// The entries in their order, repeated names included, `__metadata__` left out.
struct Header(Vec<(String, Info)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    let info = map.next_value::<Info>().map_err(|e| serde::de::Error::custom(format!("tensor {name}: {e}")))?;
                    entries.push((name, info));
                }
                Ok(Header(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}
