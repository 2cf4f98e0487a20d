//! `minicache status`: how far the runs in a results folder have come.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::Result;
use indexmap::IndexMap;
use minicache_config::{RunInfo, cells};
use minicache_eval::run::{describe_cell, slot};
use minicache_eval::store::{Seen, State, limit};
use serde_json::json;

use super::report::folders;
use super::submit::hours;
use crate::failure::{Unfinished, usage};
use crate::global::Global;
use crate::output;
use crate::shares::Shares;

/// Options of `minicache status`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder with one folder per experiment, or that of one experiment.
    #[arg(default_value = "results", value_name = "DIR")]
    dir: PathBuf,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// A cell that is not finished.
struct Open {
    /// What it is; its key where no more is known.
    cell: String,
    /// Estimated seconds, where there is anything to go by.
    seconds: Option<f64>,
    state: Standing,
}

enum Standing {
    Running(Seen),
    Failed { error: String, host: String, since: String },
    ToDo,
}

/// An experiment.
struct Progress {
    dir: PathBuf,
    planned: usize,
    done: usize,
    open: Vec<Open>,
}

impl Progress {
    fn count(&self, of: fn(&Standing) -> bool) -> usize {
        self.open.iter().filter(|open| of(&open.state)).count()
    }

    fn running(&self) -> usize {
        self.count(|s| matches!(s, Standing::Running(_)))
    }

    fn failed(&self) -> usize {
        self.count(|s| matches!(s, Standing::Failed { .. }))
    }

    fn to_do(&self) -> usize {
        self.count(|s| matches!(s, Standing::ToDo))
    }
}

/// Prints it, and fails where not everything is done: with 3 where it may still become so, with 1 where cells failed.
pub(crate) fn run(args: &Args, _: &Global) -> Result<()> {
    let dir = args.dir.display();
    if !args.dir.is_dir() {
        return Err(usage(format!("{dir}: no such folder; name the --results folder of a run or submit")));
    }
    let (limit, now) = (limit()?, SystemTime::now());
    let is_gone = |seen: &Seen| seen.is_gone(now, limit);
    let shares = Shares::all(&args.dir);
    let mut all: Vec<Progress> = Vec::new();
    let mut planned: IndexMap<PathBuf, IndexMap<String, crate::shares::Planned>> = IndexMap::new();
    // The last plan of each experiment.
    for (folder, cells) in shares.into_iter().flat_map(|sweep| sweep.experiments) {
        planned.insert(args.dir.join(folder), cells);
    }
    for folder in begun(&args.dir) {
        planned.entry(folder).or_default();
    }
    for (folder, submitted) in planned {
        all.extend(progress(&folder, &submitted, &is_gone)?);
    }
    if all.is_empty() {
        let mend = "nothing was run or submitted there; name the --results folder of a run or submit";
        return Err(usage(format!("{dir}: {mend}")));
    }
    let sum = |of: fn(&Progress) -> usize| all.iter().map(of).sum::<usize>();
    let (running, failed, to_do) = (sum(Progress::running), sum(Progress::failed), sum(Progress::to_do));
    let left = time_left(&all);
    let code = match (running + to_do, failed) {
        (0, 0) => 0,
        (0, _) => 1,
        _ => 3,
    };
    if args.json {
        print_json(&all, left, code, now)?;
    } else {
        print(&all, left, now)?;
    }
    if code == 0 { Ok(()) } else { Err(Unfinished { code }.into()) }
}

/// The folders of experiments that were begun.
fn begun(dir: &Path) -> Vec<PathBuf> {
    if dir.join(RunInfo::FILE).is_file() {
        return vec![dir.to_path_buf()];
    }
    let all =
        folders(dir).into_iter().flat_map(|folder| minicache_plot::experiments(&folder).unwrap_or_default());
    all.filter(|folder| folder.join(RunInfo::FILE).is_file()).collect()
}

/// How far an experiment is; `None` where its folder says of no plan. Where it was submitted, the cells are those of the
/// submitted plan.
fn progress(
    dir: &Path,
    submitted: &IndexMap<String, crate::shares::Planned>,
    is_gone: &dyn Fn(&Seen) -> bool,
) -> Result<Option<Progress>> {
    let state = State::read(dir)?;
    let info = RunInfo::read(dir).ok();
    // Slots and keys belong together where the plan was made with all models at hand.
    if let Some(info) =
        info.as_ref().filter(|info| info.keys.is_empty() && submitted.is_empty() && info.planned > 0)
        && state.failed.is_empty()
    {
        // Of a version that named no cells.
        let done = if info.finished { info.planned } else { state.done.len().min(info.planned) };
        let unnamed = || Open { cell: "a cell of an older run".into(), seconds: None, state: Standing::ToDo };
        let open = (done..info.planned).map(|_| unnamed()).collect();
        return Ok(Some(Progress { dir: dir.to_path_buf(), planned: info.planned, done, open }));
    }
    if let Some(info) = &info {
        let plan = cells(&info.experiment)?;
        let named: Vec<(String, String)> =
            plan.iter().map(|cell| (slot(&info.experiment, cell), describe_cell(cell))).collect();
        let missing: HashSet<&str> =
            state.failed.iter().filter(|f| f.key.is_empty()).map(|f| f.slot.as_str()).collect();
        let with_keys: Vec<_> =
            named.iter().filter(|(slot, _)| !missing.contains(slot.as_str())).cloned().collect();
        if with_keys.len() == info.keys.len() && info.planned == named.len() {
            return Ok(Some(of_plan(dir, &state, &info.keys, &with_keys, &named, submitted, is_gone)));
        }
        if submitted.is_empty() || info.planned >= submitted.len() {
            return Ok(Some(of_keys(dir, &state, info, is_gone)));
        }
    }
    if submitted.is_empty() {
        return Ok(None);
    }
    // Nothing but the plan is known yet.
    let failed: HashMap<&str, _> = state.failed.iter().map(|f| (f.slot.as_str(), f)).collect();
    let open = submitted.iter().map(|(slot, planned)| Open {
        cell: planned.cell.clone(),
        seconds: Some(planned.seconds),
        state: failed.get(slot.as_str()).map_or(Standing::ToDo, |f| standing(f)),
    });
    Ok(Some(Progress { dir: dir.to_path_buf(), planned: submitted.len(), done: 0, open: open.collect() }))
}

fn standing(failed: &minicache_eval::store::FailedCell) -> Standing {
    let (error, host, since) = (failed.error.clone(), failed.host.clone(), failed.since.clone());
    Standing::Failed { error, host, since }
}

/// An experiment whose cells are known by name and key.
fn of_plan(
    dir: &Path,
    state: &State,
    keys: &[String],
    with_keys: &[(String, String)],
    named: &[(String, String)],
    submitted: &IndexMap<String, crate::shares::Planned>,
    is_gone: &dyn Fn(&Seen) -> bool,
) -> Progress {
    let key_of: HashMap<&str, &str> =
        with_keys.iter().zip(keys).map(|((slot, _), key)| (slot.as_str(), key.as_str())).collect();
    let running: HashMap<&str, &Seen> = state
        .claimed
        .iter()
        .filter(|(key, seen)| !state.done.contains_key(key) && !is_gone(seen))
        .map(|(key, seen)| (key.as_str(), seen))
        .collect();
    let failed: HashMap<&str, _> = state.failed.iter().map(|f| (f.slot.as_str(), f)).collect();
    let typical = typical_seconds(state);
    let mut open = Vec::new();
    let mut done = 0;
    for (slot, cell) in named {
        let key = key_of.get(slot.as_str());
        if key.is_some_and(|key| state.done.contains_key(*key)) {
            done += 1;
            continue;
        }
        let state = match (key.and_then(|key| running.get(key)), failed.get(slot.as_str())) {
            (Some(seen), _) => Standing::Running((*seen).clone()),
            (None, Some(f)) => standing(f),
            (None, None) => Standing::ToDo,
        };
        let model = cell.split(' ').next().unwrap_or_default();
        let known = typical.get(model).or(typical.get("")).copied();
        let seconds = known.or_else(|| submitted.get(slot).map(|planned| planned.seconds));
        open.push(Open { cell: cell.clone(), seconds, state });
    }
    Progress { dir: dir.to_path_buf(), planned: named.len(), done, open }
}

/// An experiment whose cells are known by key alone: some names stand for one cell.
fn of_keys(dir: &Path, state: &State, info: &RunInfo, is_gone: &dyn Fn(&Seen) -> bool) -> Progress {
    let typical = typical_seconds(state).get("").copied();
    let mut open = Vec::new();
    for key in info.keys.iter().filter(|key| !state.done.contains_key(*key)) {
        let running = state.claimed.iter().find(|(k, seen)| k == key && !is_gone(seen));
        let failed = state.failed.iter().find(|f| f.key == *key);
        let cell = failed.map_or_else(|| key.clone(), |f| f.cell.clone());
        let state = match (running, failed) {
            (Some((_, seen)), _) => Standing::Running(seen.clone()),
            (None, Some(f)) => standing(f),
            (None, None) => Standing::ToDo,
        };
        open.push(Open { cell, seconds: typical, state });
    }
    let missing = state.failed.iter().filter(|f| f.key.is_empty());
    open.extend(missing.map(|f| Open { cell: f.cell.clone(), seconds: typical, state: standing(f) }));
    let done = info.keys.iter().filter(|key| state.done.contains_key(*key)).count();
    Progress { dir: dir.to_path_buf(), planned: done + open.len(), done, open }
}

/// Seconds that finished cells took on average, by model; under the empty name those of all.
fn typical_seconds(state: &State) -> HashMap<&str, f64> {
    let mut sums: HashMap<&str, (f64, usize)> = HashMap::new();
    for row in state.done.values().filter_map(|rows| rows.first()) {
        let Some(seconds) = row.get("seconds").and_then(|s| s.parse::<f64>().ok()) else { continue };
        for name in [row.get("model").map_or("", String::as_str), ""] {
            let sum = sums.entry(name).or_default();
            *sum = (sum.0 + seconds, sum.1 + 1);
        }
    }
    sums.into_iter().map(|(name, (sum, n))| (name, sum / n as f64)).collect()
}

/// Seconds until all is done if as many go on as are at work now; `None` where nobody is, or nothing is known.
fn time_left(all: &[Progress]) -> Option<f64> {
    let mut workers: HashSet<&str> = HashSet::new();
    let (mut sum, mut known) = (0.0, true);
    for open in all.iter().flat_map(|p| &p.open) {
        match &open.state {
            Standing::Failed { .. } => continue,
            Standing::Running(seen) => {
                workers.insert(&seen.holder.id);
            }
            Standing::ToDo => {}
        }
        known &= open.seconds.is_some();
        sum += open.seconds.unwrap_or(0.0);
    }
    (!workers.is_empty() && known).then(|| sum / workers.len() as f64)
}

fn age(seen: &Seen, now: SystemTime) -> Duration {
    now.duration_since(seen.beat).unwrap_or_default()
}

fn print(all: &[Progress], left: Option<f64>, now: SystemTime) -> Result<()> {
    for p in all {
        let (done, running, failed, to_do) = (p.done, p.running(), p.failed(), p.to_do());
        let dir = p.dir.display();
        output::line(format!(
            "{dir}: {} cells: {done} done, {running} running, {failed} failed, {to_do} to do",
            p.planned
        ))?;
        for open in &p.open {
            match &open.state {
                Standing::Running(seen) => {
                    let holder = &seen.holder;
                    let job =
                        if holder.job.is_empty() { String::new() } else { format!(", job {}", holder.job) };
                    let (host, pid, since) = (&holder.host, holder.pid, &holder.since);
                    let beat = age(seen, now).as_secs();
                    output::line(format!(
                        "  running: {}: on {host}, process {pid}{job}, at work since {since}, heard of {beat} s ago",
                        open.cell
                    ))?;
                }
                Standing::Failed { error, host, since } => {
                    output::line(format!("  failed: {}: {error} (on {host}, {since})", open.cell))?;
                }
                Standing::ToDo => {}
            }
        }
    }
    if let Some(left) = left {
        output::line(format!("about {} left, with as many at work as now", hours(left)))?;
    }
    Ok(())
}

fn print_json(all: &[Progress], left: Option<f64>, code: u8, now: SystemTime) -> Result<()> {
    let experiment = |p: &Progress| {
        let running = p.open.iter().filter_map(|open| match &open.state {
            Standing::Running(seen) => Some(json!({
                "cell": open.cell,
                "host": seen.holder.host,
                "pid": seen.holder.pid,
                "job": seen.holder.job,
                "since": seen.holder.since,
                "heartbeat_s": age(seen, now).as_secs_f64(),
            })),
            _ => None,
        });
        let failed = p.open.iter().filter_map(|open| match &open.state {
            Standing::Failed { error, host, since } => {
                Some(json!({ "cell": open.cell, "error": error, "host": host, "since": since }))
            }
            _ => None,
        });
        let to_do = p.open.iter().filter(|open| matches!(open.state, Standing::ToDo)).map(|open| &open.cell);
        json!({
            "dir": p.dir,
            "planned": p.planned,
            "done": p.done,
            "running": running.collect::<Vec<_>>(),
            "failed": failed.collect::<Vec<_>>(),
            "to_do": to_do.collect::<Vec<_>>(),
        })
    };
    let state = match code {
        0 => "done",
        1 => "failed",
        _ => "in progress",
    };
    let all: Vec<_> = all.iter().map(experiment).collect();
    output::line(json!({ "state": state, "seconds_left": left, "experiments": all }))
}
