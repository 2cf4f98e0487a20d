//! Where the parts of a figure go: title, legend, panels.

use minicache_config::PlotKind;

use super::text;
use crate::figure::{Figure, Key};

pub(crate) const TITLE: f64 = 17.0;
pub(crate) const SUBTITLE: f64 = 12.5;
pub(crate) const LEGEND: f64 = 12.0;
pub(crate) const LABEL: f64 = 11.5;
pub(crate) const TICK: f64 = 11.0;

/// Space around everything.
pub(crate) const MARGIN: f64 = 22.0;
/// Length of the line sample in a legend entry, and from it to the text.
pub(crate) const SAMPLE: f64 = 24.0;
pub(crate) const SAMPLE_GAP: f64 = 7.0;
/// Height of a legend entry.
pub(crate) const ENTRY: f64 = 19.0;

/// A rectangle in pixels.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Frame {
    pub(crate) left: f64,
    pub(crate) top: f64,
    pub(crate) right: f64,
    pub(crate) bottom: f64,
}

impl Frame {
    pub(crate) fn width(&self) -> f64 {
        self.right - self.left
    }

    pub(crate) fn height(&self) -> f64 {
        self.bottom - self.top
    }
}

/// What a legend entry shows.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Entry {
    /// A series, by its index in the figure's legend.
    Series(usize),
    /// The Pareto front.
    Front,
}

/// Where the legend is.
#[derive(Debug, Clone)]
pub(crate) enum Legend {
    /// One series: its name is in the subtitle.
    None,
    /// A column right of the panel from this x on.
    Right(f64, Vec<Entry>),
    /// Rows above the panels: entry, x and y of its middle height.
    Top(Vec<(Entry, f64, f64)>),
}

/// Sizes and places of a figure's parts.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    pub(crate) width: f64,
    pub(crate) height: f64,
    /// Subtitle as it is written.
    pub(crate) subtitle: String,
    pub(crate) legend: Legend,
    /// Room of each panel with its labels.
    pub(crate) panels: Vec<Frame>,
}

/// What an entry says.
pub(crate) fn entry_label<'a>(figure: &'a Figure, entry: &Entry) -> &'a str {
    match entry {
        Entry::Series(i) => &figure.legend[*i].label,
        Entry::Front => "Pareto front",
    }
}

/// The places of everything in `figure`.
pub(crate) fn of(figure: &Figure) -> Layout {
    let count = figure.panels.len();
    let columns = match count {
        1 => 1,
        2 | 4 => 2,
        _ => 3,
    };
    let (panel_width, panel_height) = match (columns, figure.kind) {
        (1, PlotKind::Radar) => (520.0, 440.0),
        (1, _) => (640.0, 400.0),
        (2, _) => (450.0, 320.0),
        _ => (350.0, 285.0),
    };
    let entries: Vec<Entry> = entries(figure);
    let widest =
        entries.iter().map(|e| text::width(entry_label(figure, e), LEGEND, false)).fold(0.0, f64::max);
    let mut subtitle = figure.subtitle.clone();
    let body = columns as f64 * panel_width + (columns - 1) as f64 * 24.0;
    let head = MARGIN + TITLE + 6.0;
    let mut top = head + if subtitle.is_empty() && entries.len() > 1 { 8.0 } else { SUBTITLE + 12.0 };
    let mut width = body + 2.0 * MARGIN;
    let legend = if entries.len() <= 1 {
        for entry in &entries {
            let label = entry_label(figure, entry);
            if figure.panels[0].y.label == label {
                continue;
            }
            let apart = if subtitle.is_empty() { "" } else { " · " };
            subtitle = format!("{subtitle}{apart}{label}");
        }
        Legend::None
    } else if count == 1 && widest <= 250.0 && entries.len() as f64 * ENTRY <= panel_height - 50.0 {
        let from = MARGIN + body + 14.0;
        width = from + SAMPLE + SAMPLE_GAP + widest + MARGIN;
        Legend::Right(from, entries)
    } else {
        let (placed, bottom) = rows(figure, entries, top, width - MARGIN);
        top = bottom + 8.0;
        Legend::Top(placed)
    };
    let panels: Vec<Frame> = (0..count)
        .map(|i| {
            let left = MARGIN + (i % columns) as f64 * (panel_width + 24.0);
            let y = top + (i / columns) as f64 * (panel_height + 14.0);
            Frame { left, top: y, right: left + panel_width, bottom: y + panel_height }
        })
        .collect();
    let height = panels.last().map_or(top, |p| p.bottom) + MARGIN * 0.6;
    let title = text::width(&figure.title, TITLE, true).max(text::width(&subtitle, SUBTITLE, false));
    Layout { width: width.max(title + 2.0 * MARGIN).min(width + 240.0), height, subtitle, legend, panels }
}

fn entries(figure: &Figure) -> Vec<Entry> {
    let shown = |(_, key): &(usize, &Key)| !key.hidden;
    let mut out: Vec<Entry> =
        figure.legend.iter().enumerate().filter(shown).map(|(i, _)| Entry::Series(i)).collect();
    if figure.panels.iter().any(|p| p.front.len() > 1) {
        out.push(Entry::Front);
    }
    out
}

/// Entries in rows from the left, and where the last row ends.
fn rows(figure: &Figure, entries: Vec<Entry>, top: f64, right: f64) -> (Vec<(Entry, f64, f64)>, f64) {
    let (mut x, mut y) = (MARGIN, top + ENTRY / 2.0);
    let mut out = Vec::new();
    for entry in entries {
        let width = SAMPLE + SAMPLE_GAP + text::width(entry_label(figure, &entry), LEGEND, false);
        if x > MARGIN && x + width > right {
            (x, y) = (MARGIN, y + ENTRY);
        }
        out.push((entry, x, y));
        x += width + 20.0;
    }
    (out, y + ENTRY / 2.0)
}

/// Moves `wanted` heights apart until neighbours are `gap` or more from each other, within `low..=high`; the order
/// stays.
pub(crate) fn spread(wanted: &[f64], gap: f64, low: f64, high: f64) -> Vec<f64> {
    let mut order: Vec<usize> = (0..wanted.len()).collect();
    order.sort_by(|a, b| wanted[*a].total_cmp(&wanted[*b]));
    let mut placed: Vec<f64> = order.iter().map(|&i| wanted[i].clamp(low, high)).collect();
    for i in 1..placed.len() {
        placed[i] = placed[i].max(placed[i - 1] + gap);
    }
    let mut limit = high;
    for y in placed.iter_mut().rev() {
        *y = y.min(limit);
        limit = *y - gap;
    }
    let mut out = vec![0.0; wanted.len()];
    for (i, y) in order.into_iter().zip(placed) {
        out[i] = y;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_moved_apart() {
        assert_eq!(spread(&[10.0, 11.0, 50.0], 10.0, 0.0, 60.0), [10.0, 20.0, 50.0]);
        assert_eq!(spread(&[60.0, 59.0], 10.0, 0.0, 60.0), [60.0, 50.0]);
        assert_eq!(spread(&[], 10.0, 0.0, 60.0), Vec::<f64>::new());
    }
}
