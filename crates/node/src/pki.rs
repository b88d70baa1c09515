//! Who is who: the cluster's own certificate authority, the certificates it issues, and what a peer's certificate says.
//!
//! A leaf certificate carries `millrace://<cluster>/<role>/<name>` as URI name, and the fixed DNS name [`TLS_NAME`] that TLS
//! wants. Trust is the authority's signature; the name and role are the URI's. What a role may do is not decided here
//! (`Message::may_send` is). Nothing is ever asked of the network.

use std::fmt;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use millrace_core::message::Role;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{CertificateError, RootCertStore};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// The DNS name in every leaf certificate: TLS checks it, we check the URI.
pub const TLS_NAME: &str = "millrace";
/// The application protocol: raise its number with every change of the wire format.
pub const ALPN: &[u8] = b"millrace/2";
/// The same for connections that carry KV.
pub const KV_ALPN: &[u8] = b"millrace-kv/1";
/// Bytes of a cluster's or a process's name.
pub const NAME_MAX: usize = 64;
/// Life of the authority's certificate.
pub const CA_LIFE: Duration = Duration::from_secs(3650 * 86_400);
/// Life of a process's certificate.
pub const LEAF_LIFE: Duration = Duration::from_secs(365 * 86_400);
/// Certificates begin this long ago, so that a clock that is a little behind takes them.
const BACKDATE: Duration = Duration::from_secs(86_400);

const CA_CERT: &str = "ca.pem";
const CA_KEY: &str = "ca.key";
const LEAF_CERT: &str = "cert.pem";
const LEAF_KEY: &str = "cert.key";

/// Certificates could not be made, read or believed.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file holds what it must not.
    #[error("{}: {reason}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A name that cannot stand in a certificate.
    #[error("name {0:?}: 1 to {NAME_MAX} of letters, digits, '.', '_' and '-'")]
    Name(String),
    /// A certificate could not be made.
    #[error("making a certificate: {0}")]
    Make(#[from] rcgen::Error),
    /// TLS could not be set up with an identity.
    #[error("setting up TLS: {0}")]
    Tls(String),
    /// A peer's certificate, though signed by our authority, does not say who it is.
    #[error("the peer's certificate {0}")]
    Peer(String),
    /// A new certificate is somebody else's; says whose, and who we are.
    #[error("the new certificate {0}")]
    Another(String),
}

/// What distinguishes one certificate of a process from its next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// The serial number, in hexadecimal digits.
    pub serial: String,
    /// The last moment at which it is believed.
    pub valid_until: SystemTime,
}

impl Leaf {
    /// Reads it out of a certificate (DER), whose signature somebody else has checked.
    ///
    /// # Errors
    /// [`PkiError::Peer`] when it does not parse.
    pub fn of(der: &[u8]) -> Result<Self, PkiError> {
        let (_, certificate) = X509Certificate::from_der(der).map_err(|e| PkiError::Peer(format!("does not parse: {e}")))?;
        let since_1970 = u64::try_from(certificate.validity().not_after.timestamp()).unwrap_or(0);
        let serial = certificate.raw_serial().iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { serial, valid_until: SystemTime::UNIX_EPOCH + Duration::from_secs(since_1970) })
    }

    /// Reads it out of `cert.pem` in `dir`, valid or not.
    ///
    /// # Errors
    /// The file cannot be read or holds no certificate.
    pub fn load(dir: &Path) -> Result<(PeerIdentity, Self), PkiError> {
        let path = dir.join(LEAF_CERT);
        let der = parse_certificate(&path, &read_file(&path)?)?;
        let content = |e: PkiError| PkiError::Content { path: path.clone(), reason: e.to_string() };
        Ok((PeerIdentity::from_certificate(&der).map_err(content)?, Self::of(&der).map_err(content)?))
    }
}

/// Who a certificate says its holder is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerIdentity {
    /// The cluster's name.
    pub cluster: String,
    /// What it may do.
    pub role: Role,
    /// Its name, unique in the cluster.
    pub name: String,
}

impl fmt::Display for PeerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.role.as_str(), self.name)
    }
}

impl PeerIdentity {
    /// Reads the identity out of a leaf certificate (DER), whose signature somebody else has checked.
    ///
    /// # Errors
    /// [`PkiError::Peer`] unless it has exactly one `millrace:` URI, well formed.
    pub fn from_certificate(der: &[u8]) -> Result<Self, PkiError> {
        let path = millrace_uri(der)?;
        let mut parts = path.split('/');
        let (cluster, role, name) = (parts.next(), parts.next().and_then(Role::parse), parts.next());
        match (cluster, role, name, parts.next()) {
            (Some(cluster), Some(role), Some(name), None) if is_name(cluster) && is_name(name) => {
                Ok(Self { cluster: cluster.to_owned(), role, name: name.to_owned() })
            }
            _ => Err(PkiError::Peer(format!("names nobody: millrace://{path}"))),
        }
    }
}

/// What follows `millrace://` in a certificate's only such URI.
fn millrace_uri(der: &[u8]) -> Result<String, PkiError> {
    let (_, certificate) = X509Certificate::from_der(der).map_err(|e| PkiError::Peer(format!("does not parse: {e}")))?;
    let names = certificate.subject_alternative_name().map_err(|e| PkiError::Peer(format!("has unreadable names: {e}")))?;
    let mut uris = names.iter().flat_map(|ext| &ext.value.general_names).filter_map(|name| match name {
        GeneralName::URI(uri) => uri.strip_prefix("millrace://"),
        _ => None,
    });
    match (uris.next(), uris.next()) {
        (Some(path), None) => Ok(path.to_owned()),
        (None, _) => Err(PkiError::Peer("has no millrace:// name".into())),
        (Some(_), Some(_)) => Err(PkiError::Peer("has more than one millrace:// name".into())),
    }
}

fn is_name(name: &str) -> bool {
    (1..=NAME_MAX).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

fn checked_name(name: &str) -> Result<&str, PkiError> {
    if is_name(name) { Ok(name) } else { Err(PkiError::Name(name.to_owned())) }
}

/// The cluster's certificate authority: a directory with `ca.pem` and `ca.key`.
pub struct Authority {
    cluster: String,
    ca_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// Makes a new authority for `cluster` in `dir` (created when missing).
    ///
    /// # Errors
    /// When `dir` holds an authority already, a file cannot be written, or the name is not one.
    pub fn create(dir: &Path, cluster: &str) -> Result<Self, PkiError> {
        let path = dir.join(CA_KEY);
        if path.exists() {
            let source = io::Error::new(io::ErrorKind::AlreadyExists, "an authority exists here already");
            return Err(PkiError::File { path, source });
        }
        let mut params = CertificateParams::default();
        params.distinguished_name = common_name(&format!("millrace {cluster}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
        params.subject_alt_names = vec![uri(checked_name(cluster)?)?];
        set_validity(&mut params, SystemTime::now(), CA_LIFE);
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?;
        make_dir(dir)?;
        write_file(&path, &key.serialize_pem(), 0o600)?;
        write_file(&dir.join(CA_CERT), &certificate.pem(), 0o644)?;
        Self::load(dir)
    }

    /// Loads the authority of `dir`.
    ///
    /// # Errors
    /// When a file is missing or does not hold what it should.
    pub fn load(dir: &Path) -> Result<Self, PkiError> {
        let (cert_path, key_path) = (dir.join(CA_CERT), dir.join(CA_KEY));
        let content = |path: &Path, reason: String| PkiError::Content { path: path.to_owned(), reason };
        let (ca_pem, key_pem) = (read_file(&cert_path)?, read_file(&key_path)?);
        let der = parse_certificate(&cert_path, &ca_pem)?;
        let cluster = millrace_uri(&der).map_err(|e| content(&cert_path, format!("not a Millrace authority: {e}")))?;
        let key = KeyPair::from_pem(&key_pem).map_err(|e| content(&key_path, format!("no private key: {e}")))?;
        let issuer = Issuer::from_ca_cert_der(&der, key).map_err(|e| content(&cert_path, e.to_string()))?;
        Ok(Self { cluster, ca_pem, issuer })
    }

    /// The cluster that this authority speaks for.
    #[must_use]
    pub fn cluster(&self) -> &str {
        &self.cluster
    }

    /// The authority's own certificate.
    ///
    /// # Errors
    /// As [`Leaf::of`].
    pub fn leaf(&self) -> Result<Leaf, PkiError> {
        Leaf::of(&parse_certificate(Path::new(CA_CERT), &self.ca_pem)?)
    }

    /// Issues a certificate for a year, beginning a day ago: `cert.pem`, `cert.key` (mode 0600) and a copy of `ca.pem` in `dir`.
    /// Files that are there already are replaced, which renews them.
    ///
    /// # Errors
    /// When the name is not one, or a file cannot be written.
    pub fn issue(&self, role: Role, name: &str, dir: &Path) -> Result<(), PkiError> {
        self.issue_at(role, name, dir, SystemTime::now(), LEAF_LIFE)
    }

    /// [`Authority::issue`] as if it were `now`, for `life`.
    ///
    /// # Errors
    /// As [`Authority::issue`].
    pub fn issue_at(&self, role: Role, name: &str, dir: &Path, now: SystemTime, life: Duration) -> Result<(), PkiError> {
        let path = format!("{}/{}/{}", self.cluster, role.as_str(), checked_name(name)?);
        let mut params = CertificateParams::new(vec![TLS_NAME.to_owned()])?;
        params.subject_alt_names.push(uri(&path)?);
        params.distinguished_name = common_name(name);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        set_validity(&mut params, now, life);
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        make_dir(dir)?;
        write_file(&dir.join(CA_CERT), &self.ca_pem, 0o644)?;
        write_file(&dir.join(LEAF_KEY), &key.serialize_pem(), 0o600)?;
        write_file(&dir.join(LEAF_CERT), &certificate.pem(), 0o644)
    }
}

/// A process's own certificate and key, and the authority it believes.
pub struct Identity {
    /// Who we are, by our own certificate.
    pub me: PeerIdentity,
    ca: CertificateDer<'static>,
    leaf: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
}

impl Identity {
    /// Loads `ca.pem`, `cert.pem` and `cert.key` from `dir` and checks them as a peer would.
    ///
    /// # Errors
    /// Names the file and what is wrong: missing, no PEM, expired, not valid yet, signed by another authority, key of another certificate.
    pub fn load(dir: &Path) -> Result<Self, PkiError> {
        let (ca_path, cert_path, key_path) = (dir.join(CA_CERT), dir.join(LEAF_CERT), dir.join(LEAF_KEY));
        let ca = parse_certificate(&ca_path, &read_file(&ca_path)?)?;
        let leaf = parse_certificate(&cert_path, &read_file(&cert_path)?)?;
        let key = PrivateKeyDer::from_pem_slice(read_file(&key_path)?.as_bytes())
            .map_err(|e| PkiError::Content { path: key_path.clone(), reason: format!("no private key: {e}") })?;
        let me = PeerIdentity::from_certificate(&leaf)
            .map_err(|e| PkiError::Content { path: cert_path.clone(), reason: e.to_string() })?;
        let identity = Self { me, ca, leaf, key };
        let verifier = identity.verifier().map_err(|e| PkiError::Content { path: ca_path, reason: e.to_string() })?;
        verifier
            .verify_client_cert(&identity.leaf, &[], UnixTime::now())
            .map_err(|e| PkiError::Content { path: cert_path, reason: why_not(&e) })?;
        identity.server_tls(ALPN).map_err(|e| PkiError::Content { path: key_path, reason: e.to_string() })?;
        Ok(identity)
    }

    /// Our own certificate's number and end.
    ///
    /// # Errors
    /// As [`Leaf::of`]; not after [`Identity::load`] believed it.
    pub fn leaf(&self) -> Result<Leaf, PkiError> {
        Leaf::of(&self.leaf)
    }

    fn verifier(&self) -> Result<Arc<dyn ClientCertVerifier>, PkiError> {
        WebPkiClientVerifier::builder_with_provider(self.roots()?, provider()).build().map_err(tls)
    }

    fn roots(&self) -> Result<Arc<RootCertStore>, PkiError> {
        let mut roots = RootCertStore::empty();
        roots.add(self.ca.clone()).map_err(tls)?;
        Ok(Arc::new(roots))
    }

    /// TLS for accepting: 1.3 only, the peer must prove itself, every connection anew (no resumption). `alpn` names the
    /// protocol.
    ///
    /// # Errors
    /// The key is not the certificate's; not after [`Identity::load`] believed it.
    pub fn server_tls(&self, alpn: &[u8]) -> Result<rustls::ServerConfig, PkiError> {
        let mut config = rustls::ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(tls)?
            .with_client_cert_verifier(self.verifier()?)
            .with_single_cert(vec![self.leaf.clone()], self.key.clone_key())
            .map_err(tls)?;
        config.alpn_protocols = vec![alpn.to_vec()];
        config.ignore_client_order = true;
        config.send_tls13_tickets = 0;
        Ok(config)
    }

    /// TLS for dialing, with the same rules.
    ///
    /// # Errors
    /// As [`Identity::server_tls`].
    pub fn client_tls(&self, alpn: &[u8]) -> Result<rustls::ClientConfig, PkiError> {
        let mut config = rustls::ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(tls)?
            .with_root_certificates(self.roots()?)
            .with_client_auth_cert(vec![self.leaf.clone()], self.key.clone_key())
            .map_err(tls)?;
        config.alpn_protocols = vec![alpn.to_vec()];
        config.resumption = rustls::client::Resumption::disabled();
        Ok(config)
    }
}

/// The bytes of the certificates in `dir`, to see that they have changed. The key is not among them: it is written before its certificate.
///
/// # Errors
/// A file cannot be read.
pub(crate) fn files(dir: &Path) -> Result<[String; 2], PkiError> {
    Ok([read_file(&dir.join(CA_CERT))?, read_file(&dir.join(LEAF_CERT))?])
}

/// ring, with AES-128-GCM first: the fastest here, and QUIC's mandatory one.
fn provider() -> Arc<CryptoProvider> {
    let mut provider = rustls::crypto::ring::default_provider();
    provider.cipher_suites.sort_by_key(|s| s.suite() != rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
    Arc::new(provider)
}

fn tls(error: impl fmt::Display) -> PkiError {
    PkiError::Tls(error.to_string())
}

fn why_not(error: &rustls::Error) -> String {
    let rustls::Error::InvalidCertificate(reason) = error else { return error.to_string() };
    match reason {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => format!("expired: {reason}"),
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => format!("not valid yet: {reason}"),
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            format!("signed by another authority than {CA_CERT} beside it")
        }
        other => other.to_string(),
    }
}

fn uri(path: &str) -> Result<SanType, PkiError> {
    Ok(SanType::URI(format!("millrace://{path}").try_into()?))
}

fn common_name(name: &str) -> rcgen::DistinguishedName {
    let mut distinguished = rcgen::DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

fn set_validity(params: &mut CertificateParams, now: SystemTime, life: Duration) {
    let since_1970 = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let now = rcgen::date_time_ymd(1970, 1, 1) + since_1970;
    params.not_before = now - BACKDATE;
    params.not_after = now + life;
}

fn parse_certificate(path: &Path, pem: &str) -> Result<CertificateDer<'static>, PkiError> {
    CertificateDer::from_pem_slice(pem.as_bytes())
        .map_err(|e| PkiError::Content { path: path.to_owned(), reason: format!("no certificate: {e}") })
}

fn read_file(path: &Path) -> Result<String, PkiError> {
    fs::read_to_string(path).map_err(|source| PkiError::File { path: path.to_owned(), source })
}

fn make_dir(path: &Path) -> Result<(), PkiError> {
    fs::create_dir_all(path).map_err(|source| PkiError::File { path: path.to_owned(), source })
}

/// Writes beside the file and renames, so that a reader sees the old or the new one and a key is never readable to others.
fn write_file(path: &Path, text: &str, mode: u32) -> Result<(), PkiError> {
    let draft = path.with_extension("new");
    let write = || {
        let _ = fs::remove_file(&draft);
        fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&draft)?.write_all(text.as_bytes())?;
        fs::rename(&draft, path)
    };
    write().map_err(|source| PkiError::File { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn issued_certificates_say_who_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let (ca, node) = (dir.path().join("ca"), dir.path().join("p1"));
        Authority::create(&ca, "demo").unwrap();
        Authority::load(&ca).unwrap().issue(Role::Prefill, "p1", &node).unwrap();
        let me = Identity::load(&node).unwrap().me;
        assert_eq!(me, PeerIdentity { cluster: "demo".into(), role: Role::Prefill, name: "p1".into() });
        for key in [ca.join("ca.key"), node.join("cert.key")] {
            assert_eq!(fs::metadata(key).unwrap().permissions().mode() & 0o777, 0o600);
        }
        assert!(!node.join("ca.key").exists());
    }

    #[test]
    fn a_second_authority_does_not_replace_the_first() {
        let dir = tempfile::tempdir().unwrap();
        Authority::create(dir.path(), "demo").unwrap();
        let error = Authority::create(dir.path(), "demo").err().unwrap().to_string();
        assert!(error.contains("ca.key") && error.contains("exists"), "{error}");
    }

    #[test]
    fn names_that_would_forge_another_identity_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Authority::create(dir.path(), "a/b").is_err());
        let authority = Authority::create(dir.path(), "demo").unwrap();
        for bad in ["", "x/coordinator", "a b", "a?b", &"x".repeat(NAME_MAX + 1)] {
            assert!(matches!(authority.issue(Role::Decode, bad, dir.path()), Err(PkiError::Name(_))), "{bad:?}");
        }
    }

    #[test]
    fn bad_identities_are_refused_with_file_and_reason() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b, leaf) = (dir.path().join("a"), dir.path().join("b"), dir.path().join("leaf"));
        let authority = Authority::create(&a, "demo").unwrap();
        let error = |needles: [&str; 2]| {
            let text = Identity::load(&leaf).err().unwrap().to_string();
            assert!(needles.iter().all(|n| text.contains(n)), "{text}");
        };
        error(["ca.pem", "No such file"]);
        let long_ago = SystemTime::now() - Duration::from_secs(10 * 86_400);
        authority.issue_at(Role::Decode, "d1", &leaf, long_ago, Duration::from_secs(86_400)).unwrap();
        error(["cert.pem", "expired"]);
        let later = SystemTime::now() + Duration::from_secs(10 * 86_400);
        authority.issue_at(Role::Decode, "d1", &leaf, later, LEAF_LIFE).unwrap();
        error(["cert.pem", "not valid yet"]);
        authority.issue(Role::Decode, "d1", &leaf).unwrap();
        Authority::create(&b, "demo").unwrap();
        fs::copy(b.join("ca.pem"), leaf.join("ca.pem")).unwrap();
        error(["cert.pem", "another authority"]);
        authority.issue(Role::Decode, "d1", &leaf).unwrap();
        fs::copy(a.join("ca.key"), leaf.join("cert.key")).unwrap();
        error(["cert.key", "TLS"]);
        fs::write(leaf.join("cert.key"), "nothing").unwrap();
        error(["cert.key", "no private key"]);
    }
}
