//! A trace as text: the span tree with a bar of time for each span.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use shared::ids::SpanId;
use shared::time::{Dur, Time};
use shared::trace::{Span, Status};

use super::gist::gist;

/// How to print.
#[derive(Clone, Copy, Debug)]
pub struct Style {
    /// Width of a bar in characters.
    pub bar: usize,
    /// Whether to use ANSI colours.
    pub colour: bool,
}

impl Style {
    /// Plain text, as in a log.
    pub const PLAIN: Style = Style { bar: 30, colour: false };
}

/// One line before it is laid out.
struct Row {
    label: String,
    place: String,
    duration: Dur,
    bar: String,
    gist: String,
    failed: bool,
}

/// Prints the spans of one trace as a tree. `place` names the instance of a span.
pub fn tree(spans: &[&Span], place: impl Fn(&Span) -> String, style: Style) -> String {
    let mut rows = Vec::new();
    let frame = Frame::around(spans, style.bar);
    let children = children_of(spans);
    let known: std::collections::BTreeSet<SpanId> = spans.iter().map(|s| s.span_id).collect();
    for root in spans.iter().filter(|s| s.parent.is_none_or(|p| !known.contains(&p))) {
        push_rows(root, &children, &frame, &place, ("", ""), &mut rows);
    }
    lay_out(&rows, style)
}

type Children<'a> = BTreeMap<SpanId, Vec<&'a Span>>;

fn children_of<'a>(spans: &[&'a Span]) -> Children<'a> {
    let mut children: Children<'a> = BTreeMap::new();
    for span in spans {
        if let Some(parent) = span.parent {
            children.entry(parent).or_default().push(span);
        }
    }
    for list in children.values_mut() {
        list.sort_by(|a, b| (a.start, a.end, &a.name).cmp(&(b.start, b.end, &b.name)));
    }
    children
}

/// The time the bars are drawn against: the whole trace.
struct Frame {
    start: Time,
    length: u64,
    width: usize,
}

impl Frame {
    fn around(spans: &[&Span], width: usize) -> Frame {
        let start = spans.iter().map(|s| s.start).min().unwrap_or_default();
        let end = spans.iter().map(|s| s.end).max().unwrap_or_default();
        Frame { start, length: (end - start).as_nanos().max(1), width }
    }

    /// `|  ###   |`: at least one mark, so that short spans show where they lie.
    fn bar(&self, span: &Span) -> String {
        let cell =
            |t: Time| ((t - self.start).as_nanos() as u128 * self.width as u128 / u128::from(self.length)) as usize;
        let from = cell(span.start).min(self.width - 1);
        let to = cell(span.end).clamp(from + 1, self.width);
        format!("|{}{}{}|", " ".repeat(from), "#".repeat(to - from), " ".repeat(self.width - to))
    }
}

fn push_rows(
    span: &Span,
    children: &Children<'_>,
    frame: &Frame,
    place: &impl Fn(&Span) -> String,
    (branch, below): (&str, &str),
    rows: &mut Vec<Row>,
) {
    let failed = matches!(span.status, Status::Error(_));
    rows.push(Row {
        label: format!("{branch}{}", span.name),
        place: place(span),
        duration: span.end - span.start,
        bar: frame.bar(span),
        gist: gist(span),
        failed,
    });
    let list = children.get(&span.span_id).map_or(&[][..], Vec::as_slice);
    for (i, child) in list.iter().enumerate() {
        let last = i + 1 == list.len();
        let next = (
            format!("{below}{}", if last { "`- " } else { "|- " }),
            format!("{below}{}", if last { "   " } else { "|  " }),
        );
        push_rows(child, children, frame, place, (&next.0, &next.1), rows);
    }
}

fn lay_out(rows: &[Row], style: Style) -> String {
    let label = rows.iter().map(|r| r.label.chars().count()).max().unwrap_or(0);
    let place = rows.iter().map(|r| r.place.chars().count()).max().unwrap_or(0);
    let (red, plain) = if style.colour { ("\x1b[31m", "\x1b[0m") } else { ("", "") };
    let mut text = String::new();
    for row in rows {
        let (on, off) = if row.failed { (red, plain) } else { ("", "") };
        let line = format!(
            "{on}{:<label$}{off}  {:<place$}  {:>8}  {}  {}",
            row.label,
            row.place,
            row.duration.to_string(),
            row.bar,
            row.gist
        );
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

#[cfg(test)]
mod tests {
    use shared::ids::{InstanceId, TraceId};
    use shared::trace::Kind;

    use super::*;

    fn span(id: u64, parent: Option<u64>, name: &'static str, start: u64, end: u64) -> Span {
        Span {
            trace_id: TraceId::new(1).unwrap(),
            span_id: SpanId::new(id).unwrap(),
            parent: parent.and_then(SpanId::new),
            parent_is_remote: false,
            tracestate: None,
            instance: InstanceId(0),
            name: name.into(),
            kind: Kind::Internal,
            start: Time::from_nanos(start),
            end: Time::from_nanos(end),
            attrs: Vec::new(),
            events: Vec::new(),
            links: Vec::new(),
            status: Status::Unset,
        }
    }

    #[test]
    fn a_tree_reads_top_down_with_bars_in_one_frame() {
        let spans = [
            span(1, None, "root", 0, 1_000_000),
            span(4, Some(1), "later", 500_000, 1_000_000),
            span(2, Some(1), "early", 0, 1_000),
            span(3, Some(2), "inner", 0, 0),
        ];
        let refs: Vec<&Span> = spans.iter().collect();
        let text = tree(&refs, |_| "svc".into(), Style { bar: 10, colour: false });
        insta::assert_snapshot!(text, @r"
        root         svc   1.00 ms  |##########|
        |- early     svc   1.00 us  |#         |
        |  `- inner  svc      0 ns  |#         |
        `- later     svc    500 us  |     #####|
        ");
    }

    #[test]
    fn a_lost_parent_does_not_hide_its_children() {
        let spans = [span(1, None, "root", 0, 10), span(3, Some(2), "orphan", 0, 5)];
        let refs: Vec<&Span> = spans.iter().collect();
        assert!(tree(&refs, |_| String::new(), Style::PLAIN).contains("orphan"));
    }
}
