//! `minicache submit`: a sweep as jobs of Slurm.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use indexmap::IndexMap;
use minicache_config::{Experiment, Kind, Slurm, atomic};
use minicache_eval::run::{Job, Preview, Task, describe_cell, estimates, preview, renew, slot, split};
use minicache_eval::store;

use super::asked::Asked;
use super::run::context;
use crate::call::{command_line, without};
use crate::global::Global;
use crate::shares::{JOBS, Planned, Share, Shares};
use crate::slurm::{Scripts, submit};
use crate::{output, signals};

/// Options of `minicache submit`: those of `minicache run`, and the site's.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    asked: Asked,
    /// What the site needs: partition, account, time, GPUs and so on (docs/cluster.md lists the keys).
    #[arg(long, value_name = "FILE.toml")]
    slurm: Option<PathBuf>,
    /// Print the plan and the job script, and submit nothing.
    #[arg(long)]
    dry_run: bool,
}

/// Plans the cells that are not finished, writes the scripts beside the results and submits them.
pub(crate) fn run(args: &Args, global: &Global) -> Result<()> {
    let asked = &args.asked;
    let site = args.slurm.as_deref().map(Slurm::load).transpose()?.unwrap_or_default();
    let experiments = asked.load()?;
    store::check_folder(&asked.results)?;
    let call = run_call();
    let mut context = context(asked, global, command_line(call.clone()))?;
    let mut plans = Vec::with_capacity(experiments.len());
    for experiment in &experiments {
        plans.push(preview(experiment, &context, true).with_context(|| experiment.id.clone())?);
    }
    let why = pace(&experiments, &mut plans, &site);
    let jobs: Vec<Job> = plans.iter().flat_map(|plan| plan.jobs.clone()).collect();
    let tasks = split(&jobs, site.max_tasks, 60.0 * site.shortest_minutes, false);
    print_plan(&plans, &jobs, &tasks)?;
    output::line(format!("(estimates are {why})"))?;
    if tasks.is_empty() {
        return output::line("nothing is left to do");
    }
    let cwd = std::env::current_dir().context("the working directory")?;
    let program = std::env::current_exe().context("this program's own path")?;
    let results = std::path::absolute(&asked.results)?;
    // By the time, so that the last one is the last.
    let seconds =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let dir = results.join(JOBS).join(format!("{seconds}-{}", std::process::id()));
    let words: Vec<String> = call.iter().map(|word| word.to_string_lossy().into_owned()).collect();
    let shares = Shares::path(&dir);
    let scripts = Scripts {
        site: &site,
        cwd: &cwd,
        dir: &dir,
        program: &program,
        call: &words,
        shares: &shares,
        tasks: tasks.len(),
    };
    if args.dry_run {
        output::line(format!("\n{}:\n{}", dir.join("tasks.sh").display(), scripts.array()))?;
        return output::line(format!("{}:\n{}", dir.join("report.sh").display(), scripts.report()));
    }
    context.stop = signals::stop();
    context.worker = Some(asked.worker(&context.command)?);
    if asked.fresh {
        experiments.iter().try_for_each(|experiment| renew(experiment, &context))?;
    }
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let put = |name: &str, text: String| {
        let path = dir.join(name);
        let written = atomic::replace(&path, text.as_bytes());
        written.with_context(|| format!("cannot write {}", path.display())).map(|()| path)
    };
    let (array, report) = (put("tasks.sh", scripts.array())?, put("report.sh", scripts.report())?);
    let mut record = Shares {
        command: context.command.clone(),
        since: store::today(),
        jobs: Vec::new(),
        experiments: cells(&experiments, &plans, &asked.results),
        tasks: tasks.iter().map(share).collect(),
    };
    record.write(&dir)?;
    let array = submit(&array, &[])?;
    record.jobs.push(array.clone());
    record.write(&dir)?;
    let last = submit(&report, &[format!("--dependency=afterany:{array}")]);
    let last = last.with_context(|| {
        format!("job {array} is submitted; write the reports yourself with `minicache run --collect`")
    })?;
    record.jobs.push(last.clone());
    record.write(&dir)?;
    let count = tasks.len();
    output::line(format!("submitted: {count} tasks as job {array}, then the reports as job {last}"))?;
    output::line(format!("how far it is:  minicache status {}", results.display()))?;
    output::line(format!("what runs:      squeue --jobs={array},{last}"))?;
    output::line(format!("what it says:   tail {}/task-1.log", dir.display()))?;
    output::line(format!(
        "to stop it:     scancel {array} {last}    (what is finished is kept; submit again to go on)"
    ))
}

/// The words of `minicache run` that this call stands for.
fn run_call() -> Vec<std::ffi::OsString> {
    let mut call = without(std::env::args_os().skip(1), &["--dry-run", "--fresh"], &["--slurm"]);
    if let Some(word) = call.iter_mut().find(|word| *word == "submit") {
        *word = "run".into();
    }
    call
}

/// Makes the estimates of the plans those for this site: as the site's file says, or by the rows that are there, those
/// of each kind of experiment for themselves. Gives what they are, in words.
fn pace(experiments: &[Experiment], plans: &mut [Preview], site: &Slurm) -> String {
    let mut kinds: Vec<(Kind, f64, f64)> = Vec::new();
    for (experiment, plan) in experiments.iter().zip(&*plans) {
        let (took, estimated) = plan.measured;
        match kinds.iter_mut().find(|(kind, ..)| *kind == experiment.kind) {
            Some(of) => *of = (of.0, of.1 + took, of.2 + estimated),
            None => kinds.push((experiment.kind, took, estimated)),
        }
    }
    kinds.retain(|(_, took, estimated)| *took > 0.0 && *estimated > 0.0);
    if site.speed.is_some() {
        kinds.clear();
    }
    // Kinds of which no cell is finished go by those of which some are.
    let (took, estimated) = kinds.iter().fold((0.0, 0.0), |sum, of| (sum.0 + of.1, sum.1 + of.2));
    let other = if estimated > 0.0 { took / estimated } else { 1.0 / site.speed.unwrap_or(1.0) };
    for (experiment, plan) in experiments.iter().zip(plans) {
        let known = kinds.iter().find(|(kind, ..)| *kind == experiment.kind);
        let pace = known.map_or(other, |(_, took, estimated)| took / estimated);
        plan.jobs.iter_mut().for_each(|job| job.scale(pace));
    }
    let factors: Vec<String> =
        kinds.iter().map(|(kind, took, of)| format!("{} {:.2}", kind.name(), took / of)).collect();
    match site.speed {
        Some(speed) => format!("two CPU cores' divided by {speed}, as the site's file says"),
        None if !factors.is_empty() => {
            format!("two CPU cores' times what finished cells took: {}", factors.join(", "))
        }
        None => "those of two CPU cores: no cell is finished yet, and no speed given".into(),
    }
}

fn share(task: &Task) -> Share {
    Share { seconds: task.seconds, models: task.models.clone(), cells: task.cells.clone() }
}

/// All cells, by the folders of their experiments.
fn cells(
    experiments: &[Experiment],
    plans: &[Preview],
    results: &std::path::Path,
) -> IndexMap<PathBuf, IndexMap<String, Planned>> {
    let mut all = IndexMap::new();
    for (experiment, plan) in experiments.iter().zip(plans) {
        let seconds = estimates(&plan.jobs);
        let planned = plan.cells.iter().map(|(cell, _)| {
            let slot = slot(experiment, cell);
            let seconds = seconds.get(&slot).copied().unwrap_or(0.0);
            (slot, Planned { cell: describe_cell(cell), seconds })
        });
        let dir = plan.dir.strip_prefix(results).unwrap_or(&plan.dir).to_path_buf();
        all.insert(dir, planned.collect());
    }
    all
}

/// The plan in short: by experiment, by model, and how it is divided.
fn print_plan(plans: &[Preview], jobs: &[Job], tasks: &[Task]) -> Result<()> {
    for plan in plans {
        let open = plan.cells.iter().filter(|(_, done)| !done).count();
        let (all, dir) = (plan.cells.len(), plan.dir.display());
        output::line(format!("{dir}: {all} cells, {} finished, {open} to compute", all - open))?;
    }
    let mut models: IndexMap<&str, (usize, f64, usize)> = IndexMap::new();
    for job in jobs {
        let open = job.cells.iter().filter(|(_, _, done)| !done);
        let (count, own) = open.fold((0, 0.0), |(n, sum), (_, own, _)| (n + 1, sum + own));
        if count > 0 {
            let of = models.entry(&job.load.model).or_default();
            *of = (of.0 + count, of.1 + own + job.common, 0);
        }
    }
    for task in tasks {
        for model in &task.models {
            models.entry(model).or_default().2 += 1;
        }
    }
    for (model, (cells, seconds, tasks)) in &models {
        output::line(format!("  {model}: {cells} cells, {}, in {tasks} tasks", hours(*seconds)))?;
    }
    let work: f64 = models.values().map(|(_, seconds, _)| seconds).sum();
    let longest = tasks.iter().map(|task| task.seconds).fold(0.0, f64::max);
    let count = tasks.len();
    if count > 0 {
        let share = longest * count as f64 / work.max(f64::MIN_POSITIVE);
        let times = format!("{share:.2} times an even share of the work, with loading");
        output::line(format!(
            "{count} tasks, by estimate {} of work, the longest {}: {times}",
            hours(work),
            hours(longest)
        ))?;
    }
    Ok(())
}

/// Seconds in words.
pub(super) fn hours(seconds: f64) -> String {
    match seconds {
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}
