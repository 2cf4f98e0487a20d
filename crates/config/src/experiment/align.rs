//! How the layers of a model are aligned.

use minicache_core::settings::bounds::check_unit;
use minicache_core::settings::{Calibration, Checked};
use serde::{Deserialize, Serialize};

/// How far the energies of values are brought together unless said otherwise.
pub const ALIGN_LEVEL: f64 = 0.5;

/// How a model's adjacent layers are aligned: the keys of a calibration, and `level` beside them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(from = "Written", into = "Written")]
pub struct Align {
    /// Text that the maps are chosen on.
    pub text: Calibration,
    /// How far the energies of two layers' matched directions of values are brought together, 0 (not at all) to 1
    /// (wholly). `rank_one` loses less without.
    pub level: f64,
}

impl Align {
    /// Checks the numbers.
    ///
    /// # Errors
    /// Names the key below `align` and what is allowed.
    pub fn validate(&self) -> Checked {
        self.text.validate()?;
        check_unit("level", self.level)
    }
}

/// As it is written. Alignments of the usual level are written without it, as they were before there was another.
#[derive(Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Written {
    task: String,
    file: Option<String>,
    tokens: usize,
    chunk: usize,
    #[serde(skip_serializing_if = "is_usual")]
    level: f64,
}

fn is_usual(level: &f64) -> bool {
    *level == ALIGN_LEVEL
}

impl Default for Written {
    fn default() -> Self {
        Align { text: Calibration::default(), level: ALIGN_LEVEL }.into()
    }
}

impl From<Written> for Align {
    fn from(Written { task, file, tokens, chunk, level }: Written) -> Self {
        Self { text: Calibration { task, file, tokens, chunk }, level }
    }
}

impl From<Align> for Written {
    fn from(Align { text: Calibration { task, file, tokens, chunk }, level }: Align) -> Self {
        Self { task, file, tokens, chunk, level }
    }
}
