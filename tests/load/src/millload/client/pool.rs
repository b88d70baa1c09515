//! Kept HTTP/1.1 connections to one server. A request takes an idle one or makes a new one; there is no queue for connections, because the
//! wait for one would hide from the figures.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use bytes::Bytes;
use http_body_util::Full;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// A connection that can take requests.
pub type Sender = SendRequest<Full<Bytes>>;

/// Idle connections that are kept where some are; more are closed.
pub const IDLE_MAX: usize = 16_384;

/// Where requests go.
#[derive(Clone, Debug)]
pub struct Target {
    /// The server's address.
    pub address: SocketAddr,
    /// For the `host` header.
    pub authority: String,
    /// Before `/v1/…`.
    pub prefix: String,
}

impl Target {
    /// Reads `http://HOST:PORT`, with or without a path before `/v1`.
    ///
    /// # Errors
    /// It is no such address, or the name has none.
    pub fn parse(url: &str) -> Result<Self> {
        let rest = url.strip_prefix("http://").with_context(|| format!("{url}: expected http://HOST:PORT"))?;
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let with_port = if authority.contains(':') { authority.to_owned() } else { format!("{authority}:80") };
        let mut found = with_port.to_socket_addrs().with_context(|| format!("{url}: {with_port}"))?;
        let address = found.next().with_context(|| format!("{with_port} has no address"))?;
        let path = path.trim_end_matches('/').trim_end_matches("v1").trim_end_matches('/');
        let prefix = if path.is_empty() { String::new() } else { format!("/{path}") };
        Ok(Self { address, authority: authority.to_owned(), prefix })
    }
}

/// The connections of one generator thread.
#[derive(Clone, Debug)]
pub struct Pool {
    address: SocketAddr,
    idle_max: usize,
    idle: Arc<Mutex<Vec<Sender>>>,
}

impl Pool {
    /// With no connections yet; keeps at most `idle_max` that are idle.
    #[must_use]
    pub fn new(target: &Target, idle_max: usize) -> Self {
        Self { address: target.address, idle_max, idle: Arc::default() }
    }

    /// An idle connection, the one used last, or a new one.
    ///
    /// # Errors
    /// The server takes none.
    pub async fn take(&self) -> io::Result<Sender> {
        loop {
            let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            match idle {
                Some(sender) if sender.is_ready() => return Ok(sender),
                Some(_) => {}
                None => return self.connect().await,
            }
        }
    }

    /// A new connection.
    ///
    /// # Errors
    /// The server takes none.
    pub async fn connect(&self) -> io::Result<Sender> {
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
        tokio::spawn(connection);
        Ok(sender)
    }

    /// Gives a connection back, once its answer is read to the end.
    pub fn give(&self, mut sender: Sender) {
        if sender.is_closed() {
            return;
        }
        if sender.is_ready() {
            return self.keep(sender);
        }
        let pool = self.clone();
        tokio::spawn(async move {
            if sender.ready().await.is_ok() {
                pool.keep(sender);
            }
        });
    }

    fn keep(&self, sender: Sender) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < self.idle_max {
            idle.push(sender);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read() {
        let target = Target::parse("http://127.0.0.1:8080/v1/").unwrap();
        assert_eq!((target.address.to_string().as_str(), target.prefix.as_str()), ("127.0.0.1:8080", ""));
        assert_eq!(Target::parse("http://127.0.0.1:1/a/b").unwrap().prefix, "/a/b");
        assert!(Target::parse("https://127.0.0.1:1").is_err());
        assert!(Target::parse("127.0.0.1:1").is_err());
    }

    #[tokio::test]
    async fn idle_connections_are_kept_or_not() {
        for (idle_max, connections) in [(IDLE_MAX, 1), (0, 3)] {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let target = Target::parse(&format!("http://{}", listener.local_addr().unwrap())).unwrap();
            let pool = Pool::new(&target, idle_max);
            for _ in 0..3 {
                let mut sender = pool.take().await.unwrap();
                sender.ready().await.unwrap();
                pool.give(sender);
            }
            let mut taken = Vec::new();
            while let Ok(accepted) = tokio::time::timeout(std::time::Duration::from_millis(200), listener.accept()).await {
                taken.push(accepted.unwrap());
            }
            assert_eq!(taken.len(), connections);
        }
    }
}
