//! What a run leaves: a folder with `result.json` (figures), `requests.jsonl` (every request), `requests.csv` and `report.html`.

pub mod html;
pub mod svg;
pub mod text;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::record::Record;
use super::summary::{Summary, VERSION, good};

/// Figures and requests of a run.
#[derive(Clone, Debug)]
pub struct Results {
    /// Figures.
    pub summary: Summary,
    /// Every request, by number.
    pub records: Vec<Record>,
}

const CSV_HEAD: &str = "request,class,due_s,sent_s,ttft_ms,ttft_sent_ms,tpot_ms,gap_max_ms,e2e_ms,prompt_tokens,output_tokens,cached_tokens,outcome,good,connect_ms,front_us,gateway_us,queue_us,compute_us,prefill,decode,attempts";

impl Results {
    /// Writes the folder's files.
    ///
    /// # Errors
    /// What the system says.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let write = || -> Result<()> {
            fs::create_dir_all(dir)?;
            let mut lines = BufWriter::new(File::create(dir.join("requests.jsonl"))?);
            for record in &self.records {
                serde_json::to_writer(&mut lines, record)?;
                lines.write_all(b"\n")?;
            }
            lines.flush()?;
            fs::write(dir.join("requests.csv"), self.csv())?;
            fs::write(dir.join("report.html"), html::page(self))?;
            // Last: where it is, the rest is.
            fs::write(dir.join("result.json"), serde_json::to_string_pretty(&self.summary)? + "\n")?;
            Ok(())
        };
        write().with_context(|| dir.display().to_string())
    }

    /// Reads a folder.
    ///
    /// # Errors
    /// Names the file that is wrong.
    pub fn load(dir: &Path) -> Result<Self> {
        let (summary, lines) = (dir.join("result.json"), dir.join("requests.jsonl"));
        let text = fs::read_to_string(&summary).with_context(|| summary.display().to_string())?;
        let summary: Summary = serde_json::from_str(&text).with_context(|| summary.display().to_string())?;
        ensure!(summary.millload_result == VERSION, "{}: version {}", dir.display(), summary.millload_result);
        let file = BufReader::new(File::open(&lines).with_context(|| lines.display().to_string())?);
        let records = file.lines().map(|line| Ok(serde_json::from_str(&line?)?)).collect::<Result<Vec<Record>>>();
        Ok(Self { summary, records: records.with_context(|| lines.display().to_string())? })
    }

    /// One line for each request.
    #[must_use]
    pub fn csv(&self) -> String {
        let or_none = |value: Option<f64>| value.map_or(String::new(), |value| format!("{value:.3}"));
        let mut out = format!("{CSV_HEAD}\n");
        for r in &self.records {
            let about = &self.summary.about;
            let class = about.classes.get(usize::from(r.class)).map_or("", |class| class.name.as_str());
            let server = r.server.clone().unwrap_or_default();
            let fields = [
                r.i.to_string(),
                class.replace([',', '"', '\n'], " "),
                format!("{:.6}", r.due_ns as f64 / 1e9),
                format!("{:.6}", r.sent_ns as f64 / 1e9),
                or_none(r.ttft_ms()),
                or_none(r.ttft_sent_ms()),
                or_none(r.tpot_ms()),
                format!("{:.3}", f64::from(r.gap_max_us) / 1e3),
                format!("{:.3}", r.e2e_ms()),
                r.prompt_tokens.to_string(),
                r.output_tokens.to_string(),
                r.cached_tokens.map_or(String::new(), |tokens| tokens.to_string()),
                r.outcome.word().replace([',', '"', '\n'], " "),
                u8::from(good(r, &about.slo(r.class))).to_string(),
                format!("{:.3}", r.connect_ms()),
                server.front_us.to_string(),
                server.gateway_us.to_string(),
                server.queue_us.to_string(),
                server.compute_us.to_string(),
                server.prefill,
                server.decode,
                server.attempts.to_string(),
            ];
            out.push_str(&fields.join(","));
            out.push('\n');
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::super::summary::summarise;
    use super::super::summary::tests::known;
    use super::*;

    #[test]
    fn a_folder_is_read_as_it_was_written() {
        let (about, plan, records) = known(40);
        let results = Results { summary: summarise(about, &plan, &records), records };
        let dir = tempfile::tempdir().unwrap();
        results.save(dir.path()).unwrap();
        let again = Results::load(dir.path()).unwrap();
        assert!(again.records == results.records);
        assert_eq!(text::report(&again.summary), text::report(&results.summary));
        let csv = fs::read_to_string(dir.path().join("requests.csv")).unwrap();
        let columns: Vec<usize> = csv.lines().map(|line| line.split(',').count()).collect();
        assert!(columns.len() == 41 && columns.iter().all(|n| *n == columns[0]), "{columns:?}");
        let page = fs::read_to_string(dir.path().join("report.html")).unwrap();
        assert!(page.contains("<svg") && !page.contains("http://www.w3.org/1999/xhtml\" src") && !page.contains("<script src"));
        fs::write(dir.path().join("requests.jsonl"), "{\n").unwrap();
        assert!(Results::load(dir.path()).is_err());
    }
}
