//! Options that every command takes.

use std::path::PathBuf;

use anyhow::Result;
use candle_core::Device;
use clap::Args;

use crate::failure::usage;

/// Options that every command takes.
#[derive(Debug, Clone, Args)]
pub(crate) struct Global {
    /// Where models run: `cpu`, `cuda:N`, or several GPUs as `cuda:0,cuda:1`.
    #[arg(long, global = true, default_value = "cpu", value_name = "DEVICE", help_heading = "Everywhere")]
    pub(crate) device: String,
    /// Folder with the data sets' original files; the sample data of the repository where it is absent.
    #[arg(long, global = true, env = "MINICACHE_DATA", value_name = "DIR", help_heading = "Everywhere")]
    pub(crate) data: Option<PathBuf>,
    /// CPU threads; by default one per physical core that this process may use.
    #[arg(long, global = true, value_name = "N", help_heading = "Everywhere")]
    pub(crate) threads: Option<usize>,
}

impl Global {
    /// Sets up what has to be in place before any work: the thread pool, and a look at the options.
    pub(crate) fn prepare(&self) -> Result<()> {
        if let Some(threads) = self.threads {
            if threads == 0 {
                return Err(usage("--threads: must be at least 1"));
            }
            rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
        }
        if let Some(data) = &self.data
            && !data.is_dir()
        {
            let message = "no such folder; give the folder with the data sets' original files";
            return Err(usage(format!("--data: {}: {message}", data.display())));
        }
        self.device_names().map(|_| ())
    }

    /// The devices to spread a model over.
    ///
    /// # Errors
    /// Names of no device, and GPUs that this build or machine does not have (exit code 2).
    pub(crate) fn devices(&self) -> Result<Vec<Device>> {
        self.device_names()?
            .into_iter()
            .map(|n| match n {
                None => Ok(Device::Cpu),
                Some(n) => Device::new_cuda(n).map_err(|e| {
                    let reason = e.to_string();
                    let reason = reason.lines().next().unwrap_or_default();
                    usage(format!("--device: cannot use cuda:{n}: {reason}; use --device cpu"))
                }),
            })
            .collect()
    }

    fn device_names(&self) -> Result<Vec<Option<usize>>> {
        let wrong = || {
            let message = "is not a device; use `cpu`, `cuda:N` or `cuda:0,cuda:1`";
            usage(format!("--device: `{}` {message}", self.device))
        };
        let parse = |name: &str| match name.trim() {
            "cpu" => Ok(None),
            "cuda" => Ok(Some(0)),
            other => other.strip_prefix("cuda:").and_then(|n| n.parse().ok()).map(Some).ok_or_else(wrong),
        };
        let names: Vec<Option<usize>> = self.device.split(',').map(parse).collect::<Result<_>>()?;
        if names.len() > 1 && names.contains(&None) { Err(wrong()) } else { Ok(names) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn global(device: &str) -> Global {
        Global { device: device.to_string(), data: None, threads: None }
    }

    #[test]
    fn devices_are_named_as_candle_numbers_them() {
        let names = |d| global(d).device_names().ok();
        assert_eq!(names("cpu"), Some(vec![None]));
        assert_eq!(names("cuda"), Some(vec![Some(0)]));
        assert_eq!(names("cuda:0,cuda:1"), Some(vec![Some(0), Some(1)]));
        for bad in ["gpu", "cuda:x", "cpu,cuda:0", ""] {
            assert_eq!(names(bad), None, "{bad}");
        }
    }
}
