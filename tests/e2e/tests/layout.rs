//! The shape of the workspace, held by tests: which package may depend on which, what a dependency's line must say, and the few
//! rules of style that a program can check.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, PackageId};
use millrace_e2e::repository;

/// Lines of a file.
const LINES_MAX: usize = 600;
/// Each member, and the members that it may depend on.
const EDGES: [(&str, &[&str]); 13] = [
    ("millrace-core", &[]),
    ("millrace-kernels", &[]),
    ("millrace-checkpoint", &["millrace-core"]),
    ("millrace-log", &[]),
    ("millrace-model", &["millrace-core", "millrace-checkpoint", "millrace-kernels"]),
    ("millrace-node", &["millrace-core", "millrace-kernels"]),
    ("prefill-node", &["millrace-core", "millrace-model", "millrace-node", "millrace-checkpoint", "millrace-kernels"]),
    ("decode-node", &["millrace-core", "millrace-model", "millrace-node", "millrace-checkpoint", "millrace-kernels"]),
    ("coordinator", &["millrace-core", "millrace-checkpoint", "millrace-log", "millrace-node"]),
    ("millrace-e2e", TESTED),
    ("millrace-sim", TESTED),
    ("millrace-load", TESTED),
    ("millrace-fuzz", &["millrace-core", "millrace-checkpoint", "millrace-node", "millrace-log", "coordinator", "millrace-load"]),
];
/// What the packages of tests may depend on: everything but LibTorch, which comes with the nodes.
const TESTED: &[&str] =
    &["millrace-core", "millrace-checkpoint", "millrace-kernels", "millrace-log", "millrace-node", "coordinator"];
/// Members that must build without LibTorch.
const WITHOUT_LIBTORCH: [&str; 10] = [
    "millrace-core",
    "millrace-kernels",
    "millrace-checkpoint",
    "millrace-log",
    "millrace-node",
    "coordinator",
    "millrace-e2e",
    "millrace-sim",
    "millrace-load",
    "millrace-fuzz",
];

/// The workspace as Cargo resolves it for this machine.
fn metadata() -> Metadata {
    let platform = format!("--filter-platform={}-unknown-linux-gnu", std::env::consts::ARCH);
    let mut command = MetadataCommand::new();
    command.manifest_path(repository().join("Cargo.toml")).other_options(vec!["--offline".into(), "--locked".into(), platform]);
    command.exec().unwrap()
}

fn name<'a>(metadata: &'a Metadata, id: &PackageId) -> &'a str {
    metadata[id].name.as_str()
}

/// Direct dependencies of a package that are part of its own build.
fn links(metadata: &Metadata, id: &PackageId) -> Vec<PackageId> {
    let node = metadata.resolve.as_ref().unwrap().nodes.iter().find(|node| node.id == *id).unwrap();
    let built = |dep: &&cargo_metadata::NodeDep| dep.dep_kinds.iter().any(|kind| kind.kind != DependencyKind::Development);
    node.deps.iter().filter(built).map(|dep| dep.pkg.clone()).collect()
}

#[test]
fn members_depend_only_on_whom_they_may() {
    let metadata = metadata();
    let allowed: BTreeMap<&str, &[&str]> = EDGES.into_iter().collect();
    let members: BTreeSet<&str> = metadata.workspace_packages().iter().map(|package| package.name.as_str()).collect();
    assert_eq!(members, allowed.keys().copied().collect(), "a new member needs its line in EDGES");
    let mut wrong = Vec::new();
    for package in metadata.workspace_packages() {
        let own = package.dependencies.iter().filter(|dependency| members.contains(dependency.name.as_str()));
        for dependency in own.filter(|dependency| !allowed[package.name.as_str()].contains(&dependency.name.as_str())) {
            wrong.push(format!("{} -> {}", package.name, dependency.name));
        }
    }
    assert!(wrong.is_empty(), "edges that are not allowed: {wrong:?}");
}

#[test]
fn libtorch_is_reached_only_through_the_model() {
    let metadata = metadata();
    for package in metadata.workspace_packages() {
        let (mut seen, mut open) = (BTreeSet::new(), vec![package.id.clone()]);
        while let Some(id) = open.pop() {
            if seen.insert(id.clone()) {
                open.extend(links(&metadata, &id));
            }
        }
        let torch = seen.iter().map(|id| name(&metadata, id)).find(|name| ["tch", "torch-sys"].contains(name));
        let without = WITHOUT_LIBTORCH.contains(&package.name.as_str());
        assert_eq!(torch.is_none(), without, "{} and LibTorch", package.name);
    }
}

#[test]
fn every_direct_dependency_has_one_version_and_a_reason() {
    let metadata = metadata();
    let mut versions: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for package in metadata.workspace_packages() {
        let node = metadata.resolve.as_ref().unwrap().nodes.iter().find(|node| node.id == package.id).unwrap();
        for dep in &node.deps {
            versions.entry(name(&metadata, &dep.pkg)).or_default().insert(metadata[&dep.pkg].version.to_string());
        }
    }
    versions.retain(|_, versions| versions.len() > 1);
    assert!(versions.is_empty(), "more than one version: {versions:?}");
    let manifest = std::fs::read_to_string(repository().join("Cargo.toml")).unwrap();
    let section = manifest.split("[workspace.dependencies]").nth(1).unwrap().split("\n[").next().unwrap();
    let ours = |line: &&str| line.contains("path = ");
    let lines = section.lines().filter(|line| line.contains('=') && !line.starts_with('#') && !ours(line));
    let silent: Vec<&str> = lines.filter(|line| line.split_once('#').is_none_or(|(_, reason)| reason.trim().is_empty())).collect();
    assert!(silent.is_empty(), "dependencies without a reason: {silent:#?}");
}

#[test]
fn members_take_every_dependency_from_the_workspace() {
    for package in metadata().workspace_packages() {
        let text = std::fs::read_to_string(&package.manifest_path).unwrap();
        for table in text.split("\n[").filter(|table| table.split(']').next().unwrap().ends_with("dependencies")) {
            let lines = table.lines().skip(1).filter(|line| line.contains('=') && !line.starts_with('#'));
            for line in lines {
                assert!(line.contains("workspace = true"), "{}: {line}", package.name);
            }
        }
    }
}

/// All Rust files of the repository, from its root.
fn sources() -> Vec<(PathBuf, String)> {
    let (root, mut open, mut files) = (repository(), vec![repository()], Vec::new());
    while let Some(folder) = open.pop() {
        for path in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            let hidden = path.file_name().unwrap().to_string_lossy().starts_with('.');
            if path.is_dir() && !hidden && path != root.join("target") {
                open.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push((path.strip_prefix(&root).unwrap().to_owned(), std::fs::read_to_string(&path).unwrap()));
            }
        }
    }
    assert!(files.len() > 50, "only {} files found", files.len());
    files
}

/// A line without its comment. Good enough for what is looked for here: `//` in a text only hides what follows it.
fn code(line: &str) -> &str {
    line.split("//").next().unwrap()
}

/// Where the wall clock may be read, and what for. Nothing else may: leases, elections, deadlines and retries run on monotonic time, so
/// that a clock that jumps changes nothing.
const WALL_CLOCKS: [(&str, &str); 12] = [
    ("coordinator/src/http/respond.rs", "the `created` field of an answer"),
    ("coordinator/src/ctl/front.rs", "the same"),
    ("coordinator/src/dispatch/decisions.rs", "when a decision was made, for operators"),
    ("coordinator/src/admin/health.rs", "how far the clocks are apart, for operators"),
    ("coordinator/src/ctl/doctor.rs", "the same"),
    ("coordinator/src/ctl/doctor/checks.rs", "the same, and the validity of certificates"),
    ("coordinator/src/ctl/certs.rs", "the validity of certificates"),
    ("coordinator/src/ctl/certs/rotate.rs", "the same"),
    ("coordinator/src/ctl/dates.rs", "dates on the screen"),
    ("coordinator/src/ctl/running.rs", "which cluster of this user is the newest"),
    ("crates/checkpoint/src/strftime.rs", "the date that a chat template asks for"),
    ("crates/node/src/pki.rs", "the validity of certificates"),
];

#[test]
fn no_decision_reads_the_wall_clock() {
    let clocks =
        [concat!("System", "Time"), concat!("UNIX_", "EPOCH"), concat!("CLOCK_", "REALTIME"), "chrono::", "time::OffsetDateTime"];
    let reads = |(path, text): (PathBuf, String)| {
        let found = text.lines().any(|line| clocks.iter().any(|clock| code(line).contains(clock)));
        (found && !path.starts_with("tests")).then_some(path)
    };
    let found: BTreeSet<PathBuf> = sources().into_iter().filter_map(reads).collect();
    let allowed: BTreeSet<PathBuf> = WALL_CLOCKS.iter().map(|(path, _)| PathBuf::from(path)).collect();
    assert_eq!(found, allowed, "who reads the wall clock, and who may");
}

/// Whether a line opens a block, function, impl, trait or extern block that the compiler does not check.
fn is_unsafe(line: &str) -> bool {
    let word = concat!("uns", "afe");
    let code = code(line);
    let opens = ["{", "fn ", "impl ", "trait ", "extern "];
    code.match_indices(word).any(|(at, _)| {
        let rest = code[at + word.len()..].trim_start();
        !code[..at].ends_with('"') && (rest.is_empty() || opens.iter().any(|next| rest.starts_with(next)))
    })
}

#[test]
fn files_are_short_say_what_they_are_and_finish_what_they_begin() {
    let unfinished = [concat!("to", "do!("), concat!("unimpl", "emented!("), concat!("#[ig", "nore")];
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let lines = text.lines().count();
        if lines > LINES_MAX {
            wrong.push(format!("{}: {lines} lines", path.display()));
        }
        // The one file that others include cannot have inner documentation.
        let opening = if path == Path::new("deploy/libtorch_rpath.rs") { "// " } else { "//!" };
        if !text.starts_with(opening) {
            wrong.push(format!("{}: does not begin by saying what it is", path.display()));
        }
        for (number, line) in text.lines().enumerate() {
            if unfinished.iter().any(|mark| code(line).contains(mark)) {
                wrong.push(format!("{}:{}: {}", path.display(), number + 1, line.trim()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn code_that_the_compiler_does_not_check_is_in_the_kernels_and_in_one_line_that_maps_files() {
    let mapping = Path::new("crates/checkpoint/src/mapping.rs");
    let mut found = Vec::new();
    for (path, text) in sources().into_iter().filter(|(path, _)| !path.starts_with("kernels")) {
        let lines = text.lines().enumerate().filter(|(_, line)| is_unsafe(line));
        found.extend(lines.map(|(number, line)| (path.clone(), format!("{}: {}", number + 1, line.trim()))));
    }
    let elsewhere: Vec<_> = found.iter().filter(|(path, _)| path != mapping).collect();
    assert!(elsewhere.is_empty(), "{elsewhere:#?}");
    assert_eq!(found.len(), 1, "the one that maps files: {found:#?}");
}
