//! Relays before the UDP endpoints of a cluster and the TCP door of a client, so that a test decides what becomes of every packet:
//! delay, reordering, loss, a cut of all that one process says and hears, and packets that wait until they are let go. What is lost is
//! counted: a fault that lost nothing did not happen.
//!
//! Every process dials the relays' addresses and listens at its own. A process uses its UDP ports (a node has one for links and one for KV)
//! for dialing and accepting, so the source of a packet tells who sent it. Nothing of a packet is looked into: it is encrypted.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep_until, timeout};

/// Packets that wait in one direction of a flow; one more is lost, as in any router.
const QUEUE_MAX: usize = 8192;
/// A flow on which nothing comes back for so long is forgotten. Connections say something several times a second.
const FLOW_IDLE_MAX: Duration = Duration::from_secs(20);
/// The largest UDP payload.
const PACKET_BYTES_MAX: usize = 65_536;

/// What a process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A replica of the coordinator.
    Coordinator,
    /// A prefill node.
    Prefill,
    /// A decode node.
    Decode,
}

/// What is relayed for one process.
#[derive(Clone, Copy, Debug)]
pub struct Listens {
    /// What it is.
    pub kind: Kind,
    /// Where it takes links.
    pub links: SocketAddr,
    /// Where it takes KV, if it does.
    pub lanes: Option<SocketAddr>,
}

/// One direction between two kinds of process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    /// Who sends.
    pub from: Kind,
    /// Who receives.
    pub to: Kind,
}

/// Both directions between prefill and decode nodes.
pub const HANDOVER_WAYS: [Way; 2] = [Way { from: Kind::Prefill, to: Kind::Decode }, Way { from: Kind::Decode, to: Kind::Prefill }];

/// What becomes of packets.
#[derive(Clone, Debug, Default)]
pub struct Weather {
    /// Processes that nothing reaches and nothing leaves.
    pub cut: Vec<usize>,
    /// Directions whose packets are lost.
    pub lost: Vec<Way>,
    /// Directions whose packets wait.
    pub held: Vec<Way>,
    /// How long packets of a direction take.
    pub delay: Vec<(Way, Duration)>,
    /// One of so many packets of those directions changes places with the one after it; 0 for none.
    pub swap_one_in: u64,
    /// Whether all packets between ports for KV are lost, as behind a wall that lets only links through.
    pub lanes_lost: bool,
}

/// Who sends and who receives; `None` for somebody who is no part of the cluster.
#[derive(Clone, Copy)]
struct Ends {
    from: Option<usize>,
    to: Option<usize>,
    /// Whether it is KV.
    lane: bool,
}

/// One port of a process, and the relay's before it.
struct Port {
    listens: SocketAddr,
    door: UdpSocket,
}

struct End {
    kind: Kind,
    links: Port,
    lanes: Option<Port>,
    /// Packets to or from it that were lost.
    dropped: AtomicU64,
}

struct Hub {
    ends: Vec<End>,
    weather: watch::Sender<Weather>,
    carried: AtomicU64,
}

/// A relay before each process. Dropping it ends them.
pub struct Relays {
    hub: Arc<Hub>,
    tasks: Vec<AbortHandle>,
}

impl Drop for Relays {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

impl Relays {
    /// A relay for each process.
    ///
    /// # Errors
    /// What the system says.
    pub async fn start(processes: &[Listens]) -> std::io::Result<Self> {
        let mut ends = Vec::new();
        for process in processes {
            let links = Port::before(process.links).await?;
            let lanes = match process.lanes {
                Some(lanes) => Some(Port::before(lanes).await?),
                None => None,
            };
            ends.push(End { kind: process.kind, links, lanes, dropped: AtomicU64::new(0) });
        }
        let hub = Arc::new(Hub { ends, weather: watch::Sender::default(), carried: AtomicU64::new(0) });
        let all = (0..hub.ends.len()).flat_map(|to| [(to, false), (to, true)]);
        let ports = all.filter(|&(to, lane)| hub.port(to, lane).is_some());
        let tasks = ports.map(|(to, lane)| tokio::spawn(keep_door(hub.clone(), to, lane)).abort_handle()).collect();
        Ok(Self { hub, tasks })
    }

    /// The address at which others reach a process.
    ///
    /// # Panics
    /// When the socket is gone.
    #[must_use]
    pub fn door(&self, process: usize) -> SocketAddr {
        self.hub.ends[process].links.address()
    }

    /// The address at which others reach it with KV, if it takes any.
    ///
    /// # Panics
    /// When the socket is gone.
    #[must_use]
    pub fn lanes_door(&self, process: usize) -> Option<SocketAddr> {
        self.hub.ends[process].lanes.as_ref().map(Port::address)
    }

    /// Changes the weather.
    pub fn set(&self, change: impl FnOnce(&mut Weather)) {
        self.hub.weather.send_modify(change);
    }

    /// Packets to or from a process that were lost so far.
    #[must_use]
    pub fn dropped(&self, process: usize) -> u64 {
        self.hub.ends[process].dropped.load(Relaxed)
    }
}

impl Port {
    async fn before(listens: SocketAddr) -> std::io::Result<Self> {
        Ok(Self { listens, door: UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await? })
    }

    fn address(&self) -> SocketAddr {
        self.door.local_addr().expect("a bound socket has an address")
    }
}

impl Weather {
    fn loses(&self, hub: &Hub, ends: Ends) -> bool {
        let cut = |end: Option<usize>| end.is_some_and(|end| self.cut.contains(&end));
        (self.lanes_lost && ends.lane)
            || cut(ends.from)
            || cut(ends.to)
            || hub.way(ends).is_some_and(|way| self.lost.contains(&way))
    }

    fn holds(&self, hub: &Hub, ends: Ends) -> bool {
        hub.way(ends).is_some_and(|way| self.held.contains(&way))
    }

    fn swaps(&self, number: u64) -> bool {
        self.swap_one_in > 0 && number.is_multiple_of(self.swap_one_in)
    }

    fn delay(&self, hub: &Hub, ends: Ends) -> Duration {
        let way = hub.way(ends);
        self.delay.iter().find(|(delayed, _)| Some(*delayed) == way).map_or(Duration::ZERO, |(_, delay)| *delay)
    }
}

impl Hub {
    fn port(&self, process: usize, lane: bool) -> Option<&Port> {
        let end = &self.ends[process];
        if lane { end.lanes.as_ref() } else { Some(&end.links) }
    }

    /// Whose port of that sort this is.
    fn whose(&self, source: SocketAddr, lane: bool) -> Option<usize> {
        (0..self.ends.len()).find(|&end| self.port(end, lane).is_some_and(|port| port.listens == source))
    }

    fn way(&self, ends: Ends) -> Option<Way> {
        Some(Way { from: self.ends[ends.from?].kind, to: self.ends[ends.to?].kind })
    }

    fn dropped(&self, ends: Ends) {
        for end in [ends.from, ends.to].into_iter().flatten() {
            self.ends[end].dropped.fetch_add(1, Relaxed);
        }
    }
}

/// A packet and when it came.
type Packet = (Instant, Vec<u8>);

/// Sorts what comes to a process by who sent it.
async fn keep_door(hub: Arc<Hub>, to: usize, lane: bool) {
    let Some(port) = hub.port(to, lane) else { return };
    let mut flows: HashMap<SocketAddr, mpsc::Sender<Packet>> = HashMap::new();
    let mut buffer = vec![0; PACKET_BYTES_MAX];
    loop {
        // An error is an earlier packet's, whose receiver is dead.
        let Ok((bytes, source)) = port.door.recv_from(&mut buffer).await else { continue };
        if flows.get(&source).is_none_or(mpsc::Sender::is_closed) {
            flows.retain(|_, flow| !flow.is_closed());
            let (queue, packets) = mpsc::channel(QUEUE_MAX);
            let ends = Ends { from: hub.whose(source, lane), to: Some(to), lane };
            tokio::spawn(keep_flow(hub.clone(), ends, source, packets));
            flows.insert(source, queue);
        }
        // A full queue loses packets.
        let _ = flows[&source].try_send((Instant::now(), buffer[..bytes].to_vec()));
    }
}

/// Carries what one sender and one process say to each other, until nothing comes back any more.
async fn keep_flow(hub: Arc<Hub>, ends: Ends, source: SocketAddr, packets: mpsc::Receiver<Packet>) {
    let Ok(socket) = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await else { return };
    let Some(port) = ends.to.and_then(|to| hub.port(to, ends.lane)) else { return };
    if socket.connect(port.listens).await.is_err() {
        return;
    }
    let (queue, back) = mpsc::channel(QUEUE_MAX);
    let ends_back = Ends { from: ends.to, to: ends.from, lane: ends.lane };
    let (socket, door) = (&socket, &port.door);
    tokio::select! {
        () = carry(&hub, ends, packets, Out { socket, to: None }) => {}
        () = carry(&hub, ends_back, back, Out { socket: door, to: Some(source) }) => {}
        () = listen(socket, queue) => {}
    }
}

async fn listen(socket: &UdpSocket, queue: mpsc::Sender<Packet>) {
    let mut buffer = vec![0; PACKET_BYTES_MAX];
    while let Ok(come) = timeout(FLOW_IDLE_MAX, socket.recv(&mut buffer)).await {
        if let Ok(bytes) = come {
            let _ = queue.try_send((Instant::now(), buffer[..bytes].to_vec()));
        } else {
            // The process is dead: what was sent to it was refused.
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

/// Where packets leave: a connected socket, or one that is told where to.
struct Out<'a> {
    socket: &'a UdpSocket,
    to: Option<SocketAddr>,
}

impl Out<'_> {
    /// A packet to a dead process is lost, as it should be.
    async fn send(&self, packet: &[u8]) {
        let _ = match self.to {
            Some(to) => self.socket.send_to(packet, to).await,
            None => self.socket.send(packet).await,
        };
    }
}

async fn carry(hub: &Hub, ends: Ends, mut packets: mpsc::Receiver<Packet>, out: Out<'_>) {
    let mut weather = hub.weather.subscribe();
    let mut late = None;
    while let Some((come, packet)) = packets.recv().await {
        let number = hub.carried.fetch_add(1, Relaxed);
        let (delay, swaps) = (weather.borrow().delay(hub, ends), weather.borrow().swaps(number));
        if late.is_none() && swaps && !delay.is_zero() {
            late = Some(packet);
            continue;
        }
        sleep_until(come + delay).await;
        if weather.wait_for(|weather| !weather.holds(hub, ends)).await.is_err() {
            return;
        }
        for packet in std::iter::once(packet).chain(late.take()) {
            if weather.borrow().loses(hub, ends) {
                hub.dropped(ends);
            } else {
                out.send(&packet).await;
            }
        }
    }
}

/// A relay before an HTTP door, for one client that can be cut off: TCP loses nothing, so what is said meanwhile waits.
pub struct ClientRelay {
    /// Where the client connects.
    pub address: SocketAddr,
    cut: watch::Sender<bool>,
    waited: Arc<AtomicU64>,
    task: AbortHandle,
}

impl Drop for ClientRelay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl ClientRelay {
    /// A relay to `target`.
    ///
    /// # Errors
    /// What the system says.
    pub async fn start(target: SocketAddr) -> std::io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let (address, cut, waited) = (listener.local_addr()?, watch::Sender::new(false), Arc::new(AtomicU64::new(0)));
        let (is_cut, count) = (cut.subscribe(), waited.clone());
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let Ok(door) = TcpStream::connect(target).await else { continue };
                tokio::spawn(join(client, door, is_cut.clone(), count.clone()));
            }
        });
        Ok(Self { address, cut, waited, task: task.abort_handle() })
    }

    /// Cuts the client off, or lets it back.
    pub fn cut(&self, cut: bool) {
        self.cut.send_replace(cut);
    }

    /// Pieces that had to wait so far.
    #[must_use]
    pub fn waited(&self) -> u64 {
        self.waited.load(Relaxed)
    }
}

/// Carries both directions; the end of either ends both, as a client that dies does.
async fn join(client: TcpStream, door: TcpStream, cut: watch::Receiver<bool>, waited: Arc<AtomicU64>) {
    for stream in [&client, &door] {
        // Slower, but not wrong, without it.
        let _ = stream.set_nodelay(true);
    }
    let ((client_in, client_out), (door_in, door_out)) = (client.into_split(), door.into_split());
    tokio::select! {
        () = pour(client_in, door_out, cut.clone(), &waited) => {}
        () = pour(door_in, client_out, cut, &waited) => {}
    }
}

async fn pour(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut cut: watch::Receiver<bool>, waited: &AtomicU64) {
    let mut buffer = vec![0; PACKET_BYTES_MAX];
    while let Ok(bytes @ 1..) = from.read(&mut buffer).await {
        if *cut.borrow() {
            waited.fetch_add(1, Relaxed);
        }
        if cut.wait_for(|cut| !cut).await.is_err() {
            return;
        }
        if to.write_all(&buffer[..bytes]).await.is_err() {
            return;
        }
    }
}
