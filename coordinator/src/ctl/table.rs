//! What people see: pages of lines and tables. Columns are as wide as their widest cell, two spaces between, figures to the right;
//! a cell may have a tone, which becomes a colour on a terminal and nothing elsewhere.

use std::fmt::Display;

/// What a cell means, for its colour.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tone {
    /// Nothing in particular.
    #[default]
    Plain,
    /// As it should be.
    Good,
    /// To be looked at.
    Warn,
    /// Broken.
    Bad,
    /// A heading.
    Head,
}

impl Tone {
    const fn code(self) -> Option<&'static str> {
        match self {
            Self::Plain => None,
            Self::Good => Some("32"),
            Self::Warn => Some("33"),
            Self::Bad => Some("31;1"),
            Self::Head => Some("1"),
        }
    }
}

/// A piece of text with a tone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cell {
    text: String,
    tone: Tone,
}

impl Cell {
    /// With this tone.
    #[must_use]
    pub fn tone(self, tone: Tone) -> Self {
        Self { tone, ..self }
    }

    fn paint(&self, padded: &str, colour: bool) -> String {
        match self.tone.code().filter(|_| colour) {
            Some(code) => format!("\x1b[{code}m{padded}\x1b[0m"),
            None => padded.to_owned(),
        }
    }
}

/// A plain cell.
#[must_use]
pub fn cell(value: impl Display) -> Cell {
    Cell { text: value.to_string(), tone: Tone::Plain }
}

/// A cell that may have nothing to say: `-`.
#[must_use]
pub fn maybe(value: Option<impl Display>) -> Cell {
    value.map_or_else(|| cell("-"), cell)
}

/// `yes`, or `no` in the tone of a warning.
#[must_use]
pub fn yes_no(value: bool) -> Cell {
    if value { cell("yes").tone(Tone::Good) } else { cell("no").tone(Tone::Warn) }
}

/// A word as it should be (`good`), or to be looked at.
#[must_use]
pub fn word(text: impl Display, good: bool) -> Cell {
    cell(text).tone(if good { Tone::Good } else { Tone::Warn })
}

/// One column over rows of `T`.
pub struct Column<T> {
    title: &'static str,
    wide: bool,
    cell: fn(&T) -> Cell,
}

/// A column that is always shown.
#[must_use]
pub const fn column<T>(title: &'static str, cell: fn(&T) -> Cell) -> Column<T> {
    Column { title, wide: false, cell }
}

/// A column that `-o wide` adds.
#[must_use]
pub const fn wide<T>(title: &'static str, cell: fn(&T) -> Cell) -> Column<T> {
    Column { title, wide: true, cell }
}

#[derive(Clone, Debug)]
struct Table {
    head: Vec<(&'static str, bool)>,
    rows: Vec<Vec<Cell>>,
}

#[derive(Clone, Debug)]
enum Part {
    Line(Vec<Cell>),
    Table(Table),
}

/// What is shown of an answer, from top to bottom.
#[derive(Clone, Debug, Default)]
pub struct Page(Vec<Part>);

impl Page {
    /// An empty page.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a line of one text.
    #[must_use]
    pub fn line(self, text: impl Display) -> Self {
        self.cells([cell(text)])
    }

    /// Adds a line of cells, three spaces between them.
    #[must_use]
    pub fn cells(mut self, cells: impl IntoIterator<Item = Cell>) -> Self {
        self.0.push(Part::Line(cells.into_iter().collect()));
        self
    }

    /// Adds a table; an empty line before it unless it is first.
    #[must_use]
    pub fn table<'a, T: 'a>(mut self, columns: &[Column<T>], rows: impl IntoIterator<Item = &'a T>) -> Self {
        let head = columns.iter().map(|column| (column.title, column.wide)).collect();
        let rows = rows.into_iter().map(|row| columns.iter().map(|column| (column.cell)(row)).collect()).collect();
        self.0.push(Part::Table(Table { head, rows }));
        self
    }

    /// The page as text that ends with a newline.
    #[must_use]
    pub fn render(&self, wide: bool, colour: bool) -> String {
        let mut out = String::new();
        for part in &self.0 {
            match part {
                Part::Line(cells) => {
                    let texts: Vec<String> = cells.iter().map(|cell| cell.paint(&cell.text, colour)).collect();
                    out.push_str(texts.join("   ").trim_end());
                    out.push('\n');
                }
                Part::Table(table) => {
                    if !out.is_empty() {
                        out.push('\n');
                    }
                    table.render(wide, colour, &mut out);
                }
            }
        }
        out
    }
}

impl Table {
    fn render(&self, wide: bool, colour: bool, out: &mut String) {
        let head: Vec<Cell> = self.head.iter().map(|(title, _)| cell(title).tone(Tone::Head)).collect();
        let shown: Vec<usize> = (0..head.len()).filter(|&i| wide || !self.head[i].1).collect();
        let lines = || std::iter::once(&head).chain(&self.rows);
        let width = |i: usize| lines().map(|row| row[i].text.chars().count()).max().unwrap_or(0);
        let figures = |i: usize| !self.rows.is_empty() && self.rows.iter().all(|row| is_figure(&row[i].text));
        let shape: Vec<(usize, usize, bool)> = shown.iter().map(|&i| (i, width(i), figures(i))).collect();
        let last = shown.last().copied();
        for row in lines() {
            let mut line = String::new();
            for &(i, width, right) in &shape {
                let text = &row[i].text;
                let padded = match (right, Some(i) == last) {
                    (true, _) => format!("{text:>width$}"),
                    (false, true) => text.clone(),
                    (false, false) => format!("{text:<width$}"),
                };
                line.push_str(&row[i].paint(&padded, colour));
                line.push_str("  ");
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
    }
}

fn is_figure(text: &str) -> bool {
    text == "-" || text.chars().next().is_some_and(|c| c.is_ascii_digit()) && text.chars().all(|c| c.is_ascii_digit() || c == '.')
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLUMNS: &[Column<(&str, Option<u32>, bool)>] =
        &[column("NAME", |row| cell(row.0)), column("TERM", |row| maybe(row.1)), wide("UP", |row| yes_no(row.2))];

    #[test]
    fn columns_line_up_and_figures_stand_right() {
        let rows = [("coordinator-1", Some(7), true), ("c", Some(12345), false), ("d", None, true)];
        let page = Page::new().table(COLUMNS, &rows);
        let expected = "NAME            TERM\ncoordinator-1      7\nc              12345\nd                  -\n";
        assert_eq!(page.render(false, false), expected);
        assert!(page.render(true, false).starts_with("NAME            TERM  UP\ncoordinator-1      7  yes\n"));
    }

    #[test]
    fn a_page_is_lines_and_tables_and_an_empty_table_is_its_head() {
        let page = Page::new().line("first").cells([cell("a"), cell("b")]).table(COLUMNS, &[]);
        assert_eq!(page.render(false, false), "first\na   b\n\nNAME  TERM\n");
    }

    #[test]
    fn colours_change_nothing_but_the_colour() {
        let page = Page::new().table(COLUMNS, &[("x", Some(1), false), ("longer", None, true)]);
        let (plain, coloured) = (page.render(true, false), page.render(true, true));
        assert!(!plain.contains('\x1b') && coloured.contains("\x1b[33mno\x1b[0m"), "{coloured:?}");
        let stripped = coloured.replace("\x1b[0m", "").replace("\x1b[1m", "").replace("\x1b[33m", "").replace("\x1b[32m", "");
        assert_eq!(stripped, plain);
    }
}
