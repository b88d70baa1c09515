//! The paths over TCP: cells in turn on one connection, with blocking calls, and one byte back when all are in their slots.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;

use anyhow::Result;
use millrace_node::pki::{ALPN, TLS_NAME};
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, ServerConnection, StreamOwned};

use super::end::{Bench, RoundFn};

/// Plaintext that waits to be encrypted, at most: several records of 16 KiB go out in one call.
const TLS_BUFFER: usize = 256 << 10;

pub(super) fn sender(bench: &Arc<Bench>, peer: SocketAddr) -> Result<RoundFn> {
    Ok(send_over(bench, TcpStream::connect(peer)?))
}

pub(super) fn receiver(bench: &Arc<Bench>, announce: &dyn Fn(SocketAddr)) -> Result<RoundFn> {
    Ok(receive_over(bench, accept(announce)?))
}

pub(super) fn tls_sender(bench: &Arc<Bench>, peer: SocketAddr) -> Result<RoundFn> {
    let mut connection = ClientConnection::new(Arc::new(bench.identity()?.client_tls(ALPN)?), ServerName::try_from(TLS_NAME)?)?;
    connection.set_buffer_limit(Some(TLS_BUFFER));
    Ok(send_over(bench, StreamOwned::new(connection, TcpStream::connect(peer)?)))
}

pub(super) fn tls_receiver(bench: &Arc<Bench>, announce: &dyn Fn(SocketAddr)) -> Result<RoundFn> {
    let connection = ServerConnection::new(Arc::new(bench.identity()?.server_tls(ALPN)?))?;
    Ok(receive_over(bench, StreamOwned::new(connection, accept(announce)?)))
}

fn accept(announce: &dyn Fn(SocketAddr)) -> Result<TcpStream> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    announce(listener.local_addr()?);
    Ok(listener.accept()?.0)
}

fn send_over(bench: &Arc<Bench>, mut stream: impl Read + Write + 'static) -> RoundFn {
    let bench = Arc::clone(bench);
    Box::new(move || {
        for slot in bench.round() {
            stream.write_all(&bench.slab.read(slot, 0))?;
        }
        stream.flush()?;
        Ok(stream.read_exact(&mut [0])?)
    })
}

fn receive_over(bench: &Arc<Bench>, mut stream: impl Read + Write + 'static) -> RoundFn {
    let bench = Arc::clone(bench);
    Box::new(move || {
        for slot in bench.round() {
            stream.read_exact(&mut bench.slab.write(slot, 0))?;
        }
        stream.write_all(&[1])?;
        Ok(stream.flush()?)
    })
}
