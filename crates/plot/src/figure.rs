//! What is drawn: panels, axes, series, legend. See [`crate::build`] for where it comes from.

use minicache_config::PlotKind;

use crate::axis::Axis;

/// A figure, ready to be drawn.
#[derive(Debug, Clone)]
pub(crate) struct Figure {
    /// File name without extension.
    pub(crate) name: String,
    /// Title above the panels.
    pub(crate) title: String,
    /// What all panels have in common, such as the model.
    pub(crate) subtitle: String,
    /// How it is drawn.
    pub(crate) kind: PlotKind,
    /// Side by side, one per model, task or side that the plot does not tell apart otherwise.
    pub(crate) panels: Vec<Panel>,
    /// Every series once, in order of appearance.
    pub(crate) legend: Vec<Key>,
    /// What stands below it: the names of the numbered points.
    pub(crate) captions: Vec<String>,
    /// What a reader has to know: averaged rows, points left out.
    pub(crate) notes: Vec<String>,
}

/// One set of axes.
#[derive(Debug, Clone)]
pub(crate) struct Panel {
    /// What tells it from its neighbours.
    pub(crate) title: String,
    /// Horizontal axis.
    pub(crate) x: Axis,
    /// Vertical axis.
    pub(crate) y: Axis,
    /// What is drawn.
    pub(crate) series: Vec<Series>,
    /// Indices (series, point) of the Pareto front, by x.
    pub(crate) front: Vec<(usize, usize)>,
}

/// One line, set of points or bars.
#[derive(Debug, Clone)]
pub(crate) struct Series {
    /// Index into the legend.
    pub(crate) key: usize,
    /// Values by x.
    pub(crate) points: Vec<Point>,
    /// One value for every x: a row without the column on the x axis, such as the full cache.
    pub(crate) level: bool,
}

/// One value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Point {
    /// Position on the x axis; the index of a category.
    pub(crate) x: f64,
    /// Value.
    pub(crate) y: f64,
    /// Ends of the band or interval.
    pub(crate) spread: Option<(f64, f64)>,
    /// The row that it is of, where it is of one.
    pub(crate) row: Option<usize>,
}

/// How a series looks, and its name.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Key {
    /// Name.
    pub(crate) label: String,
    /// Colour: 0 is ink, for the full cache; from 1 on those of the palette.
    pub(crate) hue: usize,
    /// Marker shape.
    pub(crate) marker: usize,
    /// From the paper, not measured.
    pub(crate) paper: bool,
    /// Left out of the legend, because one entry stands for all curves of the paper.
    pub(crate) hidden: bool,
}

/// Hues from here to 255 above it are a ramp, for series that have an order.
pub(crate) const RAMP_HUE: usize = 10_000;

/// The hue of what stands for several series.
pub(crate) const MUTED_HUE: usize = usize::MAX;
