//! A bitmap backend with text in the fonts of this crate, glyph by glyph with their side bearings, and smooth edges:
//! everything is drawn at twice the size and averaged.

use ab_glyph::{Font, FontRef, PxScale, ScaleFont, point};
use plotters::backend::BitMapBackend;
use plotters_backend::{
    BackendColor, BackendCoord, BackendStyle, BackendTextStyle, DrawingBackend, DrawingErrorKind, FontStyle,
};

use super::text::{self, EM};

/// Pixels drawn per pixel written, in each direction.
pub(crate) const OVERSAMPLING: usize = 2;

type Failure = <BitMapBackend<'static> as DrawingBackend>::ErrorType;
type Drawn = Result<(), DrawingErrorKind<Failure>>;

/// plotters' bitmap with this crate's text and round line joints.
pub(crate) struct Raster<'a> {
    inner: BitMapBackend<'a>,
}

impl<'a> Raster<'a> {
    /// Draws into `pixels`, RGB, `width * height * 3` bytes.
    pub(crate) fn new(pixels: &'a mut [u8], (width, height): (u32, u32)) -> Self {
        Self { inner: BitMapBackend::with_buffer(pixels, (width, height)) }
    }
}

impl DrawingBackend for Raster<'_> {
    type ErrorType = Failure;

    fn get_size(&self) -> (u32, u32) {
        self.inner.get_size()
    }

    fn ensure_prepared(&mut self) -> Drawn {
        self.inner.ensure_prepared()
    }

    fn present(&mut self) -> Drawn {
        self.inner.present()
    }

    fn draw_pixel(&mut self, at: BackendCoord, color: BackendColor) -> Drawn {
        self.inner.draw_pixel(at, color)
    }

    fn draw_rect<S: BackendStyle>(
        &mut self,
        a: BackendCoord,
        b: BackendCoord,
        style: &S,
        fill: bool,
    ) -> Drawn {
        self.inner.draw_rect(a, b, style, fill)
    }

    fn fill_polygon<S: BackendStyle, I: IntoIterator<Item = BackendCoord>>(
        &mut self,
        corners: I,
        style: &S,
    ) -> Drawn {
        self.inner.fill_polygon(corners, style)
    }

    /// A rectangle per segment and a disc per joint: one polygon around the whole path has spikes at sharp turns.
    fn draw_path<S: BackendStyle, I: IntoIterator<Item = BackendCoord>>(
        &mut self,
        path: I,
        style: &S,
    ) -> Drawn {
        let half = f64::from(style.stroke_width()) / 2.0;
        let mut last: Option<BackendCoord> = None;
        let mut joints = 0;
        for to in path {
            if let Some(from) = last {
                let (dx, dy) = (f64::from(to.0 - from.0), f64::from(to.1 - from.1));
                let length = dx.hypot(dy);
                if length > 0.0 {
                    let (nx, ny) = (-dy / length * half, dx / length * half);
                    let corner = |at: BackendCoord, sign: f64| {
                        let x = f64::from(at.0) + sign * nx;
                        let y = f64::from(at.1) + sign * ny;
                        (x.round() as i32, y.round() as i32)
                    };
                    let corners = [corner(from, 1.0), corner(to, 1.0), corner(to, -1.0), corner(from, -1.0)];
                    self.inner.fill_polygon(corners, style)?;
                }
                if joints > 0 && half > 1.0 {
                    self.inner.draw_circle(from, half.round() as u32, style, true)?;
                }
                joints += 1;
            }
            last = Some(to);
        }
        Ok(())
    }

    fn draw_text<S: BackendTextStyle>(&mut self, line: &str, style: &S, at: BackendCoord) -> Drawn {
        let bold = style.style() as u8 == FontStyle::Bold as u8;
        let font = text::font(bold);
        let em = style.size() / EM;
        let anchor = style.anchor();
        let width = text::width(line, em, bold);
        let x = f64::from(at.0) - width * text::horizontal(anchor.h_pos);
        let y = f64::from(at.1) + em * text::baseline(anchor.v_pos);
        self.glyphs(&font, line, em, (x, y), style.color())
    }
}

impl Raster<'_> {
    fn glyphs(
        &mut self,
        font: &FontRef<'static>,
        line: &str,
        em: f64,
        (mut x, y): (f64, f64),
        color: BackendColor,
    ) -> Drawn {
        let scale = PxScale::from(text::pixels(font, em));
        let scaled = font.as_scaled(scale);
        for c in line.chars() {
            let id = font.glyph_id(c);
            let glyph = id.with_scale_and_position(scale, point(x as f32, y as f32));
            if let Some(outline) = font.outline_glyph(glyph) {
                let bounds = outline.px_bounds();
                let mut result = Ok(());
                outline.draw(|gx, gy, coverage| {
                    let at = (bounds.min.x as i32 + gx as i32, bounds.min.y as i32 + gy as i32);
                    let alpha = color.alpha * f64::from(coverage.clamp(0.0, 1.0));
                    if alpha > 0.0 && result.is_ok() {
                        result = self.inner.draw_pixel(at, BackendColor { alpha, ..color });
                    }
                });
                result?;
            }
            x += f64::from(scaled.h_advance(id));
        }
        Ok(())
    }
}

/// The picture as PNG: `pixels` (RGB, drawn `OVERSAMPLING` times too large) averaged down to `width` x `height`.
pub(crate) fn encode(pixels: &[u8], width: usize, height: usize) -> Result<Vec<u8>, png::EncodingError> {
    let stride = width * OVERSAMPLING * 3;
    let mut small = Vec::with_capacity(width * height * 3);
    for row in 0..height {
        for column in 0..width {
            for channel in 0..3 {
                let mut sum = 0;
                for dy in 0..OVERSAMPLING {
                    for dx in 0..OVERSAMPLING {
                        let at = (row * OVERSAMPLING + dy) * stride + (column * OVERSAMPLING + dx) * 3;
                        sum += usize::from(pixels[at + channel]);
                    }
                }
                small.push((sum / (OVERSAMPLING * OVERSAMPLING)) as u8);
            }
        }
    }
    let mut out = Vec::new();
    let mut encoder = png::Encoder::new(&mut out, width as u32, height as u32);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_compression(png::Compression::Default);
    encoder.set_adaptive_filter(png::AdaptiveFilterType::Adaptive);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&small)?;
    writer.finish()?;
    Ok(out)
}
