//! Axes with grid, ticks and labels. The name of the y axis stands above it, to be read without turning the head.

use plotters_backend::DrawingBackend;
use plotters_backend::text_anchor::{HPos, VPos};

use super::canvas::{Canvas, Lettering};
use super::layout::{Frame, LABEL, TICK};
use super::palette::{GRID, INK, MUTED};
use super::text;
use crate::figure::Panel;

/// Most lines of a category's name.
const LINES: usize = 3;

/// Draws the axes of `panel` into `room` and returns the place left for data.
pub(crate) fn paint<B: DrawingBackend>(
    canvas: &mut Canvas<B>,
    panel: &Panel,
    room: Frame,
    titled: bool,
) -> Result<Frame, String> {
    let mut top = room.top;
    if titled {
        let look = Lettering::new(13.0, INK).bold().held(HPos::Left, VPos::Center);
        canvas.text(&text::fitted(&panel.title, 13.8, room.width()), (room.left, top + 9.0), look)?;
        top += 22.0;
    }
    let look = Lettering::new(LABEL, MUTED);
    canvas.text(&text::fitted(&panel.y.label, LABEL, room.width()), (room.left, top + 7.0), look)?;
    let widest = panel.y.ticks.iter().map(|(_, t)| text::width(t, TICK, false)).fold(0.0, f64::max);
    let left = room.left + widest + 9.0;
    let names = category_lines(panel, room.right - left);
    let lines = names.iter().map(Vec::len).max().unwrap_or(1).max(1);
    let bottom = room.bottom - 26.0 - 13.0 * lines as f64;
    let inner = Frame { left, top: top + 22.0, right: room.right - 2.0, bottom };
    for (y, label) in &panel.y.ticks {
        let at = inner.bottom - panel.y.place(*y) * inner.height();
        if at < inner.top - 1.0 || at > inner.bottom + 1.0 {
            continue;
        }
        canvas.line(&[(inner.left, at), (inner.right, at)], GRID, 1.0)?;
        let look = Lettering::new(TICK, MUTED).held(HPos::Right, VPos::Center);
        canvas.text(label, (inner.left - 7.0, at), look)?;
    }
    for (i, (x, label)) in panel.x.ticks.iter().enumerate() {
        let at = inner.left + panel.x.place(*x) * inner.width();
        if at < inner.left - 1.0 || at > inner.right + 1.0 {
            continue;
        }
        if !panel.x.categories {
            canvas.line(&[(at, inner.bottom), (at, inner.bottom + 4.0)], MUTED, 1.0)?;
        }
        let own = [label.clone()];
        let written = names.get(i).map_or(&own[..], Vec::as_slice);
        for (line, part) in written.iter().enumerate() {
            let look = Lettering::new(TICK, MUTED).held(HPos::Center, VPos::Center);
            canvas.text(part, (at, inner.bottom + 13.0 + 13.0 * line as f64), look)?;
        }
    }
    if panel.y.low < 0.0 && panel.y.high > 0.0 && !panel.y.log {
        let zero = inner.bottom - panel.y.place(0.0) * inner.height();
        canvas.line(&[(inner.left, zero), (inner.right, zero)], MUTED, 1.0)?;
    }
    canvas.line(&[(inner.left, inner.bottom), (inner.right, inner.bottom)], MUTED, 1.2)?;
    let middle = (inner.left + inner.right) / 2.0;
    let look = Lettering::new(LABEL, MUTED).held(HPos::Center, VPos::Center);
    canvas.text(&text::fitted(&panel.x.label, LABEL, inner.width()), (middle, room.bottom - 8.0), look)?;
    Ok(inner)
}

/// The names of categories, broken into lines that fit their place.
fn category_lines(panel: &Panel, width: f64) -> Vec<Vec<String>> {
    if !panel.x.categories {
        return Vec::new();
    }
    let room = width / panel.x.ticks.len().max(1) as f64 - 6.0;
    panel.x.ticks.iter().map(|(_, name)| broken(name, room)).collect()
}

/// `name` in at most three lines of at most `room` pixels.
pub(crate) fn broken(name: &str, room: f64) -> Vec<String> {
    let mut lines: Vec<String> = vec![String::new()];
    for part in name.split_inclusive([' ', '-', '_', '/']) {
        let last = lines.len() - 1;
        let longer = format!("{}{part}", lines[last]);
        if lines[last].is_empty() || text::width(longer.trim_end(), TICK, false) <= room {
            lines[last] = longer;
        } else {
            lines.push(part.to_string());
        }
    }
    if lines.len() > LINES {
        let rest = lines.split_off(LINES - 1).concat();
        lines.push(rest);
    }
    lines.iter().map(|l| text::fitted(l.trim_end(), TICK, room)).collect()
}
