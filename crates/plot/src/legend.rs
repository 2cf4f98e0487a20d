//! The legend of a figure: every series once, with its colour and marker.

use crate::curves::PaperCurve;
use crate::figure::{Figure, Key, MUTED_HUE, RAMP_HUE};
use crate::paper::plain;

/// The legend's entry for a measured series, made if it is new.
pub(crate) fn measured(figure: &mut Figure, label: String, full: bool) -> usize {
    if let Some(i) = figure.legend.iter().position(|k| !k.paper && k.label == label) {
        return i;
    }
    let hue = if full { 0 } else { next_hue(figure) };
    figure.legend.push(Key { label, hue, marker: marker(hue), paper: false, hidden: false });
    figure.legend.len() - 1
}

/// When the palette begins again, every colour gets another shape.
fn marker(hue: usize) -> usize {
    hue + 3 * (hue.saturating_sub(1) / 7)
}

fn next_hue(figure: &Figure) -> usize {
    figure.legend.iter().map(|k| k.hue).max().unwrap_or(0) + 1
}

/// A curve of the paper takes the colour of the measured series of its name.
pub(crate) fn paper(figure: &mut Figure, curve: &PaperCurve) -> usize {
    let label = curve.label();
    if let Some(i) = figure.legend.iter().position(|k| k.paper && k.label == label) {
        return i;
    }
    let name = plain(&curve.column);
    let same = |k: &&Key| {
        let measured = plain(&k.label);
        !k.paper && (measured == name || name == format!("{measured}cache"))
    };
    let alone = figure.legend.iter().filter(|k| !k.paper).count() == 1 && curve.placed;
    let twin = figure.legend.iter().find(same).or_else(|| figure.legend.first().filter(|_| alone));
    let (hue, hidden) = match twin {
        Some(key) => (key.hue, true),
        None => (next_hue(figure), false),
    };
    figure.legend.push(Key { label, hue, marker: marker(hue), paper: true, hidden });
    figure.legend.len() - 1
}

/// Once all panels are there: hides what was not drawn, and where curves of the paper share the colours of measured
/// ones, adds one grey dashed entry that says whose they are.
pub(crate) fn finish(figure: &mut Figure) {
    let twins: Vec<&Key> = figure.legend.iter().filter(|k| k.hidden).collect();
    let model = |k: &Key| k.label.split_once(": ").map_or_else(|| k.label.clone(), |(m, _)| m.to_string());
    let stands_for_twins = twins.first().map(|first| {
        let one = twins.iter().all(|k| model(k) == model(first));
        let hue = if twins.len() == 1 { first.hue } else { MUTED_HUE };
        let label = if one { model(first) } else { "paper".into() };
        Key { label, hue, marker: 0, paper: true, hidden: false }
    });
    for (i, key) in figure.legend.iter_mut().enumerate() {
        key.hidden |= !figure.panels.iter().flat_map(|p| &p.series).any(|s| s.key == i);
    }
    figure.legend.extend(stands_for_twins);
}

/// Gives the measured series, which follow a number, colours that follow it too.
pub(crate) fn in_order(figure: &mut Figure) {
    let last = figure.legend.iter().filter(|k| !k.paper).count().saturating_sub(1).max(1);
    for (i, key) in figure.legend.iter_mut().filter(|k| !k.paper).enumerate() {
        (key.hue, key.marker) = (RAMP_HUE + 255 * i / last, 1);
    }
}
