//! `millctl completion`: what a shell needs to complete our command lines.

use clap::{Args, CommandFactory, ValueEnum};
use clap_complete::generate;

use super::Cli;

/// For which shell.
#[derive(Args, Clone, Copy, Debug)]
#[command(
    after_help = "Example:\n  millctl completion bash > ~/.local/share/bash-completion/completions/millctl\n  millctl completion zsh > ~/.zfunc/_millctl\n  millctl completion fish > ~/.config/fish/completions/millctl.fish"
)]
pub struct Completion {
    /// The shell
    shell: Shell,
}

/// A shell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Shell {
    /// GNU Bash.
    Bash,
    /// Z shell.
    Zsh,
    /// fish.
    Fish,
}

/// The script.
#[must_use]
pub fn script(Completion { shell }: Completion) -> Vec<u8> {
    let (mut command, mut script) = (Cli::command(), Vec::new());
    match shell {
        Shell::Bash => generate(clap_complete::Shell::Bash, &mut command, "millctl", &mut script),
        Shell::Zsh => generate(clap_complete::Shell::Zsh, &mut command, "millctl", &mut script),
        Shell::Fish => generate(clap_complete::Shell::Fish, &mut command, "millctl", &mut script),
    }
    script
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shell_knows_the_commands() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let script = String::from_utf8(script(Completion { shell })).unwrap();
            for word in ["millctl", "uncordon", "lookup", "--watch".trim_start_matches('-')] {
                assert!(script.contains(word), "{shell:?} does not know {word}");
            }
        }
    }
}
