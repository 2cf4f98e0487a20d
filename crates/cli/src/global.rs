//! Options that every command takes.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;
use clap::Args;
use minicache_config::bounds::{MOST_THREADS, check_number};
use minicache_core::kernels::Isa;
use minicache_eval::data::{DataSource, HubData};
use minicache_models::{Hub, Target};

use crate::failure::usage;

/// Options that every command takes.
#[derive(Debug, Clone, Args)]
pub(crate) struct Global {
    /// Where models run: `cpu`, `cuda:N`, or several GPUs as `cuda:0,cuda:1`.
    #[arg(long, global = true, default_value = "cpu", value_name = "DEVICE", help_heading = "Everywhere")]
    pub(crate) device: String,
    /// Folder with the data sets' original files. What it lacks comes from the hub, or else from the bundled sample.
    #[arg(long, global = true, env = "MINICACHE_DATA", value_name = "DIR", help_heading = "Everywhere")]
    pub(crate) data: Option<PathBuf>,
    /// CPU threads; by default one per physical core that this process may use.
    #[arg(long, global = true, value_name = "N", help_heading = "Everywhere")]
    pub(crate) threads: Option<usize>,
}

impl Global {
    /// Sets up what has to be in place before any work: the thread pool, and a look at the options and at the environment.
    pub(crate) fn prepare(&self) -> Result<()> {
        Isa::named()?;
        if let Some(threads) = self.threads {
            check_number("--threads", threads, 1..=MOST_THREADS)?;
            rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
        }
        if let Some(data) = &self.data
            && !data.is_dir()
        {
            let message = "no such folder; give the folder with the data sets' original files";
            return Err(usage(format!("--data: {}: {message}", data.display())));
        }
        self.devices().map(|_| ())
    }

    /// The devices to spread a model over.
    ///
    /// # Errors
    /// Names of no device, and GPUs that this build or machine does not have.
    pub(crate) fn devices(&self) -> Result<Vec<Target>> {
        Ok(minicache_models::parse_devices(&self.device)?)
    }

    /// Where data sets come from: the data folder, then the hub, then the bundled sample.
    pub(crate) fn data_source(&self) -> DataSource {
        DataSource::new(self.data.clone()).with_hub(Arc::new(HubData::new(Hub::from_env())))
    }
}
