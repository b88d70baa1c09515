//! One case: brings a request into a state, holds it there, does harm, proves it, lets go, and judges what becomes of everybody.

use std::time::{Duration, Instant};

use tokio::sync::broadcast;
use tokio::time::{sleep, timeout};

use super::client::Client;
use super::{Asked, Case, Fault, Matrix, State, Victim, WIRE};
use crate::WAIT_MAX;
use crate::cluster::{Node, Status};
use crate::parts::{Line, MOVED, Parts};
use crate::process;
use crate::relay::{HANDOVER_WAYS, Kind, Way};

/// From the end of the fault to the end of the answer at the latest, whole or with a typed error.
pub const DEADLINE: Duration = Duration::from_secs(20);
/// From the end of the fault, or of the answer if that comes later, until no survivor has a block in use.
pub const REST_MAX: Duration = Duration::from_secs(5);
/// The fault would have come too late: begins the reason of such a failure.
const MISSED: &str = "the state was over before the fault";
/// Until it is tried again: about as long as a node stays in doubt that can be reached.
const AGAIN_AFTER: Duration = Duration::from_secs(2);
/// How often a state is looked for.
const TRIES_MAX: usize = 4;
/// Time in which a request must come into its state.
const REACH_WAIT_MAX: Duration = Duration::from_secs(15);
/// Time until caches and index agree, as any replica sees it.
const VERIFY_MAX: Duration = Duration::from_secs(10);
/// Links end after a second and a half of silence: these are less and more.
const FAULT_LASTS: [Duration; 2] = [Duration::from_millis(700), Duration::from_millis(3000)];
/// After so much silence there are no links between prefill and decode nodes.
const LINKS_END: Duration = Duration::from_millis(2500);
/// In every other round one of so many packets between prefill and decode nodes comes after its successor.
const SWAP_ONE_IN: u64 = 5;
/// Tokens that the client has in the middle of an answer.
const MIDDLE: usize = 8;

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Went {
    /// With the tokens of the undisturbed answer.
    Same,
    /// With a typed error after the first of them.
    Error,
    /// Its client was gone.
    Freed,
}

/// What a case showed.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// How the request ended.
    pub went: Went,
    /// How much longer than undisturbed it took.
    pub late: Duration,
    /// From the end of fault and answer until no survivor had a block in use.
    pub rest: Duration,
    /// Tokens computed again.
    pub recomputed: u64,
    /// Tickets.
    pub attempts: u64,
    /// That the fault happened.
    pub proof: String,
}

/// Who takes part in the request.
#[derive(Clone, Copy, Debug)]
struct Parties {
    gateway: usize,
    prefill: usize,
    decode: usize,
}

impl Matrix {
    /// Runs one case; `round` changes whether the fault is short or long, and which coordinator is meant.
    ///
    /// # Errors
    /// What is not as it must be.
    pub async fn run(&mut self, case: Case, round: usize) -> Result<Outcome, String> {
        for _ in 1..TRIES_MAX {
            match self.try_once(case, round).await {
                // On a busy machine the state may be over before anybody has noticed it, or an earlier fault is still felt.
                Err(reason) if reason.starts_with(MISSED) => {
                    self.parts.relays.set(|weather| weather.held.clear());
                    sleep(AGAIN_AFTER).await;
                }
                done => return done,
            }
        }
        self.try_once(case, round).await
    }

    async fn try_once(&mut self, case: Case, round: usize) -> Result<Outcome, String> {
        let before = self.parts.whole(WAIT_MAX).await?;
        let asked = self.asked[round % self.asked.len()].clone();
        self.parts.relays.set(|weather| weather.swap_one_in = [0, SWAP_ONE_IN][round / 4 % 2]);
        self.prepare(case.state).await;
        let mut lines = self.parts.follow();
        let begun = Instant::now();
        let mut client = self.ask(&asked.body).await?;
        let parties = self.reach(case.state, &mut lines, &mut client).await?;
        self.hold(&[HANDOVER_WAYS[0], HANDOVER_WAYS[1], ASSIGN_WAY]);
        if let Some(line) = passed(case.state, &mut lines) {
            return Err(format!("{MISSED}: {line}"));
        }
        let victim = self.victim(case.victim, parties, &before, round)?;
        let done = self.harm(case.fault, victim, &mut client, FAULT_LASTS[round % 2]).await;
        self.parts.relays.set(|weather| {
            (weather.cut, weather.held) = (Vec::new(), Vec::new());
            weather.delay.retain(|(way, _)| *way != ASSIGN_WAY);
        });
        let proof = done?;
        let over = Instant::now();
        let gone = (case.victim, case.fault) == (Victim::Client, Fault::Kill);
        if !gone {
            client.read(usize::MAX, DEADLINE).await?;
        }
        let went = if gone { Went::Freed } else { judge(&client, &asked)? };
        let ended = client.ended.unwrap_or(over);
        let killed = victim.filter(|_| case.fault == Fault::Kill);
        let rest = self.survivors_rest(killed, over.max(ended)).await?;
        self.mend(killed, victim, &before).await?;
        let number = |key: &str| client.end.as_ref().and_then(|end| end["millrace"][key].as_u64()).unwrap_or_default();
        let late = ended.saturating_duration_since(begun).saturating_sub(asked.took);
        Ok(Outcome { went, late, rest, recomputed: number("recomputed_tokens"), attempts: number("attempts"), proof })
    }

    async fn prepare(&self, state: State) {
        match state {
            State::Assigned => self.parts.relays.set(|weather| weather.delay.push((ASSIGN_WAY, WIRE))),
            State::Dialing => {
                self.parts.relays.set(|weather| weather.lost = HANDOVER_WAYS.into());
                sleep(LINKS_END).await;
                self.parts.relays.set(|weather| weather.lost.clear());
            }
            _ => {}
        }
    }

    /// Waits until the request is in `state`.
    async fn reach(&self, state: State, lines: &mut broadcast::Receiver<Line>, client: &mut Client) -> Result<Parties, String> {
        let placed = next(lines, &[": placed attempt="]).await?;
        let attempt = word(&placed.text, "attempt=").ok_or("a ticket has a name")?;
        let party = |key| party(&self.parts, &placed, key);
        let parties = Parties { gateway: placed.part, prefill: party("prefill=")?, decode: party("decode=")? };
        let step = match state {
            State::Assigned => return Ok(parties),
            State::Dialing => "hand-over: admitted",
            State::Asked => "hand-over: asked for slots",
            State::Granted => "hand-over: slots reserved",
            State::Streaming => "hand-over: cells arrive",
            State::Finishing => "hand-over: manifest leaves",
            State::Verified => "hand-over: all there",
            State::Decoding => return client.read(MIDDLE, REACH_WAIT_MAX).await.map(|()| parties),
        };
        // A node may still be in doubt after an earlier fault.
        let request = attempt.split('/').next().unwrap_or(&attempt);
        let line = next_of(lines, &[&[step, &attempt], &[MOVED, request]]).await?;
        if line.text.contains(MOVED) { Err(format!("{MISSED}: {}", line.text)) } else { Ok(parties) }
    }

    /// The place of the process that is meant; `None` for the client.
    fn victim(&self, victim: Victim, parties: Parties, before: &Status, round: usize) -> Result<Option<usize>, String> {
        Ok(match victim {
            Victim::Coordinator if (round / 2).is_multiple_of(2) => Some(parties.gateway),
            Victim::Coordinator => {
                let leader = before.leader.as_deref().and_then(|name| self.parts.find(name));
                Some(leader.ok_or("no leader")?)
            }
            Victim::Prefill => Some(parties.prefill),
            Victim::Decode => Some(parties.decode),
            Victim::Client => None,
        })
    }

    /// Does harm, lets the hand-over go on, and undoes what can be undone after `lasts`; gives the proof.
    async fn harm(&mut self, fault: Fault, victim: Option<usize>, client: &mut Client, lasts: Duration) -> Result<String, String> {
        match (fault, victim) {
            (Fault::Kill, part) => {
                let signal = match part {
                    Some(part) => self.parts.kill(part).await?,
                    None => client.kill().await?,
                };
                if signal == 9 { Ok("ended by signal 9".into()) } else { Err(format!("ended by signal {signal}, not 9")) }
            }
            (Fault::Stop, part) => {
                let pid = part.map_or_else(|| client.pid(), |part| self.parts.pid(part))?;
                stop(pid).await?;
                self.hold(&[]);
                sleep(lasts).await;
                let state = process::state(pid);
                if state != Some('T') || !process::signal("CONT", pid) {
                    return Err(format!("it did not stand still to the end: {state:?}"));
                }
                Ok(format!("state T for {} ms", lasts.as_millis()))
            }
            (Fault::Cut, Some(part)) => {
                let before = self.parts.relays.dropped(part);
                self.parts.relays.set(|weather| (weather.cut, weather.held) = (vec![part], Vec::new()));
                sleep(lasts).await;
                match self.parts.relays.dropped(part) - before {
                    0 => Err("no packet was lost".into()),
                    lost => Ok(format!("{lost} packets lost by the relay in {} ms", lasts.as_millis())),
                }
            }
            (Fault::Cut, None) => {
                client.relay.cut(true);
                self.hold(&[]);
                sleep(lasts).await;
                // On a busy machine the answer may begin later than that.
                let begun = Instant::now();
                while client.relay.waited() == 0 && begun.elapsed() < REACH_WAIT_MAX {
                    sleep(Duration::from_millis(25)).await;
                }
                let waited = client.relay.waited();
                client.relay.cut(false);
                if waited == 0 { Err("nothing had to wait".into()) } else { Ok(format!("{waited} pieces waited in the relay")) }
            }
        }
    }

    /// Waits until no survivor has a block in use; gives how long that took, counted from `since`.
    async fn survivors_rest(&mut self, killed: Option<usize>, since: Instant) -> Result<Duration, String> {
        let dead = killed.map(|part| self.parts.parts[part].name.clone());
        self.parts.hang_up();
        loop {
            let status = self.parts.status().await;
            let survives = |node: &&Node| dead.as_ref() != Some(&node.name);
            let rests = |node: &Node| node.blocks.in_use == Some(0) && node.running == 0;
            let rest = status.as_ref().is_ok_and(|status| status.nodes.iter().filter(survives).all(rests));
            if rest {
                return Ok(since.elapsed());
            }
            if since.elapsed() > REST_MAX {
                return Err(format!("blocks are in use {} s later: {status:?}", REST_MAX.as_secs()));
            }
            sleep(Duration::from_millis(25)).await;
        }
    }

    /// Starts again what was killed and looks that nobody else died, joined anew, or disagrees with the index.
    async fn mend(&mut self, killed: Option<usize>, victim: Option<usize>, before: &Status) -> Result<(), String> {
        let ended = self.parts.ended();
        if !ended.is_empty() {
            return Err(format!("survivors have ended: {ended:?}"));
        }
        if let Some(part) = killed {
            self.parts.spawn(part)?;
        }
        let after = self.parts.whole(WAIT_MAX).await?;
        let name = victim.map(|part| self.parts.parts[part].name.clone());
        let lives = |status: &Status| {
            let nodes = status.nodes.iter().map(|node| (node.name.clone(), Some(node.epoch), Some(node.pid)));
            let members = status.members.iter().map(|member| (member.name.clone(), None, member.pid));
            let mut lives: Vec<_> = nodes.chain(members).filter(|(of, _, _)| Some(of) != name.as_ref()).collect();
            lives.sort();
            lives
        };
        if lives(before) != lives(&after) {
            return Err(format!("survivors were {:?} and are {:?}", lives(before), lives(&after)));
        }
        self.verified().await
    }

    /// Waits until caches and index agree as `millctl cache verify` sees it. A replica that was just started says no until all nodes have
    /// found it.
    async fn verified(&self) -> Result<(), String> {
        let (dir, begun) = (self.parts.dir().display().to_string(), Instant::now());
        loop {
            let verified = process::run("millctl", &["cache", "verify", "-o", "json", "--dir", &dir], WAIT_MAX).await;
            if verified.code == Some(0) {
                return Ok(());
            }
            if begun.elapsed() > VERIFY_MAX {
                return Err(format!("caches and index disagree: {verified:?}"));
            }
            sleep(Duration::from_millis(200)).await;
        }
    }
}

/// The way of tickets.
const ASSIGN_WAY: Way = Way { from: Kind::Coordinator, to: Kind::Prefill };

/// Stops a process and waits until all of it stands.
async fn stop(pid: u32) -> Result<(), String> {
    if !process::signal("STOP", pid) {
        return Err(format!("no process {pid}"));
    }
    let begun = Instant::now();
    while process::state(pid) != Some('T') {
        if begun.elapsed() > REACH_WAIT_MAX {
            return Err("it does not stop".into());
        }
        sleep(Duration::from_millis(1)).await;
    }
    Ok(())
}

/// A step that comes after `state` and was logged already.
fn passed(state: State, lines: &mut broadcast::Receiver<Line>) -> Option<String> {
    let step = match state {
        State::Assigned => "hand-over: admitted",
        State::Dialing => "hand-over: asked for slots",
        State::Asked => "hand-over: slots reserved",
        State::Granted => "hand-over: cells arrive",
        State::Streaming => "hand-over: manifest leaves",
        State::Finishing => "hand-over: all there",
        State::Verified | State::Decoding => return None,
    };
    std::iter::from_fn(|| lines.try_recv().ok()).map(|line| line.text).find(|text| text.contains(step))
}

/// The process that a line names after `key`.
pub(super) fn party(parts: &Parts, line: &Line, key: &str) -> Result<usize, String> {
    let name = word(&line.text, key).map(|name| name.trim_matches('"').to_owned());
    name.and_then(|name| parts.find(&name)).ok_or_else(|| format!("no {key} in {}", line.text))
}

/// The next line that has all of `words`.
pub(super) async fn next(lines: &mut broadcast::Receiver<Line>, words: &[&str]) -> Result<Line, String> {
    next_of(lines, &[words]).await
}

/// The next line that has all words of one of `choices`.
async fn next_of(lines: &mut broadcast::Receiver<Line>, choices: &[&[&str]]) -> Result<Line, String> {
    let find = async {
        loop {
            let line = lines.recv().await.map_err(|e| e.to_string())?;
            if choices.iter().any(|words| words.iter().all(|word| line.text.contains(word))) {
                return Ok(line);
            }
        }
    };
    timeout(REACH_WAIT_MAX, find).await.map_err(|_| format!("nobody says any of {choices:?}"))?
}

/// The value after `key` in a line of a log.
fn word(line: &str, key: &str) -> Option<String> {
    let rest = &line[line.find(key)? + key.len()..];
    rest.split_whitespace().next().map(str::to_owned)
}

/// How the answer of a client that was not killed ended.
pub(super) fn judge(client: &Client, asked: &Asked) -> Result<Went, String> {
    let (ids, right) = (&client.ids, &asked.ids);
    asked.check(ids)?;
    let end = client.end.as_ref().ok_or("no end")?;
    if end["error"].is_object() {
        return Ok(Went::Error);
    }
    let usage = &end["whole"];
    if usage.is_null() || ids.len() != right.len() {
        return Err(format!("after {} of {} tokens: {end}", ids.len(), right.len()));
    }
    let counted = (usage["prompt_tokens"].as_u64(), usage["completion_tokens"].as_u64());
    let prompt = asked.body["prompt"].as_array().map_or(0, Vec::len) as u64;
    let due = (Some(prompt), Some(right.len() as u64));
    if counted == due { Ok(Went::Same) } else { Err(format!("the usage is {usage}, not {due:?}")) }
}
