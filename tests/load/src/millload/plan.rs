//! The plan: every request of a run, before the run. Line 1 of the file is a [`Header`], each further line a [`Planned`], as JSON. A
//! run only executes it, so the same plan is the same requests on any machine and over any number of generators.
//!
//! Prompts are recipes: runs of tokens that belong to a key ([`Piece`]). Equal leading pieces are equal leading tokens, and only they are.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::rng::{mix, prf};

/// The version of the file's shape; another is refused.
pub const VERSION: u32 = 1;
/// Requests of one plan; a generator refuses to make more, and a reader to read more.
pub const REQUESTS_MAX: usize = 5_000_000;
/// Tokens of one prompt; more is refused.
pub const PROMPT_TOKENS_MAX: u64 = 4_000_000;
/// Other keys that [`Namer`] tries for a piece whose first token a sibling has already.
const RENAMES_MAX: u64 = 64;

/// What answers a session's later turns contain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Answers {
    /// What the server said, token by token.
    #[default]
    Real,
    /// Tokens that the plan names, of the planned length.
    Planned,
}

/// What a user can expect; a limit that is absent always holds. Milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Slo {
    /// To the first token, from the moment the request was due.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttft_ms: Option<f64>,
    /// For each token after the first, on average.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tpot_ms: Option<f64>,
    /// To the end, from the moment the request was due.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub e2e_ms: Option<f64>,
    /// The longest silence between two tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gap_ms: Option<f64>,
}

impl Slo {
    /// Reads `ttft=500ms,tpot=50ms`; units are `us`, `ms` (also when absent) and `s`.
    ///
    /// # Errors
    /// Names the part that is wrong.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut slo = Self::default();
        for part in text.split(',').filter(|part| !part.trim().is_empty()) {
            let (name, value) = part.split_once('=').ok_or_else(|| format!("{part:?}: expected NAME=TIME"))?;
            let place = match name.trim() {
                "ttft" => &mut slo.ttft_ms,
                "tpot" => &mut slo.tpot_ms,
                "e2e" => &mut slo.e2e_ms,
                "gap" => &mut slo.gap_ms,
                other => return Err(format!("{other:?}: expected ttft, tpot, e2e or gap")),
            };
            *place = Some(millis(value.trim())?);
        }
        Ok(slo)
    }
}

/// A time as text, in milliseconds: `500ms`, `2s`, `250us`, `12`.
///
/// # Errors
/// It is no time.
pub fn millis(text: &str) -> Result<f64, String> {
    let units = [("us", 0.001), ("ms", 1.0), ("s", 1000.0), ("", 1.0)];
    let (number, factor) =
        units.iter().find_map(|(unit, factor)| text.strip_suffix(unit).map(|n| (n, factor))).unwrap_or((text, &1.0));
    let value: f64 = number.trim().parse().map_err(|_| format!("{text:?} is not a time"))?;
    if value.is_finite() && value >= 0.0 { Ok(value * factor) } else { Err(format!("{text:?} is not a time")) }
}

/// A kind of request with its own objective.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Class {
    /// Its name.
    pub name: String,
    /// What its users can expect.
    pub slo: Slo,
}

/// What holds for the whole plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// [`VERSION`].
    pub millload_plan: u32,
    /// Where all randomness comes from.
    pub seed: u64,
    /// What it was made from, in words.
    pub workload: String,
    /// How requests arrive, in words.
    pub arrivals: String,
    /// Users of a closed loop: due times mean nothing then. `None` for an open one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub users: Option<u32>,
    /// Tokens of a block, for the figures about reuse.
    pub block_tokens: u32,
    /// Token ids of prompts: from, and up to but without.
    pub vocabulary: (u32, u32),
    /// What answers later turns contain.
    pub answers: Answers,
    /// Kinds of request; [`Planned::class`] counts from 0 in it.
    pub classes: Vec<Class>,
    /// Lines that follow.
    pub requests: usize,
}

/// Who says a piece of a prompt. Only chat requests make a difference of it, and answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// The user, or nobody in particular.
    User,
    /// The operator of the application.
    System,
    /// The model: the answer of an earlier turn of the session, in order.
    Answer,
}

/// A run of tokens that belongs to a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "(u64, u32, char)", try_from = "(u64, u32, char)")]
pub struct Piece {
    /// What the tokens are made from.
    pub key: u64,
    /// How many.
    pub tokens: u32,
    /// Who says them.
    pub role: Role,
}

impl From<Piece> for (u64, u32, char) {
    fn from(piece: Piece) -> Self {
        let role = match piece.role {
            Role::User => 'u',
            Role::System => 's',
            Role::Answer => 'a',
        };
        (piece.key, piece.tokens, role)
    }
}

impl TryFrom<(u64, u32, char)> for Piece {
    type Error = String;

    fn try_from((key, tokens, role): (u64, u32, char)) -> Result<Self, String> {
        let role = match role {
            'u' => Role::User,
            's' => Role::System,
            'a' => Role::Answer,
            other => return Err(format!("{other:?} is no role: u, s or a")),
        };
        Ok(Self { key, tokens, role })
    }
}

/// One request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Planned {
    /// Its number: its place in the plan.
    pub i: u32,
    /// When it is due, nanoseconds from the start. A session's later turn is due `after_ms` after the answer before it instead.
    pub due_ns: u64,
    /// The recipe of its prompt.
    pub prompt: Vec<Piece>,
    /// Tokens of its answer.
    pub out: u32,
    /// Its kind, an index into [`Header::classes`].
    #[serde(default)]
    pub class: u16,
    /// The session that it belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<u32>,
    /// Its place in the session.
    #[serde(default)]
    pub turn: u32,
    /// Thinking time before it, for turns after the first, milliseconds.
    #[serde(default)]
    pub after_ms: u32,
}

impl Planned {
    /// Tokens of its prompt.
    #[must_use]
    pub fn prompt_tokens(&self) -> u64 {
        self.prompt.iter().map(|piece| u64::from(piece.tokens)).sum()
    }
}

/// A plan in memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// What holds for all of it.
    pub header: Header,
    /// Every request, by number.
    pub requests: Vec<Planned>,
    /// The first 16 hex digits of the BLAKE3 digest of the file.
    pub digest: String,
}

impl Plan {
    /// Puts a plan together; `header.requests` is set here.
    ///
    /// # Errors
    /// What [`Plan::check`] finds.
    pub fn new(header: Header, requests: Vec<Planned>) -> Result<Self> {
        let header = Header { requests: requests.len(), ..header };
        let mut plan = Self { header, requests, digest: String::new() };
        plan.check()?;
        let mut hasher = blake3::Hasher::new();
        for line in plan.lines() {
            hasher.update(line?.as_bytes());
        }
        plan.digest = hasher.finalize().to_hex()[..16].to_owned();
        Ok(plan)
    }

    fn check(&self) -> Result<()> {
        let (header, (low, high)) = (&self.header, self.header.vocabulary);
        ensure!(header.millload_plan == VERSION, "plan version {}, this millload knows {VERSION}", header.millload_plan);
        ensure!(header.requests == self.requests.len(), "{} requests announced, {} found", header.requests, self.requests.len());
        ensure!(self.requests.len() <= REQUESTS_MAX, "{} requests, the limit is {REQUESTS_MAX}", self.requests.len());
        ensure!(low < high, "vocabulary {low}..{high} is empty");
        ensure!(header.block_tokens > 0, "blocks of no tokens");
        let mut last = HashMap::new();
        for (at, request) in self.requests.iter().enumerate() {
            ensure!(request.i as usize == at, "request {} stands in place {at}", request.i);
            ensure!(usize::from(request.class) < header.classes.len(), "request {at}: no class {}", request.class);
            let tokens = request.prompt_tokens();
            ensure!(tokens > 0 && tokens <= PROMPT_TOKENS_MAX, "request {at}: a prompt of {tokens} tokens");
            ensure!(request.out > 0, "request {at}: no answer is asked for");
            if let Some(session) = request.session {
                let before = last.insert(session, request.turn);
                let expected = before.map_or(0, |turn| turn + 1);
                ensure!(request.turn == expected, "request {at}: turn {} of session {session}, not {expected}", request.turn);
            }
        }
        Ok(())
    }

    /// The lines of the file, each with its end.
    fn lines(&self) -> impl Iterator<Item = serde_json::Result<String>> {
        let requests = self.requests.iter().map(serde_json::to_string);
        std::iter::once(serde_json::to_string(&self.header)).chain(requests).map(|line| Ok(line? + "\n"))
    }

    /// Writes the file.
    ///
    /// # Errors
    /// What the system says.
    pub fn save(&self, path: &Path) -> Result<()> {
        let mut out = BufWriter::new(File::create(path).with_context(|| path.display().to_string())?);
        for line in self.lines() {
            out.write_all(line?.as_bytes())?;
        }
        out.flush().with_context(|| path.display().to_string())
    }

    /// Reads a file.
    ///
    /// # Errors
    /// Names the line that is wrong.
    pub fn load(path: &Path) -> Result<Self> {
        let file = BufReader::new(File::open(path).with_context(|| path.display().to_string())?);
        let mut lines = file.lines();
        let first = lines.next().with_context(|| format!("{}: empty", path.display()))??;
        let header: Header =
            serde_json::from_str(&first).with_context(|| format!("{}: line 1 is no plan header", path.display()))?;
        let mut requests = Vec::new();
        for (at, line) in lines.enumerate() {
            ensure!(requests.len() < REQUESTS_MAX, "{}: over {REQUESTS_MAX} requests", path.display());
            requests.push(serde_json::from_str(&line?).with_context(|| format!("{}: line {}", path.display(), at + 2))?);
        }
        let announced = header.requests;
        ensure!(announced == requests.len(), "{}: cut off: {} of {announced} requests", path.display(), requests.len());
        Self::new(header, requests).with_context(|| path.display().to_string())
    }

    /// What runs together: sessions with their turns in order, other requests alone; sorted by the time that the first is due.
    #[must_use]
    pub fn units(&self) -> Vec<Vec<u32>> {
        let (mut units, mut at): (Vec<Vec<u32>>, HashMap<u32, usize>) = Default::default();
        for request in &self.requests {
            match request.session.and_then(|session| at.get(&session)) {
                Some(unit) => units[*unit].push(request.i),
                None => {
                    request.session.map(|session| at.insert(session, units.len()));
                    units.push(vec![request.i]);
                }
            }
        }
        units.sort_by_key(|unit| (self.requests[unit[0] as usize].due_ns, unit[0]));
        units
    }

    /// The units of part `index` of `of`: all parts together are [`Plan::units`], each unit once.
    #[must_use]
    pub fn part(&self, index: u32, of: u32) -> Vec<Vec<u32>> {
        let units = self.units().into_iter().enumerate();
        units.filter(|(at, _)| *at as u64 % u64::from(of.max(1)) == u64::from(index)).map(|(_, unit)| unit).collect()
    }

    /// The tokens of a piece. O(tokens).
    pub fn piece_tokens(&self, piece: Piece, out: &mut Vec<u32>) {
        let ((low, high), base) = (self.header.vocabulary, prf(self.header.seed, piece.key, 0));
        let range = u64::from(high - low);
        out.extend((0..u64::from(piece.tokens)).map(|j| low + token_offset(base, j, range)));
    }

    /// The tokens of a prompt. `answers` are those of the session's earlier turns; where they are missing, or the plan names its own,
    /// the planned ones stand in.
    #[must_use]
    pub fn prompt(&self, request: &Planned, answers: &[Vec<u32>]) -> Vec<u32> {
        let mut out = Vec::with_capacity(request.prompt_tokens() as usize);
        let mut answers = answers.iter().filter(|_| self.header.answers == Answers::Real);
        for piece in &request.prompt {
            match (piece.role == Role::Answer).then(|| answers.next()).flatten() {
                Some(real) => out.extend_from_slice(real),
                None => self.piece_tokens(*piece, &mut out),
            }
        }
        out
    }
}

fn token_offset(base: u64, j: u64, range: u64) -> u32 {
    let bits = mix(base.wrapping_add(j.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    ((u128::from(bits) * u128::from(range)) >> 64) as u32
}

/// Gives pieces keys whose first tokens differ from those of every sibling (another piece after the same prefix), so that two prompts
/// have exactly their equal leading pieces in common, to the token. With more siblings than the vocabulary can tell apart, later ones
/// may share a first token by chance; `plan verify` says whether any do.
#[derive(Debug)]
pub struct Namer {
    seed: u64,
    vocabulary: (u32, u32),
    taken: HashMap<u64, HashSet<u32>>,
    keys: HashMap<(u64, u64), u64>,
}

impl Namer {
    /// For one plan.
    #[must_use]
    pub fn new(seed: u64, vocabulary: (u32, u32)) -> Self {
        Self { seed, vocabulary, taken: HashMap::new(), keys: HashMap::new() }
    }

    /// The key of what the workload calls `name`, after the pieces before it. `before` is the key of the piece before, or 0.
    pub fn key(&mut self, before: u64, name: u64) -> u64 {
        if let Some(key) = self.keys.get(&(before, name)) {
            return *key;
        }
        let range = u64::from(self.vocabulary.1 - self.vocabulary.0);
        let taken = self.taken.entry(before).or_default();
        let mut candidates = (0..RENAMES_MAX).map(|attempt| prf(self.seed, prf(name, before, 1), attempt) | 1);
        let first = |key: u64| token_offset(prf(self.seed, key, 0), 0, range);
        let crowded = taken.len() as u64 >= range / 8 * 7; // looking further would cost much and find little
        let free = candidates.clone().find(|key| crowded || !taken.contains(&first(*key))).or_else(|| candidates.next());
        let key = free.unwrap_or(name);
        taken.insert(first(key));
        self.keys.insert((before, name), key);
        key
    }
}

/// Reads `LOW..HIGH`.
///
/// # Errors
/// It is no range of token ids.
pub fn parse_vocabulary(text: &str) -> Result<(u32, u32)> {
    let parts = text.split_once("..").and_then(|(low, high)| Some((low.parse().ok()?, high.parse().ok()?)));
    match parts {
        Some((low, high)) if low < high => Ok((low, high)),
        _ => bail!("{text:?} is no range of token ids; example: 1000..30000"),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn header() -> Header {
        Header {
            millload_plan: VERSION,
            seed: 1,
            workload: "test".into(),
            arrivals: "test".into(),
            users: None,
            block_tokens: 16,
            vocabulary: (1000, 30_000),
            answers: Answers::Real,
            classes: vec![Class { name: "all".into(), slo: Slo::default() }],
            requests: 0,
        }
    }

    pub fn planned(i: u32, due_ns: u64, prompt: &[(u64, u32)], out: u32) -> Planned {
        let prompt = prompt.iter().map(|&(key, tokens)| Piece { key, tokens, role: Role::User }).collect();
        Planned { i, due_ns, prompt, out, class: 0, session: None, turn: 0, after_ms: 0 }
    }

    #[test]
    fn a_plan_survives_its_file_and_a_cut_file_does_not() {
        let plan = Plan::new(header(), vec![planned(0, 5, &[(1, 16), (2, 3)], 4), planned(1, 9, &[(1, 16)], 2)]).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("plan");
        plan.save(&path).unwrap();
        assert_eq!(Plan::load(&path).unwrap(), plan);
        let text = std::fs::read_to_string(&path).unwrap();
        let cut = text.lines().take(2).collect::<Vec<_>>().join("\n");
        std::fs::write(&path, cut).unwrap();
        assert!(format!("{:#}", Plan::load(&path).unwrap_err()).contains("cut off"));
        std::fs::write(&path, text.replace("\"due_ns\":9", "\"due_ns\":10")).unwrap();
        assert_ne!(Plan::load(&path).unwrap().digest, plan.digest);
    }

    #[test]
    fn parts_are_the_plan_and_sessions_stay_whole() {
        let mut requests: Vec<Planned> = (0..20).map(|i| planned(i, u64::from(i), &[(u64::from(i), 4)], 1)).collect();
        for (at, request) in requests.iter_mut().enumerate().filter(|(at, _)| at % 5 == 0) {
            (request.session, request.turn) = (Some(9), at as u32 / 5);
        }
        let plan = Plan::new(header(), requests).unwrap();
        for of in 1..5 {
            let mut parts: Vec<Vec<u32>> = (0..of).flat_map(|index| plan.part(index, of)).collect();
            parts.sort_by_key(|unit| unit[0]);
            assert_eq!(parts, plan.units(), "in {of} parts");
            assert!(parts.contains(&vec![0, 5, 10, 15]));
        }
    }

    #[test]
    fn siblings_begin_differently_and_cousins_may_be_equal() {
        let mut namer = Namer::new(3, (0, 1000));
        let keys: Vec<u64> = (0..600).map(|name| namer.key(0, name)).collect();
        let first = |key: u64| token_offset(prf(3, key, 0), 0, 1000);
        assert_eq!(keys.iter().map(|key| first(*key)).collect::<HashSet<_>>().len(), 600);
        assert_eq!(namer.key(0, 17), keys[17]);
        assert_ne!(namer.key(keys[1], 17), keys[17], "the same name elsewhere is another piece");
    }

    #[test]
    fn real_answers_take_their_place() {
        let mut request = planned(0, 0, &[(1, 2), (2, 3), (3, 1)], 4);
        request.prompt[1].role = Role::Answer;
        let plan = Plan::new(header(), vec![request.clone()]).unwrap();
        let planned = plan.prompt(&request, &[]);
        assert_eq!(planned.len(), 6);
        let real = plan.prompt(&request, &[vec![7, 8]]);
        assert_eq!(real, [&planned[..2], &[7, 8], &planned[5..]].concat());
    }

    #[test]
    fn objectives_are_read() {
        let slo = Slo::parse("ttft=0.5s, tpot=50ms,gap=250").unwrap();
        assert_eq!(slo, Slo { ttft_ms: Some(500.0), tpot_ms: Some(50.0), e2e_ms: None, gap_ms: Some(250.0) });
        for bad in ["ttft", "x=1", "ttft=-1", "ttft=soon"] {
            assert!(Slo::parse(bad).is_err(), "{bad}");
        }
        assert!(parse_vocabulary("5..5").is_err());
    }
}
