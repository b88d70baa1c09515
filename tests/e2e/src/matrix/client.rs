//! A client as a process of its own, so that it can be killed, stopped and cut off like everybody else. It streams one answer and says
//! on standard output, a JSON object a line, which tokens came and how it ended.

use std::net::SocketAddr;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tokio::time::timeout;

use crate::process;
use crate::relay::ClientRelay;
use crate::stream::{Answer, End, Events};

/// What the process of [`Client`] does: streams the answer to `body` and says what comes.
pub async fn speak(at: SocketAddr, body: &Value) {
    let mut answer = Answer::default();
    let end = match Events::open(at, "/v1/completions", body).await {
        Ok(events) => listen(events, &mut answer).await,
        Err(reason) => json!({"broken": reason}),
    };
    println!("{end}");
}

async fn listen(mut events: Events, answer: &mut Answer) -> Value {
    loop {
        let known = answer.ids.len();
        match events.next().await {
            Ok(Some(event)) => answer.add(event),
            Ok(None) => break,
            Err(reason) => return json!({"broken": reason}),
        }
        if answer.ids.len() > known {
            println!("{}", json!({"ids": answer.ids[known..]}));
        }
    }
    match &answer.end {
        End::Whole => json!({"whole": answer.usage, "millrace": answer.timings}),
        End::Error(error) => json!({"error": error}),
        End::Broken(reason) => json!({"broken": reason}),
        End::Open => json!({"broken": "the stream ended without a word"}),
    }
}

/// The process, and what it has said.
pub struct Client {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    /// Between it and the cluster.
    pub relay: ClientRelay,
    /// The tokens it has.
    pub ids: Vec<u32>,
    /// The last thing it said.
    pub end: Option<Value>,
    /// When it said it.
    pub ended: Option<Instant>,
}

impl Client {
    /// Starts one that asks `body` of the cluster at `http`.
    ///
    /// # Errors
    /// It cannot be started.
    pub async fn start(http: SocketAddr, body: &Value) -> Result<Self, String> {
        let relay = ClientRelay::start(http).await.map_err(|e| e.to_string())?;
        let mut command = Command::new(process::binary("millmatrix"));
        command.args(["client", &relay.address.to_string(), &body.to_string()]).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.kill_on_drop(true).spawn().map_err(|e| e.to_string())?;
        let lines = BufReader::new(child.stdout.take().ok_or("stdout is a pipe")?).lines();
        Ok(Self { child, lines, relay, ids: Vec::new(), end: None, ended: None })
    }

    /// Its number.
    ///
    /// # Errors
    /// It has ended.
    pub fn pid(&self) -> Result<u32, String> {
        self.child.id().ok_or_else(|| "the client has ended".into())
    }

    /// Reads what it says until it has `tokens` tokens, or to its end.
    ///
    /// # Errors
    /// It says nothing for too long, or something else.
    pub async fn read(&mut self, tokens: usize, wait_max: Duration) -> Result<(), String> {
        let read = async {
            while self.ids.len() < tokens && self.end.is_none() {
                let line = self.lines.next_line().await.map_err(|e| e.to_string())?.ok_or("the client died")?;
                let said: Value = serde_json::from_str(&line).map_err(|e| format!("{e}: {line}"))?;
                if let Some(ids) = said["ids"].as_array() {
                    self.ids.extend(ids.iter().filter_map(Value::as_u64).map(|id| id as u32));
                } else {
                    (self.end, self.ended) = (Some(said), Some(Instant::now()));
                }
            }
            Ok::<(), String>(())
        };
        timeout(wait_max, read).await.map_err(|_| format!("the client hangs for {} s", wait_max.as_secs()))?
    }

    /// Kills it with SIGKILL; gives the signal that ended it.
    ///
    /// # Errors
    /// It does not end by the signal.
    pub async fn kill(&mut self) -> Result<i32, String> {
        use std::os::unix::process::ExitStatusExt;
        self.child.start_kill().map_err(|e| e.to_string())?;
        let status = self.child.wait().await.map_err(|e| e.to_string())?;
        status.signal().ok_or_else(|| format!("the client ended by itself: {status}"))
    }
}
