//! The relays do to packets what they are told, and count what they lose.
#![allow(clippy::unwrap_used)]

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use millrace_e2e::relay::{Kind, Listens, Relays, Way};
use tokio::net::UdpSocket;
use tokio::time::{Instant, timeout};

const WAY: Way = Way { from: Kind::Prefill, to: Kind::Decode };
/// Packets on loopback are there at once; this long without one means that there is none.
const NOTHING: Duration = Duration::from_millis(200);

/// Two sockets that are processes to the relays: `from` dials `to` at its door.
async fn pair() -> (UdpSocket, UdpSocket, Relays) {
    let bind = || UdpSocket::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
    let (from, to) = (bind().await.unwrap(), bind().await.unwrap());
    let listens = |kind, socket: &UdpSocket| Listens { kind, links: socket.local_addr().unwrap(), lanes: None };
    let ends = [listens(WAY.from, &from), listens(WAY.to, &to)];
    let relays = Relays::start(&ends).await.unwrap();
    from.connect(relays.door(1)).await.unwrap();
    (from, to, relays)
}

/// The next packet's first byte, and where an answer goes.
async fn next(socket: &UdpSocket) -> Option<(u8, SocketAddr)> {
    let mut buffer = [0; 8];
    let (_, source) = timeout(NOTHING, socket.recv_from(&mut buffer)).await.ok()?.unwrap();
    Some((buffer[0], source))
}

#[tokio::test]
async fn packets_go_both_ways_and_in_order() {
    let (from, to, _relays) = pair().await;
    for n in 0..20 {
        from.send(&[n]).await.unwrap();
    }
    for n in 0..20 {
        let (got, source) = next(&to).await.unwrap();
        assert_eq!(got, n);
        to.send_to(&[100 + n], source).await.unwrap();
    }
    for n in 0..20 {
        assert_eq!(next(&from).await.unwrap().0, 100 + n);
    }
}

#[tokio::test]
async fn what_is_held_comes_later_and_what_is_cut_off_is_lost_and_counted() {
    let (from, to, relays) = pair().await;
    relays.set(|weather| weather.held = vec![WAY]);
    from.send(&[1]).await.unwrap();
    assert_eq!(next(&to).await, None, "it is held");
    relays.set(|weather| weather.held.clear());
    assert_eq!(next(&to).await.unwrap().0, 1);
    relays.set(|weather| weather.cut = vec![0]);
    from.send(&[2]).await.unwrap();
    assert_eq!((next(&to).await, relays.dropped(0), relays.dropped(1)), (None, 1, 1));
    relays.set(|weather| weather.cut.clear());
    from.send(&[3]).await.unwrap();
    assert_eq!(next(&to).await.unwrap().0, 3, "what was lost stays lost");
}

#[tokio::test]
async fn packets_take_their_time_and_change_places() {
    let (from, to, relays) = pair().await;
    let delay = NOTHING / 4;
    relays.set(|weather| weather.delay = vec![(WAY, delay)]);
    let sent = Instant::now();
    from.send(&[1]).await.unwrap();
    assert_eq!(next(&to).await.unwrap().0, 1);
    assert!(sent.elapsed() >= delay, "{:?}", sent.elapsed());
    relays.set(|weather| weather.swap_one_in = 1);
    for n in 2..4 {
        from.send(&[n]).await.unwrap();
    }
    assert_eq!((next(&to).await.unwrap().0, next(&to).await.unwrap().0), (3, 2));
}

#[tokio::test]
async fn ports_for_kv_have_a_door_of_their_own_and_can_be_lost_alone() {
    let bind = || UdpSocket::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
    let sockets = [bind().await.unwrap(), bind().await.unwrap(), bind().await.unwrap(), bind().await.unwrap()];
    let [from, from_lane, to, to_lane] = &sockets;
    let listens = |kind, links: &UdpSocket, lanes: &UdpSocket| Listens {
        kind,
        links: links.local_addr().unwrap(),
        lanes: lanes.local_addr().ok(),
    };
    let relays = Relays::start(&[listens(WAY.from, from, from_lane), listens(WAY.to, to, to_lane)]).await.unwrap();
    from.connect(relays.door(1)).await.unwrap();
    from_lane.connect(relays.lanes_door(1).unwrap()).await.unwrap();
    let say = async |lanes: bool, n: u8| {
        let (out, into) = if lanes { (from_lane, to_lane) } else { (from, to) };
        out.send(&[n]).await.unwrap();
        next(into).await.map(|(got, _)| got)
    };
    assert_eq!((say(false, 1).await, say(true, 2).await), (Some(1), Some(2)));
    relays.set(|weather| weather.lanes_lost = true);
    assert_eq!((say(false, 3).await, say(true, 4).await), (Some(3), None));
    assert_eq!((relays.dropped(0), relays.dropped(1)), (1, 1), "who sent it is known by its port for KV too");
    relays.set(|weather| (weather.lanes_lost, weather.cut) = (false, vec![1]));
    assert_eq!((say(false, 5).await, say(true, 6).await), (None, None), "a cut cuts both");
}
