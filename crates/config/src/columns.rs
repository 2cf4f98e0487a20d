//! The columns of `cells.csv`, in one table: what each holds, its name and unit for readers, and whether less is more.
//!
//! Swept keys of caches and models are names of cells; a column that ends in a unit is what its ending says. Any other
//! column that is not listed is a result of the model (a task's metric), and is shown under its own name.

/// What kind of thing a column of `cells.csv` holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// What the cell is: its model, task, cache or a swept value.
    Name,
    /// Tells the rows of one cell apart, or places them on an axis: a layer pair, a batch size.
    Place,
    /// Of use to programs only.
    Internal,
    /// A time or a rate: of the machine and the moment.
    Timing,
    /// Counted, or said in words.
    Count,
    /// Computed by the model.
    Metric,
}

use Role::{Count, Internal, Metric, Name, Place, Timing};

/// A column for readers.
#[derive(Debug, Clone, PartialEq)]
pub struct Meaning {
    /// Name, such as `KL from the full cache`.
    pub label: String,
    /// Unit, such as `nats`; empty for plain numbers.
    pub unit: String,
}

impl Meaning {
    /// Label with the unit in brackets.
    pub fn with_unit(&self) -> String {
        if self.unit.is_empty() { self.label.clone() } else { format!("{} ({})", self.label, self.unit) }
    }
}

/// A listed column: its name, what it holds, label and unit (no label: its name, with spaces).
type Column = (&'static str, Role, &'static str, &'static str);

const COLUMNS: &[Column] = &[
    ("model", Name, "", ""),
    ("task", Name, "", ""),
    ("variant", Name, "cache", ""),
    ("cache.start_layer", Name, "start layer", ""),
    ("cache.t", Name, "interpolation parameter t", ""),
    ("cache.retention.gamma", Name, "retention threshold γ", ""),
    ("cache.quant.bits", Name, "bits", ""),
    ("cache.quant.group", Name, "group size", ""),
    ("cache.quant.residual", Name, "residual window", "tokens"),
    ("cache.calibration.tokens", Name, "calibration text", "tokens"),
    ("model.align.tokens", Name, "calibration text", "tokens"),
    ("model.align.level", Name, "energies of values brought together", ""),
    ("pair", Place, "layer pair, by its first layer", ""),
    ("side", Place, "", ""),
    ("position", Place, "token position", "tokens"),
    ("batch", Place, "batch size", "sequences"),
    ("context", Place, "context length", "tokens"),
    ("length", Place, "context length", "tokens"),
    ("step", Place, "", ""),
    ("layer", Place, "", ""),
    ("method", Place, "", ""),
    ("bits", Place, "", ""),
    ("pair_index", Place, "layer pair, counted from the input", ""),
    ("depth", Place, "relative depth of the layer pair", ""),
    ("merged_layers", Place, "merged layers", ""),
    ("merged_share", Place, "share of layers merged", ""),
    ("cache", Internal, "", ""),
    ("cell", Internal, "", ""),
    ("key", Internal, "", ""),
    ("hash", Internal, "", ""),
    ("settings", Internal, "", ""),
    ("seconds", Timing, "time", "s"),
    ("ms", Timing, "time", "ms"),
    ("tokens_per_s", Timing, "throughput", "tokens/s"),
    ("decode_tokens_per_s", Timing, "decode speed", "tokens/s"),
    ("prefill_tokens_per_s", Timing, "prefill speed", "tokens/s"),
    ("samples", Count, "", ""),
    ("tokens", Count, "", ""),
    ("loops", Count, "texts that ended in a loop", ""),
    ("ratio", Count, "compression ratio", "FP16 bytes / stored bytes"),
    ("nominal_ratio", Count, "ratio by arithmetic", ""),
    ("arithmetic", Count, "", ""),
    ("bytes", Count, "cache size", ""),
    ("full_bytes", Count, "full FP16 cache", ""),
    ("peak_bytes", Count, "peak memory", ""),
    ("memory_bytes", Count, "memory with weights", ""),
    ("joined", Count, "requests that joined", ""),
    ("fits", Count, "", ""),
    ("token_cosine", Metric, "cosine of adjacent layers, per token", ""),
    ("head_cosine", Metric, "cosine of adjacent layers, per KV head", ""),
    ("hidden_cosine", Metric, "cosine of hidden states", ""),
    ("cka", Metric, "linear CKA of adjacent layers", ""),
    ("kl", Metric, "KL from the full cache", "nats"),
    ("perplexity", Metric, "", ""),
    ("perplexity_full", Metric, "perplexity, full cache", ""),
    ("agreement", Metric, "top-1 agreement with the full cache", ""),
    ("score", Metric, "", ""),
    ("diff", Metric, "difference from the full cache", ""),
    ("em", Metric, "exact match", ""),
    ("f1", Metric, "F1", ""),
    ("acc", Metric, "accuracy", ""),
    ("acc_norm", Metric, "accuracy, length-normalised", ""),
];

/// Endings that say what a column holds, with its unit.
const ENDINGS: &[(&str, Role, &str)] = &[
    ("_tokens_per_s", Timing, "tokens/s"),
    ("_per_s", Timing, "1/s"),
    ("_gb_s", Timing, "GB/s"),
    ("_seconds", Timing, "s"),
    ("_ms", Timing, "ms"),
    ("_us", Timing, "µs"),
    ("_bytes", Count, ""),
];

/// Columns in which less is more, besides times and bytes.
const LESS_IS_MORE: &[&str] = &["kl", "perplexity", "loss"];

fn listed(name: &str) -> Option<&'static Column> {
    COLUMNS.iter().find(|c| c.0 == name)
}

/// Whether the column is in the table, by its name or by its ending.
pub fn is_known(name: &str) -> bool {
    let name = spread_of(name).unwrap_or(name);
    is_name(name) || listed(name).is_some() || ENDINGS.iter().any(|e| name.ends_with(e.0))
}

/// What the column `name` holds. Timings differ from run to run; all else is the same whenever a run is repeated with the
/// same instructions.
pub fn role(name: &str) -> Role {
    if is_name(name) {
        return Name;
    }
    let ending = || ENDINGS.iter().find(|e| name.ends_with(e.0)).map(|e| e.1);
    listed(name).map(|c| c.1).or_else(ending).unwrap_or(Metric)
}

/// Whether the column says what the cell is.
pub fn is_name(name: &str) -> bool {
    name.starts_with("cache.") || name.starts_with("model.") || listed(name).is_some_and(|c| c.1 == Name)
}

/// Whether the column names what was run rather than what came out.
pub fn is_key(name: &str) -> bool {
    matches!(role(name), Name | Place)
}

/// Whether the column is for programs only.
pub fn is_internal(name: &str) -> bool {
    role(name) == Internal
}

/// Whether the column is a result for readers: not a key, a bound or a spread of another one, nor what is counted or
/// timed of every cell alike.
pub fn is_metric(name: &str) -> bool {
    let of_every_cell = name == "seconds" || listed(name).is_some_and(|c| c.1 == Count && !is_measured(name));
    !is_key(name) && !is_internal(name) && !of_every_cell && spread_of(name).is_none()
}

/// Bytes that an experiment is about, beside those of each cell's cache.
fn is_measured(name: &str) -> bool {
    name.ends_with("_bytes")
}

/// For `x_lo`, `x_hi` and `x_std`: `x`.
pub fn spread_of(name: &str) -> Option<&str> {
    ["_lo", "_hi", "_std"].iter().find_map(|suffix| name.strip_suffix(suffix))
}

/// Whether the numbers of the column are bytes, shown with a binary unit.
pub fn is_bytes(name: &str) -> bool {
    name == "bytes" || name.ends_with("_bytes")
}

/// Whether less is more in this column.
pub fn lower_is_better(name: &str) -> bool {
    let time = || role(name) == Timing && !name.ends_with("_s");
    LESS_IS_MORE.contains(&name) || is_bytes(name) || time()
}

/// The column for readers.
pub fn meaning(name: &str) -> Meaning {
    match listed(name) {
        Some((_, _, label, unit)) if !label.is_empty() => {
            Meaning { label: (*label).into(), unit: (*unit).into() }
        }
        _ => guess(name),
    }
}

/// Names with a unit at their end, and dotted keys.
fn guess(name: &str) -> Meaning {
    let plain = name.strip_prefix("cache.").unwrap_or(name);
    let found = ENDINGS.iter().find_map(|e| plain.strip_suffix(e.0).map(|stem| (stem, e.2)));
    let (stem, unit) = found.unwrap_or((plain, ""));
    Meaning { label: stem.replace(['_', '.'], " "), unit: unit.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_for_readers() {
        assert_eq!(meaning("kl").with_unit(), "KL from the full cache (nats)");
        assert_eq!(meaning("attend_ms").with_unit(), "attend (ms)");
        assert_eq!(meaning("cache.k.rank").with_unit(), "k rank");
        assert_eq!(meaning("something_new").with_unit(), "something new");
        assert_eq!(meaning("side").with_unit(), "side");
    }

    #[test]
    fn kinds_of_columns() {
        assert!(is_key("cache.k.rank") && is_key("pair") && !is_key("cka"));
        assert!(is_metric("cka") && !is_metric("cka_std") && !is_metric("ratio") && !is_metric("cache"));
        assert!(is_metric("peak_bytes") && is_metric("tokens_per_s") && !is_metric("bytes"));
        assert_eq!(spread_of("exact_match_hi"), Some("exact_match"));
        assert!(is_bytes("peak_bytes") && !is_bytes("bytes_per_token"));
        for (role, columns) in [
            (Name, ["model", "cache.k.rate"]),
            (Place, ["side", "step"]),
            (Internal, ["key", "cache"]),
            (Timing, ["seconds", "decode_tokens_per_s"]),
            (Count, ["arithmetic", "states_bytes"]),
            (Metric, ["exact_match,strict-match", "kl_std"]),
        ] {
            assert_eq!(columns.map(super::role), [role; 2]);
        }
        assert!(lower_is_better("kl") && lower_is_better("ms") && lower_is_better("attend_us"));
        assert!(lower_is_better("peak_bytes") && lower_is_better("step_seconds"));
        assert!(
            !lower_is_better("tokens_per_s") && !lower_is_better("score") && !lower_is_better("read_gb_s")
        );
    }
}
