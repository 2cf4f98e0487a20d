//! Claims about scores: differences from the full cache on the same samples, with their intervals.

use minicache_config::Which;

use super::{Outcome, Part};
use crate::curves::group;
use crate::data::Data;
use crate::number::significant;

/// A difference with its 95 % interval: all numbers where there is none, which then tells nothing.
#[derive(Debug, Clone, Copy)]
struct Gap {
    value: f64,
    low: f64,
    high: f64,
}

impl Gap {
    /// `self` less `other`. Both are differences from the same scores, so that the interval is rather too wide.
    fn less(self, other: Self) -> Self {
        let value = self.value - other.value;
        let below = (self.value - self.low).hypot(other.high - other.value);
        let above = (self.high - self.value).hypot(other.value - other.low);
        Self { value, low: value - below, high: value + above }
    }

    fn scaled(self, factor: f64) -> Self {
        Self { value: factor * self.value, low: factor * self.low, high: factor * self.high }
    }

    fn shown(self) -> String {
        let number = |x: f64| significant(x, 3).replace('-', "\u{2212}");
        if !(self.low.is_finite() && self.high.is_finite()) {
            return number(self.value);
        }
        format!("{} [{}, {}]", number(self.value), number(self.low), number(self.high))
    }

    /// The mean of several independent ones.
    fn mean(all: &[Self]) -> Self {
        let n = all.len() as f64;
        let value = all.iter().map(|g| g.value).sum::<f64>() / n;
        let side = |of: fn(&Self) -> f64| all.iter().map(|g| of(g).powi(2)).sum::<f64>().sqrt() / n;
        Self { value, low: value - side(|g| g.value - g.low), high: value + side(|g| g.high - g.value) }
    }
}

/// What a comparison is made of: a task, or all of them.
struct Place<'a> {
    data: &'a Data,
    /// Rows of each task.
    tasks: Vec<Vec<usize>>,
}

impl<'a> Place<'a> {
    /// The tasks of `rows` apart, or together. A task that the full cache was not run on takes no part.
    fn all(data: &'a Data, rows: &[usize], mean: bool) -> Vec<Self> {
        let mut tasks = group(&data.cells, &["task".to_string()], rows);
        tasks.retain(|rows| full(data, rows).is_some());
        if mean && !tasks.is_empty() {
            return vec![Self { data, tasks }];
        }
        tasks.into_iter().map(|task| Self { data, tasks: vec![task] }).collect()
    }

    fn name(&self) -> String {
        match self.tasks.as_slice() {
            [one] => self.data.cells.text(one[0], "task").to_string(),
            several => format!("mean of {} tasks", several.len()),
        }
    }

    /// Scores of 0..1 are shown as those of 0..100.
    fn factor(&self, task: &[usize]) -> f64 {
        let scores = task.iter().filter_map(|&r| self.data.cells.number(r, "score"));
        if scores.fold(0.0, f64::max) <= 1.0 { 100.0 } else { 1.0 }
    }

    fn full(&self) -> f64 {
        let score = |task: &Vec<usize>| Some(self.factor(task) * full(self.data, task)?.1);
        self.tasks.iter().filter_map(score).sum::<f64>() / self.tasks.len() as f64
    }

    fn samples(&self) -> f64 {
        let count = |task: &Vec<usize>| self.data.cells.number(task[0], "samples");
        self.tasks.iter().filter_map(count).sum()
    }

    /// The difference of `which` from the full cache; `None` where a task lacks it.
    fn gap(&self, which: &Which) -> Option<Gap> {
        self.mean(|task| gap(self.data, task, find(self.data, task, which)?))
    }

    /// The difference of `which` from `other`.
    fn between(&self, which: &Which, other: &Which) -> Option<Gap> {
        self.mean(|task| {
            let [ours, theirs] = [find(self.data, task, which)?, find(self.data, task, other)?];
            between(self.data, ours, theirs)
        })
    }

    fn mean(&self, of: impl Fn(&[usize]) -> Option<Gap>) -> Option<Gap> {
        let gaps = self.tasks.iter().map(|task| Some(of(task)?.scaled(self.factor(task))));
        Some(Gap::mean(&gaps.collect::<Option<Vec<_>>>()?))
    }
}

/// The full cache's row among those of a task, with its score.
fn full(data: &Data, task: &[usize]) -> Option<(usize, f64)> {
    let row = task.iter().copied().find(|&r| data.method(r) == "full")?;
    Some((row, data.cells.number(row, "score")?))
}

/// The row that `which` means among those of a task.
fn find(data: &Data, task: &[usize], which: &Which) -> Option<usize> {
    let distance = |row: usize| {
        let of = |(column, at): (&String, &f64)| Some((data.cells.number(row, column)? - at).abs());
        which.at.iter().map(of).sum::<Option<f64>>()
    };
    let named = task.iter().copied().filter(|&r| data.cells.text(r, "variant") == which.variant);
    let near = named.filter_map(|r| Some((r, distance(r)?)));
    near.min_by(|a, b| a.1.total_cmp(&b.1)).map(|(row, _)| row)
}

/// A row's difference from the full cache: as it was computed on pairs of samples, or by the scores' own intervals.
fn gap(data: &Data, task: &[usize], row: usize) -> Option<Gap> {
    let (full, _) = full(data, task)?;
    interval(data, row, "diff").or_else(|| between(data, row, full))
}

/// The difference of two rows: of their differences from the full cache, or else of their scores.
fn between(data: &Data, row: usize, other: usize) -> Option<Gap> {
    let of = |column: &str| Some(interval(data, row, column)?.less(interval(data, other, column)?));
    of("diff").or_else(|| of("score"))
}

/// A number with its interval. One sample drawn again and again is always the same: that is no interval.
fn interval(data: &Data, row: usize, column: &str) -> Option<Gap> {
    let value = data.cells.number(row, column)?;
    let one = data.cells.number(row, "samples").is_some_and(|n| n < 2.0);
    let bound = |end: &str, none: f64| {
        data.cells.number(row, &format!("{column}_{end}")).filter(|_| !one).unwrap_or(none)
    };
    Some(Gap { value, low: bound("lo", f64::NEG_INFINITY), high: bound("hi", f64::INFINITY) })
}

/// What would tell, where an interval is too wide for `margin`.
fn more_samples(place: &Place<'_>, gap: Gap, margin: f64) -> Option<String> {
    if !(gap.low.is_finite() && gap.high.is_finite()) {
        return Some(format!("more samples of {}, for an interval", place.name()));
    }
    let nearest = (gap.value + margin).abs().max(margin / 2.0).max(0.5);
    let times = ((gap.high - gap.low) / 2.0 / nearest).powi(2);
    let samples = place.samples() * times.max(1.0);
    let round = 10f64.powf(samples.max(10.0).log10().floor());
    Some(format!("about {} samples of {}", (samples / round).ceil() * round, place.name()))
}

/// A full cache that solves nothing has nothing to lose.
fn solves_nothing(place: &Place<'_>) -> Option<Part> {
    (place.full() <= 0.0).then(|| Part {
        text: format!("{}: the full cache scores 0", place.name()),
        outcome: Outcome::Open,
        wanted: Some(format!("a model that can do {}", place.name())),
    })
}

pub(super) fn kept(data: &Data, rows: &[usize], which: &Which, within: f64, mean: bool) -> Vec<Part> {
    let holds = |gap: Gap, margin: f64| (gap.low >= -margin, gap.high < -margin);
    from_full(data, rows, which, within, mean, holds)
}

pub(super) fn lost(data: &Data, rows: &[usize], which: &Which, mean: bool) -> Vec<Part> {
    from_full(data, rows, which, 0.0, mean, |gap, _| (gap.high < 0.0, gap.low >= 0.0))
}

/// Judges the differences of `which` from the full cache: `holds` says, of a difference and of the share `within` of the
/// full cache's score, whether the claim holds and whether it fails.
fn from_full(
    data: &Data,
    rows: &[usize],
    which: &Which,
    within: f64,
    mean: bool,
    holds: impl Fn(Gap, f64) -> (bool, bool),
) -> Vec<Part> {
    let part = |place: Place<'_>| {
        let gap = place.gap(which)?;
        if let Some(part) = solves_nothing(&place) {
            return Some(part);
        }
        let margin = within * place.full();
        let text = format!("{}: {} from {}", place.name(), gap.shown(), significant(place.full(), 3));
        let (holds, fails) = holds(gap, margin);
        Some(Part::judged(text, holds, fails, || more_samples(&place, gap, margin)))
    };
    Place::all(data, rows, mean).into_iter().filter_map(part).collect()
}

pub(super) fn ahead(data: &Data, rows: &[usize], which: &Which, of: &[Which], mean: bool) -> Vec<Part> {
    let mut parts = Vec::new();
    for place in Place::all(data, rows, mean) {
        for other in of {
            let Some(gap) = place.between(which, other) else { continue };
            let text = format!("{}: {} against {}", place.name(), gap.shown(), other.variant);
            let wanted = || more_samples(&place, gap, 0.0);
            parts.push(Part::judged(text, gap.low > 0.0, gap.high < 0.0, wanted));
        }
    }
    parts
}

pub(super) fn best(data: &Data, rows: &[usize], variant: &str, key: &str, value: f64) -> Vec<Part> {
    let short = key.rsplit('.').next().unwrap_or(key);
    let part = |place: Place<'_>| {
        let cells = &data.cells;
        let task = &place.tasks[0];
        let swept = task.iter().copied().filter(|&r| cells.text(r, "variant") == variant);
        let factor = place.factor(task);
        let at = |row: &usize| cells.number(*row, key).is_some_and(|x| (x - value).abs() < 1e-9);
        let (theirs, others): (Vec<usize>, Vec<usize>) = swept.partition(at);
        let theirs = *theirs.first()?;
        let gap_of = |row: usize| Some(gap(data, task, row)?.scaled(factor));
        let score = |row: usize| cells.number(row, "score").unwrap_or(f64::NEG_INFINITY);
        let top = others.iter().copied().max_by(|a, b| score(*a).total_cmp(&score(*b)))?;
        if let Some(part) = solves_nothing(&place) {
            return Some(part);
        }
        let text = format!(
            "{}: {} from full at {short} = {value}, {} at {}, the best other",
            place.name(),
            gap_of(theirs)?.shown(),
            gap_of(top)?.shown(),
            cells.number(top, key)?
        );
        let above = |a: usize, b: usize| between(data, a, b).is_some_and(|gap| gap.low > 0.0);
        let beaten = others.iter().any(|&other| above(other, theirs));
        let beats = others.iter().any(|&other| above(theirs, other));
        let wanted = || more_samples(&place, between(data, theirs, top)?.scaled(factor), 0.0);
        Some(Part::judged(text, beats && !beaten, beaten, wanted))
    };
    Place::all(data, rows, false).into_iter().filter_map(part).collect()
}
