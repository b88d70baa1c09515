//! Makes plans: random prompts, shared prefixes, chat sessions, agent sessions. Traces are read in [`super::trace`].
//!
//! Every quantity of request or session n is drawn from its own address (see [`super::rng`]), so plans that differ in one setting differ in
//! that only.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::{Args, Subcommand, ValueEnum};

use super::arrivals::{Arrivals, read_windows, spread};
use super::lengths::{Lengths, Row, read_csv};
use super::plan::{Answers, Class, Header, Namer, Piece, Plan, Planned, REQUESTS_MAX, Role, Slo, VERSION, parse_vocabulary};
use super::rng::{Draws, Stream, Zipf};
use super::trace::{self, TraceArgs};

/// What holds for every workload.
#[derive(Args, Clone, Debug)]
pub struct Common {
    /// Where all randomness comes from
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Requests; a trace takes its first so many rows, all when absent
    #[arg(long)]
    pub requests: Option<usize>,
    /// How requests (or first turns of sessions) arrive; `trace` takes the trace's own times, or those of --shape
    #[arg(long, value_enum)]
    pub arrivals: Option<ArrivalKind>,
    /// Requests (or sessions) a second
    #[arg(long, default_value_t = 1.0)]
    pub rate: f64,
    /// Standard deviation of gaps over their mean, for `gamma`
    #[arg(long, default_value_t = 2.0)]
    pub cv: f64,
    /// Users of a closed loop
    #[arg(long, default_value_t = 4)]
    pub users: u32,
    /// Recorded times (Azure or BurstGPT CSV) or windows (ServeGen CSV)
    #[arg(long, value_name = "FILE")]
    pub shape: Option<PathBuf>,
    /// How many times faster than recorded
    #[arg(long, default_value_t = 1.0)]
    pub speed: f64,
    /// Spread requests that were recorded at the same time evenly until the next recorded time
    #[arg(long)]
    pub spread: bool,
    /// Token ids of prompts
    #[arg(long, default_value = "1000..30000")]
    pub vocabulary: String,
    /// Tokens of a block, as the server has it; a trace sends so many for each of its ids
    #[arg(long, default_value_t = 16)]
    pub block_tokens: u32,
    /// What answers later turns contain
    #[arg(long, value_enum, default_value = "real")]
    pub answers: Answers,
    /// A kind of request: NAME:SHARE:ttft=500ms,tpot=50ms; may be repeated. Traces with `cls` take the objective by name
    #[arg(long = "class", value_parser = parse_class, value_name = "NAME:SHARE:SLO")]
    pub classes: Vec<ClassShare>,
    /// Prompts are cut to so many tokens; sessions end before they would be longer
    #[arg(long, default_value_t = 1_000_000)]
    pub prompt_max: u32,
    /// Answers are cut to so many tokens
    #[arg(long, default_value_t = 100_000)]
    pub output_max: u32,
}

/// How requests arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ArrivalKind {
    /// At equal distances
    Constant,
    /// Independently of each other
    Poisson,
    /// In bursts, see --cv
    Gamma,
    /// As recorded
    Trace,
    /// As a ServeGen client's windows say, see --shape
    Windows,
    /// Each user sends when its answer is there: not a latency test
    Closed,
}

/// A class, and how many of the requests are of it.
#[derive(Clone, Debug, PartialEq)]
pub struct ClassShare {
    /// The class.
    pub class: Class,
    /// Its weight.
    pub share: f64,
}

fn parse_class(text: &str) -> Result<ClassShare, String> {
    let mut parts = text.splitn(3, ':');
    let (name, share, slo) = (parts.next().unwrap_or_default(), parts.next().unwrap_or("1"), parts.next().unwrap_or(""));
    let share = share.parse().ok().filter(|share: &f64| share.is_finite() && *share >= 0.0);
    let share = share.ok_or_else(|| format!("{text:?}: expected NAME:SHARE:SLO, as chat:0.7:ttft=500ms,tpot=50ms"))?;
    Ok(ClassShare { class: Class { name: name.to_owned(), slo: Slo::parse(slo)? }, share })
}

/// What is asked.
#[derive(Subcommand, Clone, Debug)]
pub enum Workload {
    /// Prompts that share nothing
    Random {
        /// Tokens of a prompt: N, N..M or ~MEDIAN:SIGMA
        #[arg(long, default_value = "512")]
        prompt: Lengths,
        /// Tokens of an answer
        #[arg(long, default_value = "64")]
        output: Lengths,
        /// Take both from the rows of an Azure, BurstGPT or Vidur CSV instead
        #[arg(long, value_name = "FILE")]
        lengths: Option<PathBuf>,
        /// What holds for every workload
        #[command(flatten)]
        common: Common,
    },
    /// Groups of requests with a common prefix; the first groups are asked most
    Prefix {
        /// Groups
        #[arg(long, default_value_t = 16)]
        groups: u32,
        /// Group n is asked in proportion to n^-ZIPF
        #[arg(long, default_value_t = 1.0)]
        zipf: f64,
        /// Tokens that a group shares
        #[arg(long, default_value = "512")]
        prefix: Lengths,
        /// Tokens of a request's own
        #[arg(long, default_value = "64")]
        prompt: Lengths,
        /// Tokens of an answer
        #[arg(long, default_value = "64")]
        output: Lengths,
        /// What holds for every workload
        #[command(flatten)]
        common: Common,
    },
    /// Chats of several turns behind one system prompt; every turn carries all before it
    Sessions(SessionArgs),
    /// Agents: a few long system prompts, many short turns, a tool's delay between them
    Agents(SessionArgs),
    /// A trace of prompts as ids of blocks (Mooncake's form)
    Trace(TraceArgs),
}

/// What sessions look like. What is absent has a value that fits the kind.
#[derive(Args, Clone, Debug)]
pub struct SessionArgs {
    /// Different system prompts
    #[arg(long)]
    pub systems: Option<u32>,
    /// Tokens of a system prompt
    #[arg(long)]
    pub system: Option<Lengths>,
    /// Turns of a session
    #[arg(long)]
    pub turns: Option<Lengths>,
    /// New tokens of each turn
    #[arg(long)]
    pub prompt: Option<Lengths>,
    /// Tokens of an answer
    #[arg(long)]
    pub output: Option<Lengths>,
    /// Milliseconds between an answer and the next turn
    #[arg(long)]
    pub think_ms: Option<Lengths>,
    /// What holds for every workload
    #[command(flatten)]
    pub common: Common,
}

impl Workload {
    /// Makes the plan.
    ///
    /// # Errors
    /// A setting that makes no sense, or a file that cannot be read.
    pub fn plan(&self) -> Result<Plan> {
        match self {
            Self::Random { prompt, output, lengths, common } => {
                let rows = lengths.as_deref().map(read_csv).transpose()?;
                let what = match lengths {
                    Some(path) => format!("random, lengths of {}", file_name(path)),
                    None => format!("random, prompt {prompt:?}, output {output:?}"),
                };
                Maker::new(common, what)?.random(prompt, output, rows.as_deref())
            }
            Self::Prefix { groups, zipf, prefix, prompt, output, common } => {
                let what = format!("prefix, {groups} groups, Zipf {zipf}, prefix {prefix:?}, own {prompt:?}, output {output:?}");
                Maker::new(common, what)?.prefix((*groups, *zipf), [prefix, prompt, output])
            }
            Self::Sessions(args) => args.plan("sessions", [1, 256, 4, 64, 64, 2000]),
            Self::Agents(args) => args.plan("agents", [4, 1024, 12, 96, 48, 300]),
            Self::Trace(args) => trace::plan(args),
        }
    }
}

/// The last part of a path.
pub(super) fn file_name(path: &std::path::Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
}

/// A plan in the making.
pub(super) struct Maker<'a> {
    pub(super) common: &'a Common,
    pub(super) header: Header,
    pub(super) namer: Namer,
}

impl<'a> Maker<'a> {
    /// With everything that does not depend on the workload.
    pub(super) fn new(common: &'a Common, workload: String) -> Result<Self> {
        let vocabulary = parse_vocabulary(&common.vocabulary)?;
        ensure!(common.requests.is_none_or(|n| n > 0 && n <= REQUESTS_MAX), "--requests: 1 to {REQUESTS_MAX}");
        let mut classes: Vec<Class> = common.classes.iter().map(|share| share.class.clone()).collect();
        if classes.is_empty() {
            classes.push(Class { name: "all".into(), slo: Slo::default() });
        }
        let header = Header {
            millload_plan: VERSION,
            seed: common.seed,
            workload,
            arrivals: String::new(),
            users: None,
            block_tokens: common.block_tokens,
            vocabulary,
            answers: common.answers,
            classes,
            requests: 0,
        };
        Ok(Self { common, header, namer: Namer::new(common.seed, vocabulary) })
    }

    /// How requests arrive; `recorded` are the trace's own times.
    pub(super) fn arrivals(&self, recorded: Option<Vec<u64>>) -> Result<Arrivals> {
        let common = self.common;
        let (rate, speed) = (common.rate, common.speed);
        let kind = common.arrivals.unwrap_or(if recorded.is_some() { ArrivalKind::Trace } else { ArrivalKind::Poisson });
        Ok(match kind {
            ArrivalKind::Constant => Arrivals::Constant { rate },
            ArrivalKind::Poisson => Arrivals::Poisson { rate },
            ArrivalKind::Gamma => Arrivals::Gamma { rate, cv: common.cv },
            ArrivalKind::Closed => Arrivals::Closed { users: common.users.max(1) },
            ArrivalKind::Windows => {
                let path = common.shape.as_deref().context("--arrivals windows needs --shape FILE")?;
                Arrivals::Windows { windows: read_windows(path)?, speed }
            }
            ArrivalKind::Trace => {
                let mut at_ns = match (&common.shape, recorded) {
                    (Some(path), _) => {
                        read_csv(path)?.iter().map(|row| row.at_ns.context("--shape has no times")).collect::<Result<_>>()?
                    }
                    (None, Some(recorded)) => recorded,
                    (None, None) => anyhow::bail!("--arrivals trace needs a trace, or --shape FILE"),
                };
                if common.spread {
                    spread(&mut at_ns);
                }
                Arrivals::Times { at_ns, speed }
            }
        })
    }

    /// Sets due times, puts requests in their order and numbers them. `firsts` says how many arrivals there are; each request's `due_ns` is
    /// the offset from its arrival, whose number is beside it.
    pub(super) fn finish(mut self, arrivals: &Arrivals, firsts: usize, mut requests: Vec<(usize, Planned)>) -> Result<Plan> {
        let due = arrivals.due_ns(self.common.seed, firsts)?;
        requests.iter_mut().for_each(|(first, request)| request.due_ns = request.due_ns.saturating_add(due[*first]));
        requests.sort_by_key(|(_, request)| request.due_ns);
        let mut requests: Vec<Planned> = requests.into_iter().map(|(_, request)| request).collect();
        requests.iter_mut().zip(0..).for_each(|(request, i)| request.i = i);
        self.header.arrivals = arrivals.describe();
        self.header.users = if let Arrivals::Closed { users } = arrivals { Some(*users) } else { None };
        Plan::new(self.header, requests)
    }

    fn class(&self, index: u64) -> u16 {
        let shares = &self.common.classes;
        let total: f64 = shares.iter().map(|share| share.share).sum();
        let mut left = Draws::new(self.common.seed, Stream::Groups, index ^ (1 << 40)).unit() * total;
        let found = shares.iter().position(|share| {
            left -= share.share;
            left < 0.0
        });
        found.unwrap_or(0) as u16
    }

    pub(super) fn piece(&mut self, before: u64, name: u64, tokens: u32, role: Role) -> Piece {
        Piece { key: self.namer.key(before, name), tokens, role }
    }

    fn count(&self, default: usize) -> usize {
        self.common.requests.unwrap_or(default)
    }

    fn single(&self, index: usize, prompt: Vec<Piece>, out: u32) -> (usize, Planned) {
        let class = self.class(index as u64);
        let out = out.min(self.common.output_max).max(1);
        (index, Planned { i: 0, due_ns: 0, prompt, out, class, session: None, turn: 0, after_ms: 0 })
    }

    fn random(mut self, prompt: &Lengths, output: &Lengths, rows: Option<&[Row]>) -> Result<Plan> {
        let count = self.count(rows.map_or(100, <[Row]>::len));
        let mut requests = Vec::with_capacity(count);
        for index in 0..count {
            let (tokens, out) = match rows.map(|rows| rows[index % rows.len()]) {
                Some(row) => (row.prompt, row.answer),
                None => (self.draw(prompt, Stream::Prompts, index), self.draw(output, Stream::Answers, index)),
            };
            let piece = self.piece(0, index as u64, tokens.min(self.common.prompt_max), Role::User);
            requests.push(self.single(index, vec![piece], out));
        }
        let arrivals = self.arrivals(None)?;
        self.finish(&arrivals, count, requests)
    }

    fn draw(&self, lengths: &Lengths, stream: Stream, index: usize) -> u32 {
        lengths.draw(&mut Draws::new(self.common.seed, stream, index as u64))
    }

    fn prefix(mut self, (groups, exponent): (u32, f64), [prefix, own, output]: [&Lengths; 3]) -> Result<Plan> {
        let (count, zipf) = (self.count(100), Zipf::new(groups, exponent));
        let mut requests = Vec::with_capacity(count);
        for index in 0..count {
            let group = zipf.draw(&mut Draws::new(self.common.seed, Stream::Groups, index as u64));
            // The length belongs to the group; its address lies beyond those of requests.
            let shared = self.draw(prefix, Stream::Prompts, (1 << 40) + group as usize);
            let tokens = self.draw(own, Stream::Prompts, index);
            let first = self.piece(0, u64::from(group), shared, Role::System);
            let second = self.piece(first.key, index as u64, tokens, Role::User);
            let out = self.draw(output, Stream::Answers, index);
            requests.push(self.single(index, vec![first, second], out));
        }
        let arrivals = self.arrivals(None)?;
        self.finish(&arrivals, count, requests)
    }
}

impl SessionArgs {
    fn plan(&self, kind: &str, defaults: [u32; 6]) -> Result<Plan> {
        let [systems, system, turns, prompt, output, think_ms] = defaults;
        let or = |given: &Option<Lengths>, default: u32| {
            given.clone().unwrap_or(Lengths::Range(default.div_ceil(2), default + default / 2))
        };
        let shape = Shape {
            systems: self.systems.unwrap_or(systems).max(1),
            system: self.system.clone().unwrap_or(Lengths::Range(system, system)),
            turns: or(&self.turns, turns),
            prompt: or(&self.prompt, prompt),
            output: or(&self.output, output),
            think_ms: or(&self.think_ms, think_ms),
        };
        Maker::new(&self.common, format!("{kind}, {shape:?}"))?.sessions(&shape)
    }
}

#[derive(Debug)]
struct Shape {
    systems: u32,
    system: Lengths,
    turns: Lengths,
    prompt: Lengths,
    output: Lengths,
    think_ms: Lengths,
}

impl Maker<'_> {
    fn sessions(mut self, shape: &Shape) -> Result<Plan> {
        let count = self.count(100);
        let (mut requests, mut session) = (Vec::with_capacity(count), 0usize);
        while requests.len() < count {
            let turns = self.session(shape, session);
            ensure!(!turns.is_empty(), "--prompt-max {} leaves no room for a first turn", self.common.prompt_max);
            let room = count - requests.len();
            requests.extend(turns.into_iter().take(room).map(|turn| (session, turn)));
            session += 1;
        }
        let arrivals = self.arrivals(None)?;
        self.finish(&arrivals, session, requests)
    }

    /// All turns of one session; `due_ns` counts from its first.
    fn session(&mut self, shape: &Shape, session: usize) -> Vec<Planned> {
        let mut draws = Draws::new(self.common.seed, Stream::Sessions, session as u64);
        let system = draws.below(u64::from(shape.systems)) as usize;
        let system_tokens = self.draw(&shape.system, Stream::Prompts, (1 << 40) + system);
        let mut prompt = vec![self.piece(0, system as u64, system_tokens, Role::System)];
        let (mut turns, mut due_ns) = (Vec::new(), 0);
        for turn in 0..shape.turns.draw(&mut draws) {
            let (own, out) = (shape.prompt.draw(&mut draws), shape.output.draw(&mut draws).min(self.common.output_max));
            let after_ms = if turn == 0 { 0 } else { shape.think_ms.draw(&mut draws) };
            due_ns += u64::from(after_ms) * 1_000_000;
            let name = (session as u64) << 24 | u64::from(turn) << 1;
            let before = prompt.last().map_or(0, |piece| piece.key);
            prompt.push(self.piece(before, name, own, Role::User));
            if prompt.iter().map(|piece| u64::from(piece.tokens)).sum::<u64>() > u64::from(self.common.prompt_max) {
                break;
            }
            let (class, session) = (self.class(session as u64), Some(session as u32));
            turns.push(Planned { i: 0, due_ns, prompt: prompt.clone(), out, class, session, turn, after_ms });
            let before = prompt.last().map_or(0, |piece| piece.key);
            prompt.push(self.piece(before, name | 1, out, Role::Answer));
        }
        turns
    }
}

#[cfg(test)]
mod tests {
    use super::super::verify::verify;
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(subcommand)]
        workload: Workload,
    }

    pub fn made(line: &str) -> Plan {
        Line::try_parse_from(format!("plan {line}").split_whitespace()).unwrap().workload.plan().unwrap()
    }

    #[test]
    fn every_workload_shares_exactly_what_it_says() {
        for line in [
            "random --requests 300 --prompt 16..64",
            "prefix --requests 300 --groups 7 --prefix 40",
            "sessions --requests 120 --rate 3",
            "agents --requests 120 --system 64 --turns 5 --prompt-max 400",
        ] {
            let plan = made(line);
            let found = verify(&plan).unwrap();
            assert_eq!((found.wrong, found.requests), (0, plan.requests.len()), "{line}");
            assert_eq!(made(line), plan, "{line}: the same again");
            assert_ne!(made(&format!("{line} --seed 2")).digest, plan.digest);
        }
    }

    #[test]
    fn turns_carry_all_before_them() {
        let plan = made("sessions --requests 50 --rate 100 --think-ms 10 --system 32 --systems 2");
        let units = plan.units();
        assert!(units.iter().any(|unit| unit.len() > 1));
        for unit in units {
            for pair in unit.windows(2) {
                let (before, after) = (&plan.requests[pair[0] as usize], &plan.requests[pair[1] as usize]);
                assert_eq!(after.prompt[..before.prompt.len()], before.prompt, "the prompt before");
                let answer = after.prompt[before.prompt.len()];
                assert_eq!((answer.role, answer.tokens), (Role::Answer, before.out), "its answer");
                assert_eq!((after.turn, after.after_ms), (before.turn + 1, 10));
            }
        }
    }

    #[test]
    fn classes_have_their_shares_and_closed_loops_their_users() {
        let plan = made("random --requests 2000 --class fast:3:ttft=100ms --class slow:1:ttft=2s --arrivals closed --users 5");
        let fast = plan.requests.iter().filter(|request| request.class == 0).count();
        assert!((1400..1600).contains(&fast), "{fast} of 2000");
        assert_eq!((plan.header.users, plan.header.classes[1].slo.ttft_ms), (Some(5), Some(2000.0)));
    }

    #[test]
    fn hot_groups_are_asked_most() {
        let plan = made("prefix --requests 1000 --groups 5 --zipf 1.2");
        let mut counts = std::collections::HashMap::new();
        plan.requests.iter().for_each(|request| *counts.entry(request.prompt[0].key).or_insert(0) += 1);
        let (least, most) = (counts.values().min().unwrap(), counts.values().max().unwrap());
        assert!(counts.len() == 5 && most > &(3 * least), "{counts:?}");
    }
}
