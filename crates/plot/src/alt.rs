//! Figures in words, for readers who do not see them.

use minicache_config::PlotKind;

use crate::figure::{Figure, Panel};
use crate::number::significant;

/// What a figure shows: kind, axes, and the ends of every series.
pub(crate) fn describe(figure: &Figure) -> String {
    let kind = match figure.kind {
        PlotKind::Line => "Line chart",
        PlotKind::Scatter => "Scatter plot",
        PlotKind::Bar => "Bar chart",
        PlotKind::Radar => "Radar chart",
    };
    let panels: Vec<String> = figure.panels.iter().map(|p| panel(figure, p)).collect();
    let first = &figure.panels[0];
    format!("{kind}: {}, {} against {}. {}", figure.title, first.y.label, first.x.label, panels.join(" "))
}

fn panel(figure: &Figure, panel: &Panel) -> String {
    let series: Vec<String> = panel
        .series
        .iter()
        .map(|s| {
            let label = &figure.legend[s.key].label;
            let ys = s.points.iter().map(|p| p.y);
            let (low, high) = ys.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), y| (a.min(y), b.max(y)));
            if low == high {
                format!("{label} {}", significant(low, 3))
            } else {
                format!("{label} {} to {}", significant(low, 3), significant(high, 3))
            }
        })
        .collect();
    let place = if panel.title.is_empty() { String::new() } else { format!("{}: ", panel.title) };
    format!("{place}{}.", series.join("; "))
}
