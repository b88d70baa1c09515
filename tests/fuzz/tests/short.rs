//! The short run: every target, its kept inputs first, then the same spoiled examples every time. The long one is `make fuzz`.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::process::Command;

use millrace_fuzz::targets::TARGETS;

/// Runs targets in processes of their own; gives what they say.
fn run(targets: &[&str]) -> (bool, String) {
    let out = Command::new(env!("CARGO_BIN_EXE_millrace-fuzz")).arg("run").args(targets).output().unwrap();
    let said = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
    (out.status.success(), said)
}

/// Every second target, beginning with `first`: two tests run at a time.
fn half(first: usize) {
    let names: Vec<&str> = TARGETS.iter().skip(first).step_by(2).map(|target| target.name).collect();
    let (sound, said) = run(&names);
    assert!(sound, "{said}");
    for line in names.iter().map(|name| said.lines().find(|line| line.starts_with(&format!("{name} "))).unwrap()) {
        // A target that takes nothing, or everything, is not reached by what is spoiled.
        let words: Vec<&str> = line.split_whitespace().collect();
        let (runs, taken): (u64, u64) = (words[1].parse().unwrap(), words[3].parse().unwrap());
        assert!(taken * 100 > runs && taken < runs, "{line}");
    }
}

#[test]
fn half_of_the_parsers_hold_their_promises() {
    half(0);
}

#[test]
fn the_other_half_holds_them_too() {
    half(1);
}

#[test]
fn what_is_no_target_is_refused() {
    let (sound, said) = run(&["nothing"]);
    assert!(!sound && said.contains("nothing"), "{said}");
}
