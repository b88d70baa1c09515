//! The front before scripted gateways: raw sockets that say what a test wants and die when it wants.

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::*;
use crate::http::BODY_BYTES_MAX;

/// What a scripted gateway does with a connection, after it has read a request.
#[derive(Clone)]
struct Script {
    say: &'static str,
    /// Keep the connection after that, until the client leaves.
    stay: bool,
    /// Say that it is ready, when asked; else say nothing.
    ready: bool,
}

const WHOLE: Script = Script { say: "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", stay: true, ready: true };
const SILENT: Script = Script { say: "", stay: false, ready: true };
const BUSY: Script = Script { say: "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 4\r\n\r\nbusy", stay: true, ready: true };
const DIES_IN_STREAM: Script = Script {
    say: "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n\
          f\r\ndata: {\"a\":1}\n\n\r\n9\r\ndata: {\"b\r\n",
    stay: false,
    ready: true,
};
const OPEN_STREAM: Script = Script {
    say: "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n9\r\ndata: x\n\n\r\n",
    stay: true,
    ready: true,
};
/// With notes: a token, and a half of the next.
const DIES_WITH_NOTES: Script = Script {
    say: "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nx-millrace-front: noted\r\ntransfer-encoding: chunked\r\n\r\n\
          1a\r\n: t 0 7 16\ndata: {\"a\":1}\n\n\r\n13\r\n: t 0 8 16\ndata: {\"\r\n",
    stay: false,
    ready: true,
};
/// The same, and it does not die, but stands still.
const STANDS_STILL: Script = Script { stay: true, ready: false, ..DIES_WITH_NOTES };
/// The next token, and the end.
const GOES_ON: Script = Script {
    say: "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nx-millrace-front: noted\r\ntransfer-encoding: chunked\r\n\r\n\
          1a\r\n: t 0 8 16\ndata: {\"b\":2}\n\n\r\n15\r\n: e 0\ndata: {\"e\":3}\n\n\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n",
    stay: true,
    ready: true,
};

struct Upstream {
    gateway: Gateway,
    /// Requests seen, each with its body.
    requests: Arc<parking_lot::Mutex<Vec<String>>>,
    /// Connections that their client has left.
    left: watch::Receiver<usize>,
}

async fn upstream(name: &str, script: Script) -> Upstream {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let gateway = Gateway { name: name.into(), address: listener.local_addr().unwrap(), ready: true, leader: false };
    let requests: Arc<parking_lot::Mutex<Vec<String>>> = Arc::default();
    let (leaving, left) = watch::channel(0);
    let seen = requests.clone();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let (script, seen, leaving) = (script.clone(), seen.clone(), leaving.clone());
            tokio::spawn(async move {
                let mut asked = false;
                while let Some(request) = read_request(&mut stream).await {
                    if request.starts_with("GET /readyz") {
                        let say: &[u8] = if script.ready { b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n" } else { b"" };
                        stream.write_all(say).await.unwrap();
                        continue;
                    }
                    asked = true;
                    seen.lock().push(request);
                    stream.write_all(script.say.as_bytes()).await.unwrap();
                    if !script.stay {
                        break;
                    }
                }
                leaving.send_modify(|left| *left += usize::from(asked));
            });
        }
    });
    Upstream { gateway, requests, left }
}

/// A request with a declared length; `None` when the client has left.
async fn read_request(stream: &mut TcpStream) -> Option<String> {
    let mut text = Vec::new();
    loop {
        let mut buffer = [0; 4096];
        let n = stream.read(&mut buffer).await.ok().filter(|n| *n > 0)?;
        text.extend_from_slice(&buffer[..n]);
        let whole = String::from_utf8_lossy(&text).into_owned();
        let Some((head, body)) = whole.split_once("\r\n\r\n") else { continue };
        let length = head.to_lowercase().lines().find_map(|l| l.strip_prefix("content-length:").map(|v| v.trim().parse().unwrap()));
        if body.len() >= length.unwrap_or(0) {
            return Some(whole);
        }
    }
}

async fn front(gateways: Vec<Gateway>) -> (SocketAddr, watch::Sender<Vec<Gateway>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (sender, receiver) = watch::channel(gateways);
    tokio::spawn(serve(listener, receiver, std::future::pending()));
    (address, sender)
}

async fn post(front: SocketAddr, body: &str) -> (StatusCode, String) {
    let request =
        hyper::Request::post(format!("http://{front}/v1/chat/completions?x=1")).body(Full::new(Bytes::from(body.to_owned())));
    let response = http_client().request(request.unwrap()).await.unwrap();
    let status = response.status();
    (status, String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap())
}

#[tokio::test]
async fn a_stream_whose_gateway_dies_ends_with_one_typed_event_and_no_half_event() {
    let dying = upstream("c-1", DIES_IN_STREAM).await;
    let (front, _keep) = front(vec![dying.gateway.clone()]).await;
    let (status, text) = post(front, "{}").await;
    assert_eq!(status, StatusCode::OK);
    let events: Vec<&str> = text.split_terminator("\n\n").collect();
    assert_eq!(events.len(), 2, "{text}");
    assert_eq!(events[0], "data: {\"a\":1}");
    let error: serde_json::Value = serde_json::from_str(events[1].strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!(error["error"]["type"], "server_error");
    assert_eq!(error["error"]["code"], "gateway_lost");
    assert!(error["error"]["param"].is_null() && error["error"]["message"].as_str().unwrap().contains("c-1"));
}

/// The order of a request that a gateway saw, and what came before the client's body.
fn carried(request: &str) -> (String, String) {
    let (head, body) = request.split_once("\r\n\r\n").unwrap();
    let order = head.lines().find_map(|line| line.strip_prefix("x-millrace-front: ")).unwrap();
    let (order, bytes) = order.rsplit_once(" resume=").unwrap();
    let (resume, rest) = body.split_at(bytes.parse().unwrap());
    assert_eq!(rest, "{}");
    (order.to_owned(), resume.to_owned())
}

#[tokio::test]
async fn a_stream_goes_on_at_another_gateway_and_the_client_sees_no_seam() {
    for script in [DIES_WITH_NOTES, STANDS_STILL] {
        let (dying, healthy) = (upstream("c-1", script).await, upstream("c-2", GOES_ON).await);
        let (front, _keep) = front(vec![dying.gateway.clone(), Gateway { leader: true, ..healthy.gateway.clone() }]).await;
        let (status, text) = post(front, "{}").await;
        assert_eq!(status, StatusCode::OK);
        assert_eq!(text, "data: {\"a\":1}\n\ndata: {\"b\":2}\n\ndata: {\"e\":3}\n\ndata: [DONE]\n\n");
        let (first, second) = (carried(&dying.requests.lock()[0]), carried(&healthy.requests.lock()[0]));
        assert_eq!(first.0, second.0, "one name, one seed");
        assert_eq!(first.1, "");
        assert_eq!(second.1, "{\"choices\":[{\"cached_tokens\":16,\"ended\":false,\"tokens\":[7]}]}");
    }
}

#[tokio::test]
async fn a_gateway_that_stands_still_before_its_first_byte_is_replaced() {
    let silent = Script { say: "", stay: true, ready: false };
    let (still, healthy) = (upstream("c-1", silent).await, upstream("c-2", WHOLE).await);
    let (front, _keep) = front(vec![still.gateway.clone(), Gateway { leader: true, ..healthy.gateway.clone() }]).await;
    assert_eq!(post(front, "{}").await, (StatusCode::OK, "ok".into()));
    assert_eq!(still.requests.lock().len(), 1);
}

#[tokio::test]
async fn a_client_cannot_give_the_order_of_a_front() {
    let healthy = upstream("c-1", WHOLE).await;
    let (front, _keep) = front(vec![healthy.gateway.clone()]).await;
    let request = hyper::Request::post(format!("http://{front}/")).header(HEADER, "id=1 resume=2");
    http_client().request(request.body(Full::from("{}")).unwrap()).await.unwrap();
    assert_eq!(carried(&healthy.requests.lock()[0]).1, "");
}

#[tokio::test]
async fn a_gateway_that_dies_before_its_first_byte_is_replaced_with_the_same_request() {
    let (dying, healthy) = (upstream("c-1", SILENT).await, upstream("c-2", WHOLE).await);
    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let refusing = Gateway { address: gone.local_addr().unwrap(), ..dying.gateway.clone() };
    drop(gone);
    let (front, _keep) = front(vec![refusing, dying.gateway.clone(), Gateway { leader: true, ..healthy.gateway.clone() }]).await;
    assert_eq!(post(front, "{\"n\":1}").await, (StatusCode::OK, "ok".into()));
    for upstream in [&dying, &healthy] {
        let requests = upstream.requests.lock().clone();
        assert!(requests[0].starts_with("POST /v1/chat/completions?x=1 HTTP/1.1"), "{requests:?}");
        assert!(requests[0].ends_with("{\"n\":1}"), "{requests:?}");
    }
}

#[tokio::test]
async fn a_gateway_that_refuses_for_now_is_replaced_and_the_last_refusal_is_passed_on() {
    let (busy, healthy) = (upstream("c-1", BUSY).await, upstream("c-2", WHOLE).await);
    let (front, gateways) = front(vec![busy.gateway.clone(), Gateway { leader: true, ..healthy.gateway.clone() }]).await;
    assert_eq!(post(front, "{}").await, (StatusCode::OK, "ok".into()));
    gateways.send_replace(vec![busy.gateway.clone()]);
    assert_eq!(post(front, "{}").await, (StatusCode::SERVICE_UNAVAILABLE, "busy".into()));
}

#[tokio::test]
async fn without_a_gateway_the_error_has_the_shape_of_the_api() {
    let (front, _keep) = front(Vec::new()).await;
    let (status, text) = post(front, "{}").await;
    let error: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!((status, &error["error"]["code"]), (StatusCode::SERVICE_UNAVAILABLE, &json!("no_gateway")));
    assert_eq!(error["error"]["type"], "server_error");
}

#[tokio::test]
async fn a_body_over_the_bound_is_refused_whole_and_reaches_no_gateway() {
    let healthy = upstream("c-1", WHOLE).await;
    let (front, _keep) = front(vec![healthy.gateway.clone()]).await;
    let (status, text) = post(front, &" ".repeat(BODY_BYTES_MAX + 1)).await;
    let error: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!((status, &error["error"]["code"]), (StatusCode::PAYLOAD_TOO_LARGE, &json!("body_too_large")));
    assert_eq!(error["error"]["type"], "invalid_request_error");
    assert!(healthy.requests.lock().is_empty());
}

#[tokio::test]
async fn a_client_that_leaves_takes_its_stream_from_the_gateway() {
    let mut open = upstream("c-1", OPEN_STREAM).await;
    let (front, _keep) = front(vec![open.gateway.clone()]).await;
    let mut client = TcpStream::connect(front).await.unwrap();
    client.write_all(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n").await.unwrap();
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains("data: x\n\n") {
        assert!(client.read_buf(&mut seen).await.unwrap() > 0);
    }
    drop(client);
    open.left.wait_for(|left| *left == 1).await.unwrap();
}

#[test]
fn followers_take_turns_and_the_leader_and_the_unready_come_last() {
    let gateway =
        |name: &str, ready, leader| Gateway { name: name.into(), address: SocketAddr::from(([127, 0, 0, 1], 1)), ready, leader };
    let all =
        vec![gateway("lead", true, true), gateway("a", true, false), gateway("late", false, false), gateway("b", true, false)];
    let names = |turn| order(all.clone(), turn).into_iter().map(|g| g.name).collect::<Vec<_>>();
    assert_eq!(names(0), ["a", "b", "lead", "late"]);
    assert_eq!(names(1), ["b", "a", "lead", "late"]);
    assert_eq!(names(2), names(0));
    assert_eq!(order(vec![gateway("lead", true, true)], 5).len(), 1);
    assert!(order(Vec::new(), 1).is_empty());
}
