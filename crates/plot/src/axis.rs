//! Axes: ranges, ticks, labels.

use minicache_config::{Plot, PlotKind};

use crate::data::Data;
use crate::figure::Series;
use crate::number::{self, Tick};
use crate::table;
use minicache_config::columns::meaning;

/// One axis.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Axis {
    /// Name and unit.
    pub(crate) label: String,
    /// Logarithmic.
    pub(crate) log: bool,
    /// Lower end.
    pub(crate) low: f64,
    /// Upper end.
    pub(crate) high: f64,
    /// Ticks by position; for categories all of them, at 0, 1, ...
    pub(crate) ticks: Vec<Tick>,
    /// Ticks are names, not numbers.
    pub(crate) categories: bool,
}

impl Axis {
    /// Where `x` lies between the ends: 0 to 1.
    pub(crate) fn place(&self, x: f64) -> f64 {
        if self.log {
            (x / self.low).ln() / (self.high / self.low).ln()
        } else {
            (x - self.low) / (self.high - self.low)
        }
    }

    /// The same axis over another range.
    pub(crate) fn widened(&self, low: f64, high: f64) -> Self {
        let ticks = if self.log { number::log_ticks(low, high) } else { number::linear_ticks(low, high, 5) };
        Self { low, high, ticks, ..self.clone() }
    }
}

/// The categories on the x axis, if it has any: always for bars and radars, else where a value is no number.
pub(crate) fn categories(plot: &Plot, data: &Data, rows: &[usize]) -> Option<Vec<String>> {
    let values = data.cells.distinct(&plot.x, rows);
    let drawn_apart = matches!(plot.kind, PlotKind::Bar | PlotKind::Radar);
    (drawn_apart || values.iter().any(|v| table::number(v).is_none())).then_some(values)
}

/// The axes around `series`; `categories` are those of the x axis, with the paper's appended.
pub(crate) fn of(
    plot: &Plot,
    series: &[Series],
    categories: Option<Vec<String>>,
) -> Result<(Axis, Axis), String> {
    let placed = || series.iter().filter(|s| !s.level).flat_map(|s| &s.points);
    let x = match categories {
        Some(names) => Axis {
            label: meaning(&plot.x).with_unit(),
            log: false,
            low: -0.5,
            high: names.len() as f64 - 0.5,
            ticks: names.into_iter().enumerate().map(|(i, n)| (i as f64, n)).collect(),
            categories: true,
        },
        None => {
            let mut xs: Vec<f64> = placed().map(|p| p.x).collect();
            if xs.is_empty() {
                return Err(format!("column `{}` has no values", plot.x));
            }
            xs.sort_by(f64::total_cmp);
            xs.dedup();
            numeric_x(plot, &xs)
        }
    };
    let points = || series.iter().flat_map(|s| &s.points);
    let ends = points().flat_map(|p| {
        let (low, high) = p.spread.unwrap_or((p.y, p.y));
        // on a logarithmic axis an interval that nearly reaches zero would squash everything else
        [if plot.log_y && low < p.y / 10.0 { p.y } else { low }, high]
    });
    let (low, high) = ends.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), y| (a.min(y), b.max(y)));
    Ok((x, numeric_y(plot, low, high, points().map(|p| p.y).fold(0.0, f64::max))))
}

fn numeric_x(plot: &Plot, xs: &[f64]) -> Axis {
    let (first, last) = (xs[0], xs[xs.len() - 1]);
    let (low, high) = pad(first, last, plot.log_x, 0.03);
    let each = xs.len() <= 7 && apart(xs, low, high, plot.log_x);
    let ticks = if each {
        xs.iter().map(|&x| (x, number::significant(x, 4))).collect()
    } else if plot.log_x {
        number::log_ticks(low, high)
    } else {
        let whole = xs.iter().all(|x| x.fract() == 0.0);
        let ticks = number::linear_ticks(low, high, 7);
        ticks.into_iter().filter(|(x, _)| !whole || x.fract() == 0.0).collect()
    };
    Axis { label: meaning(&plot.x).with_unit(), log: plot.log_x, low, high, ticks, categories: false }
}

/// Whether a tick at every value leaves room for what is written there.
fn apart(xs: &[f64], low: f64, high: f64, log: bool) -> bool {
    let at = |x: f64| if log { (x / low).ln() / (high / low).ln() } else { (x - low) / (high - low) };
    xs.windows(2).all(|w| at(w[1]) - at(w[0]) > 0.08)
}

fn numeric_y(plot: &Plot, low: f64, high: f64, top: f64) -> Axis {
    let label = meaning(&plot.y).with_unit();
    let from_zero = matches!(plot.kind, PlotKind::Bar | PlotKind::Radar);
    let (mut low, mut high) = (low, high);
    if !plot.log_y {
        if low >= 0.0 && (from_zero || low < 0.4 * high) {
            low = 0.0;
        }
        if from_zero {
            high = high.max(0.0);
        }
    }
    let touches_zero = low == 0.0 && !plot.log_y;
    let (padded_low, padded_high) = pad(low, high, plot.log_y, 0.06);
    let low = if touches_zero { 0.0 } else { padded_low };
    let high =
        if plot.kind == PlotKind::Radar { (if top > 0.0 { top } else { 1.0 }) * 1.02 } else { padded_high };
    let ticks = if plot.log_y { number::log_ticks(low, high) } else { number::linear_ticks(low, high, 5) };
    Axis { label, log: plot.log_y, low, high, ticks, categories: false }
}

fn pad(low: f64, high: f64, log: bool, by: f64) -> (f64, f64) {
    if log {
        let by = (high / low).powf(by).max(1.06);
        (low / by, high * by)
    } else if high > low {
        (low - (high - low) * by, high + (high - low) * by)
    } else {
        let by = if low == 0.0 { 1.0 } else { low.abs() * 0.1 };
        (low - by, high + by)
    }
}
