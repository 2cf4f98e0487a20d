//! Radar charts: one spoke per category, one ring per series.

use std::f64::consts::{FRAC_PI_2, TAU};

use plotters_backend::DrawingBackend;
use plotters_backend::text_anchor::{HPos, VPos};

use super::axes::broken;
use super::canvas::{Canvas, Lettering, Xy};
use super::layout::{Frame, TICK};
use super::marks::DASH;
use super::palette::{GRID, INK, MUTED, hue};
use super::text;
use crate::figure::{Figure, Panel};

/// Draws `panel` into `room` and returns the square of the chart.
pub(crate) fn paint<B: DrawingBackend>(
    canvas: &mut Canvas<B>,
    figure: &Figure,
    panel: &Panel,
    room: Frame,
) -> Result<Frame, String> {
    let mut top = room.top;
    if figure.panels.len() > 1 {
        let look = Lettering::new(13.0, INK).bold();
        canvas.text(&text::fitted(&panel.title, 13.8, room.width()), (room.left, top + 9.0), look)?;
        top += 22.0;
    }
    let center = ((room.left + room.right) / 2.0, (top + room.bottom) / 2.0 + 4.0);
    let radius = ((room.bottom - top) / 2.0 - 32.0).min(room.width() / 2.0 - 80.0);
    let count = panel.x.ticks.len();
    let at = |spoke: usize, share: f64| -> Xy {
        let angle = TAU * spoke as f64 / count as f64 - FRAC_PI_2;
        (center.0 + radius * share * angle.cos(), center.1 + radius * share * angle.sin())
    };
    let ring = |share: f64| (0..=count).map(|i| at(i % count, share)).collect::<Vec<_>>();
    for (value, _) in panel.y.ticks.iter().filter(|(v, _)| *v > 0.0) {
        canvas.line(&ring(panel.y.place(*value)), GRID, 1.0)?;
    }
    for (i, (_, name)) in panel.x.ticks.iter().enumerate() {
        canvas.line(&[center, at(i, 1.0)], GRID, 1.0)?;
        let (x, y) = at(i, 1.0);
        let (dx, dy) = ((x - center.0) / radius, (y - center.1) / radius);
        let h = match dx {
            d if d > 0.2 => HPos::Left,
            d if d < -0.2 => HPos::Right,
            _ => HPos::Center,
        };
        let lines = broken(name, 84.0);
        let tall = 13.0 * (lines.len() - 1) as f64;
        for (line, part) in lines.iter().enumerate() {
            let look = Lettering::new(TICK + 0.5, INK).held(h, VPos::Center);
            let y = y + dy * (13.0 + tall / 2.0) - tall / 2.0 + 13.0 * line as f64;
            canvas.text(part, (x + dx * 10.0, y), look)?;
        }
    }
    for series in &panel.series {
        let key = &figure.legend[series.key];
        let color = hue(key.hue);
        let mut path: Vec<Xy> = series.points.iter().map(|p| at(p.x as usize, panel.y.place(p.y))).collect();
        let closed = path.len() == count;
        if closed {
            path.push(path[0]);
        }
        if key.paper {
            canvas.dashed(&path, color, 1.8, DASH)?;
            continue;
        }
        if closed && key.hue > 0 {
            canvas.area(&path, color, 0.07)?;
        }
        canvas.line(&path, color, 2.2)?;
        for at in path {
            canvas.marker(at, key.marker, 3.4, color, false)?;
        }
    }
    for (value, label) in panel.y.ticks.iter().filter(|(v, _)| *v > 0.0) {
        let (x, y) = at(0, panel.y.place(*value));
        let look = Lettering::new(9.5, MUTED).held(HPos::Right, VPos::Center);
        canvas.text(label, (x - 5.0, y), look)?;
    }
    Ok(Frame { left: room.left, top: top + 10.0, right: room.right, bottom: room.bottom })
}
