//! Plain tables for people: columns as wide as their widest cell, two spaces between, figures to the right.

use serde_json::Value;

/// Renders `rows` under `head`. A row that is too short has empty cells. Ends with a newline.
#[must_use]
pub fn render(head: &[&str], rows: &[Vec<String>]) -> String {
    let cell = |row: &[String], i: usize| row.get(i).cloned().unwrap_or_default();
    let width = |i: usize| rows.iter().map(|row| cell(row, i).chars().count()).chain([head[i].chars().count()]).max().unwrap_or(0);
    let figures = |i: usize| !rows.is_empty() && rows.iter().all(|row| is_figure(&cell(row, i)));
    let columns: Vec<(usize, bool)> = (0..head.len()).map(|i| (width(i), figures(i))).collect();
    let mut out = String::new();
    let head: Vec<String> = head.iter().map(|&title| title.to_owned()).collect();
    for row in std::iter::once(&head).chain(rows) {
        let mut line = String::new();
        for (i, (width, right)) in columns.iter().enumerate() {
            let text = cell(row, i);
            let padded = if *right { format!("{text:>width$}") } else { format!("{text:<width$}") };
            line.push_str(&padded);
            line.push_str("  ");
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

fn is_figure(text: &str) -> bool {
    text == "-" || text.chars().next().is_some_and(|c| c.is_ascii_digit()) && text.chars().all(|c| c.is_ascii_digit() || c == '.')
}

/// A JSON value as a cell: text without quotes, `-` for nothing.
#[must_use]
pub fn cell(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::String(text) => text.clone(),
        Value::Bool(true) => "yes".into(),
        Value::Bool(false) => "no".into(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn columns_line_up_and_figures_stand_right() {
        let rows = vec![vec!["coordinator-1".into(), "7".into()], vec!["c".into(), "12345".into()], vec!["d".into(), "-".into()]];
        let expected = "NAME            TERM\ncoordinator-1      7\nc              12345\nd                  -\n";
        assert_eq!(render(&["NAME", "TERM"], &rows), expected);
    }

    #[test]
    fn a_table_without_rows_is_its_head_and_short_rows_are_padded() {
        assert_eq!(render(&["A", "B"], &[]), "A  B\n");
        assert_eq!(render(&["A", "B"], &[vec!["x".into()]]), "A  B\nx\n");
    }

    #[test]
    fn json_reads_as_people_write() {
        let cells = [json!(null), json!("a"), json!(true), json!(3)].map(|value| cell(&value));
        assert_eq!(cells, ["-", "a", "yes", "3"]);
    }
}
