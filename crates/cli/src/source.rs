//! Which model, which weights, which tokens: options of the commands that run a model.

use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use minicache_config::WeightMode;
use minicache_core::settings::Calibration;
use minicache_core::{CacheSpec, Latent};
use minicache_eval::run::Corpus;
use minicache_models::{LoadOptions, Model};

use crate::failure::{OrUsage, usage};
use crate::global::Global;

/// A model to load.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ModelArgs {
    /// The model: a name of `minicache models`, a folder with config.json and safetensors, a .gguf file or a hub id.
    #[arg(long, value_name = "M")]
    pub(crate) model: String,
    /// Form of the weights: auto (the fastest), f32 (dequantised) or quantized (as stored).
    #[arg(long, value_name = "FORM", value_parser = weight_mode)]
    weights: Option<WeightMode>,
    /// The same as KEY=VALUE, as experiment files have it: `weights=f32`.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

fn weight_mode(text: &str) -> std::result::Result<WeightMode, String> {
    match text {
        "auto" => Ok(WeightMode::Auto),
        "f32" => Ok(WeightMode::F32),
        "quantized" => Ok(WeightMode::Quantized),
        _ => Err("must be auto, f32 or quantized".to_string()),
    }
}

impl ModelArgs {
    /// Loads the model, with weights in the form asked for or else in `default`.
    pub(crate) fn load(&self, global: &Global, default: WeightMode) -> Result<Model> {
        let mut weights = self.weights.unwrap_or(default);
        for setting in &self.set {
            match setting.split_once('=') {
                Some(("weights" | "settings.weights", value)) => {
                    weights = weight_mode(value.trim_matches('"')).or_usage("--set weights")?;
                }
                _ => {
                    let message = "only `weights` can be set here; settings of a cache go into --cache";
                    return Err(usage(format!("--set {setting}: {message}")));
                }
            }
        }
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            if let Ok(style) = ProgressStyle::with_template("loading {prefix} [{bar:30}] {percent:>3} %") {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.set_prefix(self.model.clone());
            bar
        });
        let progress = bar.clone().map(|bar| -> minicache_models::Progress {
            Arc::new(move |done, total| {
                bar.set_length(total as u64);
                bar.set_position(done as u64);
            })
        });
        let start = Instant::now();
        let options = LoadOptions { weights, devices: global.devices()?, dtype: None, progress };
        let model = Model::load(&self.model, &options);
        match &bar {
            Some(bar) => bar.finish_and_clear(),
            None if model.is_ok() && start.elapsed().as_secs() >= 5 => {
                eprintln!("loaded {} in {:.0} s", self.model, start.elapsed().as_secs_f64());
            }
            None => {}
        }
        Ok(model?)
    }
}

/// The tokens that a model is run on.
#[derive(Debug, Clone, clap::Args)]
#[group(required = true, multiple = false)]
pub(crate) struct TokensArgs {
    /// A text file, or - for stdin; the model's tokenizer adds the special tokens that the model expects around a text.
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
    /// Token ids, separated by spaces or commas.
    #[arg(long, value_name = "IDS")]
    tokens: Option<String>,
}

impl TokensArgs {
    /// Looks at what can be looked at before the model is loaded.
    pub(crate) fn check(&self) -> Result<()> {
        match (&self.prompt_file, &self.tokens) {
            // What stdin has can be read only once.
            (Some(path), _) if path == Path::new("-") => Ok(()),
            (Some(path), _) => read_text(path).map(|_| ()),
            (_, Some(text)) => ids(text).map(|_| ()),
            _ => Ok(()),
        }
    }

    /// The tokens, at least one.
    pub(crate) fn read(&self, model: &Model) -> Result<Vec<u32>> {
        let tokens = match (&self.prompt_file, &self.tokens) {
            (Some(path), _) => model.need_tokenizer()?.encode(&read_text(path)?, true)?,
            (_, Some(text)) => ids(text)?,
            _ => Vec::new(),
        };
        if tokens.is_empty() {
            return Err(usage("no tokens: the prompt is empty"));
        }
        Ok(tokens)
    }
}

/// Reads a prompt; `-` is stdin. A byte order mark is no part of the text.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    if path != Path::new("-") {
        return minicache_config::read_text(path).or_usage("--prompt-file");
    }
    let mut bytes = Vec::new();
    std::io::stdin().read_to_end(&mut bytes).or_usage("--prompt-file: stdin")?;
    Ok(minicache_config::utf8(&bytes).or_usage("--prompt-file: stdin")?.to_string())
}

fn ids(text: &str) -> Result<Vec<u32>> {
    let parts = text.split(|c: char| c.is_whitespace() || c == ',').filter(|p| !p.is_empty());
    let ids: Vec<u32> = parts
        .map(|p| {
            p.parse()
                .map_err(|_| usage(format!("--tokens: `{p}` is no token id; give numbers such as \"1 2 3\"")))
        })
        .collect::<Result<_>>()?;
    if ids.is_empty() { Err(usage("--tokens: no ids; give numbers such as \"1 2 3\"")) } else { Ok(ids) }
}

/// Calibrates, on the text that each specification names, the latent caches that have no basis file, and chooses what a
/// specification leaves to choice.
pub(crate) fn prepare(model: &Model, specs: &[CacheSpec], global: &Global) -> Result<Vec<CacheSpec>> {
    let data = global.data_source();
    let corpus = Corpus::all(&data);
    calibrate(model, specs, &corpus)?;
    let mut choices = minicache_eval::run::Choices::default();
    let chosen = specs.iter().map(|spec| {
        let chosen = choices.resolve(model, spec, &corpus)?;
        if *spec != chosen {
            let json = minicache_eval::run::cache_json(&chosen, model.decoder.shape().layers);
            eprintln!("chosen for {}: {json}", spec.label());
        }
        Ok(chosen)
    });
    chosen.collect()
}

fn calibrate(model: &Model, specs: &[CacheSpec], corpus: &Corpus<'_>) -> Result<()> {
    let open = specs.iter().find_map(|spec| match spec {
        CacheSpec::Latent(latent) if latent.basis.is_none() && !model.has_basis(latent) => Some(latent),
        _ => None,
    });
    let Some(Latent { calibration, .. }) = open else {
        return Ok(());
    };
    let mend =
        "name some in `calibration`, or give `basis = \"FILE\"`, a file that minicache calibrate wrote";
    let start = Instant::now();
    // A signal ends these commands at once.
    let stop = minicache_eval::run::Stop::default();
    minicache_eval::run::prepare_latents(model, specs.iter(), corpus, &stop).map_err(|e| {
        anyhow::Error::new(e).context(format!("--cache: no text to calibrate latents on; {mend}"))
    })?;
    let Calibration { tokens, .. } = calibration;
    let (text, time) = (calibration.source(), start.elapsed().as_secs_f64());
    eprintln!(
        "latents calibrated on {tokens} tokens of {text} in {time:.0} s; minicache calibrate keeps a basis"
    );
    Ok(())
}

/// Reads `--cache`; the full cache in f32 where it is left out.
pub(crate) fn cache_or_exact(spec: Option<&str>) -> Result<CacheSpec> {
    match spec {
        Some(text) => CacheSpec::parse(text).or_usage("--cache"),
        None => Ok(CacheSpec::default().with_f32()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_numbers() {
        assert_eq!(ids("1 2,3\n4").unwrap(), [1, 2, 3, 4]);
        for bad in ["", " , ", "1 x", "-1", "4294967296"] {
            assert!(ids(bad).unwrap_err().to_string().starts_with("--tokens: "), "{bad}");
        }
    }
}
