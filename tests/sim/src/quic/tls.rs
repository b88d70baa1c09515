//! TLS and transport settings of the simulated network: those of the product, with one fixed Ed25519 key for all, so that certificates and
//! signatures have one length.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use quinn_proto::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn_proto::{ClientConfig, IdleTimeout, ServerConfig, TransportConfig, ValidationTokenConfig, VarInt};
use rcgen::{CertificateParams, KeyPair, PKCS_ED25519};
use rustls::RootCertStore;
use rustls::client::Resumption;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::WebPkiClientVerifier;

use super::NAME;

/// What `millrace-node` sets: a peer that is silent this long is lost, and each side says something at least this often.
const IDLE: Duration = Duration::from_secs(3);
const KEEP_ALIVE: Duration = Duration::from_millis(300);
/// KV streams that a peer may have open at once: few, so that some have to wait.
const UNI_STREAMS_MAX: u32 = 8;
/// A private key in PKCS #8, without its 32 bytes.
const PKCS8_ED25519: [u8; 16] = [0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];

/// Both roles of an endpoint.
pub(super) struct Tls {
    pub client: ClientConfig,
    pub server: Arc<ServerConfig>,
}

/// The one certificate and its key.
fn identity() -> &'static (CertificateDer<'static>, Vec<u8>) {
    static IDENTITY: OnceLock<(CertificateDer<'static>, Vec<u8>)> = OnceLock::new();
    IDENTITY.get_or_init(|| {
        let key = [&PKCS8_ED25519[..], &[7; 32]].concat();
        let pair = KeyPair::from_pkcs8_der_and_sign_algo(&PrivatePkcs8KeyDer::from(key.clone()), &PKCS_ED25519);
        let pair = pair.expect("a key of 32 bytes is one");
        let params = CertificateParams::new(vec![NAME.to_owned()]).expect("the name is one");
        let certificate = params.self_signed(&pair).expect("the key can sign");
        (certificate.der().clone(), key)
    })
}

/// Settings for one world; nothing is shared with another.
pub(super) fn configs(window: u32) -> Tls {
    let (certificate, key) = identity();
    let key = || PrivateKeyDer::Pkcs8(key.clone().into());
    let mut roots = RootCertStore::empty();
    roots.add(certificate.clone()).expect("our own certificate can be trusted");
    let roots = Arc::new(roots);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let versions = &[&rustls::version::TLS13];
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider)).build();
    let mut server = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(versions)
        .expect("the provider speaks TLS 1.3")
        .with_client_cert_verifier(verifier.expect("there is a root"))
        .with_single_cert(vec![certificate.clone()], key())
        .expect("certificate and key belong together");
    server.send_tls13_tickets = 0;
    let mut client = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .expect("the provider speaks TLS 1.3")
        .with_root_certificates(roots)
        .with_client_auth_cert(vec![certificate.clone()], key())
        .expect("certificate and key belong together");
    client.resumption = Resumption::disabled();
    let transport = Arc::new(transport(window));
    let mut tokens = ValidationTokenConfig::default();
    tokens.sent(0);
    let server = QuicServerConfig::try_from(server).expect("TLS 1.3 has the suite of QUIC's first packets");
    let mut server = ServerConfig::with_crypto(Arc::new(server));
    server.transport_config(Arc::clone(&transport)).validation_token_config(tokens);
    let client = QuicClientConfig::try_from(client).expect("TLS 1.3 has the suite of QUIC's first packets");
    let mut client = ClientConfig::new(Arc::new(client));
    client.transport_config(transport);
    Tls { client, server: Arc::new(server) }
}

fn transport(window: u32) -> TransportConfig {
    let mut transport = TransportConfig::default();
    transport
        .max_idle_timeout(Some(IdleTimeout::try_from(IDLE).expect("three seconds fit")))
        .keep_alive_interval(Some(KEEP_ALIVE))
        .max_concurrent_uni_streams(UNI_STREAMS_MAX.into())
        .max_concurrent_bidi_streams(VarInt::from_u32(1))
        .stream_receive_window(window.into())
        .receive_window(VarInt::from_u32(window.saturating_mul(4)))
        .initial_rtt(Duration::from_millis(20))
        .mtu_discovery_config(None)
        .allow_spin(false);
    transport
}
