//! What the columns of `cells.csv` mean: what kind of thing each holds, and its name and unit for readers. A column that
//! is not listed is a result of the model, and is shown under its own name.

/// What kind of thing a column of `cells.csv` holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// What the cell is: its model, task, cache or a swept value.
    Name,
    /// Tells the rows of one cell apart: a layer pair, a batch size.
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

/// A column for readers.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Meaning {
    /// Name, such as `KL from the full cache`.
    pub(crate) label: String,
    /// Unit, such as `nats`; empty for plain numbers.
    pub(crate) unit: String,
}

impl Meaning {
    /// Label with the unit in brackets.
    pub(crate) fn with_unit(&self) -> String {
        if self.unit.is_empty() { self.label.clone() } else { format!("{} ({})", self.label, self.unit) }
    }
}

/// What every cell is named by; swept values stand beside it.
const NAMES: &[&str] = &["model", "task", "variant"];

/// Names that tell rows apart although they stand after the `cache` column.
const PLACES: &[&str] = &[
    "pair",
    "side",
    "position",
    "batch",
    "context",
    "step",
    "layer",
    "method",
    "bits",
    "length",
    "pair_index",
    "depth",
    "merged_layers",
    "merged_share",
];

/// What is counted about a run rather than measured of the model.
const COUNTS: &[&str] = &[
    "samples",
    "tokens",
    "loops",
    "ratio",
    "nominal_ratio",
    "arithmetic",
    "bytes",
    "joined",
    "fits",
    "seconds",
];

/// Columns of use to programs only.
const INTERNAL: &[&str] = &["cache", "cell", "key", "hash", "settings"];

/// What the column `name` holds.
pub fn role(name: &str) -> Role {
    if is_name(name) {
        Role::Name
    } else if PLACES.contains(&name) {
        Role::Place
    } else if is_internal(name) {
        Role::Internal
    } else if is_timing(name) {
        Role::Timing
    } else if COUNTS.contains(&name) || is_bytes(name) {
        Role::Count
    } else {
        Role::Metric
    }
}

/// Whether the column says what the cell is.
pub(crate) fn is_name(name: &str) -> bool {
    NAMES.contains(&name) || name.starts_with("cache.") || name.starts_with("model.")
}

/// Whether the column names what was run rather than what came out.
pub(crate) fn is_key(name: &str) -> bool {
    is_name(name) || PLACES.contains(&name)
}

/// Whether the column depends on the machine and the moment. All others are the same whenever a run is repeated with
/// the same instructions.
fn is_timing(name: &str) -> bool {
    ["seconds", "ms"].contains(&name)
        || ["_seconds", "_ms", "_us", "_per_s", "_gb_s"].iter().any(|suffix| name.ends_with(suffix))
}

/// Whether the column is for programs only.
pub(crate) fn is_internal(name: &str) -> bool {
    INTERNAL.contains(&name)
}

/// Whether the column is a result of the model: not a key, a count, a bound or a spread of another one.
pub(crate) fn is_metric(name: &str) -> bool {
    !is_key(name) && !is_internal(name) && !COUNTS.contains(&name) && spread_of(name).is_none()
}

/// For `x_lo`, `x_hi` and `x_std`: `x`.
pub fn spread_of(name: &str) -> Option<&str> {
    ["_lo", "_hi", "_std"].iter().find_map(|suffix| name.strip_suffix(suffix))
}

/// Whether the numbers of the column are bytes, shown with a binary unit.
pub(crate) fn is_bytes(name: &str) -> bool {
    name == "bytes" || name.ends_with("_bytes")
}

/// Whether less is more in this column.
pub(crate) fn lower_is_better(name: &str) -> bool {
    ["kl", "perplexity", "seconds", "ms", "bytes", "loss"].contains(&name)
        || ["_bytes", "_ms", "_us", "_seconds"].iter().any(|s| name.ends_with(s))
}

/// The column for readers.
pub(crate) fn meaning(name: &str) -> Meaning {
    let (label, unit) = match name {
        "variant" => ("cache", ""),
        "pair" => ("layer pair, by its first layer", ""),
        "pair_index" => ("layer pair, counted from the input", ""),
        "depth" => ("relative depth of the layer pair", ""),
        "merged_layers" => ("merged layers", ""),
        "merged_share" => ("share of layers merged", ""),
        "position" => ("token position", "tokens"),
        "token_cosine" => ("cosine of adjacent layers, per token", ""),
        "head_cosine" => ("cosine of adjacent layers, per KV head", ""),
        "hidden_cosine" => ("cosine of hidden states", ""),
        "cka" => ("linear CKA of adjacent layers", ""),
        "kl" => ("KL from the full cache", "nats"),
        "perplexity_full" => ("perplexity, full cache", ""),
        "agreement" => ("top-1 agreement with the full cache", ""),
        "ratio" => ("compression ratio", "FP16 bytes / stored bytes"),
        "nominal_ratio" => ("ratio by arithmetic", ""),
        "bytes" => ("cache size", ""),
        "full_bytes" => ("full FP16 cache", ""),
        "peak_bytes" => ("peak memory", ""),
        "seconds" => ("time", "s"),
        "memory_bytes" => ("memory with weights", ""),
        "diff" => ("difference from the full cache", ""),
        "loops" => ("texts that ended in a loop", ""),
        "joined" => ("requests that joined", ""),
        "ms" => ("time", "ms"),
        "tokens_per_s" => ("throughput", "tokens/s"),
        "decode_tokens_per_s" => ("decode speed", "tokens/s"),
        "prefill_tokens_per_s" => ("prefill speed", "tokens/s"),
        "batch" => ("batch size", "sequences"),
        "context" | "length" => ("context length", "tokens"),
        "em" => ("exact match", ""),
        "f1" => ("F1", ""),
        "acc" => ("accuracy", ""),
        "acc_norm" => ("accuracy, length-normalised", ""),
        "cache.start_layer" => ("start layer", ""),
        "cache.t" => ("interpolation parameter t", ""),
        "cache.retention.gamma" => ("retention threshold γ", ""),
        "cache.quant.bits" => ("bits", ""),
        "cache.quant.group" => ("group size", ""),
        "cache.quant.residual" => ("residual window", "tokens"),
        "cache.calibration.tokens" | "model.align.tokens" => ("calibration text", "tokens"),
        _ => return guess(name),
    };
    Meaning { label: label.into(), unit: unit.into() }
}

/// Names with a unit at their end, and dotted keys.
fn guess(name: &str) -> Meaning {
    let plain = name.strip_prefix("cache.").unwrap_or(name);
    let units = [
        ("_tokens_per_s", "tokens/s"),
        ("_per_s", "1/s"),
        ("_gb_s", "GB/s"),
        ("_seconds", "s"),
        ("_ms", "ms"),
        ("_us", "µs"),
        ("_bytes", ""),
    ];
    let found = units.iter().find_map(|(suffix, unit)| plain.strip_suffix(suffix).map(|p| (p, *unit)));
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
    }

    #[test]
    fn kinds_of_columns() {
        assert!(is_key("cache.k.rank") && is_key("pair") && !is_key("cka"));
        assert!(is_metric("cka") && !is_metric("cka_std") && !is_metric("ratio") && !is_metric("cache"));
        assert_eq!(spread_of("exact_match_hi"), Some("exact_match"));
        assert!(is_bytes("peak_bytes") && !is_bytes("bytes_per_token"));
        for (role, columns) in [
            (Role::Name, ["model", "cache.k.rate"]),
            (Role::Place, ["side", "step"]),
            (Role::Internal, ["key", "cache"]),
            (Role::Timing, ["seconds", "decode_tokens_per_s"]),
            (Role::Count, ["arithmetic", "states_bytes"]),
            (Role::Metric, ["exact_match,strict-match", "kl_std"]),
        ] {
            assert_eq!(columns.map(super::role), [role; 2]);
        }
    }
}
