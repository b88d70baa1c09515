//! Plots as SVG text: axes, lines, dots, bars. No library, no script; colours come from the page's style.

use std::fmt::Write;

/// Width of a plot.
pub const WIDTH: f64 = 640.0;
/// Height of a plot.
pub const HEIGHT: f64 = 260.0;
/// Points of a line that are drawn; longer lines are thinned.
pub const POINTS_MAX: usize = 2000;
const LEFT: f64 = 58.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 14.0;
const BOTTOM: f64 = 40.0;

/// How the vertical axis counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// From 0.
    Linear,
    /// By decades.
    Log,
}

/// One set of points.
#[derive(Clone, Debug)]
pub struct Series {
    /// Its name in the legend.
    pub name: String,
    /// Its points, by x.
    pub points: Vec<(f64, f64)>,
    /// Dots, not a line.
    pub dots: bool,
}

/// A plot of series over a common axis.
#[derive(Clone, Debug)]
pub struct Plot<'a> {
    /// Under the horizontal axis.
    pub x: &'a str,
    /// Beside the vertical axis.
    pub y: &'a str,
    /// How the vertical axis counts.
    pub scale: Scale,
    /// What is drawn.
    pub series: Vec<Series>,
    /// Vertical lines with a word.
    pub marks: Vec<(f64, String)>,
    /// Horizontal lines with a word.
    pub limits: Vec<(f64, String)>,
}

/// Text that may stand in SVG and HTML.
#[must_use]
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// 1, 2 or 5 times a power of ten, about a `parts`-th of `span`.
fn step(span: f64, parts: f64) -> f64 {
    let raw = (span / parts).max(1e-12);
    let power = 10f64.powf(raw.log10().floor());
    let factor = [1.0, 2.0, 5.0, 10.0].into_iter().find(|factor| factor * power >= raw).unwrap_or(10.0);
    factor * power
}

/// A number on an axis.
fn label(value: f64) -> String {
    match value.abs() {
        size if size >= 10_000.0 => format!("{:.0}k", value / 1000.0),
        size if size >= 10.0 || size == 0.0 => format!("{value:.0}"),
        size if size >= 1.0 => format!("{value:.1}"),
        _ => format!("{value:.3}"),
    }
}

struct Frame {
    x: (f64, f64),
    y: (f64, f64),
    scale: Scale,
}

impl Frame {
    fn new(plot: &Plot) -> Self {
        let all = || plot.series.iter().flat_map(|series| &series.points);
        let finite = |values: &mut dyn Iterator<Item = f64>| {
            values.filter(|v| v.is_finite()).fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)))
        };
        let (x_low, x_high) = finite(&mut all().map(|point| point.0));
        let (y_low, y_high) = finite(&mut all().map(|point| point.1).chain(plot.limits.iter().map(|limit| limit.0)));
        let wide = |low: f64, high: f64| if high > low { (low, high) } else { (low.min(0.0), low.max(0.0) + 1.0) };
        let (x, usable) = (wide(x_low.min(0.0), x_high), y_high.is_finite());
        let y = match plot.scale {
            Scale::Linear if !usable => (0.0, 1.0),
            Scale::Log if !usable => (0.1, 1.0),
            Scale::Linear => (0.0, (y_high * 1.05).max(1e-9)),
            Scale::Log => {
                let low = y_low.max(y_high * 1e-6).max(1e-3);
                (10f64.powf(low.log10().floor()), 10f64.powf(y_high.max(low * 1.01).log10().ceil()))
            }
        };
        Self { x: if x.0.is_finite() { x } else { (0.0, 1.0) }, y, scale: plot.scale }
    }

    fn across(&self, x: f64) -> f64 {
        LEFT + (x - self.x.0) / (self.x.1 - self.x.0) * (WIDTH - LEFT - RIGHT)
    }

    fn up(&self, y: f64) -> f64 {
        let share = match self.scale {
            Scale::Linear => (y - self.y.0) / (self.y.1 - self.y.0),
            Scale::Log => (y.max(self.y.0) / self.y.0).log10() / (self.y.1 / self.y.0).log10(),
        };
        HEIGHT - BOTTOM - share.clamp(0.0, 1.02) * (HEIGHT - TOP - BOTTOM)
    }

    fn y_ticks(&self) -> Vec<f64> {
        match self.scale {
            Scale::Linear => {
                let step = step(self.y.1, 4.0);
                (0..=8).map(|i| f64::from(i) * step).take_while(|y| *y <= self.y.1).collect()
            }
            Scale::Log => {
                let decades = (self.y.1 / self.y.0).log10().round() as i32;
                (0..=decades).map(|i| self.y.0 * 10f64.powi(i)).collect()
            }
        }
    }

    fn axes(&self, out: &mut String, plot: &Plot) {
        let (right, bottom) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
        for y in self.y_ticks() {
            let at = self.up(y);
            let _ = write!(out, r#"<line class="grid" x1="{LEFT}" x2="{right}" y1="{at:.1}" y2="{at:.1}"/>"#);
            let _ =
                write!(out, r#"<text class="tick" x="{}" y="{:.1}" text-anchor="end">{}</text>"#, LEFT - 6.0, at + 4.0, label(y));
        }
        let step = step(self.x.1 - self.x.0, 7.0);
        let first = (self.x.0 / step).ceil() as i64;
        for i in first..first + 12 {
            let x = i as f64 * step;
            if x > self.x.1 {
                break;
            }
            let at = self.across(x);
            let _ = write!(out, r#"<line class="grid" x1="{at:.1}" x2="{at:.1}" y1="{bottom}" y2="{}"/>"#, bottom + 4.0);
            let _ = write!(out, r#"<text class="tick" x="{at:.1}" y="{}" text-anchor="middle">{}</text>"#, bottom + 16.0, label(x));
        }
        let _ = write!(out, r#"<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>"#);
        let (middle, low) = ((LEFT + right) / 2.0, HEIGHT - 6.0);
        let _ = write!(out, r#"<text class="name" x="{middle}" y="{low}" text-anchor="middle">{}</text>"#, escape(plot.x));
        let _ = write!(
            out,
            r#"<text class="name" transform="translate(13 {}) rotate(-90)" text-anchor="middle">{}</text>"#,
            (TOP + bottom) / 2.0,
            escape(plot.y)
        );
    }
}

impl Plot<'_> {
    /// The `svg` element.
    #[must_use]
    pub fn draw(&self) -> String {
        let frame = Frame::new(self);
        let mut out = format!(r#"<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">"#);
        frame.axes(&mut out, self);
        for (y, word) in &self.limits {
            let at = frame.up(*y);
            let _ = write!(out, r#"<line class="limit" x1="{LEFT}" x2="{}" y1="{at:.1}" y2="{at:.1}"/>"#, WIDTH - RIGHT);
            let _ = write!(
                out,
                r#"<text class="mark" x="{}" y="{:.1}" text-anchor="end">{}</text>"#,
                WIDTH - RIGHT,
                at - 4.0,
                escape(word)
            );
        }
        for (x, word) in &self.marks {
            let at = frame.across(*x);
            let _ = write!(out, r#"<line class="limit" x1="{at:.1}" x2="{at:.1}" y1="{TOP}" y2="{}"/>"#, HEIGHT - BOTTOM);
            let _ = write!(out, r#"<text class="mark" x="{:.1}" y="{}">{}</text>"#, at + 4.0, TOP + 10.0, escape(word));
        }
        for (at, series) in self.series.iter().enumerate() {
            series.draw(&mut out, &frame, at);
        }
        self.legend(&mut out);
        out + "</svg>"
    }

    fn legend(&self, out: &mut String) {
        if self.series.len() < 2 {
            return;
        }
        let mut x = LEFT + 8.0;
        for (at, series) in self.series.iter().enumerate() {
            let _ = write!(out, r#"<rect class="fill{at}" x="{x}" y="{}" width="10" height="10" rx="2"/>"#, TOP - 6.0);
            let _ = write!(out, r#"<text class="tick" x="{}" y="{}">{}</text>"#, x + 14.0, TOP + 3.0, escape(&series.name));
            x += 28.0 + series.name.chars().count() as f64 * 6.6;
        }
    }
}

impl Series {
    fn draw(&self, out: &mut String, frame: &Frame, at: usize) {
        let every = self.points.len().div_ceil(POINTS_MAX).max(1);
        let last = self.points.len().saturating_sub(1);
        let kept = self.points.iter().enumerate().filter(|(i, _)| i % every == 0 || *i == last).map(|(_, point)| point);
        let places = kept.filter(|(x, y)| x.is_finite() && y.is_finite()).map(|(x, y)| (frame.across(*x), frame.up(*y)));
        if self.dots {
            for (x, y) in places {
                let _ = write!(out, r#"<circle class="fill{at}" cx="{x:.1}" cy="{y:.1}" r="2"/>"#);
            }
            return;
        }
        let path: Vec<String> = places.map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let _ = write!(out, r#"<polyline class="line{at}" points="{}"/>"#, path.join(" "));
    }
}

/// Horizontal bars made of parts: each bar a name and its parts' lengths, in the order of `parts`.
#[must_use]
pub fn bars(parts: &[&str], bars: &[(String, Vec<f64>)], unit: &str) -> String {
    let height = 34.0 + bars.len() as f64 * 38.0 + 8.0;
    let most = bars.iter().map(|(_, values)| values.iter().map(|v| v.max(0.0)).sum::<f64>()).fold(1e-9, f64::max);
    let (left, width) = (150.0, WIDTH - 150.0 - 90.0);
    let mut out = format!(r#"<svg viewBox="0 0 {WIDTH} {height}" role="img">"#);
    let mut x = 10.0;
    for (at, part) in parts.iter().enumerate() {
        let _ = write!(out, r#"<rect class="fill{at}" x="{x}" y="6" width="10" height="10" rx="2"/>"#);
        let _ = write!(out, r#"<text class="tick" x="{}" y="15">{}</text>"#, x + 14.0, escape(part));
        x += 30.0 + part.chars().count() as f64 * 6.8;
    }
    for (row, (name, values)) in bars.iter().enumerate() {
        let (y, mut x) = (32.0 + row as f64 * 38.0, left);
        let _ = write!(out, r#"<text class="name" x="{}" y="{}" text-anchor="end">{}</text>"#, left - 10.0, y + 17.0, escape(name));
        for (at, value) in values.iter().enumerate() {
            let length = value.max(0.0) / most * width;
            let _ = write!(out, r#"<rect class="fill{at}" x="{x:.1}" y="{y}" width="{length:.1}" height="26"/>"#);
            x += length;
        }
        let sum: f64 = values.iter().sum();
        let _ = write!(out, r#"<text class="tick" x="{:.1}" y="{}">{} {unit}</text>"#, x + 6.0, y + 17.0, label(sum));
    }
    out + "</svg>"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plots_are_well_formed_whatever_they_show() {
        let series = |points: Vec<(f64, f64)>| Series { name: "a<b".into(), points, dots: false };
        let cases = [
            vec![],
            vec![(0.0, 0.0)],
            vec![(1.0, 5.0), (2.0, f64::NAN), (3.0, 1e9)],
            (0..9000).map(|i| (f64::from(i), 1.0)).collect(),
        ];
        for points in cases {
            for scale in [Scale::Linear, Scale::Log] {
                let limits = if points.is_empty() { vec![] } else { vec![(10.0, "limit".to_owned())] };
                let plot = Plot {
                    x: "x",
                    y: "y",
                    scale,
                    series: vec![series(points.clone()), series(vec![])],
                    marks: vec![(1.0, "k".into())],
                    limits,
                };
                let svg = plot.draw();
                assert!(!svg.contains("NaN") && !svg.contains("inf") && !svg.contains("a<b"), "{svg}");
                assert_eq!(svg.matches("<text").count(), svg.matches("</text>").count());
                assert!(svg.len() < 100_000);
            }
        }
        assert!(bars(&["x", "y"], &[("n".into(), vec![1.0, 2.0]), ("m".into(), vec![0.0, 0.0])], "ms").contains("3.0 ms"));
    }

    #[test]
    fn ticks_are_round() {
        assert_eq!((step(10.0, 5.0), step(0.7, 7.0), step(330.0, 4.0)), (2.0, 0.1, 100.0));
    }
}
