//! Logs: to standard error, as text or JSON lines, filtered by `MILLRACE_LOG`. Standard output stays the program's.

use std::io::{self, IsTerminal};

use tracing_subscriber::EnvFilter;

/// The environment variable with the filter, in the syntax of `tracing_subscriber::EnvFilter`; `info` without it.
pub const FILTER_VARIABLE: &str = "MILLRACE_LOG";

/// How a log line looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// The filter cannot be read, or logging is set up already.
#[derive(Debug, thiserror::Error)]
#[error("logging: {0}")]
pub struct TelemetryError(String);

/// Sets up logging for the process; to be called once, first.
///
/// # Errors
/// [`TelemetryError`] names the filter's mistake.
pub fn init(format: LogFormat) -> Result<(), TelemetryError> {
    let filter = match std::env::var(FILTER_VARIABLE) {
        Ok(text) => EnvFilter::try_new(&text).map_err(|e| TelemetryError(format!("{FILTER_VARIABLE}={text:?}: {e}")))?,
        Err(_) => EnvFilter::new("info"),
    };
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    match format {
        LogFormat::Text => builder.with_ansi(io::stderr().is_terminal()).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    }
    .map_err(|e| TelemetryError(e.to_string()))
}
