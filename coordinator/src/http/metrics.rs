//! All metric names of the gateway, in one place, and the meter behind `/metrics`.
//!
//! Names follow OpenTelemetry's conventions for generative AI where there is one (`gen_ai.*`); the rest begins with `millrace`.

use std::collections::BTreeSet;
use std::sync::{Arc, Weak};
use std::time::Instant;

use millrace_core::cluster::{Cluster, Node};
use millrace_core::message::Load;
use opentelemetry::KeyValue;
use opentelemetry::metrics::{Counter, Histogram, Meter, MeterProvider};
use opentelemetry_sdk::metrics::SdkMeterProvider;
use parking_lot::Mutex;
use prometheus::{Registry, TextEncoder};

use crate::App;
use crate::dispatch::{BeliefCounts, Usage};
use crate::traffic::Traffic;
use millrace_log::Role;

/// From arrival to the first token, seconds.
pub const TIME_TO_FIRST_TOKEN: &str = "gen_ai.server.time_to_first_token";
/// Between two tokens after the first, seconds.
pub const TIME_PER_OUTPUT_TOKEN: &str = "gen_ai.server.time_per_output_token";
/// From arrival to the end, seconds.
pub const REQUEST_DURATION: &str = "gen_ai.server.request.duration";
/// Tokens, by `gen_ai.token.type`: input, cached, output.
pub const TOKENS: &str = "millrace.tokens";
/// Requests that ended, by `outcome`: ok or the error's code.
pub const REQUESTS: &str = "millrace.requests";
/// Requests that a second ticket was made for.
pub const MIGRATIONS: &str = "millrace.migrations";
/// Tokens that tickets after the first computed again.
pub const TOKENS_RECOMPUTED: &str = "millrace.tokens.recomputed";
/// KV bytes that moved for requests of this gateway.
pub const KV_BYTES: &str = "millrace.kv.bytes_moved";
/// Time of hand-overs that compute did not hide, seconds.
pub const KV_EXPOSED: &str = "millrace.kv.exposed_time";
/// Requests running on this gateway.
pub const RUNNING: &str = "millrace.requests.running";
/// Entry of the log that this replica has applied.
pub const RAFT_APPLIED: &str = "millrace.raft.applied";
/// This replica's raft term.
pub const RAFT_TERM: &str = "millrace.raft.term";
/// 1 on the leader.
pub const RAFT_LEADER: &str = "millrace.raft.is_leader";
/// Pairs of a block and a node that holds it, in the index.
pub const INDEX_LOCATIONS: &str = "millrace.index.locations";
/// Blocks that the index had no room for, of nodes that are members.
pub const INDEX_REFUSED: &str = "millrace.index.refused";
/// Caches that the index was found to disagree with since the log began.
pub const INDEX_DRIFT_FOUND: &str = "millrace.index.drift_found";
/// Those of them mended by a snapshot of the node.
pub const INDEX_DRIFT_REPAIRED: &str = "millrace.index.drift_repaired";
/// Replicas whose state was not that of the majority since this one started.
pub const REPLICAS_DIFFERING: &str = "millrace.replicas.differing";
/// Blocks of a node's pool, by `node` and `state`: free, evictable, pinned, in_use.
pub const NODE_BLOCKS: &str = "millrace.node.blocks";
/// Messages and streams of hand-overs that named an old generation or one that was over, by `node`: none had an effect.
pub const NODE_STALE: &str = "millrace.node.stale_frames";
/// Hand-overs that went on after a lost link, by `node`; each side counts.
pub const NODE_RESUMES: &str = "millrace.node.handovers_resumed";

/// Cached blocks that routing believed in, by `side`: prefill, decode.
pub const ROUTE_BELIEF: &str = "millrace.route.belief_blocks";
/// Cached blocks that were found there.
pub const ROUTE_FOUND: &str = "millrace.route.found_blocks";
/// Requests of a tenant that ended, by `tenant` and `outcome`.
pub const TENANT_REQUESTS: &str = "millrace.tenant.requests";
/// Tokens of a tenant, by `tenant` and `gen_ai.token.type`.
pub const TENANT_TOKENS: &str = "millrace.tenant.tokens";

/// Tenants that have a label of their own: the first that ask; the rest are [`OTHER_TENANTS`].
pub const TENANT_LABELS_MAX: usize = 64;
/// The label of the rest.
pub const OTHER_TENANTS: &str = "other";

const LATENCY_BOUNDS: [f64; 16] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0];

/// The gateway's instruments.
pub struct Metrics {
    registry: Registry,
    first_token: Histogram<f64>,
    next_token: Histogram<f64>,
    duration: Histogram<f64>,
    exposed: Histogram<f64>,
    tokens: Counter<u64>,
    requests: Counter<u64>,
    migrations: Counter<u64>,
    recomputed: Counter<u64>,
    kv_bytes: Counter<u64>,
    tenant_requests: Counter<u64>,
    tenant_tokens: Counter<u64>,
    tenants: Mutex<BTreeSet<Arc<str>>>,
    /// Counts the same for operators; it outlives the meter.
    app: Weak<App>,
    /// Keeps the readers of the gauges alive.
    _provider: SdkMeterProvider,
}

impl Metrics {
    /// Sets up the meter; gauges read the state of `app` when they are asked for.
    ///
    /// # Errors
    /// Two metrics of one name.
    pub fn new(app: &Arc<App>) -> Result<Arc<Self>, String> {
        let registry = Registry::new();
        let exporter = opentelemetry_prometheus::exporter()
            .with_registry(registry.clone())
            .scope_info_enabled(false)
            .build()
            .map_err(|e| e.to_string())?;
        let provider = SdkMeterProvider::builder().with_reader(exporter).build();
        let meter = provider.meter("millrace");
        let seconds = |name| meter.f64_histogram(name).with_unit("s").with_boundaries(LATENCY_BOUNDS.to_vec()).build();
        let count = |name| meter.u64_counter(name).build();
        let metrics = Self {
            first_token: seconds(TIME_TO_FIRST_TOKEN),
            next_token: seconds(TIME_PER_OUTPUT_TOKEN),
            duration: seconds(REQUEST_DURATION),
            exposed: seconds(KV_EXPOSED),
            tokens: count(TOKENS),
            requests: count(REQUESTS),
            migrations: count(MIGRATIONS),
            recomputed: count(TOKENS_RECOMPUTED),
            kv_bytes: meter.u64_counter(KV_BYTES).with_unit("By").build(),
            tenant_requests: count(TENANT_REQUESTS),
            tenant_tokens: count(TENANT_TOKENS),
            tenants: Mutex::default(),
            app: Arc::downgrade(app),
            registry,
            _provider: provider.clone(),
        };
        gauges(&meter, app);
        beliefs(&meter, app);
        Ok(Arc::new(metrics))
    }

    /// The Prometheus text.
    ///
    /// # Errors
    /// A metric that cannot be written.
    pub fn text(&self) -> Result<String, String> {
        TextEncoder::new().encode_to_string(&self.registry.gather()).map_err(|e| e.to_string())
    }

    /// Where to count the requests of a tenant.
    #[must_use]
    pub fn of_tenant(self: &Arc<Self>, tenant: &str) -> TenantMeter {
        TenantMeter { metrics: self.clone(), tenant: label(&mut self.tenants.lock(), tenant) }
    }

    fn traffic(&self, count: impl FnOnce(&Traffic)) {
        if let Some(app) = self.app.upgrade() {
            count(app.dispatcher.traffic());
        }
    }

    /// A request that never ran.
    pub fn refused(&self, code: &'static str) {
        self.traffic(Traffic::failed);
        self.requests.add(1, &[KeyValue::new("outcome", code)]);
    }
}

/// Values that are read, not counted. The application outlives the meter only through this weak reference.
fn gauges(meter: &Meter, app: &Arc<App>) {
    let gauge = |name: &'static str, read: fn(&App) -> u64| {
        let app = Arc::downgrade(app);
        let observe = move |observer: &dyn opentelemetry::metrics::AsyncInstrument<u64>| {
            if let Some(app) = app.upgrade() {
                observer.observe(read(&app), &[]);
            }
        };
        meter.u64_observable_gauge(name).with_callback(observe).build();
    };
    gauge(RUNNING, |app| app.dispatcher.running() as u64);
    gauge(RAFT_APPLIED, |app| app.raft.status().applied);
    gauge(RAFT_TERM, |app| app.raft.status().term);
    gauge(RAFT_LEADER, |app| u64::from(app.raft.status().role == Role::Leader));
    gauge(INDEX_LOCATIONS, |app| app.cluster.read().holders().locations() as u64);
    gauge(INDEX_REFUSED, |app| refused(&app.cluster.read()));
    gauge(INDEX_DRIFT_FOUND, |app| app.cluster.read().holders().drift().found);
    gauge(INDEX_DRIFT_REPAIRED, |app| app.cluster.read().holders().drift().repaired);
    gauge(REPLICAS_DIFFERING, |app| app.cluster.read().audit().differing().count() as u64);
    per_node(meter, app, NODE_STALE, |load| load.stale_frames);
    per_node(meter, app, NODE_RESUMES, |load| load.resumes);
    let app = Arc::downgrade(app);
    let blocks = move |observer: &dyn opentelemetry::metrics::AsyncInstrument<u64>| {
        let Some(app) = app.upgrade() else { return };
        for (name, load) in loads(&app) {
            let idle = load.free_blocks.saturating_add(load.evictable_blocks).saturating_add(load.pinned_blocks);
            let in_use = load.total_blocks.saturating_sub(idle);
            let pinned = ("pinned", load.pinned_blocks);
            for (state, count) in [("free", load.free_blocks), ("evictable", load.evictable_blocks), pinned, ("in_use", in_use)] {
                observer.observe(u64::from(count), &[KeyValue::new("node", name.clone()), KeyValue::new("state", state)]);
            }
        }
    };
    meter.u64_observable_gauge(NODE_BLOCKS).with_callback(blocks).build();
}

/// What each node counts, as its last heartbeat said it.
fn per_node(meter: &Meter, app: &Arc<App>, name: &'static str, read: fn(&Load) -> u64) {
    let app = Arc::downgrade(app);
    let observe = move |observer: &dyn opentelemetry::metrics::AsyncInstrument<u64>| {
        let Some(app) = app.upgrade() else { return };
        loads(&app).into_iter().for_each(|(name, load)| observer.observe(read(&load), &[KeyValue::new("node", name)]));
    };
    meter.u64_observable_gauge(name).with_callback(observe).build();
}

/// Counters that the dispatcher keeps.
fn beliefs(meter: &Meter, app: &Arc<App>) {
    let counter = |name: &'static str, read: fn(BeliefCounts) -> [(&'static str, u64); 2]| {
        let app = Arc::downgrade(app);
        let observe = move |observer: &dyn opentelemetry::metrics::AsyncInstrument<u64>| {
            let counts = app.upgrade().map(|app| read(app.dispatcher.beliefs()));
            counts.into_iter().flatten().for_each(|(side, count)| observer.observe(count, &[KeyValue::new("side", side)]));
        };
        meter.u64_observable_counter(name).with_callback(observe).build();
    };
    counter(ROUTE_BELIEF, |counts| [("prefill", counts.prefill_belief), ("decode", counts.decode_belief)]);
    counter(ROUTE_FOUND, |counts| [("prefill", counts.prefill_found), ("decode", counts.decode_found)]);
}

fn refused(cluster: &Cluster) -> u64 {
    let holders = cluster.holders();
    holders.nodes().filter_map(|node| holders.tally(node)).map(|tally| tally.refused).sum()
}

/// What each node that is heard of last said of itself.
fn loads(app: &App) -> Vec<(String, Load)> {
    let (now, cluster) = (Instant::now(), app.cluster.read());
    let load = |node: &Node| Some((node.name.clone(), app.nodes.seen(now, &node.name, node.epoch)?.load));
    cluster.nodes().filter_map(load).collect()
}

/// The instruments, for one tenant.
#[derive(Clone)]
pub struct TenantMeter {
    metrics: Arc<Metrics>,
    tenant: Arc<str>,
}

/// The tenant's label: its name while there are few.
fn label(labels: &mut BTreeSet<Arc<str>>, tenant: &str) -> Arc<str> {
    if let Some(known) = labels.get(tenant) {
        return known.clone();
    }
    if labels.len() >= TENANT_LABELS_MAX {
        return OTHER_TENANTS.into();
    }
    let label: Arc<str> = tenant.into();
    labels.insert(label.clone());
    label
}

/// Measures one choice. A choice that is dropped before its end counts as cancelled.
pub struct Watch {
    metrics: Arc<Metrics>,
    tenant: Arc<str>,
    started: Instant,
    last_token: Option<Instant>,
    over: bool,
}

impl Watch {
    /// From now.
    #[must_use]
    pub fn start(meter: &TenantMeter) -> Self {
        let TenantMeter { metrics, tenant } = meter.clone();
        Self { metrics, tenant, started: Instant::now(), last_token: None, over: false }
    }

    /// A token came.
    pub fn token(&mut self) {
        let now = Instant::now();
        self.metrics.traffic(Traffic::token);
        match self.last_token.replace(now) {
            None => {
                self.metrics.traffic(|traffic| traffic.first_token(now - self.started));
                self.metrics.first_token.record((now - self.started).as_secs_f64(), &[]);
            }
            Some(last) => self.metrics.next_token.record((now - last).as_secs_f64(), &[]),
        }
    }

    /// The choice is whole.
    pub fn end(&mut self, usage: &Usage) {
        self.close("ok");
        self.metrics.traffic(|traffic| traffic.ended(usage.prompt_tokens, usage.cached_tokens));
        for (kind, tokens) in [("input", usage.prompt_tokens), ("cached", usage.cached_tokens), ("output", usage.completion_tokens)]
        {
            let (tokens, kind) = (u64::from(tokens), KeyValue::new("gen_ai.token.type", kind));
            self.metrics.tenant_tokens.add(tokens, &[kind.clone(), self.tenant()]);
            self.metrics.tokens.add(tokens, &[kind]);
        }
        if usage.timings.attempts > 1 {
            self.metrics.migrations.add(1, &[]);
            self.metrics.recomputed.add(usage.timings.recomputed_tokens.into(), &[]);
        }
        if let Some(handover) = &usage.timings.handover {
            self.metrics.kv_bytes.add(handover.bytes, &[]);
            self.metrics.exposed.record(handover.exposed_us as f64 / 1e6, &[]);
        }
    }

    /// It failed.
    pub fn failed(&mut self, code: &'static str) {
        self.metrics.traffic(Traffic::failed);
        self.close(code);
    }

    fn close(&mut self, outcome: &'static str) {
        self.over = true;
        self.metrics.duration.record(self.started.elapsed().as_secs_f64(), &[]);
        let outcome = KeyValue::new("outcome", outcome);
        self.metrics.tenant_requests.add(1, &[outcome.clone(), self.tenant()]);
        self.metrics.requests.add(1, &[outcome]);
    }

    fn tenant(&self) -> KeyValue {
        KeyValue::new("tenant", self.tenant.clone())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if !self.over {
            self.close("cancelled");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_bounded_and_stay() {
        let mut labels = BTreeSet::new();
        for i in 0..2 * TENANT_LABELS_MAX {
            let expected = if i < TENANT_LABELS_MAX { format!("t{i}") } else { OTHER_TENANTS.to_owned() };
            assert_eq!(*label(&mut labels, &format!("t{i}")), *expected);
        }
        assert_eq!((&*label(&mut labels, "t3"), labels.len()), ("t3", TENANT_LABELS_MAX));
    }
}
