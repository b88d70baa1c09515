//! Stop strings: finds the first one in text that comes in pieces, and never lets a part of one out.

/// Holds back just as much text as could be the beginning of a stop string.
#[derive(Debug)]
pub struct StopFilter {
    stops: Vec<String>,
    held: String,
}

/// What may go out.
#[derive(Debug, PartialEq, Eq)]
pub struct Passed {
    /// Text before any stop string.
    pub text: String,
    /// Whether one was found: nothing after it is wanted.
    pub stopped: bool,
}

impl StopFilter {
    /// A filter for some strings, none of them empty.
    #[must_use]
    pub fn new(stops: Vec<String>) -> Self {
        Self { stops, held: String::new() }
    }

    /// Takes the next piece. O(held x stops): both are bounded by the request's limits.
    pub fn push(&mut self, piece: &str) -> Passed {
        self.held.push_str(piece);
        let found = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min();
        if let Some(at) = found {
            let text = self.held[..at].to_owned();
            self.held.clear();
            return Passed { text, stopped: true };
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        Passed { text: std::mem::replace(&mut self.held, rest), stopped: false }
    }

    /// The text ends: what was held back was no stop string.
    pub fn flush(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes at the end of `text` that are a beginning of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len().saturating_sub(1));
    (1..=longest).rev().find(|&n| stop.is_char_boundary(n) && text.ends_with(&stop[..n])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let mut filter = StopFilter::new(stops.iter().map(|s| (*s).to_owned()).collect());
        let mut out = String::new();
        for piece in pieces {
            let passed = filter.push(piece);
            out.push_str(&passed.text);
            if passed.stopped {
                return (out, true);
            }
        }
        out.push_str(&filter.flush());
        (out, false)
    }

    #[test]
    fn a_stop_over_several_pieces_is_found() {
        assert_eq!(run(&["\n\nQ:"], &["answer\n", "\nQ", ": more"]), ("answer".into(), true));
        assert_eq!(run(&["abc"], &["ab", "abc"]), ("ab".into(), true));
    }

    #[test]
    fn the_first_of_several_wins() {
        assert_eq!(run(&["world", "lo"], &["hello world"]), ("hel".into(), true));
    }

    #[test]
    fn what_only_looked_like_a_stop_goes_out() {
        assert_eq!(run(&["\n\n\n"], &["a\n", "\nb"]), ("a\n\nb".into(), false));
        assert_eq!(run(&["é!"], &["caf", "é", "?"]), ("café?".into(), false));
        assert_eq!(run(&[], &["a", "b"]), ("ab".into(), false));
    }
}
