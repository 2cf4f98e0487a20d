//! A surface with points in fractions of a pixel: lines, dashes, areas, markers, text.

use plotters::style::{Color, FontDesc, FontFamily, FontStyle, RGBColor, ShapeStyle, TextStyle};
use plotters_backend::DrawingBackend;
use plotters_backend::text_anchor::{HPos, Pos, VPos};

use super::palette::PAPER;
use super::text::{EM, FAMILY};

/// A point or size in pixels of the picture as it is looked at.
pub(crate) type Xy = (f64, f64);

/// Drawing that failed, in words.
pub(crate) type Drawn = Result<(), String>;

/// How a line of text looks and where it is held.
#[derive(Clone, Copy)]
pub(crate) struct Lettering {
    /// Em square in pixels.
    pub(crate) em: f64,
    /// Semi-bold.
    pub(crate) bold: bool,
    /// Colour.
    pub(crate) color: RGBColor,
    /// Horizontal anchor.
    pub(crate) h: HPos,
    /// Vertical anchor.
    pub(crate) v: VPos,
}

impl Lettering {
    /// Plain text, held at its left end and middle height.
    pub(crate) fn new(em: f64, color: RGBColor) -> Self {
        Self { em, bold: false, color, h: HPos::Left, v: VPos::Center }
    }

    /// Held elsewhere.
    pub(crate) fn held(self, h: HPos, v: VPos) -> Self {
        Self { h, v, ..self }
    }

    /// Semi-bold.
    pub(crate) fn bold(self) -> Self {
        Self { bold: true, ..self }
    }
}

/// A backend of plotters, drawn on in units of the finished picture.
pub(crate) struct Canvas<B> {
    backend: B,
    /// Backend units per pixel of the finished picture.
    scale: f64,
}

impl<B: DrawingBackend> Canvas<B> {
    /// A surface with `scale` backend units per pixel.
    pub(crate) fn new(backend: B, scale: f64) -> Self {
        Self { backend, scale }
    }

    /// Ends the drawing.
    pub(crate) fn finish(mut self) -> Drawn {
        self.backend.present().map_err(|e| e.to_string())
    }

    fn at(&self, (x, y): Xy) -> (i32, i32) {
        ((x * self.scale).round() as i32, (y * self.scale).round() as i32)
    }

    fn stroke(&self, width: f64) -> u32 {
        (width * self.scale).round().max(1.0) as u32
    }

    /// A path of straight pieces.
    pub(crate) fn line(&mut self, points: &[Xy], color: RGBColor, width: f64) -> Drawn {
        let style = ShapeStyle { color: color.to_rgba(), filled: false, stroke_width: self.stroke(width) };
        let path: Vec<_> = points.iter().map(|&p| self.at(p)).collect();
        self.backend.draw_path(path, &style).map_err(|e| e.to_string())
    }

    /// A dashed path: `on` pixels drawn, `off` pixels left.
    pub(crate) fn dashed(&mut self, points: &[Xy], color: RGBColor, width: f64, (on, off): Xy) -> Drawn {
        for piece in dashes(points, on, off) {
            self.line(&piece, color, width)?;
        }
        Ok(())
    }

    /// A filled polygon.
    pub(crate) fn area(&mut self, corners: &[Xy], color: RGBColor, alpha: f64) -> Drawn {
        let style = ShapeStyle { color: color.mix(alpha), filled: true, stroke_width: 0 };
        let corners: Vec<_> = corners.iter().map(|&p| self.at(p)).collect();
        self.backend.fill_polygon(corners, &style).map_err(|e| e.to_string())
    }

    /// A filled rectangle.
    pub(crate) fn block(&mut self, (x0, y0): Xy, (x1, y1): Xy, color: RGBColor, alpha: f64) -> Drawn {
        self.area(&[(x0, y0), (x1, y0), (x1, y1), (x0, y1)], color, alpha)
    }

    /// The marker of a series, set off from what lies below it.
    pub(crate) fn marker(
        &mut self,
        at: Xy,
        shape: usize,
        radius: f64,
        color: RGBColor,
        hollow: bool,
    ) -> Drawn {
        self.shape(at, shape, radius + 1.2, PAPER)?;
        self.shape(at, shape, radius, color)?;
        if hollow { self.shape(at, shape, radius - 1.4, PAPER) } else { Ok(()) }
    }

    fn shape(&mut self, at: Xy, shape: usize, radius: f64, color: RGBColor) -> Drawn {
        if shape % SHAPES != 1 {
            return self.area(&outline(at, shape, radius), color, 1.0);
        }
        let style = ShapeStyle { color: color.to_rgba(), filled: true, stroke_width: 0 };
        let (at, radius) = (self.at(at), (radius * self.scale).round() as u32);
        self.backend.draw_circle(at, radius, &style, true).map_err(|e| e.to_string())
    }

    /// One line of text.
    pub(crate) fn text(&mut self, line: &str, at: Xy, look: Lettering) -> Drawn {
        let weight = if look.bold { FontStyle::Bold } else { FontStyle::Normal };
        let font = FontDesc::new(FontFamily::Name(FAMILY), look.em * self.scale * EM, weight);
        let style = TextStyle { font, color: look.color.to_backend_color(), pos: Pos::new(look.h, look.v) };
        let at = self.at(at);
        self.backend.draw_text(line, &style, at).map_err(|e| e.to_string())
    }
}

/// The drawn pieces of a dashed path.
fn dashes(points: &[Xy], on: f64, off: f64) -> Vec<Vec<Xy>> {
    let mut out = Vec::new();
    let (mut drawing, mut left) = (true, on);
    let mut piece: Vec<Xy> = points.first().copied().into_iter().collect();
    for pair in points.windows(2) {
        let (mut from, to) = (pair[0], pair[1]);
        loop {
            let (dx, dy) = (to.0 - from.0, to.1 - from.1);
            let length = dx.hypot(dy);
            if length <= left {
                left -= length;
                if drawing {
                    piece.push(to);
                }
                break;
            }
            from = (from.0 + dx / length * left, from.1 + dy / length * left);
            if drawing {
                piece.push(from);
                out.push(std::mem::take(&mut piece));
            } else {
                piece = vec![from];
            }
            drawing = !drawing;
            left = if drawing { on } else { off };
        }
    }
    if drawing && piece.len() > 1 {
        out.push(piece);
    }
    out
}

/// Different marker shapes; 1 is a disc.
const SHAPES: usize = 7;

/// The corners of a marker of about equal area whatever its shape.
fn outline((x, y): Xy, shape: usize, r: f64) -> Vec<Xy> {
    use std::f64::consts::{PI, TAU};
    let regular = |n: usize, r: f64, turn: f64| {
        (0..n).map(|i| turn + TAU * i as f64 / n as f64).map(|a| (x + r * a.cos(), y + r * a.sin())).collect()
    };
    match shape % SHAPES {
        2 => regular(4, r * 1.25, PI / 4.0),
        3 => regular(3, r * 1.45, -PI / 2.0),
        4 => regular(4, r * 1.3, 0.0),
        5 => regular(3, r * 1.45, PI / 2.0),
        6 => regular(5, r * 1.15, -PI / 2.0),
        _ => regular(6, r * 1.1, 0.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dashes_add_up() {
        let pieces = dashes(&[(0.0, 0.0), (9.0, 0.0), (9.0, 11.0)], 4.0, 2.0);
        let length =
            |p: &Vec<Xy>| p.windows(2).map(|w| (w[1].0 - w[0].0).hypot(w[1].1 - w[0].1)).sum::<f64>();
        let lengths: Vec<f64> = pieces.iter().map(length).collect();
        assert_eq!(lengths, [4.0, 4.0, 4.0, 2.0]);
        assert_eq!(pieces[1], [(6.0, 0.0), (9.0, 0.0), (9.0, 1.0)]);
    }
}
