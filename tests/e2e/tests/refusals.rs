//! Refused at start: a process that cannot serve ends with an exit code other than 0 and says why, naming the object. A cluster that
//! refuses a node goes on.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::Read;
use std::net::{TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::Duration;

use millrace_e2e::cluster::{Cluster, Plan};
use millrace_e2e::process::{self, Ended};
use millrace_e2e::{WAIT_MAX, real_model, tiny_model};
use tempfile::TempDir;

/// A node tries to join for 15 s.
const JOIN_WAIT_MAX: Duration = Duration::from_secs(60);

/// Certificates of a cluster that does not run, and room for spoiled models.
struct Scratch(TempDir);

impl Scratch {
    async fn new() -> Self {
        let scratch = Self(tempfile::tempdir().unwrap());
        let certs = scratch.text("certs");
        let mut commands = vec![vec!["certs", "init", "--dir", &certs, "--cluster", "test"]];
        for (role, name) in [("prefill", "prefill-0"), ("decode", "decode-0"), ("coordinator", "coordinator-1")] {
            commands.push(vec!["certs", "issue", "--dir", &certs, "--role", role, "--name", name]);
        }
        for command in commands {
            let ended = process::run("millctl", &command, WAIT_MAX).await;
            assert_eq!(ended.code, Some(0), "{ended:?}");
        }
        scratch
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// Starts a node of this cluster's certificates.
    async fn node(&self, kind: &str, model: &Path, more: &[&str]) -> Ended {
        let (name, certs) = (format!("{kind}-0"), self.text(&format!("certs/{kind}-0")));
        let model = model.display().to_string();
        let fixed = ["--name", &name, "--cluster", "test", "--certs", &certs, "--model", &model];
        process::run(&format!("{kind}-node"), &[&fixed[..], &["--coordinators", "1=127.0.0.1:1"], more].concat(), WAIT_MAX).await
    }

    async fn coordinator(&self, model: &Path, more: &[&str]) -> Ended {
        let (certs, dir, model) = (self.text("certs/coordinator-1"), self.text("log"), model.display().to_string());
        let fixed = ["--id", "1", "--name", "coordinator-1", "--peers", "1=127.0.0.1:1", "--cluster", "test"];
        let paths = ["--certs", &certs, "--dir", &dir, "--model", &model];
        let listen: &[&str] = if more.contains(&"--listen") { &[] } else { &["--listen", "127.0.0.1:0"] };
        process::run("coordinator", &[&fixed[..], &paths, listen, more].concat(), WAIT_MAX).await
    }

    /// A copy of the tiny model, to be spoiled.
    fn tiny(&self, name: &str) -> PathBuf {
        let to = self.path(name);
        fs::create_dir(&to).unwrap();
        for file in ["config.json", "model.safetensors"] {
            fs::copy(tiny_model().join(file), to.join(file)).unwrap();
        }
        to
    }

    /// The first bytes of the real model.
    fn beginning(&self, name: &str, bytes: u64) -> PathBuf {
        let to = self.path(name);
        let mut part = fs::File::open(real_model()).unwrap().take(bytes);
        std::io::copy(&mut part, &mut fs::File::create(&to).unwrap()).unwrap();
        to
    }
}

fn truncate(file: &Path, keep: impl Fn(u64) -> u64) {
    let bytes = fs::metadata(file).unwrap().len();
    fs::File::options().write(true).open(file).unwrap().set_len(keep(bytes)).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_cannot_be_served_is_refused_by_name() {
    let scratch = Scratch::new().await;
    let bloom = scratch.tiny("bloom");
    let config = r#"{"architectures": ["BloomForCausalLM"], "model_type": "bloom", "n_embed": 64, "n_head": 4, "n_layer": 3, "vocab_size": 300}"#;
    fs::write(bloom.join("config.json"), config).unwrap();
    let cut = scratch.tiny("cut");
    truncate(&cut.join("model.safetensors"), |bytes| bytes - 1000);
    let stump = scratch.tiny("stump");
    truncate(&stump.join("model.safetensors"), |_| 100);
    let broken = scratch.tiny("broken");
    fs::write(broken.join("config.json"), "{").unwrap();
    let header = scratch.beginning("header.gguf", 5000);
    let half = scratch.beginning("half.gguf", fs::metadata(real_model()).unwrap().len() / 2);
    let noise = scratch.path("noise.gguf");
    fs::write(&noise, [7; 4096]).unwrap();
    let cases: [(&Path, &[&str]); 8] = [
        (&bloom, &["config.json", "Bloom", "not supported"]),
        (&cut, &["model.safetensors"]),
        (&stump, &["model.safetensors"]),
        (&broken, &["config.json"]),
        (&header, &["header.gguf"]),
        (&half, &["half.gguf", "tensor"]),
        (&noise, &["noise.gguf", "GGUF"]),
        (Path::new("/nowhere"), &["/nowhere", "No such file"]),
    ];
    for (model, words) in cases {
        scratch.node("prefill", model, &[]).await.assert_refused(words);
        scratch.coordinator(model, &[]).await.assert_refused(words);
    }
    scratch.node("decode", &half, &[]).await.assert_refused(&["half.gguf", "tensor"]);
    let (dir, model) = (scratch.text("up"), bloom.display().to_string());
    let up = [
        "local",
        "up",
        "--model",
        &model,
        "--coordinators",
        "1",
        "--prefill",
        "1",
        "--decode",
        "1",
        "--http",
        "127.0.0.1:0",
        "--dir",
        &dir,
    ];
    let ended = process::run("millctl", &up, WAIT_MAX).await;
    assert!(ended.code.is_some_and(|code| code != 0) && ended.stderr.contains("Bloom"), "{ended:?}");
    assert!(!ended.stdout.contains("ready"), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_in_use_is_refused_by_its_number() {
    let scratch = Scratch::new().await;
    let (udp, tcp) = (UdpSocket::bind("127.0.0.1:0").unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
    let (quic, http) = (udp.local_addr().unwrap().to_string(), tcp.local_addr().unwrap().to_string());
    let tiny = tiny_model();
    scratch.node("prefill", &tiny, &["--listen", &quic, "--checksum-engine", "0"]).await.assert_refused(&[&quic, "in use"]);
    scratch.node("decode", &tiny, &["--listen", &quic, "--checksum-engine", "0"]).await.assert_refused(&[&quic, "in use"]);
    scratch.coordinator(&tiny, &["--listen", &quic]).await.assert_refused(&[&quic, "in use"]);
    scratch.coordinator(&tiny, &["--http", &http]).await.assert_refused(&[&http, "in use"]);
    let (dir, model) = (scratch.text("up"), tiny.display().to_string());
    let up = [
        "local",
        "up",
        "--model",
        &model,
        "--coordinators",
        "1",
        "--prefill",
        "1",
        "--decode",
        "1",
        "--http",
        &http,
        "--dir",
        &dir,
    ];
    let ended = process::run("millctl", &up, WAIT_MAX).await;
    assert!(ended.code.is_some_and(|code| code != 0) && ended.stderr.contains(&http), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn arguments_and_certificates_that_do_not_fit_are_refused() {
    let scratch = Scratch::new().await;
    let tiny = tiny_model();
    let node = async |more: &[&str]| scratch.node("prefill", &tiny, &[&["--checksum-engine", "0"], more].concat()).await;
    let no_model = process::run("prefill-node", &["--name", "prefill-0"], WAIT_MAX).await;
    assert!(no_model.code == Some(2) && no_model.stderr.contains("--model"), "{no_model:?}");
    assert_eq!(node(&["--block-tokens", "17"]).await.code, Some(2));
    assert_eq!(node(&["--kv-blocks", "0"]).await.code, Some(2));
    assert_eq!(node(&["--listen", "nowhere"]).await.code, Some(2));
    let (model, certs) = (tiny.display().to_string(), scratch.text("certs/decode-0"));
    let rest = ["--coordinators", "1=127.0.0.1:1", "--model", &model, "--checksum-engine", "0"];
    let as_another = ["--name", "prefill-0", "--cluster", "test", "--certs", &certs];
    let ended = process::run("prefill-node", &[&as_another[..], &rest].concat(), WAIT_MAX).await;
    ended.assert_refused(&["certificate", "decode-0", "prefill-0"]);
    let absent = ["--name", "prefill-0", "--cluster", "test", "--certs", "/nowhere"];
    process::run("prefill-node", &[&absent[..], &rest].concat(), WAIT_MAX).await.assert_refused(&["/nowhere"]);
}

/// Joins a running cluster as `name`, with the certificate that it gave that name.
async fn join(cluster: &Cluster, name: &str, model: &Path, more: &[&str]) -> Ended {
    let file = cluster.file();
    let certs = cluster.dir().join(file["certs"].as_str().unwrap()).join(name);
    let coordinators = file["coordinators"].as_array().unwrap().iter();
    let coordinators: Vec<String> = coordinators.map(|c| format!("{}={}", c["id"], c["quic"].as_str().unwrap())).collect();
    let (coordinators, certs, model) = (coordinators.join(","), certs.display().to_string(), model.display().to_string());
    let who = ["--name", name, "--cluster", file["cluster"].as_str().unwrap(), "--certs", &certs];
    let what = ["--coordinators", &coordinators, "--model", &model, "--checksum-engine", "0"];
    process::run("prefill-node", &[&who[..], &what, more].concat(), JOIN_WAIT_MAX).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_node_of_one_name_or_with_another_model_is_refused_and_the_cluster_goes_on() {
    let cluster = Cluster::start(Plan::checksum(100)).await;
    let before = cluster.rests().await;
    let certs = cluster.dir().join(cluster.file()["certs"].as_str().unwrap()).display().to_string();
    let issued =
        process::run("millctl", &["certs", "issue", "--dir", &certs, "--role", "prefill", "--name", "prefill-9"], WAIT_MAX).await;
    assert_eq!(issued.code, Some(0), "{issued:?}");
    let other = cluster.scratch().join("other");
    fs::create_dir(&other).unwrap();
    fs::copy(tiny_model().join("config.json"), other.join("config.json")).unwrap();
    let mut weights = fs::read(tiny_model().join("model.safetensors")).unwrap();
    *weights.last_mut().unwrap() ^= 1;
    fs::write(other.join("model.safetensors"), weights).unwrap();
    let tiny = tiny_model();
    let (twin, stranger, halved, eight) = tokio::join!(
        join(&cluster, "prefill-1", &tiny, &["--dtype", "f32"]),
        join(&cluster, "prefill-9", &other, &["--dtype", "f32"]),
        join(&cluster, "prefill-9", &tiny, &["--dtype", "bf16"]),
        join(&cluster, "prefill-9", &tiny, &["--dtype", "f32", "--kv-dtype", "int8"]),
    );
    twin.assert_refused(&["prefill-1", "live process"]);
    stranger.assert_refused(&["weights"]);
    halved.assert_refused(&["kv_dtype"]);
    eight.assert_refused(&["kv_dtype"]);
    let after = cluster.rests().await;
    let epochs = |status: &millrace_e2e::cluster::Status| -> Vec<(String, u64, u32)> {
        status.nodes.iter().map(|node| (node.name.clone(), node.epoch, node.pid)).collect()
    };
    assert_eq!(epochs(&after), epochs(&before), "the members are the same");
}
