//! A terminal as a screen: its other buffer, keys without Enter, and everything as it was when this ends, however it ends.

use std::io::{Read, Write, stdin, stdout};

use anyhow::{Context, Result};
use rustix::termios::{LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::sync::mpsc;

/// To the other buffer, without a cursor.
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";
/// Keys that wait; more are dropped.
const KEYS_MAX: usize = 16;
/// Control-C and Control-D, as a terminal without signals sends them.
const ENDS: [u8; 2] = [3, 4];

/// What a key means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// Enough.
    Quit,
    /// Look again now.
    Other,
}

/// The screen; the terminal is as before when it is dropped.
pub struct Screen {
    before: Termios,
}

impl Screen {
    /// Takes the terminal.
    ///
    /// # Errors
    /// Standard input is none.
    pub fn open() -> Result<Self> {
        let before = tcgetattr(stdin()).context("the terminal")?;
        let mut raw = before.clone();
        // Signals are keys here, so that no key ends us without the terminal being restored.
        raw.local_modes.remove(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG);
        raw.special_codes[SpecialCodeIndex::VMIN] = 1;
        raw.special_codes[SpecialCodeIndex::VTIME] = 0;
        tcsetattr(stdin(), OptionalActions::Now, &raw).context("the terminal")?;
        let screen = Self { before };
        write(ENTER)?;
        Ok(screen)
    }

    /// Shows the lines that fit.
    ///
    /// # Errors
    /// The terminal is gone.
    pub fn draw(&self, text: &str) -> Result<()> {
        let rows = tcgetwinsize(stdout()).map_or(24, |size| usize::from(size.ws_row.max(2)));
        let mut lines: Vec<&str> = text.lines().take(rows - 1).collect();
        lines.push("q quits");
        // Home, each line cleared to its end, and what is below: nothing flickers.
        let body: String = lines.iter().map(|line| format!("{line}\x1b[K")).collect::<Vec<_>>().join("\r\n");
        write(&format!("\x1b[H{body}\x1b[J"))
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = write(LEAVE);
        let _ = tcsetattr(stdin(), OptionalActions::Now, &self.before);
    }
}

fn write(text: &str) -> Result<()> {
    let mut out = stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("the terminal")
}

/// The keys as they come; ends with standard input.
pub fn keys() -> mpsc::Receiver<Key> {
    let (keys, pressed) = mpsc::channel(KEYS_MAX);
    std::thread::spawn(move || {
        let mut byte = [0];
        while matches!(stdin().lock().read(&mut byte), Ok(1)) {
            let _ = keys.try_send(meaning(byte[0]));
        }
    });
    pressed
}

fn meaning(byte: u8) -> Key {
    if byte.eq_ignore_ascii_case(&b'q') || ENDS.contains(&byte) { Key::Quit } else { Key::Other }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn q_and_the_keys_that_end_programs_quit() {
        assert!([b'q', b'Q', 3, 4].map(meaning).iter().all(|key| *key == Key::Quit));
        assert_eq!(meaning(b'x'), Key::Other);
    }
}
