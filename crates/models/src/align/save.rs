//! An aligned model as a folder that any tool loads.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::Tensor;
use minicache_config::atomic;
use serde_json::{Map, Value, json};

use super::{Aligned, Alignment};
use crate::model::{Source, source};
use crate::save::write_tensors;
use crate::{Error, Family, Model, Result, WeightSource};

/// Bytes of tensors that are collected before they are written as one shard: bounds memory for large models.
const SHARD: usize = 2 << 30;

/// What a model folder may hold besides weights, its configuration and its tokenizer's main file.
const BESIDE: [&str; 9] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
];

/// Writes `model` with `alignment` folded in to the folder `out`, which is made or must be empty: safetensors (in shards
/// where large), `config.json`, and tokenizer and generation defaults where the model has them. Projections of
/// attention and norms of heads are f32, everything else stays in the type it is stored in; the quantised weights of a
/// GGUF file become f32.
///
/// # Errors
/// A folder that is not empty or cannot be written; weights that cannot be read.
pub fn save(model: &Model, alignment: &Alignment, out: &Path) -> Result<()> {
    std::fs::create_dir_all(out).map_err(Error::write(out))?;
    // A run that was killed before it had put anything in its place may have left files on their way.
    atomic::remove_leftovers(out).map_err(Error::write(out))?;
    if std::fs::read_dir(out).map_err(Error::io(out))?.next().is_some() {
        return Err(Error::file(out, "is not empty; give a new folder for the aligned model"));
    }
    let mut source = source(&model.path)?;
    source.tie(&mut model.config.clone())?;
    let aligned = Aligned::new(source.weights(), &model.config, alignment);
    write_weights(&aligned, model, alignment, out)?;
    match &source {
        Source::Folder(_) => {
            for name in BESIDE {
                let (from, to) = (model.path.join(name), out.join(name));
                if from.is_file() {
                    let bytes = std::fs::read(&from).map_err(Error::io(&from))?;
                    atomic::replace(&to, &bytes).map_err(Error::write(&to))?;
                }
            }
            Ok(())
        }
        Source::Gguf(gguf) => {
            let mut config = gguf.hf_config()?;
            if let Value::Object(map) = &mut config {
                describe(map, model.config.family);
            }
            write_json(&out.join("config.json"), &config)?;
            let Some(tokenizer) = &model.tokenizer else { return Ok(()) };
            tokenizer.save(&out.join("tokenizer.json"))?;
            let mut about = Map::new();
            about.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
            for (key, id) in [("bos_token", tokenizer.bos()), ("eos_token", tokenizer.eos())] {
                if let Some(token) = id.and_then(|id| tokenizer.id_to_token(id)) {
                    about.insert(key.into(), json!(token));
                }
            }
            if let Some(template) = gguf.text("tokenizer.chat_template") {
                about.insert("chat_template".into(), json!(template));
            }
            write_json(&out.join("tokenizer_config.json"), &Value::Object(about))
        }
    }
}

/// What transformers wants in a configuration besides what the metadata of a GGUF file says.
fn describe(config: &mut Map<String, Value>, family: &Family) {
    config.insert("architectures".into(), json!([family.class]));
    config.insert("torch_dtype".into(), json!("float32"));
}

fn write_weights(aligned: &Aligned<'_>, model: &Model, alignment: &Alignment, out: &Path) -> Result<()> {
    // Named and put in their places once it is known how many there are.
    let mut shards: Vec<(atomic::Writer, Vec<String>)> = Vec::new();
    let mut pending: Vec<(String, Tensor)> = Vec::new();
    let (mut bytes, mut total) = (0, 0);
    let mut flush = |pending: &mut Vec<(String, Tensor)>| -> Result<()> {
        let about = HashMap::from([
            ("format".to_string(), "pt".to_string()),
            ("aligned".to_string(), format!("{} on {} tokens", model.fingerprint, alignment.tokens)),
        ]);
        let views = pending.iter().map(|(name, tensor)| (name.as_str(), tensor));
        let path = out.join("model.safetensors");
        let mut shard = atomic::Writer::new(&path).map_err(Error::write(&path))?;
        write_tensors(&mut shard, views, Some(about)).map_err(Error::write(&path))?;
        shards.push((shard, pending.drain(..).map(|(name, _)| name).collect()));
        Ok(())
    };
    for (name, shape) in model.config.tensors() {
        let tensor = aligned.stored(&name, &shape)?;
        let size = tensor.elem_count() * tensor.dtype().size_in_bytes();
        if bytes > 0 && bytes + size > SHARD {
            flush(&mut pending)?;
            bytes = 0;
        }
        bytes += size;
        total += size;
        pending.push((name, tensor));
    }
    flush(&mut pending)?;
    let count = shards.len();
    let mut map = BTreeMap::new();
    for (index, (shard, names)) in shards.into_iter().enumerate() {
        let name = match count {
            1 => "model.safetensors".to_string(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
        };
        let path = out.join(&name);
        shard.commit_as(&path).map_err(Error::write(&path))?;
        map.extend(names.into_iter().map(|tensor| (tensor, name.clone())));
    }
    if count > 1 {
        let index = json!({ "metadata": { "total_size": total }, "weight_map": map });
        write_json(&out.join("model.safetensors.index.json"), &index)?;
    }
    Ok(())
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Error::file(path, e.to_string()))?;
    atomic::replace(path, (text + "\n").as_bytes()).map_err(Error::write(path))
}
