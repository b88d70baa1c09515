//! Spoils JSON so that it stays JSON: values of another type, numbers at an edge, long texts, fields that are missing, renamed or from
//! elsewhere, nests. What is behind a JSON parser is not reached by flipped bytes.

use serde_json::{Map, Value, json};

use crate::mutate::{self, Random};

/// Nests of an inserted value at most; JSON readers stop at 128.
const NEST_MAX: usize = 140;
/// Elements of an inserted list at most.
const LIST_MAX: usize = 300;

/// Spoils one document. One in eight is spoiled as bytes as well.
pub fn document(bytes: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    if let Ok(mut value) = serde_json::from_slice::<Value>(bytes) {
        let donor = serde_json::from_slice(other).unwrap_or(Value::Null);
        for _ in 0..=random.below(3) {
            spoil(&mut value, &donor, random);
        }
        *bytes = value.to_string().into_bytes();
    }
    if random.once_in(8) {
        mutate::bytes(bytes, other, random);
    }
}

/// Spoils one line of a file that has a document on each.
pub fn lines(bytes: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    let mut lines: Vec<Vec<u8>> = bytes.split(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect();
    let others: Vec<&[u8]> = other.split(|byte| *byte == b'\n').collect();
    let at = random.below(lines.len());
    match random.below(8) {
        0 => lines.insert(at, others[random.below(others.len())].to_vec()),
        1 => drop(lines.remove(at)),
        _ => document(&mut lines[at], others[random.below(others.len())], random),
    }
    *bytes = lines.join(&b'\n');
}

fn spoil(value: &mut Value, donor: &Value, random: &mut Random) {
    let place = node(value, random);
    match (random.below(6), &mut *place) {
        (0, Value::Object(fields)) => rename(fields, random),
        (0, Value::Array(items)) if !items.is_empty() => {
            let item = random.pick(items).clone();
            items.insert(random.below(items.len()), item);
        }
        (1, Value::Object(fields)) if !fields.is_empty() => {
            let key = fields.keys().nth(random.below(fields.len())).cloned().unwrap_or_default();
            fields.remove(&key);
        }
        (1, Value::Array(items)) if !items.is_empty() => drop(items.remove(random.below(items.len()))),
        (2, _) => *place = other_node(donor, random).clone(),
        (3, Value::Number(_)) => *place = number(random),
        (4, Value::String(text)) => *place = Value::String(self::text(text, random)),
        _ => *place = invented(random),
    }
}

/// Gives a field a name from elsewhere, or adds one.
fn rename(fields: &mut Map<String, Value>, random: &mut Random) {
    let names = ["", "__metadata__", "q", "op", "tokens", "text", "stream", "n", "\u{0}", "ä"];
    let name = (*random.pick(&names)).to_owned();
    let old = fields.keys().nth(random.below(fields.len().max(1))).cloned();
    let value = old.and_then(|old| fields.remove(&old)).unwrap_or_else(|| invented(random));
    fields.insert(name, value);
}

/// Any node below `value`, inner ones as likely as leaves.
fn node<'a>(value: &'a mut Value, random: &mut Random) -> &'a mut Value {
    let inner = match value {
        Value::Object(fields) => fields.len(),
        Value::Array(items) => items.len(),
        _ => 0,
    };
    if inner == 0 || random.once_in(5) {
        return value;
    }
    let at = random.below(inner);
    match value {
        Value::Object(fields) => node(fields.values_mut().nth(at).expect("below their number"), random),
        Value::Array(items) => node(&mut items[at], random),
        _ => value,
    }
}

fn other_node<'a>(value: &'a Value, random: &mut Random) -> &'a Value {
    match value {
        Value::Object(fields) if !fields.is_empty() && !random.once_in(5) => {
            other_node(fields.values().nth(random.below(fields.len())).unwrap_or(value), random)
        }
        Value::Array(items) if !items.is_empty() && !random.once_in(5) => other_node(random.pick(items), random),
        _ => value,
    }
}

fn number(random: &mut Random) -> Value {
    match random.below(4) {
        0 => json!(random.edge()),
        1 => json!((random.edge() as i64).wrapping_neg()),
        2 => json!(random.pick(&[0.5, -0.0, 1e-320, 1e308, -1e308, 2.000_000_1, 1e19])),
        _ => json!(random.below(4)),
    }
}

fn text(old: &str, random: &mut Random) -> String {
    match random.below(7) {
        0 => String::new(),
        1 => old.repeat(1 + random.below(20)),
        2 => old.chars().rev().collect(),
        3 => format!("{old}\u{0}\u{202e}é😀\u{fffd}"),
        4 => "x".repeat(random.below(5000)),
        5 => random.edge().to_string(),
        _ => format!("{}{old}", random.pick(&["-", "+", " ", "../", "%", "{{", "{%", "<|im_end|>", "[\u{7f}", "1e9"])),
    }
}

fn invented(random: &mut Random) -> Value {
    match random.below(9) {
        0 => Value::Null,
        1 => json!(random.once_in(2)),
        2 | 3 => number(random),
        4 | 5 => Value::String(text("a", random)),
        6 => {
            (0..random.below(NEST_MAX)).fold(json!({}), |inner, at| if at % 2 == 0 { json!([inner]) } else { json!({"a": inner}) })
        }
        7 => Value::Array(vec![number(random); random.below(LIST_MAX)]),
        _ => json!([[], {}]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_json_mostly_stays_json_and_mostly_changes() {
        let example = json!({"a": [1, 2.5, "x"], "b": {"c": true, "d": null}, "e": "text"});
        let (mut still, mut changed) = (0, 0);
        for number in 0..1000 {
            let mut bytes = example.to_string().into_bytes();
            document(&mut bytes, br#"{"f": [7]}"#, &mut Random::new(9, number));
            let parsed = serde_json::from_slice::<Value>(&bytes);
            still += u32::from(parsed.is_ok());
            changed += u32::from(parsed.ok() != Some(example.clone()));
        }
        assert!(still > 850 && changed > 850, "{still} are JSON, {changed} changed");
    }

    #[test]
    fn lines_stay_lines() {
        for number in 0..500 {
            let mut bytes = b"{\"a\":1}\n{\"b\":[2]}\n".to_vec();
            lines(&mut bytes, b"", &mut Random::new(2, number));
            lines(&mut Vec::new(), b"x\ny", &mut Random::new(2, number));
        }
    }
}
