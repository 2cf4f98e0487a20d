//! Made-up results to report.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use minicache_config::{Experiment, ModelInfo, RunInfo};

pub(crate) const SIMILARITY: &str = r#"
id = "fig1a"
place = 10
title = "Similarity of adjacent layers"
kind = "similarity"
models = ["tiny"]
tasks = ["coqa", "gsm8k"]
notes = "What adjacent layers share."
[[paper]]
csv = "paper_figure_similarity_llama3_70b.csv"
claim = "Deep layers are alike."
[[claims]]
text = "Deep layers are alike"
paper = "0.77 to 0.90"
needs = { rule = "similar", least = 0.67 }
[[plots]]
name = "cosine"
x = "depth"
y = "token_cosine"
series = ["task"]
band = "token_cosine_std"
filter = { side = "key|value" }
paper_x = "depth"
paper_y = ["coqa", "gsm8k"]
[[plots]]
name = "absent"
x = "pair"
y = "no_such_column"
"#;

pub(crate) const SWEEP: &str = r#"
id = "fig1b"
place = 20
title = "Merged layers"
kind = "accuracy"
models = ["tiny"]
tasks = ["gsm8k"]
variants = [{ name = "full", cache = { method = "full" } }, { cache = { method = "minicache" } }, { cache = { method = "mean" } }]
[[claims]]
text = "half of the layers"
paper = "no loss"
needs = { rule = "kept", which = { variant = "minicache", at = { merged_share = 0.5 } }, within = 0.05 }
[[claims]]
text = "ahead of the mean"
paper = "0.81 against 0.55"
needs = { rule = "ahead", which = { variant = "minicache", at = { merged_share = 0.5 } }, of = [{ variant = "mean", at = { merged_share = 0.5 } }] }
[[plots]]
name = "merged"
x = "merged_layers"
y = "score"
series = ["variant"]
[[plots]]
name = "bars"
kind = "bar"
x = "task"
y = "score"
series = ["variant"]
"#;

pub(crate) const FIDELITY: &str = r#"
id = "fidelity"
place = 30
kind = "fidelity"
models = ["tiny"]
tasks = ["text"]
[[plots]]
name = "frontier"
kind = "scatter"
x = "ratio"
y = "kl"
series = ["variant"]
log_y = true
"#;

pub(crate) fn info(toml: &str, planned: usize, finished: bool) -> RunInfo {
    let model = ModelInfo { label: "Tiny-8".into(), layers: Some(8), ..ModelInfo::default() };
    RunInfo {
        command: "minicache run experiments/x.toml".into(),
        experiment: Experiment::from_toml(toml, &[], None).unwrap(),
        origins: [("gsm8k".to_string(), "bundled sample".to_string())].into_iter().collect(),
        models: [("tiny".to_string(), model)].into_iter().collect(),
        chosen: indexmap::IndexMap::new(),
        calibrations: indexmap::IndexMap::new(),
        machine: "2 cores".into(),
        device: String::new(),
        simd: "avx2".into(),
        date: "2025-01-31".into(),
        planned,
        keys: Vec::new(),
        finished,
    }
}

/// A results folder with one experiment.
pub(crate) fn experiment(root: &Path, toml: &str, csv: &str, planned: usize, finished: bool) -> PathBuf {
    let info = info(toml, planned, finished);
    let dir = root.join(&info.experiment.id);
    fs::create_dir_all(&dir).unwrap();
    info.write(&dir).unwrap();
    fs::write(dir.join("cells.csv"), csv).unwrap();
    dir
}

pub(crate) fn similarity_rows(cosine: f64) -> String {
    let mut csv =
        "model,task,variant,cache,pair,side,token_cosine,token_cosine_std,cka,samples,seconds\n".to_string();
    for task in ["coqa", "gsm8k"] {
        for pair in 0..7 {
            for side in ["key", "value", "hidden"] {
                let y = cosine + f64::from(pair) * 0.001;
                writeln!(
                    csv,
                    "tiny,{task},full,\"{{\"\"method\"\":\"\"full\"\"}}\",{pair},{side},{y},0.02,0.7,24,1.5"
                )
                .unwrap();
            }
        }
    }
    csv
}

pub(crate) const SWEEP_ROWS: &str = r#"model,task,variant,cache.start_layer,cache,score,score_lo,score_hi,samples,ratio,bytes,seconds
tiny,gsm8k,full,,"{""method"":""full""}",0.40,0.30,0.50,24,1,4096,2
tiny,gsm8k,minicache,4,"{""method"":""minicache"",""start_layer"":4}",0.39,0.29,0.49,24,1.3,3150,2
tiny,gsm8k,minicache,6,"{""method"":""minicache"",""start_layer"":6}",0.40,0.30,0.50,24,1.1,3700,2
tiny,gsm8k,mean,4,"{""method"":""mean"",""start_layer"":4}",0.20,0.12,0.30,24,1.33,3072,2
tiny,gsm8k,mean,6,"{""method"":""mean"",""start_layer"":6}",0.30,0.20,0.40,24,1.14,3600,2
"#;

pub(crate) const FIDELITY_ROWS: &str = r#"model,task,variant,cache,kl,perplexity,samples,ratio,bytes,seconds
tiny,text,full,"{""method"":""full""}",0,12,8,1,9000,2
tiny,text,kivi-2,"{""method"":""kivi""}",0.2,14,8,5.3,1700,2
tiny,text,latent-4,"{""method"":""latent""}",0.03,12.2,8,6.4,1400,2
"#;

pub(crate) fn paper() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../experiments/paper")
}

pub(crate) fn text(dir: &Path, name: &str) -> String {
    fs::read_to_string(dir.join(name)).unwrap()
}
