//! The exit codes, and the error that carries one.

use std::fmt;
use std::process::ExitCode;

use super::ask::AskError;

/// How a command ended, as its exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Done.
    Ok = 0,
    /// The operation failed.
    Failed = 1,
    /// The command line makes no sense. `clap` gives the same.
    Usage = 2,
    /// The cluster serves, but something is missing.
    Degraded = 3,
    /// No replica answers, or there is no quorum.
    Unavailable = 4,
    /// What was named does not exist.
    NotFound = 5,
    /// Something else is in the way.
    Conflict = 6,
    /// Not done in time.
    Timeout = 7,
    /// The cluster does not know us.
    Denied = 8,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

impl Exit {
    /// The code that an error carries, else [`Exit::Failed`].
    #[must_use]
    pub fn of(error: &anyhow::Error) -> Self {
        let own = error.downcast_ref::<CtlError>().map(|error| error.exit);
        own.or_else(|| error.downcast_ref::<AskError>().map(AskError::exit)).unwrap_or(Self::Failed)
    }

    /// The code that a replica's refusal means, by the word it begins with.
    #[must_use]
    pub fn of_refusal(reason: &str) -> Self {
        let codes = [
            ("not found:", Self::NotFound),
            ("conflict:", Self::Conflict),
            ("unavailable:", Self::Unavailable),
            ("denied:", Self::Denied),
            ("usage:", Self::Usage),
            ("timeout:", Self::Timeout),
        ];
        codes.into_iter().find(|(word, _)| reason.starts_with(word)).map_or(Self::Failed, |(_, exit)| exit)
    }

    /// An error with this code.
    #[must_use]
    pub fn error(self, message: impl fmt::Display) -> anyhow::Error {
        CtlError { exit: self, message: message.to_string(), hint: None }.into()
    }

    /// An error with this code, and what may help.
    #[must_use]
    pub fn hinted(self, message: impl fmt::Display, hint: impl fmt::Display) -> anyhow::Error {
        CtlError { exit: self, message: message.to_string(), hint: Some(hint.to_string()) }.into()
    }

    /// What may help against an error: its own hint, else what its code suggests.
    #[must_use]
    pub fn hint(error: &anyhow::Error) -> Option<String> {
        if let Some(own) = error.downcast_ref::<CtlError>() {
            return own.hint.clone();
        }
        let hint = match Self::of(error) {
            Self::Unavailable => "`millctl doctor` looks at each replica by itself",
            Self::Denied => "`millctl certs show --dir FOLDER` tells whose certificate it is and until when",
            Self::NotFound => "`millctl cluster status` lists what there is",
            _ => return None,
        };
        Some(hint.into())
    }
}

/// An error with an exit code of its own.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct CtlError {
    /// The code.
    pub exit: Exit,
    /// What went wrong, naming the object.
    pub message: String,
    /// What may help.
    pub hint: Option<String>,
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn an_error_keeps_its_code_under_context() {
        let error: anyhow::Result<()> = Err(Exit::NotFound.error("no node \"x\""));
        let error = error.context("cordoning").unwrap_err();
        assert_eq!(Exit::of(&error), Exit::NotFound);
        assert_eq!(format!("{error:#}"), "cordoning: no node \"x\"");
        assert_eq!(Exit::of(&anyhow::anyhow!("else")), Exit::Failed);
    }

    #[test]
    fn a_refusal_says_its_code_and_errors_carry_hints() {
        assert_eq!(Exit::of_refusal("not found: node \"x\""), Exit::NotFound);
        assert_eq!(Exit::of_refusal("conflict: y"), Exit::Conflict);
        assert_eq!(Exit::of_refusal("unavailable: there is no leader now"), Exit::Unavailable);
        assert_eq!(Exit::of_refusal("anything else"), Exit::Failed);
        let error = Exit::Conflict.hinted("a", "try b");
        assert_eq!((Exit::of(&error), Exit::hint(&error).as_deref()), (Exit::Conflict, Some("try b")));
        let asked = anyhow::Error::from(AskError::Unavailable(String::new()));
        assert!(Exit::hint(&asked).is_some_and(|hint| hint.contains("doctor")));
        assert_eq!(Exit::hint(&anyhow::anyhow!("x")), None);
    }

    #[test]
    fn the_codes_are_the_documented_ones() {
        use Exit::*;
        let codes = [Ok, Failed, Usage, Degraded, Unavailable, NotFound, Conflict, Timeout, Denied].map(|exit| exit as u8);
        assert_eq!(codes, [0, 1, 2, 3, 4, 5, 6, 7, 8]);
    }
}
