//! Figures as SVG and PNG, drawn by the same code through plotters' backends.

mod axes;
mod canvas;
mod layout;
mod marks;
mod palette;
mod radar;
mod raster;
mod text;

use minicache_config::PlotKind;
use plotters::backend::SVGBackend;
use plotters_backend::DrawingBackend;
use plotters_backend::text_anchor::{HPos, VPos};

use crate::error::{PlotError, Result};
use crate::figure::{Figure, Panel};
use canvas::{Canvas, Drawn, Lettering};
use layout::{Entry, Frame, Layout, Legend};
pub(crate) use palette::variables;

/// Coordinates of the SVG per pixel: plotters rounds to whole ones.
const SVG_SCALE: f64 = 10.0;
/// Pixels of the PNG per pixel of the layout, for sharp text on dense screens.
const PNG_SCALE: usize = 2;

/// Pixels of a figure's layout, at most: each takes 48 bytes while the PNG is drawn, and nobody looks at more.
const MOST_PIXELS: f64 = 4e6;

/// Why the figure is not to be drawn, if it is too large: of rows that tell thousands of series or panels apart.
pub(crate) fn check_size(figure: &Figure) -> std::result::Result<(), String> {
    let Layout { width, height, .. } = layout::of(figure);
    if width * height <= MOST_PIXELS {
        return Ok(());
    }
    let panels = figure.panels.len();
    let plural = if panels == 1 { "" } else { "s" };
    Err(format!(
        "its series and {panels} panel{plural} would take {width:.0} x {height:.0} pixels; set a `filter` in its plot"
    ))
}

/// The figure as SVG.
pub(crate) fn svg(figure: &Figure) -> Result<String> {
    let layout = layout::of(figure);
    let (w, h) = (layout.width.ceil(), layout.height.ceil());
    let mut out = String::new();
    let size = ((w * SVG_SCALE) as u32, (h * SVG_SCALE) as u32);
    let canvas = Canvas::new(SVGBackend::with_string(&mut out, size), SVG_SCALE);
    paint(canvas, figure, &layout).map_err(|message| fail(figure, message))?;
    // plotters writes the coordinate range as the size, too
    let body = out.split_once('>').map_or("", |(_, body)| body);
    let (wide, high) = size;
    Ok(format!(
        "<svg width=\"{w}\" height=\"{h}\" viewBox=\"0 0 {wide} {high}\" stroke-linejoin=\"round\" \
         xmlns=\"http://www.w3.org/2000/svg\">{body}"
    ))
}

/// Width of the figure in pixels.
pub(crate) fn width(figure: &Figure) -> u32 {
    layout::of(figure).width.ceil() as u32
}

/// The figure as PNG.
pub(crate) fn png(figure: &Figure) -> Result<Vec<u8>> {
    let layout = layout::of(figure);
    let (w, h) = (layout.width.ceil() as usize * PNG_SCALE, layout.height.ceil() as usize * PNG_SCALE);
    let (large_w, large_h) = (w * raster::OVERSAMPLING, h * raster::OVERSAMPLING);
    let mut pixels = vec![0; large_w * large_h * 3];
    let backend = raster::Raster::new(&mut pixels, (large_w as u32, large_h as u32));
    let canvas = Canvas::new(backend, (PNG_SCALE * raster::OVERSAMPLING) as f64);
    paint(canvas, figure, &layout).map_err(|message| fail(figure, message))?;
    raster::encode(&pixels, w, h).map_err(|e| fail(figure, e.to_string()))
}

fn fail(figure: &Figure, message: String) -> PlotError {
    PlotError::Draw { name: figure.name.clone(), message }
}

fn paint<B: DrawingBackend>(mut canvas: Canvas<B>, figure: &Figure, layout: &Layout) -> Drawn {
    use layout::{MARGIN, SUBTITLE, TITLE};
    canvas.block((0.0, 0.0), (layout.width.ceil(), layout.height.ceil()), palette::PAPER, 1.0)?;
    let room = layout.width - 2.0 * MARGIN;
    let y = MARGIN + TITLE / 2.0;
    let look = Lettering::new(TITLE, palette::INK).bold();
    canvas.text(&text::fitted(&figure.title, TITLE * 1.06, room), (MARGIN, y), look)?;
    if !layout.subtitle.is_empty() {
        let y = MARGIN + TITLE + 6.0 + SUBTITLE / 2.0;
        let look = Lettering::new(SUBTITLE, palette::MUTED);
        canvas.text(&text::fitted(&layout.subtitle, SUBTITLE, room), (MARGIN, y), look)?;
    }
    for (panel, frame) in figure.panels.iter().zip(&layout.panels) {
        let inner = match figure.kind {
            PlotKind::Radar => radar::paint(&mut canvas, figure, panel, *frame)?,
            _ => {
                let inner = axes::paint(&mut canvas, panel, *frame, figure.panels.len() > 1)?;
                match figure.kind {
                    PlotKind::Bar => marks::bars(&mut canvas, figure, panel, inner)?,
                    PlotKind::Scatter => marks::points(&mut canvas, figure, panel, inner)?,
                    _ => marks::lines(&mut canvas, figure, panel, inner)?,
                }
                inner
            }
        };
        if let Legend::Right(x, entries) = &layout.legend {
            let heights = entry_heights(figure, panel, inner, entries);
            for (entry, y) in entries.iter().zip(heights) {
                legend_entry(&mut canvas, figure, entry, *x, y)?;
            }
        }
    }
    if let Legend::Top(entries) = &layout.legend {
        for (entry, x, y) in entries {
            legend_entry(&mut canvas, figure, entry, *x, *y)?;
        }
    }
    canvas.finish()
}

/// Heights of the entries right of a panel: beside the ends of lines, else from the top.
fn entry_heights(figure: &Figure, panel: &Panel, inner: Frame, entries: &[Entry]) -> Vec<f64> {
    let end = |entry: &Entry| {
        let Entry::Series(key) = entry else { return None };
        // the entry that stands for all curves of the paper goes beside the first of them
        let stands_for =
            |i: usize| figure.legend[*key].paper && figure.legend[i].paper && figure.legend[i].hidden;
        let own = panel.series.iter().find(|s| s.key == *key);
        let series = own.or_else(|| panel.series.iter().find(|s| stands_for(s.key)))?;
        let last = series.points.last()?;
        Some(inner.bottom - panel.y.place(last.y) * inner.height())
    };
    let wanted: Vec<f64> = entries
        .iter()
        .enumerate()
        .map(|(i, entry)| match figure.kind {
            PlotKind::Line => end(entry).unwrap_or(inner.bottom),
            _ => inner.top + (i as f64 + 0.5) * layout::ENTRY,
        })
        .collect();
    layout::spread(&wanted, layout::ENTRY, inner.top + 6.0, inner.bottom - 6.0)
}

fn legend_entry<B: DrawingBackend>(
    canvas: &mut Canvas<B>,
    figure: &Figure,
    entry: &Entry,
    x: f64,
    y: f64,
) -> Drawn {
    let end = x + layout::SAMPLE;
    let middle = x + layout::SAMPLE / 2.0;
    match entry {
        Entry::Front => canvas.line(&[(x, y), (end, y)], palette::MUTED, 1.4)?,
        Entry::Series(i) => {
            let key = &figure.legend[*i];
            let color = palette::hue(key.hue);
            match figure.kind {
                PlotKind::Bar => marks::bar(canvas, key, (x + 6.0, y - 5.5), (end - 2.0, y + 5.5))?,
                PlotKind::Scatter => canvas.marker((middle, y), key.marker, 4.5, color, key.paper)?,
                _ if key.paper => canvas.dashed(&[(x, y), (end, y)], color, 1.8, marks::DASH)?,
                _ => {
                    canvas.line(&[(x, y), (end, y)], color, 2.2)?;
                    let all = figure.panels.iter().flat_map(|p| &p.series);
                    if all.clone().any(|s| s.key == *i && marks::marked(s)) {
                        canvas.marker((middle, y), key.marker, 3.4, color, false)?;
                    }
                }
            }
        }
    }
    let label = layout::entry_label(figure, entry);
    let look = Lettering::new(layout::LEGEND, palette::INK).held(HPos::Left, VPos::Center);
    canvas.text(label, (end + layout::SAMPLE_GAP, y), look)
}
