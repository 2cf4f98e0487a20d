//! Metrics, one file each, as the field computes them: every function names the code whose numbers it gives.

mod bleu;
mod bootstrap;
mod choices;
mod longbench;
mod python;
mod rouge_pypi;
mod rouge_score;
mod segment;
mod sequence_matcher;
mod squad;

pub use bleu::{Tokenize, corpus_bleu};
pub use bootstrap::{Interval, bootstrap_mean, bootstrap_mean_of_means};
pub use choices::{acc, acc_norm, true_mass};
pub use longbench::{classification, code_similarity, count, f1, f1_zh, retrieval, rouge_l, rouge_l_zh};
pub(crate) use python::strip;
pub use rouge_pypi::rouge_l_f;
pub use rouge_score::{Rouge, rouge};
pub use segment::words_zh;
pub use sequence_matcher::{fuzz_ratio, ratio};
pub use squad::{exact_match, f1_score, leave_one_out};
