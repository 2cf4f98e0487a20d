//! Who made a row: `made.json`.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// On what and where the rows of one cell were computed.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Made {
    /// Where the data came from, such as `bundled sample`; empty for kinds without data.
    pub data: String,
    /// Processor, cores and memory.
    pub machine: String,
    /// The instruction set of the kernels.
    pub simd: String,
    /// The GPUs that the model and its caches were on; empty on the host.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub device: String,
    /// The day, as `2025-01-31`.
    pub date: String,
    /// The results folder, by its id (see [`super::clone_id`]).
    pub clone: String,
    /// The cell was asked for anew: the rows stand until they are computed again.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub outdated: bool,
}

impl Made {
    /// Made today by this process on `device` (empty: the host), for the results folder with the id `clone`.
    pub fn here(clone: &str, device: String) -> Self {
        Self {
            data: String::new(),
            device,
            machine: machine(),
            simd: minicache_core::kernels::Isa::active().name().to_string(),
            date: today(),
            clone: clone.to_string(),
            outdated: false,
        }
    }
}

/// Processor, cores and memory.
pub fn machine() -> String {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str| {
        text.lines().find_map(|l| l.strip_prefix(name)?.split_once(':').map(|(_, v)| v.trim().to_string()))
    };
    let processor =
        field(&read("/proc/cpuinfo"), "model name").unwrap_or_else(|| std::env::consts::ARCH.to_string());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let kib =
        field(&read("/proc/meminfo"), "MemTotal").and_then(|v| v.trim_end_matches(" kB").parse::<f64>().ok());
    let memory = kib.map(|k| format!(", {:.0} GiB memory", k / 1024.0 / 1024.0)).unwrap_or_default();
    let plural = if cores == 1 { "" } else { "s" };
    format!("{processor}, {cores} core{plural}{memory}")
}

/// The processor of what [`machine`] gives.
pub fn processor(machine: &str) -> &str {
    machine.split(", ").next().unwrap_or_default()
}

/// Today, as `2025-01-31` (UTC).
pub fn today() -> String {
    date(now())
}

/// Now, as `2025-01-31 23:59:59 UTC`.
pub(super) fn moment() -> String {
    let now = now();
    let of_day = now % 86_400;
    format!("{} {:02}:{:02}:{:02} UTC", date(now), of_day / 3600, of_day / 60 % 60, of_day % 60)
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// The day of `seconds` since 1970 as `2025-01-31` (days to civil date after Howard Hinnant's derivation: years that
/// start in March put the leap day last).
fn date(seconds: u64) -> String {
    let days = seconds / 86_400 + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_named_by_the_calendar() {
        for (seconds, day) in [
            (0, "1970-01-01"),
            (951_782_400, "2000-02-29"),
            (951_868_800, "2000-03-01"),
            (1_735_689_599, "2024-12-31"),
            (1_735_689_600, "2025-01-01"),
        ] {
            assert_eq!(date(seconds), day);
        }
        assert!(machine().contains("core"));
        assert!(moment().starts_with("20") && moment().ends_with(" UTC"));
    }
}
