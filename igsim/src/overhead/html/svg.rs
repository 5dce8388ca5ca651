//! Plots as SVG text: scales, axes, marks. Knows nothing of what is plotted.
//!
//! Every plot has a title and a description for screen readers; marks carry their figures as tooltips. Colours come from classes of the
//! page, so that one plot reads on light and on dark ground; shapes and dashes tell apart what colours alone would not.

use std::fmt::Write;

/// Text as it may stand in HTML, in an attribute too.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// From values to pixels.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scale {
    from: f64,
    to: f64,
    start: f64,
    end: f64,
    log: bool,
}

impl Scale {
    /// Values from `from` to `to`; a range without width is widened.
    pub(super) fn linear(from: f64, to: f64) -> Scale {
        let to = if to > from { to } else { from + 1.0 };
        Scale { from, to, start: 0.0, end: 1.0, log: false }
    }

    /// As [`Scale::linear`], with equal factors at equal distances; values must be positive.
    pub(super) fn logarithmic(from: f64, to: f64) -> Scale {
        let from = from.max(1e-9);
        Scale { from, to: to.max(from * 1.01), start: 0.0, end: 1.0, log: true }
    }

    /// The pixel of `value`, kept within the plot.
    pub(super) fn at(&self, value: f64) -> f64 {
        let of = |v: f64| if self.log { v.max(1e-9).ln() } else { v };
        let share = (of(value) - of(self.from)) / (of(self.to) - of(self.from));
        self.start + share.clamp(0.0, 1.0) * (self.end - self.start)
    }

    /// Whether `value` is on the scale.
    pub(super) fn shows(&self, value: f64) -> bool {
        (self.from..=self.to).contains(&value)
    }

    /// Round values on the scale, about `n` of them.
    pub(super) fn ticks(&self, n: usize) -> Vec<f64> {
        if self.log {
            let decades = (self.to / self.from).log10().max(0.1);
            let steps: &[f64] = match decades {
                d if d < 0.7 => &[1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0],
                d if d < 2.0 => &[1.0, 2.0, 5.0],
                _ => &[1.0],
            };
            let first = self.from.log10().floor() as i32;
            let last = self.to.log10().ceil() as i32;
            let all = (first..=last).flat_map(|e| steps.iter().map(move |s| s * 10f64.powi(e)));
            return all.filter(|v| self.shows(*v)).collect();
        }
        let rough = (self.to - self.from) / n.max(1) as f64;
        let size = 10f64.powf(rough.log10().floor());
        let step = size * [1.0, 2.0, 5.0, 10.0].into_iter().find(|s| s * size >= rough).unwrap_or(10.0);
        let first = (self.from / step).ceil() as i64;
        let last = (self.to / step).floor() as i64;
        (first..=last).map(|i| i as f64 * step).collect()
    }
}

/// Where a text stands against its point.
#[derive(Clone, Copy, Debug)]
pub(super) enum Anchor {
    /// To the right.
    Start,
    /// Centred.
    Middle,
    /// To the left.
    End,
}

/// A plot under construction.
#[derive(Debug)]
pub(super) struct Plot {
    /// Pixels, margins included.
    pub(super) width: f64,
    /// Pixels, margins included.
    pub(super) height: f64,
    /// The horizontal scale.
    pub(super) x: Scale,
    /// The vertical scale.
    pub(super) y: Scale,
    body: String,
}

const LEFT: f64 = 58.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 46.0;
const BOTTOM: f64 = 44.0;

impl Plot {
    /// An empty plot; `left` is more room for long labels on the left, `bottom` for a legend below.
    pub(super) fn new((width, height): (f64, f64), x: Scale, y: Scale, left: f64, bottom: f64) -> Plot {
        let x = Scale { start: LEFT + left, end: width - RIGHT, ..x };
        let y = Scale { start: height - BOTTOM - bottom, end: TOP, ..y };
        Plot { width, height, x, y, body: String::new() }
    }

    /// The left, right, top and bottom edge of the drawing area.
    pub(super) fn edges(&self) -> [f64; 4] {
        [self.x.start, self.x.end, self.y.end, self.y.start]
    }

    /// A line of marks along the vertical axis.
    pub(super) fn y_axis(&mut self, label: &str, name: impl Fn(f64) -> String) {
        let [left, right, top, _] = self.edges();
        for tick in self.y.ticks(5) {
            let y = self.y.at(tick);
            self.line("grid", [left, y, right, y]);
            self.text("faint", Anchor::End, [left - 6.0, y + 4.0], &name(tick));
        }
        self.text("faint", Anchor::Start, [8.0, top - 12.0], label);
    }

    /// A line of marks along the horizontal axis.
    pub(super) fn x_axis(&mut self, label: &str, name: impl Fn(f64) -> String) {
        let [left, right, top, bottom] = self.edges();
        for tick in self.x.ticks(7) {
            let x = self.x.at(tick);
            self.line("grid", [x, top, x, bottom]);
            self.text("faint", Anchor::Middle, [x, bottom + 16.0], &name(tick));
        }
        self.line("axis", [left, bottom, right, bottom]);
        self.text("faint", Anchor::End, [right, bottom + 34.0], label);
    }

    pub(super) fn line(&mut self, class: &str, [x1, y1, x2, y2]: [f64; 4]) {
        self.push(format_args!(r#"<line class="{class}" x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}"/>"#));
    }

    /// A filled rectangle from corner to corner, with a tooltip unless that is empty.
    pub(super) fn rect(&mut self, class: &str, [x1, y1, x2, y2]: [f64; 4], tip: &str) {
        let (x, y, w, h) = (x1.min(x2), y1.min(y2), (x2 - x1).abs(), (y2 - y1).abs());
        let tip = title(tip);
        self.push(format_args!(
            r#"<rect class="{class}" x="{x:.1}" y="{y:.1}" width="{w:.1}" height="{h:.1}">{tip}</rect>"#
        ));
    }

    pub(super) fn text(&mut self, class: &str, anchor: Anchor, [x, y]: [f64; 2], text: &str) {
        let anchor = match anchor {
            Anchor::Start => "",
            Anchor::Middle => " mid",
            Anchor::End => " end",
        };
        let text = escape(text);
        self.push(format_args!(r#"<text class="{class}{anchor}" x="{x:.1}" y="{y:.1}">{text}</text>"#));
    }

    /// A line through points given in pixels.
    pub(super) fn polyline(&mut self, class: &str, dash: &str, points: &[(f64, f64)], tip: &str) {
        let list: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let dash = if dash.is_empty() { String::new() } else { format!(r#" stroke-dasharray="{dash}""#) };
        let (list, tip) = (list.join(" "), title(tip));
        self.push(format_args!(r#"<polyline class="line {class}"{dash} points="{list}">{tip}</polyline>"#));
    }

    /// A mark whose shape goes with its class, so that it is told apart without colour.
    pub(super) fn mark(&mut self, class: &str, [x, y]: [f64; 2], size: f64, tip: &str) {
        let s = size;
        let path = match class {
            "eager" => format!("M{:.1} {:.1}h{w:.1}v{w:.1}h-{w:.1}z", x - s, y - s, w = 2.0 * s),
            "direct" => {
                let s = 1.35 * s;
                format!("M{x:.1} {:.1}l{s:.1} {s:.1}l-{s:.1} {s:.1}l-{s:.1} -{s:.1}z", y - s)
            }
            "other" => format!("M{x:.1} {:.1}l{s:.1} {:.1}h-{:.1}z", y - s, 1.8 * s, 2.0 * s),
            _ => {
                format!("M{:.1} {y:.1}a{s:.1} {s:.1} 0 1 0 {d:.1} 0a{s:.1} {s:.1} 0 1 0 -{d:.1} 0z", x - s, d = 2.0 * s)
            }
        };
        let tip = title(tip);
        self.push(format_args!(r#"<path class="{class}" d="{path}">{tip}</path>"#));
    }

    /// The finished plot in a figure of its own.
    pub(super) fn figure(self, name: &str, description: &str) -> String {
        let (name, description) = (escape(name), escape(description));
        let (w, h) = (self.width, self.height);
        format!(
            r#"<figure><svg role="img" width="{w}" height="{h}" viewBox="0 0 {w} {h}" xmlns="http://www.w3.org/2000/svg"><title>{name}</title><desc>{description}</desc><text class="name" x="8" y="16">{name}</text>{body}</svg></figure>
"#,
            body = self.body
        )
    }

    fn push(&mut self, args: std::fmt::Arguments<'_>) {
        // Writing to a String does not fail.
        let _ = self.body.write_fmt(args);
    }
}

fn title(tip: &str) -> String {
    if tip.is_empty() { String::new() } else { format!("<title>{}</title>", escape(tip)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_on_the_scale() {
        let check = |scale: Scale, expect: &[f64]| {
            let found = scale.ticks(5);
            let near = found.len() == expect.len()
                && found.iter().zip(expect).all(|(a, b)| (a - b).abs() < 1e-9 * b.abs().max(1.0));
            assert!(near, "{found:?} are not {expect:?}");
        };
        check(Scale::linear(0.0, 10.0), &[0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        check(Scale::linear(-1.3, 5.2), &[0.0, 2.0, 4.0]);
        check(Scale::linear(3.0, 3.0), &[3.0, 3.2, 3.4, 3.6, 3.8, 4.0]);
        check(Scale::logarithmic(1.0, 1000.0), &[1.0, 10.0, 100.0, 1000.0]);
        check(Scale::logarithmic(20.0, 600.0), &[20.0, 50.0, 100.0, 200.0, 500.0]);
    }

    #[test]
    fn what_comes_from_outside_is_escaped() {
        let mut plot = Plot::new((100.0, 100.0), Scale::linear(0.0, 1.0), Scale::linear(0.0, 1.0), 0.0, 0.0);
        plot.text("", Anchor::Start, [0.0, 0.0], "<script>&\"");
        plot.mark("eager", [0.0, 0.0], 3.0, "</title><b>");
        let found = plot.figure("a<b", "c>d");
        assert!(!found.contains("<script>") && !found.contains("<b>") && found.contains("a&lt;b"), "{found}");
    }
}
