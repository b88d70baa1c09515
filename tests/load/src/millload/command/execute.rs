//! Everything around one run: the model's name, the screen, the interrupt, the faults, the figures.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use clap::Args;
use http_body_util::{BodyExt, Full};
use hyper::{Request, header};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};

use crate::millload::client::body::{Api, Writer};
use crate::millload::client::pool::{IDLE_MAX, Pool, Target};
use crate::millload::faults::{self, Site};
use crate::millload::live::Live;
use crate::millload::plan::{Plan, Slo};
use crate::millload::report::Results;
use crate::millload::run::{Options, Ran, Stop, run};
use crate::millload::summary::{About, summarise};
use crate::millload::{golden, screen};

/// Longer than any run.
const NEVER: Duration = Duration::from_secs(1 << 30);

/// Where requests go and how.
#[derive(Args, Clone, Debug)]
pub struct SendArgs {
    /// The server
    #[arg(long, default_value = "http://127.0.0.1:8080")]
    pub url: String,
    /// The model's name; the server's first when absent
    #[arg(long)]
    pub model: Option<String>,
    /// Which API is asked
    #[arg(long, value_enum, default_value = "completions")]
    pub api: Api,
    /// API key
    #[arg(long, env = "MILLLOAD_API_KEY", hide_env_values = true)]
    pub key: Option<String>,
    /// A header for every request: NAME=VALUE; may be repeated
    #[arg(long, value_parser = parse_header, value_name = "NAME=VALUE")]
    pub header: Vec<(String, String)>,
    /// Send only fields that OpenAI's API has: for servers that refuse others
    #[arg(long)]
    pub plain: bool,
    /// Generator threads
    #[arg(long, default_value_t = 1)]
    pub threads: u32,
    /// Seconds for one request
    #[arg(long, default_value_t = 600.0)]
    pub timeout: f64,
    /// Requests under way at a time; one more is not sent and counts as failed
    #[arg(long, default_value_t = 10_000)]
    pub in_flight_max: usize,
    /// Ask each request on a connection of its own: for servers that close a connection after an answer without saying so
    #[arg(long)]
    pub fresh_connections: bool,
    /// What users expect, for classes without an objective of their own: ttft=500ms,tpot=50ms
    #[arg(long, value_parser = Slo::parse, default_value = "")]
    pub slo: Slo,
    /// Blocks of all the cluster's caches together, to predict an LRU cache of that size
    #[arg(long, value_name = "BLOCKS")]
    pub cache_blocks: Option<usize>,
    /// Seconds at the start that do not count
    #[arg(long, default_value_t = 0.0)]
    pub warm_up: f64,
    /// Seconds that requests under way have when the run is interrupted
    #[arg(long, default_value_t = 5.0)]
    pub grace: f64,
    /// Show nothing while the run lasts
    #[arg(long)]
    pub quiet: bool,
    /// Serve the run's counters to Prometheus at this address
    #[arg(long, value_name = "HOST:PORT")]
    pub metrics: Option<SocketAddr>,
}

fn parse_header(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or_else(|| format!("{text:?}: expected NAME=VALUE"))?;
    let fine = header::HeaderName::from_bytes(name.as_bytes()).is_ok() && header::HeaderValue::from_str(value).is_ok();
    if fine { Ok((name.to_owned(), value.to_owned())) } else { Err(format!("{text:?} is no header")) }
}

/// What belongs to one run only.
#[derive(Clone, Debug)]
pub struct Once {
    /// What the user calls it.
    pub label: String,
    /// Due times are divided by this.
    pub speed: f64,
    /// Which part of the plan, of how many.
    pub part: (u32, u32),
    /// When to begin, seconds since 1970.
    pub begin_unix_s: Option<f64>,
    /// What is done to the cluster.
    pub faults: Vec<faults::Step>,
    /// Where the cluster is.
    pub site: Option<Site>,
    /// The run whose answers are right.
    pub golden: Option<PathBuf>,
}

impl Once {
    /// The plan as it is.
    #[must_use]
    pub fn at_speed(speed: f64) -> Self {
        Self { label: String::new(), speed, part: (0, 1), begin_unix_s: None, faults: vec![], site: None, golden: None }
    }
}

/// Runs a plan and makes its figures.
///
/// # Errors
/// The server cannot be found, or the settings make no sense.
pub fn execute(plan: &Arc<Plan>, send: &SendArgs, once: &Once) -> Result<Results> {
    ensure!(once.speed.is_finite() && once.speed > 0.0, "--speed must be above 0");
    ensure!(once.faults.is_empty() || once.site.is_some(), "faults need --cluster DIR");
    let golden = once.golden.as_deref().map(Results::load).transpose()?;
    if let Some(golden) = &golden {
        ensure!(golden.summary.about.plan == plan.digest, "the golden run is of another plan ({})", golden.summary.about.plan);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(watched(plan, send, once, golden.as_ref()))
}

async fn watched(plan: &Arc<Plan>, send: &SendArgs, once: &Once, golden: Option<&Results>) -> Result<Results> {
    let target = Target::parse(&send.url)?;
    let model = match &send.model {
        Some(model) => model.clone(),
        None => first_model(&target).await.with_context(|| format!("asking {} for its model", send.url))?,
    };
    let writer = Writer {
        target,
        api: send.api,
        model: model.clone(),
        key: send.key.clone(),
        headers: send.header.clone(),
        extensions: !send.plain,
    };
    let options = Options {
        writer,
        threads: send.threads.max(1),
        part: once.part,
        speed: once.speed,
        timeout: Duration::from_secs_f64(send.timeout.clamp(0.001, 1e6)),
        in_flight_max: send.in_flight_max,
        idle_max: if send.fresh_connections { 0 } else { IDLE_MAX },
        begin: once.begin_unix_s.map(instant_of).transpose()?,
    };
    let (ran, performed, partial) = generate(plan, options, send, once).await?;
    let about = About {
        plan: plan.digest.clone(),
        workload: plan.header.workload.clone(),
        arrivals: plan.header.arrivals.clone(),
        users: plan.header.users,
        label: once.label.clone(),
        url: send.url.clone(),
        model,
        speed: once.speed,
        part: once.part,
        planned: plan.part(once.part.0, once.part.1).iter().map(|unit| unit.len() as u64).sum(),
        unix_s: unix_s(ran.started),
        warm_up_s: send.warm_up,
        cache_blocks: send.cache_blocks,
        block_tokens: plan.header.block_tokens,
        partial,
        slo: send.slo,
        classes: plan.header.classes.clone(),
    };
    let mut summary = summarise(about, plan, &ran.records);
    summary.faults = performed;
    faults::judge(&mut summary.faults, &summary.about, &ran.records);
    summary.golden = golden.map(|golden| golden::compare(&golden.records, &ran.records));
    Ok(Results { summary, records: ran.records })
}

/// Runs the generator's threads, and everything beside them, to the end.
async fn generate(plan: &Arc<Plan>, options: Options, send: &SendArgs, once: &Once) -> Result<(Ran, Vec<faults::Done>, bool)> {
    let (live, started) = (Arc::new(Live::default()), Arc::new(OnceLock::new()));
    let (stopper, stop) = watch::channel(Stop::No);
    let (done, mut ended) = oneshot::channel();
    let worker = {
        let (plan, live, started) = (plan.clone(), live.clone(), started.clone());
        std::thread::spawn(move || drop(done.send(run(&plan, &options, &live, &stop, &started))))
    };
    let metrics = match send.metrics {
        Some(address) => Some(tokio::spawn(serve_metrics(TcpListener::bind(address).await?, live.clone()))),
        None => None,
    };
    while started.get().is_none() && !worker.is_finished() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let began = started.get().copied().unwrap_or_else(Instant::now);
    let performed = Arc::new(Mutex::new(Vec::new()));
    let acting = once.site.clone().map(|site| tokio::spawn(faults::perform(once.faults.clone(), site, began, performed.clone())));
    let mut interrupts = 0;
    let screen = async {
        match send.quiet {
            true => std::future::pending().await,
            false => screen::show(&live, began).await,
        }
    };
    tokio::pin!(screen);
    let grace = Duration::from_secs_f64(send.grace.clamp(0.0, 1e6));
    let deadline = tokio::time::sleep(NEVER);
    tokio::pin!(deadline);
    let ran = loop {
        tokio::select! {
            ran = &mut ended => break ran.context("the generator ended without a word")?,
            () = &mut screen => {}
            () = &mut deadline => {
                let _ = stopper.send(Stop::Abort);
                deadline.as_mut().reset(tokio::time::Instant::now() + NEVER);
            }
            signal = tokio::signal::ctrl_c() => {
                signal?;
                interrupts += 1;
                let _ = stopper.send(if interrupts == 1 { Stop::Drain } else { Stop::Abort });
                deadline.as_mut().reset(tokio::time::Instant::now() + grace);
                eprintln!("interrupted: nothing more is sent; what is under way has {} s", grace.as_secs_f64());
            }
        }
    };
    metrics.inspect(tokio::task::JoinHandle::abort);
    // Steps after the end of the load would be felt by nobody.
    acting.inspect(tokio::task::JoinHandle::abort);
    let performed = performed.lock().unwrap_or_else(PoisonError::into_inner).clone();
    Ok((ran?, performed, interrupts > 0))
}

fn unix_now_s() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

fn instant_of(unix_s: f64) -> Result<Instant> {
    let ahead = unix_s - unix_now_s();
    ensure!((0.0..=86_400.0).contains(&ahead), "--begin lies {ahead:.1} s ahead; expected a time in the next day");
    Ok(Instant::now() + Duration::from_secs_f64(ahead))
}

fn unix_s(started: Instant) -> u64 {
    (unix_now_s() - started.elapsed().as_secs_f64()).max(0.0) as u64
}

/// The first model that the server names.
async fn first_model(target: &Target) -> Result<String> {
    let mut sender = Pool::new(target, 0).connect().await.with_context(|| target.address.to_string())?;
    let request = Request::get(format!("{}/v1/models", target.prefix)).header(header::HOST, &target.authority);
    let response = sender.send_request(request.body(Full::<Bytes>::default())?).await?;
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    ensure!(status.is_success(), "{status}");
    let models: serde_json::Value = serde_json::from_slice(&body)?;
    Ok(models["data"][0]["id"].as_str().context("no model")?.to_owned())
}

/// Answers every request with the counters.
async fn serve_metrics(listener: TcpListener, live: Arc<Live>) {
    while let Ok((mut stream, _)) = listener.accept().await {
        let text = screen::prometheus(&live);
        tokio::spawn(async move {
            let mut request = [0; 4096];
            let read = tokio::time::timeout(Duration::from_secs(5), stream.read(&mut request)).await;
            if matches!(read, Ok(Ok(n)) if n > 0) {
                let head = "HTTP/1.1 200 OK\r\ncontent-type: text/plain; version=0.0.4\r\nconnection: close\r\ncontent-length:";
                let _ = stream.write_all(format!("{head} {}\r\n\r\n{text}", text.len()).as_bytes()).await;
            }
        });
    }
}
