//! `millctl members`: the replicas of the coordinator; taking them in, giving them a vote, taking them out.

use anyhow::Result;
use clap::{Args, Subcommand};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::cluster::{MEMBERS, Member};
use super::exit::Exit;
use super::output::{Answer, Ask, Change, Line, Shape, Wait};
use super::table::{Page, Tone, cell};

/// The commands.
#[derive(Subcommand, Debug)]
pub enum Members {
    /// All replicas
    #[command(after_help = "Example:\n  millctl members list --fresh")]
    List(Ask),
    /// Take a replica in: it follows the log as soon as it is started with `coordinator --join`, and gets a vote when it has the log
    #[command(after_help = "Example:\n  millctl members add coordinator-4 --address 10.0.0.4:7000 --learner")]
    Add(AddArgs),
    /// Give a learner a vote; it must have the log by then
    #[command(after_help = "Example:\n  millctl members promote coordinator-4")]
    Promote(Named),
    /// Take a replica out; it stops. A leader hands leadership over first
    #[command(after_help = "Example:\n  millctl members remove coordinator-2")]
    Remove(Named),
    /// Let a new replica take the place of another, whose disk is lost or whose machine goes
    #[command(after_help = "Example:\n  millctl members replace coordinator-3 coordinator-4 --address 10.0.0.4:7000")]
    Replace(ReplaceArgs),
    /// Let another voter lead; the one that has most of the log if nobody is named
    #[command(after_help = "Example:\n  millctl members transfer-leader coordinator-2")]
    TransferLeader(TransferArgs),
}

/// A replica to be taken in.
#[derive(Args, Clone, Debug)]
pub struct AddArgs {
    /// The replica's name, as its certificate says; ends in its number
    name: String,
    /// Where its QUIC endpoint will listen, IP:PORT
    #[arg(long)]
    address: String,
    /// It stays a learner: a gateway that follows the log without a vote
    #[arg(long)]
    learner: bool,
    #[command(flatten)]
    change: Change,
    /// Seconds that the replica may take to get the log
    #[arg(long, default_value_t = 60.0, value_name = "SECONDS")]
    timeout: f64,
}

/// A replica to be changed.
#[derive(Args, Clone, Debug)]
pub struct Named {
    /// The replica's name or number
    name: String,
    #[command(flatten)]
    change: Change,
}

/// A replica that goes and one that comes.
#[derive(Args, Clone, Debug)]
pub struct ReplaceArgs {
    /// The replica that goes
    old: String,
    /// The replica that comes: a learner, or a new one
    new: String,
    /// Where the new one's QUIC endpoint will listen, IP:PORT; absent when it is a learner already
    #[arg(long)]
    address: Option<String>,
    #[command(flatten)]
    change: Change,
    /// Seconds that the new one may take to get the log
    #[arg(long, default_value_t = 60.0, value_name = "SECONDS")]
    timeout: f64,
}

/// Who is to lead.
#[derive(Args, Clone, Debug)]
pub struct TransferArgs {
    /// The voter
    to: Option<String>,
    #[command(flatten)]
    change: Change,
}

/// Runs one.
///
/// # Errors
/// The cluster does not answer, has no quorum, or refuses.
pub async fn run(command: Members) -> Result<()> {
    match command {
        Members::List(ask) => ask.show::<List>(json!({"q": "members_list"})).await.map(drop),
        Members::Add(args) => add(&args).await,
        Members::Promote(args) => {
            let query = json!({"q": "members", "op": "promote", "member": args.name});
            args.change.apply::<Changed>(&format!("give {} a vote", args.name), query).await.map(drop)
        }
        Members::Remove(args) => {
            let query = json!({"q": "members", "op": "remove", "member": args.name});
            args.change.apply::<Changed>(&format!("take {} out of the cluster for good", args.name), query).await.map(drop)
        }
        Members::Replace(args) => replace(&args).await,
        Members::TransferLeader(args) => {
            let plan = format!("let {} lead", args.to.as_deref().unwrap_or("the voter that has most of the log"));
            let query = json!({"q": "members", "op": "transfer_leader", "to": args.to});
            args.change.apply::<Leads>(&plan, query).await.map(drop)
        }
    }
}

async fn add(args: &AddArgs) -> Result<()> {
    let query = json!({"q": "members", "op": "add", "name": args.name, "address": args.address});
    let plan = format!("take {} at {} in as a learner", args.name, args.address);
    if args.learner || args.change.dry_run {
        let plan = if args.learner { plan } else { plan + ", and give it a vote when it has the log" };
        return args.change.apply::<Changed>(&plan, query).await.map(drop);
    }
    let mut line = Line::open(&args.change.which)?;
    line.ask(&query).await?;
    let promote = json!({"q": "members", "op": "promote", "member": args.name});
    let answer = once_caught_up(&mut line, args.timeout, &args.name, &promote).await;
    line.close().await;
    print(&args.change.shape, answer?)
}

async fn replace(args: &ReplaceArgs) -> Result<()> {
    let query = json!({"q": "members", "op": "replace", "old": args.old, "new": args.new});
    if args.change.dry_run {
        return args.change.plan(&format!("put {} in the place of {}, when it has the log", args.new, args.old));
    }
    let mut line = Line::open(&args.change.which)?;
    if let Some(address) = &args.address {
        line.ask(&json!({"q": "members", "op": "add", "name": args.new, "address": address})).await?;
    }
    let answer = once_caught_up(&mut line, args.timeout, &args.new, &query).await;
    line.close().await;
    print(&args.change.shape, answer?)
}

/// Asks until the learner has the log: until then the answer is a conflict that says what it lacks.
async fn once_caught_up(line: &mut Line, timeout: f64, name: &str, query: &Value) -> Result<Value> {
    let wait = Wait { wait: true, timeout };
    let what = format!("{name} has the log");
    wait.until(&what, async || match line.ask(query).await {
        Ok(answer) => Ok(Ok(answer)),
        Err(error) if Exit::of(&error) == Exit::Conflict && is_about_time(&error.to_string()) => Ok(Err(error.to_string())),
        Err(error) => Err(error),
    })
    .await
}

fn is_about_time(reason: &str) -> bool {
    reason.contains("does not answer") || reason.contains("entries behind") || reason.contains("under way")
}

fn print(shape: &Shape, answer: Value) -> Result<()> {
    shape.print(&serde_json::from_value::<Changed>(answer)?)
}

/// The replicas.
#[derive(Serialize, Deserialize, Debug, Default)]
#[serde(default)]
struct List {
    leader: Option<String>,
    quorum: bool,
    stale: bool,
    joint: bool,
    members: Vec<Member>,
}

impl Answer for List {
    fn page(&self) -> Page {
        let mut notes = Vec::new();
        if !self.quorum {
            notes.push(cell("NO QUORUM").tone(Tone::Bad));
        }
        if self.stale {
            notes.push(cell("(stale: may be old; --fresh asks a quorum)").tone(Tone::Warn));
        }
        if self.joint {
            notes.push(cell("voters are being exchanged").tone(Tone::Warn));
        }
        let page = if notes.is_empty() { Page::new() } else { Page::new().cells(notes) };
        page.table(MEMBERS, &self.members)
    }

    fn names(&self) -> Vec<String> {
        self.members.iter().map(|member| format!("member/{}", member.name)).collect()
    }
}

/// What a change has made of a replica.
#[derive(Serialize, Deserialize, Debug, Default)]
#[serde(default)]
struct Changed {
    member: String,
    id: u64,
    role: String,
    voters: Vec<String>,
    learners: Vec<String>,
}

impl Answer for Changed {
    fn page(&self) -> Page {
        let is = if self.role == "removed" { "is removed".to_owned() } else { format!("is a {}", self.role) };
        Page::new().line(format_args!("{} {is}   voters: {}   learners: {}", self.member, list(&self.voters), list(&self.learners)))
    }

    fn names(&self) -> Vec<String> {
        vec![format!("member/{}", self.member)]
    }
}

fn list(names: &[String]) -> String {
    if names.is_empty() { "-".into() } else { names.join(", ") }
}

/// Who leads now.
#[derive(Serialize, Deserialize, Debug, Default)]
#[serde(default)]
struct Leads {
    leader: Option<String>,
}

impl Answer for Leads {
    fn page(&self) -> Page {
        Page::new().line(format_args!("{} leads", self.leader.as_deref().unwrap_or("nobody")))
    }

    fn names(&self) -> Vec<String> {
        self.leader.iter().map(|name| format!("member/{name}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_read_as_sentences() {
        let changed = json!({"member": "c-4", "id": 4, "role": "learner", "voters": ["c-1", "c-2"], "learners": ["c-4"]});
        let changed: Changed = serde_json::from_value(changed).unwrap();
        assert_eq!(changed.page().render(false, false), "c-4 is a learner   voters: c-1, c-2   learners: c-4\n");
        assert_eq!(changed.names(), ["member/c-4"]);
        let gone = Changed { member: "c-3".into(), role: "removed".into(), ..Changed::default() };
        assert!(gone.page().render(false, false).starts_with("c-3 is removed"));
        let list = List { stale: true, ..List::default() };
        assert!(list.page().render(false, false).contains("NO QUORUM"));
    }

    #[test]
    fn only_what_time_may_mend_is_waited_for() {
        assert!(is_about_time("conflict: replica 4 is 900 entries behind; at most 256 are allowed"));
        assert!(is_about_time("conflict: replica 4 does not answer"));
        assert!(!is_about_time("conflict: replica 4 is a voter already"));
    }
}
