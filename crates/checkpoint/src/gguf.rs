//! The GGUF container: metadata keys and tensor places, read without trusting a single number.
//!
//! Decides what is well formed, not what it means: `gguf_model` and `gguf_text` do that. Values are kept as places in the file, so a
//! hostile count costs no memory. Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

use crate::{CheckpointError, TensorType};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;

/// Most metadata keys.
pub const GGUF_KEYS_MAX: u64 = 1 << 16;
/// Most tensors.
pub const GGUF_TENSORS_MAX: u64 = 1 << 16;
/// Longest key or tensor name, in bytes.
pub const GGUF_NAME_BYTES_MAX: u64 = 1 << 12;
/// Coarsest alignment of tensor data, in bytes.
pub const GGUF_ALIGNMENT_MAX: u64 = 1 << 20;
/// Most sides of a tensor.
const SIDES_MAX: u32 = 4;
/// Value type numbers of the format.
const STRING: u32 = 8;
const ARRAY: u32 = 9;

type Result<T> = std::result::Result<T, CheckpointError>;

/// A metadata value. Text and arrays are places in the file.
#[derive(Debug, Clone)]
pub(crate) enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(Range<usize>),
    Array { kind: u32, count: usize, range: Range<usize> },
}

/// One tensor as the file describes it, sides outermost first.
pub(crate) struct Info {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) dtype: TensorType,
    /// Its bytes in the file.
    pub(crate) range: Range<usize>,
}

/// A parsed file.
pub(crate) struct Gguf<'a> {
    pub(crate) file: &'a Path,
    bytes: &'a [u8],
    keys: BTreeMap<String, Value>,
    /// The raw bytes of each value.
    places: BTreeMap<String, Range<usize>>,
    pub(crate) tensors: Vec<Info>,
    /// Where the descriptions of the tensors begin: from here to the end of the file is weights.
    pub(crate) weights_start: usize,
}

impl<'a> Gguf<'a> {
    /// Parses the whole of `bytes` up to the tensor data, and checks that the data lies inside.
    pub(crate) fn parse(file: &'a Path, bytes: &'a [u8]) -> Result<Self> {
        let mut reader = Reader { file, bytes, at: 0 };
        if reader.take("magic", 4)? != b"GGUF" {
            return Err(CheckpointError::malformed(file, "magic", "the file does not begin with GGUF"));
        }
        let version = reader.u32("version")?;
        if !(2..=3).contains(&version) {
            return Err(CheckpointError::unsupported(file, "GGUF version", version));
        }
        // A key takes at least 12 + 1 bytes and a tensor 24: a count the file cannot hold is refused before it is believed.
        let tensor_count = reader.count("tensor count", GGUF_TENSORS_MAX, 24)?;
        let key_count = reader.count("metadata key count", GGUF_KEYS_MAX, 13)?;
        let mut gguf = Self { file, bytes, keys: BTreeMap::new(), places: BTreeMap::new(), tensors: Vec::new(), weights_start: 0 };
        for index in 0..key_count {
            gguf.read_key(&mut reader, index)?;
        }
        gguf.weights_start = reader.at;
        gguf.read_tensors(&mut reader, tensor_count)?;
        Ok(gguf)
    }

    fn read_key(&mut self, reader: &mut Reader<'a>, index: usize) -> Result<()> {
        let key = reader.name(&format!("metadata key {index}"))?;
        let kind = reader.u32(&key)?;
        let start = reader.at;
        let value = reader.value(&key, kind)?;
        self.places.insert(key.clone(), start..reader.at);
        match self.keys.insert(key.clone(), value) {
            Some(_) => Err(CheckpointError::malformed(self.file, key, "is there twice")),
            None => Ok(()),
        }
    }

    fn read_tensors(&mut self, reader: &mut Reader<'a>, count: usize) -> Result<()> {
        let alignment = self.count("general.alignment")?.unwrap_or(32);
        if !alignment.is_power_of_two() || alignment < 8 || alignment as u64 > GGUF_ALIGNMENT_MAX {
            let reason = format!("{alignment} is not a power of two from 8 to {GGUF_ALIGNMENT_MAX}");
            return Err(CheckpointError::malformed(self.file, "general.alignment", reason));
        }
        let described = (0..count).map(|index| reader.tensor(index)).collect::<Result<Vec<_>>>()?;
        let data_start = reader.at.next_multiple_of(alignment);
        let data_bytes = self.bytes.len().saturating_sub(data_start);
        let mut names = BTreeSet::new();
        for (name, shape, dtype, offset) in described {
            let broken = |reason: String| CheckpointError::malformed(self.file, format!("tensor {name}"), reason);
            if !names.insert(name.clone()) {
                return Err(broken("is there twice".into()));
            }
            let Some(size) = dtype.bytes_for(&shape) else {
                return Err(broken(format!("shape {shape:?} of {dtype:?} overflows or has rows of broken blocks")));
            };
            if offset % alignment as u64 != 0 {
                return Err(broken(format!("offset {offset} is not a multiple of {alignment}")));
            }
            let end = usize::try_from(offset).ok().and_then(|start| start.checked_add(size)).filter(|&end| end <= data_bytes);
            let Some(end) = end else {
                return Err(broken(format!("{size} bytes at offset {offset} do not lie in {data_bytes} bytes of data")));
            };
            let range = data_start + end - size..data_start + end;
            self.tensors.push(Info { name, shape, dtype, range });
        }
        self.check_overlap()
    }

    fn check_overlap(&self) -> Result<()> {
        let mut by_place: Vec<&Info> = self.tensors.iter().collect();
        by_place.sort_by_key(|info| (info.range.start, info.range.end));
        for pair in by_place.windows(2) {
            if pair[1].range.start < pair[0].range.end {
                let reason = format!("its bytes overlap those of {}", pair[0].name);
                return Err(CheckpointError::malformed(self.file, format!("tensor {}", pair[1].name), reason));
            }
        }
        Ok(())
    }

    fn wrong_kind<T>(&self, key: &str, expected: &str) -> Result<T> {
        Err(CheckpointError::malformed(self.file, key, format!("is not {expected}")))
    }

    /// A whole number that is not negative.
    pub(crate) fn count(&self, key: &str) -> Result<Option<usize>> {
        let number = match self.keys.get(key) {
            None => return Ok(None),
            Some(Value::Unsigned(x)) => usize::try_from(*x).ok(),
            Some(Value::Signed(x)) => usize::try_from(*x).ok(),
            Some(_) => None,
        };
        number.map_or_else(|| self.wrong_kind(key, "a whole number of at least 0"), |x| Ok(Some(x)))
    }

    /// A token id.
    pub(crate) fn token(&self, key: &str) -> Result<Option<u32>> {
        match self.count(key)? {
            None => Ok(None),
            Some(id) => u32::try_from(id).map_or_else(|_| self.wrong_kind(key, "a token id"), |id| Ok(Some(id))),
        }
    }

    pub(crate) fn float(&self, key: &str) -> Result<Option<f64>> {
        match self.keys.get(key) {
            None => Ok(None),
            Some(Value::Float(x)) => Ok(Some(*x)),
            Some(_) => self.wrong_kind(key, "a floating-point number"),
        }
    }

    pub(crate) fn flag(&self, key: &str) -> Result<Option<bool>> {
        match self.keys.get(key) {
            None => Ok(None),
            Some(Value::Bool(x)) => Ok(Some(*x)),
            Some(_) => self.wrong_kind(key, "a truth value"),
        }
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        match self.keys.get(key) {
            None => Ok(None),
            Some(Value::Text(range)) => Ok(Some(self.str_at(range.clone()))),
            Some(_) => self.wrong_kind(key, "a string"),
        }
    }

    /// An array of strings, in order.
    pub(crate) fn texts(&self, key: &str) -> Result<Option<Vec<&'a str>>> {
        let (count, range) = match self.keys.get(key) {
            None => return Ok(None),
            Some(Value::Array { kind: STRING, count, range }) => (*count, range.clone()),
            Some(_) => return self.wrong_kind(key, "an array of strings"),
        };
        let mut reader = Reader { file: self.file, bytes: self.bytes, at: range.start };
        (0..count).map(|_| reader.string(key).map(|place| self.str_at(place))).collect::<Result<Vec<_>>>().map(Some)
    }

    /// An array of whole numbers, in order.
    pub(crate) fn integers(&self, key: &str) -> Result<Option<Vec<i64>>> {
        let (kind, count, range) = match self.keys.get(key) {
            None => return Ok(None),
            Some(Value::Array { kind, count, range }) if (0..=5).contains(kind) => (*kind, *count, range.clone()),
            Some(_) => return self.wrong_kind(key, "an array of whole numbers"),
        };
        let mut reader = Reader { file: self.file, bytes: self.bytes, at: range.start };
        let number = |value| match value {
            Value::Signed(x) => x,
            Value::Unsigned(x) => x as i64, // at most 32 bits wide here
            _ => 0,
        };
        (0..count).map(|_| reader.value(key, kind).map(number)).collect::<Result<Vec<_>>>().map(Some)
    }

    /// Key and raw value of every key that begins with `prefix`, sorted by key.
    pub(crate) fn raw(&self, prefix: &'a str) -> impl Iterator<Item = (&str, &'a [u8])> {
        let wanted = self.places.iter().filter(move |(key, _)| key.starts_with(prefix));
        wanted.map(|(key, place)| (key.as_str(), &self.bytes[place.clone()]))
    }

    fn str_at(&self, range: Range<usize>) -> &'a str {
        std::str::from_utf8(&self.bytes[range]).expect("every string was checked when it was first read")
    }
}

/// A place in the file that only moves forward, and never past the end.
struct Reader<'a> {
    file: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, field: &str, count: usize) -> Result<&'a [u8]> {
        let taken = self.at.checked_add(count).and_then(|end| self.bytes.get(self.at..end));
        let Some(taken) = taken else {
            let left = self.bytes.len() - self.at;
            let reason = format!("truncated: {count} bytes wanted at {}, {left} left", self.at);
            return Err(CheckpointError::malformed(self.file, field, reason));
        };
        self.at += count;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, field: &str) -> Result<[u8; N]> {
        Ok(self.take(field, N)?.try_into().expect("take gives exactly N bytes"))
    }

    fn u32(&mut self, field: &str) -> Result<u32> {
        self.array(field).map(u32::from_le_bytes)
    }

    fn u64(&mut self, field: &str) -> Result<u64> {
        self.array(field).map(u64::from_le_bytes)
    }

    /// A count of things that take at least `bytes_each` of what is left of the file.
    fn count(&mut self, field: &str, max: u64, bytes_each: u64) -> Result<usize> {
        let count = self.u64(field)?;
        if count > max {
            return Err(CheckpointError::limit(self.file, field, count, max));
        }
        let left = (self.bytes.len() - self.at) as u64;
        if count > left / bytes_each {
            let reason = format!("{count} cannot fit in the {left} bytes that are left");
            return Err(CheckpointError::malformed(self.file, field, reason));
        }
        Ok(count as usize)
    }

    fn string(&mut self, field: &str) -> Result<Range<usize>> {
        let length = self.count(field, u64::MAX, 1)?;
        let start = self.at;
        match std::str::from_utf8(self.take(field, length)?) {
            Ok(_) => Ok(start..self.at),
            Err(_) => Err(CheckpointError::malformed(self.file, field, "is not UTF-8")),
        }
    }

    fn name(&mut self, field: &str) -> Result<String> {
        let range = self.string(field)?;
        if range.len() as u64 > GGUF_NAME_BYTES_MAX {
            let field = format!("{field}: length of its name");
            return Err(CheckpointError::limit(self.file, field, range.len() as u64, GGUF_NAME_BYTES_MAX));
        }
        Ok(String::from_utf8_lossy(&self.bytes[range]).into_owned())
    }

    fn value(&mut self, field: &str, kind: u32) -> Result<Value> {
        Ok(match kind {
            0 => Value::Unsigned(u8::from_le_bytes(self.array(field)?).into()),
            1 => Value::Signed(i8::from_le_bytes(self.array(field)?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array(field)?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array(field)?).into()),
            4 => Value::Unsigned(self.u32(field)?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.array(field)?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array(field)?).into()),
            7 => match self.take(field, 1)?[0] {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                _ => return Err(CheckpointError::malformed(self.file, field, "is not a truth value")),
            },
            STRING => Value::Text(self.string(field)?),
            ARRAY => return self.array_value(field),
            10 => Value::Unsigned(self.u64(field)?),
            11 => Value::Signed(i64::from_le_bytes(self.array(field)?)),
            12 => Value::Float(f64::from_le_bytes(self.array(field)?)),
            _ => return Err(CheckpointError::malformed(self.file, field, format!("has the unknown value type {kind}"))),
        })
    }

    /// Steps over an array, checking that all of it is there. Arrays of arrays are refused: no key in use has one.
    fn array_value(&mut self, field: &str) -> Result<Value> {
        let kind = self.u32(field)?;
        let bytes_each = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            STRING | 10..=12 => 8,
            ARRAY => return Err(CheckpointError::unsupported(self.file, field, "an array of arrays")),
            _ => return Err(CheckpointError::malformed(self.file, field, format!("has the unknown element type {kind}"))),
        };
        let count = self.count(field, u64::MAX, bytes_each)?;
        let start = self.at;
        if kind == STRING {
            for _ in 0..count {
                self.string(field)?;
            }
        } else {
            self.take(field, count * bytes_each as usize)?;
        }
        Ok(Value::Array { kind, count, range: start..self.at })
    }

    /// Name, sides outermost first, type and offset of one tensor.
    fn tensor(&mut self, index: usize) -> Result<(String, Vec<usize>, TensorType, u64)> {
        let name = self.name(&format!("tensor {index}"))?;
        let field = format!("tensor {name}");
        let sides = self.u32(&field)?;
        if sides > SIDES_MAX {
            return Err(CheckpointError::limit(self.file, format!("{field}: sides"), sides.into(), SIDES_MAX.into()));
        }
        let mut shape = Vec::new();
        for _ in 0..sides {
            let side = self.u64(&field)?;
            shape.push(usize::try_from(side).map_err(|_| CheckpointError::malformed(self.file, &field, "absurd side"))?);
        }
        shape.reverse(); // ggml writes the contiguous side first
        let kind = self.u32(&field)?;
        let Some(dtype) = tensor_type(kind) else {
            return Err(CheckpointError::TensorType { file: self.file.into(), tensor: name, found: type_name(kind) });
        };
        Ok((name, shape, dtype, self.u64(&field)?))
    }
}

fn tensor_type(kind: u32) -> Option<TensorType> {
    Some(match kind {
        0 => TensorType::F32,
        1 => TensorType::F16,
        2 => TensorType::Q4_0,
        3 => TensorType::Q4_1,
        8 => TensorType::Q8_0,
        30 => TensorType::BF16,
        _ => return None,
    })
}

/// What users call the ggml types that are not read.
fn type_name(kind: u32) -> String {
    let known = [(6, "Q5_0"), (7, "Q5_1"), (10, "Q2_K"), (11, "Q3_K"), (12, "Q4_K"), (13, "Q5_K"), (14, "Q6_K"), (15, "Q8_K")];
    known.iter().find(|(k, _)| *k == kind).map_or_else(|| format!("number {kind}"), |(_, name)| (*name).to_owned())
}
