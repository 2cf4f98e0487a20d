//! The binary, end to end, on a tiny model with random weights.
#![allow(clippy::unwrap_used)]

#[path = "cli/accuracy.rs"]
mod accuracy;
#[path = "cli/bench.rs"]
mod bench;
#[path = "cli/bounds.rs"]
mod bounds;
#[path = "cli/calibration.rs"]
mod calibration;
#[path = "cli/choices.rs"]
mod choices;
#[path = "cli/compare.rs"]
mod compare;
#[path = "cli/costs.rs"]
mod costs;
#[path = "cli/device.rs"]
mod device;
#[path = "cli/disturbed.rs"]
mod disturbed;
#[path = "cli/experiments.rs"]
mod experiments;
#[path = "cli/footprint.rs"]
mod footprint;
#[path = "cli/generate.rs"]
mod generate;
#[path = "cli/golden.rs"]
mod golden;
#[path = "cli/killed.rs"]
mod killed;
#[path = "cli/logits.rs"]
mod logits;
#[path = "cli/merge.rs"]
mod merge;
#[path = "cli/mistakes.rs"]
mod mistakes;
#[path = "cli/model_files.rs"]
mod model_files;
#[path = "cli/place.rs"]
mod place;
#[path = "cli/prompts.rs"]
mod prompts;
#[path = "cli/room.rs"]
mod room;
#[path = "cli/runs.rs"]
mod runs;
#[path = "cli/same_numbers.rs"]
mod same_numbers;
#[path = "cli/saved_caches.rs"]
mod saved_caches;
#[path = "cli/shared.rs"]
mod shared;

use place::{EXPERIMENT, Place, text, untimed, walk};
