//! `minicache run`: measures what experiment files describe.

use std::path::{Path, PathBuf};

use anyhow::Result;
use minicache_config::{Cell, Experiment, cells};

use crate::failure::usage;
use crate::global::Global;
use crate::output;

/// Options of `minicache run`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Experiment files, or the names of those in `experiments/`.
    #[arg(required = true, value_name = "EXPERIMENT")]
    experiments: Vec<PathBuf>,
    /// Models to run instead of the experiment's: registry names, folders or `.gguf` files.
    #[arg(long, value_delimiter = ',', value_name = "M,..")]
    models: Vec<String>,
    /// Samples per task, instead of the experiment's.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Sets a key of the experiment, such as `cache.start_layer=10`; may be given again.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// The profile of models, tasks and limits.
    #[arg(long, default_value = "default", value_name = "P")]
    profile: String,
    /// Folder for results.
    #[arg(long, default_value = "results", value_name = "DIR")]
    results: PathBuf,
    /// Start anew instead of going on where an earlier run stopped.
    #[arg(long)]
    fresh: bool,
    /// Print what would be run, and run nothing.
    #[arg(long)]
    dry_run: bool,
}

/// Runs the experiments one after another.
pub(crate) fn run(args: &Args, _: &Global) -> Result<()> {
    // All files are read first: a mistake in the last one should not show after an hour.
    let experiments = args.experiments.iter().map(|path| load(path, args)).collect::<Result<Vec<_>>>()?;
    for (_, experiment) in &experiments {
        print_plan(experiment, &cells(experiment)?)?;
    }
    if args.dry_run { Ok(()) } else { Err(usage("only --dry-run is implemented so far")) }
}

/// Reads an experiment file with the options of the command line on top.
fn load(name: &Path, args: &Args) -> Result<(PathBuf, Experiment)> {
    let bare = name.extension().is_none() && name.components().count() == 1 && !name.is_file();
    let path =
        if bare { Path::new("experiments").join(name).with_extension("toml") } else { name.to_path_buf() };
    let mut experiment = Experiment::load(&path, &args.set, Some(&args.profile))?;
    if !args.models.is_empty() {
        experiment.models.clone_from(&args.models);
    }
    if args.limit == Some(0) {
        return Err(usage("--limit: must be at least 1; leave it out for the experiment's own"));
    }
    experiment.limit = args.limit.or(experiment.limit);
    if experiment.models.is_empty() {
        let message = "no models in this profile; name some with --models";
        return Err(usage(format!("{}: {message}", path.display())));
    }
    Ok((path, experiment))
}

fn print_plan(experiment: &Experiment, plan: &[Cell]) -> Result<()> {
    output::line(format!("{} ({:?}): {} cells", experiment.id, experiment.kind, plan.len()).to_lowercase())?;
    for cell in plan {
        let swept = cell.swept.iter().map(|(k, v)| format!(" {k}={v}")).collect::<String>();
        output::line(format!("  {} {} {}{swept}", cell.model, cell.task, cell.variant))?;
    }
    Ok(())
}
