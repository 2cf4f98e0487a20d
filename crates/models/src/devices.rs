//! Where models run, by name, and the split of a model's layers over several GPUs.

use std::fmt;
use std::sync::Arc;

use minicache_device::Device;

use crate::{Error, Result};

/// Where layers run.
#[derive(Debug, Clone, Default)]
pub enum Target {
    /// The host.
    #[default]
    Cpu,
    /// A GPU, or an emulated one.
    Device(Arc<Device>),
}

/// Reads `cpu`, `cuda`, `cuda:1` or a list of GPUs separated by commas, and opens them. (`emulated:0` is a device of the
/// host's, to test on.)
///
/// # Errors
/// An unknown name, a device named twice, the CPU beside GPUs, libraries or a GPU that are not there.
pub fn parse_devices(text: &str) -> Result<Vec<Target>> {
    let names = device_names(text)?;
    names.into_iter().map(open).collect()
}

/// A device by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Name {
    Cpu,
    Device(&'static str, usize),
}

fn device_names(text: &str) -> Result<Vec<Name>> {
    let mut names = Vec::new();
    for part in text.split(',').map(str::trim) {
        let (kind, index) = part.split_once(':').unwrap_or((part, "0"));
        let name = match (kind, index.parse()) {
            ("cpu", _) if kind == part => Some(Name::Cpu),
            ("cuda", Ok(index)) => Some(Name::Device("cuda", index)),
            ("emulated", Ok(index)) => Some(Name::Device("emulated", index)),
            _ => None,
        };
        let name = name.ok_or_else(|| {
            Error::Device(format!(
                "{part:?} is not a device; expected cpu, cuda:N, or several GPUs separated by commas"
            ))
        })?;
        if names.contains(&name) {
            return Err(Error::Device(format!("{part:?} is named twice")));
        }
        names.push(name);
    }
    if names.len() > 1 && names.contains(&Name::Cpu) {
        return Err(Error::Device("a model runs on the CPU or on GPUs, not on both".into()));
    }
    Ok(names)
}

fn open(name: Name) -> Result<Target> {
    Ok(match name {
        Name::Cpu => Target::Cpu,
        Name::Device(kind, index) => Target::Device(Device::open(kind, index)?),
    })
}

/// The GPUs among `targets` in words, such as `NVIDIA H100 80GB HBM3, NVRTC 13.0`; empty on the host.
pub fn describe_gpus(targets: &[Target]) -> String {
    let gpus = targets.iter().filter_map(|target| match target {
        Target::Cpu => None,
        Target::Device(device) => Some(device.driver.describe()),
    });
    gpus.collect::<Vec<_>>().join("; ")
}

/// Bytes that can still be allocated; `u64::MAX` where the system does not say.
pub(crate) fn free_memory(target: &Target) -> Result<u64> {
    match target {
        Target::Cpu => Ok(available_host_memory().unwrap_or(u64::MAX)),
        Target::Device(device) => Ok(device.driver.memory()?.0),
    }
}

/// A short name: `cpu`, `cuda:0`.
pub(crate) fn label(target: &Target) -> String {
    match target {
        Target::Cpu => "cpu".into(),
        Target::Device(device) => device.driver.name().to_string(),
    }
}

/// `MemAvailable` of Linux.
fn available_host_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// Share of a device's free memory that weights may take; the rest is for activations and the allocator.
const USABLE: f64 = 0.9;

/// Gives each layer a device, in order: device d takes the next layers so that every device is filled to about the
/// same share of its free memory. `last` bytes (final norm and output projection) go with the last layers.
///
/// Pure: `layers` are bytes per layer, `free` bytes per device. Returns the device index of each layer, ascending;
/// a device may stay empty.
///
/// # Errors
/// The model does not fit.
pub fn split_layers(layers: &[u64], last: u64, free: &[u64]) -> Result<Vec<usize>> {
    let usable: Vec<u64> = free.iter().map(|f| (*f as f64 * USABLE) as u64).collect();
    let need = layers.iter().sum::<u64>() + last;
    let Some(last_device) = usable.len().checked_sub(1) else {
        return Err(Error::Device("no device is given".into()));
    };
    let too_small = || {
        let total = usable.iter().fold(0u64, |sum, f| sum.saturating_add(*f));
        Error::Device(format!(
            "the model needs {} but its devices can take {}; name more devices, or use quantised weights",
            bytes(need),
            bytes(total)
        ))
    };
    // The smallest common fill level that fits, found by bisection: assignment by a level is monotone in it.
    let assign = |level: f64| -> Option<Vec<usize>> {
        let mut device = 0;
        let mut used = 0;
        let mut map = Vec::with_capacity(layers.len());
        for (i, size) in layers.iter().enumerate() {
            let extra = if i + 1 == layers.len() { last } else { 0 };
            while used + size + extra > (usable[device] as f64 * level) as u64 {
                if device == last_device {
                    return None;
                }
                device += 1;
                used = 0;
            }
            used += size;
            map.push(device);
        }
        Some(map)
    };
    let mut best = assign(1.0).ok_or_else(too_small)?;
    let (mut low, mut high) = (0.0, 1.0);
    for _ in 0..40 {
        let level = (low + high) / 2.0;
        match assign(level) {
            Some(map) => (best, high) = (map, level),
            None => low = level,
        }
    }
    Ok(best)
}

/// Which layers lie where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceMap {
    /// Device names, in the order in which they were given.
    pub devices: Vec<String>,
    /// Device index of each layer.
    pub layers: Vec<usize>,
    /// Weight bytes on each device.
    pub bytes: Vec<u64>,
}

impl fmt::Display for DeviceMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut first = true;
        for (index, name) in self.devices.iter().enumerate() {
            let Some(from) = self.layers.iter().position(|d| *d == index) else { continue };
            let count = self.layers.iter().filter(|d| **d == index).count();
            let size = bytes(self.bytes[index]);
            let sep = if std::mem::take(&mut first) { "" } else { "; " };
            write!(f, "{sep}{name}: layers {from}..={} ({size})", from + count - 1)?;
        }
        Ok(())
    }
}

/// Bytes for people.
fn bytes(n: u64) -> String {
    let (n, unit) = match n {
        0..1_000_000 => (n as f64 / 1e3, "kB"),
        1_000_000..1_000_000_000 => (n as f64 / 1e6, "MB"),
        _ => (n as f64 / 1e9, "GB"),
    };
    format!("{n:.1} {unit}")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const GB: u64 = 1_000_000_000;

    #[test]
    fn names() {
        assert_eq!(device_names("cpu").unwrap(), [Name::Cpu]);
        assert_eq!(
            device_names("cuda:0, cuda:3").unwrap(),
            [Name::Device("cuda", 0), Name::Device("cuda", 3)]
        );
        for bad in ["gpu", "cuda:x", "", "cuda,,cuda", "cpu:0"] {
            assert!(device_names(bad).unwrap_err().to_string().contains("is not a device"), "{bad}");
        }
        let twice = device_names("cuda,cuda:0").unwrap_err().to_string();
        assert_eq!(twice, "device: \"cuda:0\" is named twice");
        assert!(device_names("cpu,cuda").unwrap_err().to_string().contains("not on both"));
        assert!(matches!(parse_devices("cpu").unwrap()[..], [Target::Cpu]));
    }

    #[test]
    fn equal_devices_share_equally() {
        let map = split_layers(&[GB; 80], 2 * GB, &[80 * GB, 80 * GB]).unwrap();
        assert_eq!(map.iter().filter(|d| **d == 0).count(), 41);
        assert!(map.is_sorted());
    }

    #[test]
    fn unequal_devices_fill_to_the_same_share() {
        let map = split_layers(&[GB; 32], 0, &[30 * GB, 10 * GB]).unwrap();
        assert_eq!(map.iter().filter(|d| **d == 0).count(), 24);
        let map = split_layers(&[GB; 32], 0, &[10 * GB, 20 * GB, 10 * GB]).unwrap();
        let counts = [0, 1, 2].map(|d| map.iter().filter(|m| **m == d).count());
        assert_eq!(counts.iter().sum::<usize>(), 32);
        assert!(counts[1] >= 15 && counts[0] >= 7 && counts[2] >= 7, "{counts:?}");
    }

    #[test]
    fn the_output_projection_counts() {
        let map = split_layers(&[GB; 10], 6 * GB, &[20 * GB, 20 * GB]).unwrap();
        assert_eq!(map.iter().filter(|d| **d == 0).count(), 8);
    }

    #[test]
    fn a_tiny_first_device_is_skipped() {
        assert_eq!(split_layers(&[5 * GB; 3], 0, &[GB, 40 * GB]).unwrap(), [1, 1, 1]);
    }

    #[test]
    fn too_large() {
        let message = split_layers(&[GB; 30], 0, &[10 * GB, 10 * GB]).unwrap_err().to_string();
        assert_eq!(
            message,
            "device: the model needs 30.0 GB but its devices can take 18.0 GB; name more devices, or use quantised weights"
        );
        assert!(split_layers(&[1], 0, &[]).is_err());
    }

    #[test]
    fn a_map_reads_well() {
        let map = DeviceMap {
            devices: vec!["cuda:0".into(), "cuda:1".into(), "cpu".into()],
            layers: vec![0, 0, 2],
            bytes: vec![2 * GB, 0, 5_000_000],
        };
        assert_eq!(map.to_string(), "cuda:0: layers 0..=1 (2.0 GB); cpu: layers 2..=2 (5.0 MB)");
    }
}
