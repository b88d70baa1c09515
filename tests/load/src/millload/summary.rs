//! All figures of a run, as they are written to `result.json`. Everything counts from the due time unless its name says `sent`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::cache::reuse;
use super::figures::{Dist, wilson};
use super::plan::{Class, Plan, Slo};
use super::record::{Outcome, Record, ServerTimes};

/// The version of `result.json`; another is refused.
pub const VERSION: u32 = 1;
/// A run is invalid when its send lag at the 99th percentile (or its greatest, of few requests) is over this and over
/// [`LAG_SHARE_MAX`] of the median time to the first token.
pub const LAG_MS_MAX: f64 = 1.0;
/// See [`LAG_MS_MAX`].
pub const LAG_SHARE_MAX: f64 = 0.01;

/// What a run was.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct About {
    /// The plan's digest: results of the same plan can be paired.
    pub plan: String,
    /// The plan's workload.
    pub workload: String,
    /// The plan's arrivals.
    pub arrivals: String,
    /// Users of a closed loop.
    pub users: Option<u32>,
    /// What the user calls it.
    pub label: String,
    /// Where requests went.
    pub url: String,
    /// The model's name.
    pub model: String,
    /// Due times were divided by this.
    pub speed: f64,
    /// Which part of the plan, of how many.
    pub part: (u32, u32),
    /// Requests of that part.
    pub planned: u64,
    /// When it began, seconds since 1970.
    pub unix_s: u64,
    /// Requests due earlier do not count, seconds from the start.
    pub warm_up_s: f64,
    /// Blocks of the cluster's caches together, if known.
    pub cache_blocks: Option<usize>,
    /// Tokens of one of the server's blocks.
    pub block_tokens: u32,
    /// It was stopped before its end.
    pub partial: bool,
    /// The objective of classes that the plan gives none.
    pub slo: Slo,
    /// The classes with their objectives.
    pub classes: Vec<Class>,
}

/// Whether the figures may be believed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "verdict", content = "why")]
pub enum Validity {
    /// They may.
    Valid,
    /// The generator was late by itself.
    Invalid(String),
    /// A closed loop waits with the server: its latencies are not what users of an open service see.
    Closed,
}

/// Requests that met their objective.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Goodput {
    /// The class.
    pub class: String,
    /// Its objective.
    pub slo: Slo,
    /// Requests that count, failures and dropped ones among them.
    pub n: u64,
    /// Of these, good ones.
    pub good: u64,
    /// Their share.
    pub share: f64,
    /// The share's 95 % interval.
    pub interval: (f64, f64),
    /// Good ones a second.
    pub per_s: f64,
}

/// Reuse of prompts, shares of prompt tokens over the requests whose answer says how many were cached.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Reused {
    /// Requests.
    pub n: u64,
    /// What the server reports.
    pub measured: f64,
    /// One cache that never forgets.
    pub infinite: f64,
    /// One LRU cache of [`About::cache_blocks`].
    pub lru: Option<f64>,
    /// Blocks of the plan.
    pub distinct_blocks: usize,
    /// The mean of each request's own share, which other tools call the hit rate.
    pub mean_of_requests: f64,
}

/// Where the time to the first token went, means in milliseconds. Each part was measured by one clock, but for `links` and `front`, which are
/// what one process measured around what another did; together they are the time to the first token since it was due.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Phases {
    /// Requests.
    pub n: u64,
    /// Due, not sent.
    pub lag: f64,
    /// Connecting.
    pub connect: f64,
    /// In the front before the gateway, and between the two.
    pub front: f64,
    /// In the gateway: reading, checking and tokenizing, placing, and writing the first token.
    pub gateway: f64,
    /// Between gateway and node, there and back.
    pub links: f64,
    /// Waiting at the prefill node.
    pub queue: f64,
    /// Computing the prompt.
    pub compute: f64,
    /// What nobody measured: kernel and way between the generator and the server, there and back.
    pub outside: f64,
    /// `outside` over the time to the first token since sending.
    pub unexplained: f64,
}

impl Phases {
    /// The parts in the order in which a request meets them; `outside` lies at both ends.
    #[must_use]
    pub fn parts(&self) -> [(&'static str, f64); 8] {
        [
            ("late here", self.lag),
            ("connect", self.connect),
            ("front", self.front),
            ("gateway", self.gateway),
            ("links", self.links),
            ("queue", self.queue),
            ("compute", self.compute),
            ("outside", self.outside),
        ]
    }
}

/// All of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// [`VERSION`].
    pub millload_result: u32,
    /// What was run.
    pub about: About,
    /// Whether to believe it.
    pub validity: Validity,
    /// Requests taken up; those of the warm-up and unfinished ones among them.
    pub sent: u64,
    /// Requests that count.
    pub counted: u64,
    /// Of these, whole answers.
    pub ok: u64,
    /// What became of the others, by kind; unfinished ones are here and do not count.
    pub errors: BTreeMap<String, u64>,
    /// From the first due time that counts to the last end, seconds.
    pub seconds: f64,
    /// Requests a second that ended whole.
    pub requests_per_s: f64,
    /// Tokens of whole answers a second.
    pub output_tokens_per_s: f64,
    /// Tokens of their prompts a second.
    pub prompt_tokens_per_s: f64,
    /// Times in milliseconds, by name.
    pub times: BTreeMap<String, Dist>,
    /// By class.
    pub goodput: Vec<Goodput>,
    /// Absent when the server does not say.
    pub reuse: Option<Reused>,
    /// Absent when the server does not say: of all requests, and of the tenth with the slowest first token.
    pub phases: Option<(Phases, Phases)>,
    /// What was done to the cluster.
    #[serde(default)]
    pub faults: Vec<super::faults::Done>,
    /// Answers against those of another run.
    #[serde(default)]
    pub golden: Option<super::golden::Compared>,
}

/// Whether a request met its objective.
#[must_use]
pub fn good(record: &Record, slo: &Slo) -> bool {
    let within = |value: Option<f64>, limit: Option<f64>| limit.is_none_or(|limit| value.is_none_or(|value| value <= limit));
    record.ok()
        && within(record.ttft_ms(), slo.ttft_ms)
        && within(record.tpot_ms(), slo.tpot_ms)
        && within(Some(record.e2e_ms()), slo.e2e_ms)
        && within(Some(f64::from(record.gap_max_us) / 1e3), slo.gap_ms)
}

impl About {
    /// Whether a request counts.
    #[must_use]
    pub fn counts(&self, record: &Record) -> bool {
        record.outcome != Outcome::Unfinished && record.due_ns as f64 / 1e9 >= self.warm_up_s
    }

    /// The objective of a class: its own, or the run's.
    #[must_use]
    pub fn slo(&self, class: u16) -> Slo {
        let own = self.classes.get(usize::from(class)).map_or(Slo::default(), |class| class.slo);
        if own == Slo::default() { self.slo } else { own }
    }
}

/// Figures of `records`. `plan` must be the one that was run.
#[must_use]
pub fn summarise(about: About, plan: &Plan, records: &[Record]) -> Summary {
    let counted: Vec<&Record> = records.iter().filter(|record| about.counts(record)).collect();
    let whole: Vec<&Record> = counted.iter().copied().filter(|record| record.ok()).collect();
    let first_ns = counted.iter().map(|record| record.due_ns).min().unwrap_or(0);
    let last_ns = counted.iter().map(|record| record.end_ns).max().unwrap_or(0);
    let seconds = (last_ns.saturating_sub(first_ns)) as f64 / 1e9;
    let per_s = |n: u64| if seconds > 0.0 { n as f64 / seconds } else { 0.0 };
    let mut errors = BTreeMap::new();
    records.iter().filter(|r| !r.ok()).for_each(|record| *errors.entry(record.outcome.word()).or_insert(0) += 1);
    let times = times(&counted, &whole);
    Summary {
        millload_result: VERSION,
        validity: validity(&about, &times),
        sent: records.len() as u64,
        counted: counted.len() as u64,
        ok: whole.len() as u64,
        errors,
        seconds,
        requests_per_s: per_s(whole.len() as u64),
        output_tokens_per_s: per_s(whole.iter().map(|r| u64::from(r.output_tokens)).sum()),
        prompt_tokens_per_s: per_s(whole.iter().map(|r| u64::from(r.prompt_tokens)).sum()),
        goodput: goodput(&about, &counted, per_s),
        reuse: reused(&about, plan, &whole),
        phases: phases(&whole),
        times,
        about,
        faults: Vec::new(),
        golden: None,
    }
}

fn times(counted: &[&Record], whole: &[&Record]) -> BTreeMap<String, Dist> {
    let gaps = || whole.iter().flat_map(|r| r.gaps_us.iter().map(|gap| f64::from(*gap) / 1e3));
    let of = |each: fn(&Record) -> Option<f64>| Dist::of(whole.iter().filter_map(|record| each(record)));
    let all = [
        ("ttft", of(Record::ttft_ms)),
        ("ttft_sent", of(Record::ttft_sent_ms)),
        ("tpot", of(Record::tpot_ms)),
        ("itl", Dist::of(gaps())),
        ("gap_max", of(|r| (r.chunks > 1).then(|| f64::from(r.gap_max_us) / 1e3))),
        ("e2e", of(|r| Some(r.e2e_ms()))),
        ("e2e_sent", of(|r| Some(r.e2e_sent_ms()))),
        ("server_queue", of(|r| Some(r.server.as_ref()?.queue_us as f64 / 1e3))),
        ("lag", Dist::of(counted.iter().map(|r| r.lag_ms()))),
    ];
    all.into_iter().filter_map(|(name, dist)| Some((name.to_owned(), dist?))).collect()
}

fn validity(about: &About, times: &BTreeMap<String, Dist>) -> Validity {
    if about.users.is_some() {
        return Validity::Closed;
    }
    let Some(lag) = times.get("lag") else { return Validity::Valid };
    let worst = lag.p99().unwrap_or(lag.max);
    let ttft = times.get("ttft").map_or(0.0, |ttft| ttft.p50().unwrap_or(ttft.mean));
    let allowed = LAG_MS_MAX.max(LAG_SHARE_MAX * ttft);
    if worst <= allowed {
        return Validity::Valid;
    }
    Validity::Invalid(format!(
        "requests left {worst:.2} ms late (99th percentile, or the worst of few); {allowed:.2} ms is allowed"
    ))
}

fn goodput(about: &About, counted: &[&Record], per_s: impl Fn(u64) -> f64) -> Vec<Goodput> {
    let class = |(at, class): (u16, &Class)| {
        let slo = about.slo(at);
        let of_class = || counted.iter().filter(|record| record.class == at);
        let (n, met) = (of_class().count() as u64, of_class().filter(|record| good(record, &slo)).count() as u64);
        let share = if n == 0 { 0.0 } else { met as f64 / n as f64 };
        Goodput { class: class.name.clone(), slo, n, good: met, share, interval: wilson(met, n), per_s: per_s(met) }
    };
    (0..).zip(&about.classes).map(class).filter(|goodput| goodput.n > 0).collect()
}

fn reused(about: &About, plan: &Plan, whole: &[&Record]) -> Option<Reused> {
    let said: Vec<&&Record> = whole.iter().filter(|r| r.cached_tokens.is_some() && r.prompt_tokens > 0).collect();
    if said.is_empty() {
        return None;
    }
    let mut asked = vec![false; plan.requests.len()];
    said.iter().for_each(|record| asked[record.i as usize] = true);
    let counts = |i: u32| asked[i as usize];
    let cached: u64 = said.iter().map(|r| u64::from(r.cached_tokens.unwrap_or(0))).sum();
    let prompt: u64 = said.iter().map(|r| u64::from(r.prompt_tokens)).sum();
    let own = said.iter().map(|r| f64::from(r.cached_tokens.unwrap_or(0)) / f64::from(r.prompt_tokens));
    let infinite = reuse(plan, None);
    Some(Reused {
        n: said.len() as u64,
        measured: cached as f64 / prompt as f64,
        infinite: infinite.share(plan, counts),
        lru: about.cache_blocks.map(|blocks| reuse(plan, Some(blocks)).share(plan, counts)),
        distinct_blocks: infinite.distinct_blocks,
        mean_of_requests: own.sum::<f64>() / said.len() as f64,
    })
}

fn phases(whole: &[&Record]) -> Option<(Phases, Phases)> {
    let mut said: Vec<&Record> = whole.iter().copied().filter(|r| r.server.is_some() && r.first_ns > 0).collect();
    if said.is_empty() {
        return None;
    }
    said.sort_by(|a, b| b.ttft_ms().unwrap_or(0.0).total_cmp(&a.ttft_ms().unwrap_or(0.0)));
    Some((mean_phases(&said), mean_phases(&said[..said.len().div_ceil(10)])))
}

fn mean_phases(records: &[&Record]) -> Phases {
    let mean = |each: &dyn Fn(&Record) -> f64| records.iter().map(|record| each(record)).sum::<f64>() / records.len() as f64;
    let server = |each: fn(&ServerTimes) -> u64| {
        mean(&|record: &Record| record.server.as_ref().map_or(0.0, |server| each(server) as f64 / 1e3))
    };
    let (sent, connect) = (mean(&|record: &Record| record.ttft_sent_ms().unwrap_or(0.0)), mean(&Record::connect_ms));
    let known = server(ServerTimes::known_us);
    let outside = sent - connect - known;
    Phases {
        n: records.len() as u64,
        lag: mean(&Record::lag_ms),
        connect,
        front: known - server(|s| s.gateway_us),
        gateway: server(|s| s.gateway_us) - server(|s| s.links_us() + s.queue_us + s.compute_us),
        links: server(ServerTimes::links_us),
        queue: server(|s| s.queue_us),
        compute: server(|s| s.compute_us),
        outside,
        unexplained: if sent > 0.0 { outside / sent } else { 0.0 },
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::plan::tests::{header, planned};
    use super::*;

    /// A plan of `n` requests, ten a second, and what became of them: request i was sent 1 ms late, had its first token 100 + i ms after
    /// it was due and four more at 20 ms.
    pub fn known(n: u32) -> (About, Plan, Vec<Record>) {
        let requests = (0..n).map(|i| planned(i, u64::from(i) * 100_000_000, &[(1, 16), (u64::from(i) + 10, 16)], 5)).collect();
        let plan = Plan::new(header(), requests).unwrap();
        let record = |i: u32| {
            let due_ns = u64::from(i) * 100_000_000;
            let first_ns = due_ns + 100_000_000 + u64::from(i) * 1_000_000;
            let server = ServerTimes {
                queue_us: 10_000,
                compute_us: 80_000,
                route_us: 1_000,
                ttft_us: 94_000,
                gateway_us: 96_000,
                front_us: 97_500,
                ..ServerTimes::default()
            };
            Record {
                i,
                due_ns,
                sent_ns: due_ns + 1_000_000,
                connected_ns: due_ns + 1_250_000,
                first_ns,
                last_ns: first_ns + 80_000_000,
                end_ns: first_ns + 81_000_000,
                outcome: Outcome::Ok,
                prompt_tokens: 32,
                output_tokens: 5,
                cached_tokens: Some(if i == 0 { 0 } else { 16 }),
                gaps_us: vec![20_000; 4],
                gap_max_us: 20_000,
                chunks: 5,
                answer: Some(u64::from(i)),
                server: Some(server),
                ..Record::default()
            }
        };
        let about = About { speed: 1.0, classes: plan.header.classes.clone(), block_tokens: 16, ..About::default() };
        (about, plan.clone(), (0..n).map(record).collect())
    }

    #[test]
    fn every_figure_is_what_it_must_be() {
        let (about, plan, records) = known(100);
        let about = About { slo: Slo { ttft_ms: Some(149.5), ..Slo::default() }, cache_blocks: Some(1), ..about };
        let summary = summarise(about, &plan, &records);
        let time = |name: &str| summary.times[name];
        assert_eq!(time("ttft").percentiles, [Some(149.0), Some(189.0), None, None]);
        assert_eq!((time("ttft").mean, time("ttft_sent").mean), (149.5, 148.5));
        assert_eq!((time("tpot").mean, time("itl").n, time("itl").max), (20.0, 400, 20.0));
        assert_eq!((time("e2e").min, time("e2e_sent").min, time("lag").max), (181.0, 180.0, 1.0));
        assert_eq!((summary.goodput[0].good, summary.goodput[0].n), (50, 100));
        // From 0 to the last end: 9.9 s + 199 ms + 81 ms.
        assert!((summary.seconds - 10.18).abs() < 1e-9 && (summary.output_tokens_per_s - 500.0 / 10.18).abs() < 1e-9);
        let reuse = summary.reuse.unwrap();
        assert_eq!((reuse.measured, reuse.infinite, reuse.lru), (0.495, 0.495, Some(0.0 + 0.495)));
        let (all, slow) = summary.phases.unwrap();
        let parts = all.parts().map(|(_, ms)| ms);
        assert_eq!(parts, [1.0, 0.25, 1.5, 3.0, 3.0, 10.0, 80.0, 50.75]);
        assert_eq!(parts.iter().sum::<f64>(), time("ttft").mean, "no part is missing");
        assert!((all.unexplained - 50.75 / 148.5).abs() < 1e-9 && slow.n == 10 && slow.outside == 193.5 - 97.75);
        assert_eq!(summary.validity, Validity::Valid);
    }

    #[test]
    fn failures_count_against_goodput_and_not_in_times() {
        let (about, plan, mut records) = known(40);
        records[3].outcome = Outcome::Status(429);
        records[4].outcome = Outcome::Dropped;
        records[5].outcome = Outcome::Unfinished;
        let summary = summarise(About { warm_up_s: 0.15, ..about }, &plan, &records);
        assert_eq!((summary.sent, summary.counted, summary.ok), (40, 37, 35));
        assert_eq!((summary.errors["http 429"], summary.errors["dropped here"], summary.errors["unfinished"]), (1, 1, 1));
        assert_eq!((summary.goodput[0].good, summary.goodput[0].n, summary.times["ttft"].n), (35, 37, 35));
    }

    #[test]
    fn a_late_generator_is_found_out() {
        let (about, plan, mut records) = known(30);
        records[7].sent_ns += 3_000_000;
        assert!(matches!(summarise(about.clone(), &plan, &records).validity, Validity::Invalid(_)));
        let closed = About { users: Some(3), ..about };
        assert_eq!(summarise(closed, &plan, &records).validity, Validity::Closed);
    }
}
