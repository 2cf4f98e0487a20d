//! What stands for the data within axes: lines with bands, points with the Pareto front, bars.

use plotters_backend::DrawingBackend;
use plotters_backend::text_anchor::{HPos, VPos};

use super::canvas::{Canvas, Drawn, Lettering, Xy};
use super::layout::Frame;
use super::palette::{INK, MUTED, area_hue, hue};
use super::text;
use crate::figure::{Figure, Key, Panel, Point, Series};
use crate::number;

/// Drawn and left pixels of the paper's curves.
pub(crate) const DASH: Xy = (6.0, 4.0);
/// Em of the values above bars.
const VALUE: f64 = 9.5;
/// Lines with more points than this have no markers.
const MARKED: usize = 16;

fn place(panel: &Panel, inner: Frame, x: f64, y: f64) -> Xy {
    let x = inner.left + panel.x.place(x) * inner.width();
    let y = inner.bottom - panel.y.place(y) * inner.height();
    // far outside of a range that was chosen for other values
    (x.clamp(inner.left - 2.0, inner.right + 2.0), y.clamp(inner.top - 2.0, inner.bottom + 2.0))
}

/// Whether the points of a line have markers.
pub(crate) fn marked(series: &Series) -> bool {
    !series.level && series.points.len() <= MARKED
}

/// Lines, dashed for the paper's, with bands where there are any. Bands lie below all lines.
pub(crate) fn lines<B: DrawingBackend>(
    canvas: &mut Canvas<B>,
    figure: &Figure,
    panel: &Panel,
    inner: Frame,
) -> Drawn {
    let ends = |p: &Point, level: bool| {
        let xs = if level { vec![panel.x.low, panel.x.high] } else { vec![p.x] };
        xs.into_iter().map(|x| Point { x, ..*p }).collect::<Vec<_>>()
    };
    // beside lines with bands the intervals of single points would pile up
    let swept = panel.series.iter().any(|s| s.points.len() > 1);
    for series in &panel.series {
        let color = hue(figure.legend[series.key].hue);
        let points: Vec<Point> = series.points.iter().flat_map(|p| ends(p, series.level)).collect();
        let banded: Vec<(&Point, (f64, f64))> = points.iter().filter_map(|p| Some((p, p.spread?))).collect();
        if banded.len() > 1 {
            let upper = banded.iter().map(|(p, s)| place(panel, inner, p.x, s.1));
            let lower = banded.iter().rev().map(|(p, s)| place(panel, inner, p.x, s.0));
            canvas.area(&upper.chain(lower).collect::<Vec<_>>(), color, 0.13)?;
        } else if let ([(p, (low, high))], false) = (&banded[..], swept) {
            whisker(canvas, place(panel, inner, p.x, *low), place(panel, inner, p.x, *high), MUTED)?;
        }
    }
    for series in &panel.series {
        let key = &figure.legend[series.key];
        let color = hue(key.hue);
        let points = series.points.iter().flat_map(|p| ends(p, series.level));
        let path: Vec<Xy> = points.map(|p| place(panel, inner, p.x, p.y)).collect();
        if key.paper {
            canvas.dashed(&path, color, 1.8, DASH)?;
            continue;
        }
        canvas.line(&path, color, if series.level { 1.8 } else { 2.2 })?;
        if marked(series) {
            for at in path {
                canvas.marker(at, key.marker, 3.4, color, false)?;
            }
        }
    }
    Ok(())
}

/// Points with intervals, and the front through those that none beats.
pub(crate) fn points<B: DrawingBackend>(
    canvas: &mut Canvas<B>,
    figure: &Figure,
    panel: &Panel,
    inner: Frame,
) -> Drawn {
    if panel.front.len() > 1 {
        let at = |&(s, p): &(usize, usize)| {
            let point = panel.series[s].points[p];
            place(panel, inner, point.x, point.y)
        };
        canvas.line(&panel.front.iter().map(at).collect::<Vec<_>>(), MUTED, 1.4)?;
    }
    for (s, series) in panel.series.iter().enumerate() {
        let key = &figure.legend[series.key];
        for (p, point) in series.points.iter().enumerate() {
            let at = place(panel, inner, point.x, point.y);
            if let Some((low, high)) = point.spread {
                whisker(
                    canvas,
                    place(panel, inner, point.x, low),
                    place(panel, inner, point.x, high),
                    hue(key.hue),
                )?;
            }
            let on_front = panel.front.iter().position(|&f| f == (s, p)).filter(|_| panel.front.len() > 1);
            let radius = if on_front.is_some() { 5.6 } else { 4.4 };
            canvas.marker(at, key.marker, radius, hue(key.hue), key.paper)?;
            if let Some(index) = on_front {
                // The caption says which cache each number is.
                let look = Lettering::new(VALUE, INK).held(HPos::Left, VPos::Center);
                canvas.text(&(index + 1).to_string(), (at.0 + 8.0, at.1 - 8.0), look)?;
            }
        }
    }
    Ok(())
}

fn whisker<B: DrawingBackend>(
    canvas: &mut Canvas<B>,
    low: Xy,
    high: Xy,
    color: plotters::style::RGBColor,
) -> Drawn {
    canvas.line(&[low, high], color, 1.2)?;
    for (x, y) in [low, high] {
        canvas.line(&[(x - 3.0, y), (x + 3.0, y)], color, 1.2)?;
    }
    Ok(())
}

/// Bars side by side within each category, with intervals, and values where there is room.
pub(crate) fn bars<B: DrawingBackend>(
    canvas: &mut Canvas<B>,
    figure: &Figure,
    panel: &Panel,
    inner: Frame,
) -> Drawn {
    let in_category = |x: f64| -> Vec<(usize, Point)> {
        let of = |s: &Series| s.points.iter().find(|p| p.x == x).map(|p| (s.key, *p));
        panel.series.iter().filter_map(of).collect()
    };
    let categories: Vec<f64> = panel.x.ticks.iter().map(|(x, _)| *x).collect();
    let most = categories.iter().map(|&x| in_category(x).len()).max().unwrap_or(1).max(1);
    let slot = inner.width() / categories.len().max(1) as f64;
    let width = (slot * 0.82 / most as f64).min(64.0);
    let value = |p: &Point| number::significant(p.y, 3);
    let all = panel.series.iter().flat_map(|s| &s.points);
    let labelled = all.map(|p| text::width(&value(p), VALUE, false)).fold(0.0, f64::max) <= width + 2.0;
    for x in categories {
        let here = in_category(x);
        let middle = inner.left + panel.x.place(x) * inner.width();
        let first = middle - width * here.len() as f64 / 2.0;
        for (i, (key, point)) in here.into_iter().enumerate() {
            let left = first + width * i as f64 + 0.8;
            let right = left + width - 1.6;
            let (_, zero) = place(panel, inner, x, if panel.y.log { panel.y.low } else { 0.0 });
            let (_, end) = place(panel, inner, x, point.y);
            bar(canvas, &figure.legend[key], (left, end.min(zero)), (right, end.max(zero)))?;
            let mut above = end.min(zero);
            let center = (left + right) / 2.0;
            if let Some((low, high)) = point.spread {
                let (_, low) = place(panel, inner, x, low);
                let (_, high) = place(panel, inner, x, high);
                whisker(canvas, (center, low), (center, high), INK)?;
                above = above.min(high);
            }
            if labelled {
                let look = Lettering::new(VALUE, MUTED).held(HPos::Center, VPos::Center);
                canvas.text(&value(&point), (center, above - 7.5), look)?;
            }
        }
    }
    Ok(())
}

/// A bar: solid if measured, an outline over a light fill if from the paper.
pub(crate) fn bar<B: DrawingBackend>(
    canvas: &mut Canvas<B>,
    key: &Key,
    (left, top): Xy,
    (right, bottom): Xy,
) -> Drawn {
    let color = area_hue(key.hue);
    if !key.paper {
        return canvas.block((left, top), (right, bottom), color, 1.0);
    }
    canvas.block((left, top), (right, bottom), color, 0.14)?;
    let (l, t, r, b) = (left + 0.7, top + 0.7, right - 0.7, bottom);
    canvas.dashed(&[(l, b), (l, t), (r, t), (r, b)], color, 1.4, (4.0, 3.0))
}
