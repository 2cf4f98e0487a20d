//! Whether the paper's claims hold here: sentences computed from the rows and the paper's tables.

use crate::columns::lower_is_better;
use crate::curves::{self, group};
use crate::data::Data;
use crate::figure::{Point, Series};
use crate::number::significant;
use crate::paper::plain;
use crate::table::number;
use crate::views::{metric, percent_tasks};

/// How a claim fared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It holds here.
    Reproduced,
    /// Part of it holds, or for some of the tasks or models.
    Partly,
    /// It does not hold here.
    NotReproduced,
    /// The rows cannot tell, or nothing is claimed.
    Open,
}

impl Outcome {
    /// For readers.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Reproduced => "reproduced",
            Self::Partly => "partly reproduced",
            Self::NotReproduced => "not reproduced",
            Self::Open => "",
        }
    }

    fn of(held: usize, judged: usize) -> Self {
        match (held, judged) {
            (_, 0) => Self::Open,
            (h, j) if h == j => Self::Reproduced,
            (0, _) => Self::NotReproduced,
            _ => Self::Partly,
        }
    }
}

/// What the rows say about a claim.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Verdict {
    /// The figures, in sentences.
    pub(crate) text: String,
    /// The judgement.
    pub(crate) outcome: Outcome,
}

/// What the rows of an experiment say; nothing for experiments without a rule or without the rows it needs. The
/// rule goes by the part of the identifier before the first `-` or `.`: `fig1a-long` is judged as `fig1a`.
pub(crate) fn of(data: &Data) -> Option<Verdict> {
    if data.cells.rows.is_empty() {
        return None;
    }
    match data.id.split(['-', '.']).next().unwrap_or_default() {
        "fig1a" => similarity(data),
        "fig2b" => positions(data),
        "fig1b" | "fig4" => half_merged(data),
        "fig2a" => kept(data, "mean", &[], false),
        "fig2c" => kept(data, "minicache", &["mean"], true),
        "table1" | "tableD" => kept(data, "minicache", &["kivi", "rtn", "smoothquant"], true),
        "tableA" => kept(data, "minicache", &["h2o", "sinks"], true),
        "tableE" => kept(data, "minicache", &["max_norm", "mean"], true),
        "fig5" => throughput(data),
        "fig6" => optimum(data, "cache.t", 0.6),
        "table2" => optimum(data, "cache.retention.gamma", 0.05),
        "tableB" => optimum(data, "cache.retention.gamma", 0.05),
        "memory" => compression(data),
        "fidelity" | "frontier" => frontier(data),
        _ => None,
    }
}

fn range(values: &[f64]) -> Option<(f64, f64)> {
    let low = values.iter().copied().reduce(f64::min)?;
    Some((low, values.iter().copied().reduce(f64::max)?))
}

fn span((low, high): (f64, f64)) -> String {
    let (low, high) = (format!("{low:.2}"), format!("{high:.2}"));
    if low == high { low } else { format!("{low} to {high}") }.replace('-', "\u{2212}")
}

/// Rows of one side in the deeper half of a model, for all tokens together or for bins of them.
fn deep<'a>(data: &'a Data, side: &'a str, by_position: bool) -> impl Iterator<Item = usize> + 'a {
    let cells = &data.cells;
    let mixed = cells.column("position").is_some_and(|c| cells.rows.iter().any(|r| r[c].is_empty()));
    cells.all().into_iter().filter(move |&row| {
        let half = data.layers(row).map(|l| (l / 2.0).floor());
        let all_tokens = !mixed || cells.text(row, "position").is_empty() != by_position;
        all_tokens
            && cells.text(row, "side") == side
            && half.is_some_and(|h| cells.number(row, "pair").is_some_and(|p| p >= h))
    })
}

fn models(data: &Data) -> String {
    let names = data.cells.distinct("model", &data.cells.all());
    names.iter().map(|n| data.model_label(n)).collect::<Vec<_>>().join(", ")
}

/// Adjacent layers point the same way in the deeper half.
fn similarity(data: &Data) -> Option<Verdict> {
    let cells = &data.cells;
    let of = |side: &str, column: &str| {
        range(&deep(data, side, false).filter_map(|r| cells.number(r, column)).collect::<Vec<_>>())
    };
    let (keys, values) = (of("key", "token_cosine")?, of("value", "token_cosine")?);
    let paper = data.papers.iter().find(|p| p.table.column("depth").is_some())?;
    let mut theirs = Vec::new();
    for row in
        paper.table.all().into_iter().filter(|&r| paper.table.number(r, "depth").is_some_and(|d| d >= 0.5))
    {
        let columns = paper.table.columns[..paper.written].iter().filter(|c| *c != "pair_index");
        theirs.extend(columns.filter_map(|c| paper.table.number(row, c)));
    }
    let theirs = range(&theirs)?;
    let mut text = format!(
        "Paper ({}): mean cosine of adjacent layers {} in the deeper half. Here ({}): keys {}, values {}.",
        paper.model,
        span(theirs),
        models(data),
        span(keys),
        span(values),
    );
    if let (Some(k), Some(v)) = (of("key", "cka"), of("value", "cka")) {
        text += &format!(
            " Linear CKA of the same states is {} for keys and {} for values: what they share is a subspace, \
             which direction by direction merging does not use.",
            span(k),
            span(v)
        );
        if keys.0.min(values.0) > 0.5 {
            text.truncate(text.find(": what they").unwrap_or(text.len()));
            text.push('.');
        }
        if let Some(hidden) = of("key", "hidden_cosine") {
            text += &format!(" The hidden states that enter the layers have a cosine of {}.", span(hidden));
        }
    }
    let held = [keys, values].iter().filter(|(low, _)| *low >= theirs.0 - 0.1).count();
    Some(Verdict { text, outcome: Outcome::of(held, 2) })
}

/// Within the deep pairs most tokens are alike, and a few, mostly the first, are far apart.
fn positions(data: &Data) -> Option<Verdict> {
    let cells = &data.cells;
    let (mut parts, mut held) = (Vec::new(), 0);
    for (side, name) in [("key", "keys"), ("value", "values")] {
        let rows: Vec<usize> =
            deep(data, side, true).filter(|&r| !cells.text(r, "position").is_empty()).collect();
        let first = cells.distinct("position", &rows).into_iter().next()?;
        let at = |row: usize| cells.text(row, "position");
        let mean = |start: bool| {
            let chosen = rows.iter().filter(|&&r| (at(r) == first) == start);
            let all: Vec<f64> = chosen.filter_map(|&r| cells.number(r, "token_cosine")).collect();
            (!all.is_empty()).then(|| all.iter().sum::<f64>() / all.len() as f64)
        };
        let (start, rest) = (mean(true)?, mean(false)?);
        held += usize::from(rest >= 0.75 && start < rest);
        parts.push(format!(
            "{name} {} in the first bin and {} after it",
            span((start, start)),
            span((rest, rest))
        ));
    }
    let text = format!(
        "Mean cosine of the deep pairs here ({}): {}. The claim needs most tokens above 0.75 and the first ones below \
         the rest.",
        models(data),
        parts.join("; ")
    );
    Some(Verdict { text, outcome: Outcome::of(held, 2) })
}

/// A mean score and the half width of its 95 % interval.
#[derive(Debug, Clone, Copy)]
struct Score {
    mean: f64,
    half: f64,
}

/// The mean over rows of their main result, with the interval of independent rows. Beside results of 0..1, those of
/// 0..100 count as shares.
fn score(data: &Data, rows: &[usize]) -> Option<Score> {
    let cells = &data.cells;
    let mut squares = 0.0;
    let mut values = Vec::new();
    let percent = if rows.len() > 1 { percent_tasks(data) } else { Vec::new() };
    for &row in rows {
        let name = metric(data, row)?;
        let factor = if percent.iter().any(|t| t == cells.text(row, "task")) { 0.01 } else { 1.0 };
        values.push(factor * cells.number(row, name)?);
        if let (Some(low), Some(high)) =
            (cells.number(row, &format!("{name}_lo")), cells.number(row, &format!("{name}_hi")))
        {
            squares += (factor * (high - low) / 2.0).powi(2);
        }
    }
    let n = values.len() as f64;
    (n > 0.0).then(|| Score { mean: values.iter().sum::<f64>() / n, half: f64::sqrt(squares) / n })
}

/// Half width of the 95 % interval of a difference of two independent scores.
fn noise(a: Score, b: Score) -> f64 {
    a.half.hypot(b.half)
}

fn lower(data: &Data, row: usize) -> bool {
    metric(data, row).is_some_and(lower_is_better)
}

/// With half of the layers merged, MiniCache keeps the full cache's score and the plain mean does not.
fn half_merged(data: &Data) -> Option<Verdict> {
    let cells = &data.cells;
    let (mut parts, mut held, mut judged) = (Vec::new(), 0, 0);
    let by = ["model".to_string(), "task".to_string()];
    for rows in group(cells, &by, &cells.all()) {
        let full: Vec<usize> = rows.iter().copied().filter(|&r| data.method(r) == "full").collect();
        let Some(full) = score(data, &full) else { continue };
        let nearest = |method: &str| {
            let share = |r: usize| cells.number(r, "merged_share").unwrap_or(f64::INFINITY);
            let merged = rows.iter().copied().filter(|&r| data.method(r) == method && share(r) <= 0.55);
            let row = merged.max_by(|a, b| share(*a).total_cmp(&share(*b)))?;
            Some((share(row), score(data, &[row])?))
        };
        let (Some((share, ours)), mean) = (nearest("minicache"), nearest("mean")) else { continue };
        let place =
            format!("{} on {}", cells.text(rows[0], "task"), data.model_label(cells.text(rows[0], "model")));
        if full.mean <= 0.0 {
            parts.push(format!("{place}: not to be judged, the full cache scores 0"));
            continue;
        }
        let loss = full.mean - ours.mean;
        let unclear = loss > 0.05 * full.mean && loss < noise(full, ours);
        judged += usize::from(!unclear);
        let good = ours.mean >= 0.95 * full.mean && mean.is_none_or(|(_, m)| m.mean <= ours.mean);
        held += usize::from(good && !unclear);
        let doubt = if unclear { ", a difference within the intervals" } else { "" };
        let beside = mean.map_or(String::new(), |(_, m)| format!(", the mean {}", significant(m.mean, 3)));
        parts.push(format!(
            "{place}: full {}, MiniCache {}{beside} with {:.0} % of the layers merged{doubt}",
            significant(full.mean, 3),
            significant(ours.mean, 3),
            share * 100.0
        ));
    }
    (!parts.is_empty()).then(|| Verdict { text: parts.join("; ") + ".", outcome: Outcome::of(held, judged) })
}

/// The paper's loss against its own baseline, where its table tells.
fn paper_loss(data: &Data) -> Option<String> {
    let table = &data.papers.iter().find(|p| p.table.column("average").is_some())?.table;
    let mut losses = Vec::new();
    for rows in group(table, &["model".to_string()], &table.all()) {
        let of = |name: &str| {
            let row = rows.iter().find(|&&r| plain(table.text(r, "method")) == name)?;
            table.number(*row, "average")
        };
        losses.push((1.0 - of("minicache")? / of("baseline")?) * 100.0);
    }
    let (low, high) = range(&losses)?;
    Some(format!("Paper: MiniCache loses {low:.1} to {high:.1} % of the baseline's average. "))
}

/// Whether `method` keeps the full cache's mean score (`keeps`) or loses some of it (not `keeps`), and does no worse
/// than each of `others`.
fn kept(data: &Data, method: &str, others: &[&str], keeps: bool) -> Option<Verdict> {
    let cells = &data.cells;
    let (mut parts, mut held, mut judged) = (Vec::new(), 0, 0);
    for rows in group(cells, &["model".to_string()], &cells.all()) {
        let mut scores = Vec::new();
        for members in group(cells, &["variant".to_string()], &rows) {
            if let Some(s) = score(data, &members) {
                let ratios: Vec<f64> = members.iter().filter_map(|&r| cells.number(r, "ratio")).collect();
                let ratio = (!ratios.is_empty()).then(|| ratios.iter().sum::<f64>() / ratios.len() as f64);
                scores.push((data.method(members[0]), cells.text(members[0], "variant"), s, ratio));
            }
        }
        let less = lower(data, rows[0]);
        // of several variants of a method, the one that compresses most stands for it
        let best = |name: &str| {
            let of_method = scores.iter().filter(|(m, ..)| *m == name);
            of_method.max_by(|a, b| a.3.unwrap_or(0.0).total_cmp(&b.3.unwrap_or(0.0)))
        };
        let (Some(full), Some(ours)) = (best("full"), best(method)) else { continue };
        let listed = scores.iter().map(|(_, name, s, ratio)| {
            let ratio = ratio.map_or(String::new(), |r| format!(" at {}x", significant(r, 3)));
            let half = if s.half > 0.0 { format!(" ± {}", significant(s.half, 2)) } else { String::new() };
            format!("{name} {}{half}{ratio}", significant(s.mean, 3))
        });
        let model = data.model_label(cells.text(rows[0], "model"));
        let listed = listed.collect::<Vec<_>>().join(", ");
        if full.2.mean <= 0.0 && !less {
            parts.push(format!("{model}: {listed}; not to be judged, the full cache scores 0"));
            continue;
        }
        let sign = if less { -1.0 } else { 1.0 };
        let loss = sign * (full.2.mean - ours.2.mean);
        let near = loss <= 0.03 * full.2.mean.abs();
        let ahead = others.iter().filter_map(|o| best(o)).all(|o| sign * (ours.2.mean - o.2.mean) >= 0.0);
        let unclear = loss > 0.03 * full.2.mean.abs() && loss < noise(full.2, ours.2);
        judged += usize::from(!unclear);
        held += usize::from(!unclear && if keeps { near && ahead } else { loss > 0.03 * full.2.mean.abs() });
        let doubt = if unclear { "; the difference from full is within the intervals" } else { "" };
        parts.push(format!("{model}: {listed}{doubt}"));
    }
    if parts.is_empty() {
        return None;
    }
    let what = match &cells.distinct("task", &cells.all())[..] {
        [one] => format!("Here on {one}"),
        _ if percent_tasks(data).is_empty() => "Mean over tasks here".into(),
        _ => format!("Mean over tasks here ({} as a share of 100)", percent_tasks(data).join(", ")),
    };
    let text = format!("{}{what}, {}.", paper_loss(data).unwrap_or_default(), parts.join("; "));
    Some(Verdict { text, outcome: Outcome::of(held, judged) })
}

/// A number of the paper's headline table.
fn headline(data: &Data, quantity: &str) -> Option<f64> {
    data.papers.iter().find_map(|p| {
        let row = p.table.all().into_iter().find(|&r| p.table.text(r, "quantity") == quantity)?;
        p.table.number(row, "value")
    })
}

/// The compression of LLaMA-2-7B with its deeper half merged, held and by arithmetic. A claim that arithmetic alone
/// reaches is reached in part.
fn compression(data: &Data) -> Option<Verdict> {
    let cells = &data.cells;
    let of_model = |row: &usize| plain(data.model_label(cells.text(*row, "model"))) == "llama27b";
    let merged = |row: &usize| {
        data.method(*row) == "minicache" && cells.number(*row, "merged_share").is_some_and(|s| s == 0.5)
    };
    let rows: Vec<usize> = cells.all().into_iter().filter(|r| of_model(r) && merged(r)).collect();
    let (mut parts, mut held, mut promised, mut judged) = (Vec::new(), 0, 0, 0);
    for (quantity, bits, what) in
        [("compression_ratio_merge_only", "", "merged"), ("compression_ratio_4bit", "4", "with 4 bits")]
    {
        let ratio =
            |&row: &usize| Some((row, cells.number(row, "ratio")?, cells.number(row, "nominal_ratio")?));
        let all = rows.iter().filter(|&&r| cells.text(r, "bits") == bits).filter_map(ratio);
        let Some((row, ratio, nominal)) = all.max_by(|a, b| a.1.total_cmp(&b.1)) else { continue };
        let Some(claimed) = headline(data, quantity) else { continue };
        let reached = |x: f64| x >= 0.995 * claimed;
        judged += 1;
        held += usize::from(reached(ratio));
        promised += usize::from(reached(nominal));
        parts.push(format!(
            "{what} {}x in the paper, {}x by arithmetic, {}x of bytes held ({}, {} tokens)",
            significant(claimed, 3),
            significant(nominal, 3),
            significant(ratio, 3),
            cells.text(row, "variant"),
            cells.text(row, "context"),
        ));
    }
    let outcome = match Outcome::of(held, judged) {
        Outcome::NotReproduced if promised > 0 => Outcome::Partly,
        outcome => outcome,
    };
    (judged > 0).then(|| Verdict { text: format!("LLaMA-2-7B, deeper half {}.", parts.join("; ")), outcome })
}

/// Compressed caches reach a higher throughput, and take less memory at the same batch size.
fn throughput(data: &Data) -> Option<Verdict> {
    let cells = &data.cells;
    let best = |full: bool| {
        let rows = cells.all().into_iter().filter(move |&r| (data.method(r) == "full") == full);
        rows.filter_map(|r| Some((r, cells.number(r, "tokens_per_s")?))).max_by(|a, b| a.1.total_cmp(&b.1))
    };
    let ((full, full_speed), (ours, speed)) = (best(true)?, best(false)?);
    let gain = speed / full_speed;
    let at = |row: usize| match cells.number(row, "batch") {
        Some(batch) => format!("{} at batch {batch}", cells.text(row, "variant")),
        None => cells.text(row, "variant").to_string(),
    };
    let mut text = String::new();
    let claimed = headline(data, "throughput_gain");
    if let Some(claimed) = claimed {
        text = format!("Paper: about {} times the throughput of the full cache. ", significant(claimed, 2));
    }
    text += &format!(
        "Best here ({}): {} tokens/s ({}) against {} ({}), {} times.",
        models(data),
        significant(speed, 3),
        at(ours),
        significant(full_speed, 3),
        at(full),
        significant(gain, 3)
    );
    if let Some((batch, less)) = saved(data) {
        let paper = headline(data, "memory_reduction")
            .map_or(String::new(), |c| format!(" (paper: {} %)", significant(100.0 * c, 2)));
        text += &format!(
            " Weights and caches together take up to {} % less memory than with the full cache at batch {batch}{paper}.",
            significant(100.0 * less, 2)
        );
    }
    let enough = claimed.map_or(1.0, |c| 0.8 * c);
    let outcome = match gain {
        g if g >= enough => Outcome::Reproduced,
        g if g > 1.05 => Outcome::Partly,
        _ => Outcome::NotReproduced,
    };
    Some(Verdict { text, outcome })
}

/// The largest batch that the full cache fits in, and the share of its memory that the smallest other one saves there.
fn saved(data: &Data) -> Option<(String, f64)> {
    let cells = &data.cells;
    let of = |full: bool, batch: Option<&str>| -> Vec<(usize, f64)> {
        let rows = cells.all().into_iter().filter(|&r| (data.method(r) == "full") == full);
        let here = rows.filter(|&r| batch.is_none_or(|b| cells.text(r, "batch") == b));
        here.filter_map(|r| Some((r, cells.number(r, "memory_bytes")?))).collect()
    };
    let (row, full) = of(true, None).into_iter().max_by(|a, b| a.1.total_cmp(&b.1))?;
    let batch = cells.text(row, "batch");
    let least = of(false, Some(batch)).into_iter().map(|(_, bytes)| bytes).reduce(f64::min)?;
    Some((batch.to_string(), 1.0 - least / full))
}

/// The paper's choice of a swept setting is the best one here, or as good as it.
fn optimum(data: &Data, key: &str, claimed: f64) -> Option<Verdict> {
    let cells = &data.cells;
    let (mut parts, mut held, mut judged) = (Vec::new(), 0, 0);
    let by = ["model".to_string(), "task".to_string(), "variant".to_string()];
    let short = key.rsplit('.').next().unwrap_or(key);
    for rows in group(cells, &by, &cells.all()) {
        let less = lower(data, rows[0]);
        let sign = if less { -1.0 } else { 1.0 };
        let worst = |at: &[(f64, Score)]| at.iter().map(|(_, s)| sign * s.mean).fold(f64::INFINITY, f64::min);
        let at: Vec<(f64, Score)> =
            rows.iter().filter_map(|&r| Some((number(cells.text(r, key))?, score(data, &[r])?))).collect();
        let Some(best) = at.iter().max_by(|a, b| (sign * a.1.mean).total_cmp(&(sign * b.1.mean))) else {
            continue;
        };
        let Some(theirs) = at.iter().find(|(x, _)| (x - claimed).abs() < 1e-9) else { continue };
        if at.len() < 2 {
            continue;
        }
        let place = cells.text(rows[0], "task");
        if at.iter().all(|(_, s)| s.mean == best.1.mean) {
            parts.push(format!("{place}: {} whatever {short}", significant(best.1.mean, 3)));
            continue;
        }
        let unclear = sign * best.1.mean - worst(&at) < noise(best.1, theirs.1);
        judged += usize::from(!unclear);
        let slack = theirs.1.half.max(0.02 * best.1.mean.abs());
        held += usize::from(!unclear && sign * (best.1.mean - theirs.1.mean) <= slack);
        let doubt = if unclear { ", all within the intervals" } else { "" };
        let name = metric(data, rows[0]).unwrap_or_default();
        parts.push(format!(
            "{place}: best {name} {} at {short} = {}, {} at {}{doubt}",
            significant(best.1.mean, 3),
            best.0,
            significant(theirs.1.mean, 3),
            theirs.0
        ));
    }
    if parts.is_empty() {
        return None;
    }
    let text = format!("Paper: {short} = {claimed}. Here, {}.", parts.join("; "));
    Some(Verdict { text, outcome: Outcome::of(held, judged) })
}

/// Points of a front that a sentence lists.
const LISTED: usize = 6;

/// What is lost for what is saved: no claim of the paper.
fn frontier(data: &Data) -> Option<Verdict> {
    let cells = &data.cells;
    let mut parts = Vec::new();
    for rows in group(cells, &["model".to_string(), "task".to_string()], &cells.all()) {
        let compressed = rows.iter().copied().filter(|&r| data.method(r) != "full");
        let (rows_of, points): (Vec<usize>, Vec<Point>) = compressed
            .filter_map(|r| {
                let (x, y) = (cells.number(r, "ratio")?, cells.number(r, "kl")?);
                Some((r, Point { x, y, spread: None }))
            })
            .unzip();
        let series = Series { key: 0, points, level: false };
        let front = curves::front(&[(&series, true)], false, true);
        let every = front.len().div_ceil(LISTED).max(1);
        let found: Vec<String> = (0..front.len())
            .filter(|i| i % every == 0 || i + 1 == front.len())
            .map(|i| {
                let point = series.points[front[i].1];
                let name = cells.text(rows_of[front[i].1], "variant");
                format!("{} at {}x ({name})", significant(point.y, 2), significant(point.x, 3))
            })
            .collect();
        if !found.is_empty() {
            let place = [data.model_label(cells.text(rows[0], "model")), cells.text(rows[0], "task")];
            let place = place.into_iter().filter(|p| !p.is_empty()).collect::<Vec<_>>().join(", ");
            parts.push(format!("{place}: {}", found.join(", ")));
        }
    }
    (!parts.is_empty()).then(|| Verdict {
        text: format!("Lowest KL in nats for the compression: {}.", parts.join("; ")),
        outcome: Outcome::Open,
    })
}
