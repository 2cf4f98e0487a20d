//! Aligned models: the same function, in a basis in which adjacent layers agree better.

use minicache_models::align::{self, AlignOptions};
use minicache_models::{Model, WeightSource};

use super::*;

/// Mean cosine of adjacent layers' values, all heads of a token together.
fn value_cosine(golden: &Golden) -> f64 {
    let mut cache = golden.full(StoreType::F32);
    golden.step(&golden.tokens, &mut cache);
    let shape = *golden.decoder.shape();
    let values: Vec<_> = (0..shape.layers).map(|l| cache.restored(l).unwrap().values).collect();
    let mut cosines = Vec::new();
    for pair in values.windows(2) {
        for (a, b) in pair[0].chunks_exact(shape.kv_dim()).zip(pair[1].chunks_exact(shape.kv_dim())) {
            let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| f64::from(x * y)).sum::<f64>();
            cosines.push(dot(a, b) / (dot(a, a) * dot(b, b)).sqrt());
        }
    }
    cosines.iter().sum::<f64>() / cosines.len() as f64
}

#[test]
fn aligned_models_are_the_same_function() {
    for name in MODELS {
        let mut golden = golden(name);
        let before = value_cosine(&golden);
        let options = LoadOptions::default();
        let folder = fixture(name);
        let model = Model::from_path(&folder, name, &options).unwrap();
        let alignment = |level| model.alignment(golden.tokens.chunks(24), AlignOptions { level }).unwrap();
        let turned = Model::load_aligned(folder.to_str().unwrap(), &options, &alignment(0.0)).unwrap();
        let alignment = alignment(0.5);
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("aligned");
        align::save(&model, &alignment, &out).unwrap();

        let in_memory = Model::load_aligned(folder.to_str().unwrap(), &options, &alignment).unwrap();
        let written = Model::from_path(&out, name, &options).unwrap();
        assert_ne!(in_memory.fingerprint, model.fingerprint);
        for aligned in [turned, in_memory, written] {
            golden.decoder = aligned.decoder;
            let mut sequence = golden.sequence();
            golden.check_logits(name, 0, &golden.step(&golden.tokens, &mut sequence));
            let after = value_cosine(&golden);
            assert!(after > before + 0.1, "{name}: cosine {before} before, {after} after");
        }
    }
}

#[test]
fn a_folder_in_use_is_refused() {
    let golden = golden("llama3");
    let model = Model::from_path(&fixture("llama3"), "llama3", &LoadOptions::default()).unwrap();
    let alignment = model.alignment([&golden.tokens[..]].into_iter(), AlignOptions::default()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("model.safetensors"), "precious").unwrap();
    let error = align::save(&model, &alignment, dir.path()).unwrap_err().to_string();
    assert!(error.ends_with("is not empty; give a new folder for the aligned model"), "{error}");
    let nothing =
        model.alignment([&golden.tokens[..3]].into_iter(), AlignOptions::default()).unwrap_err().to_string();
    assert_eq!(nothing, "the text has no chunk of more than 4 tokens to align on");
}

/// Between the projection and RoPE stands a norm, which a factor does not pass through.
#[test]
fn factors_of_keys_go_into_the_norms_of_heads() {
    let golden = golden("qwen3");
    let folder = fixture("qwen3");
    let model = Model::from_path(&folder, "qwen3", &LoadOptions::default()).unwrap();
    let alignment = model.alignment(golden.tokens.chunks(24), AlignOptions::default()).unwrap();
    let source = Safetensors::open(&folder).unwrap();
    let aligned = align::Aligned::new(&source, &model.config, &alignment);
    for layer in 0..4 {
        let factors = |side: &str| -> Vec<f32> {
            let name = format!("model.layers.{layer}.self_attn.{side}_norm.weight");
            let [own, folded] = [&source as &dyn WeightSource, &aligned]
                .map(|source| source.dense(&name, &[24]).unwrap().to_vec1::<f32>().unwrap());
            folded.iter().zip(&own).map(|(folded, own)| folded / own).collect()
        };
        let (queries, keys) = (factors("q"), factors("k"));
        assert!(keys.iter().any(|factor| (factor - 1.0).abs() > 0.1), "{keys:?}");
        for j in 0..12 {
            // Both numbers of a frequency by the same, and nothing in the score.
            assert!((keys[j] / keys[j + 12] - 1.0).abs() < 1e-5, "{keys:?}");
            assert!((queries[j] * keys[j] - 1.0).abs() < 1e-5, "{queries:?} {keys:?}");
        }
    }
}

/// What transformers wants to know is in the folder, under the names of the family.
#[test]
fn aligned_gguf_files_are_folders_of_their_family() {
    for name in ["llama3", "phi3", "mixtral", "qwen2", "qwen3"] {
        let mut golden = golden(name);
        let options = LoadOptions::default();
        let file = fixture("gguf").join(format!("{name}.f32.gguf"));
        let model = Model::from_path(&file, name, &options).unwrap();
        let alignment = model.alignment(golden.tokens.chunks(24), AlignOptions::default()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("aligned");
        align::save(&model, &alignment, &out).unwrap();
        let config = std::fs::read_to_string(out.join("config.json")).unwrap();
        let config: serde_json::Value = serde_json::from_str(&config).unwrap();
        let class = config["architectures"][0].as_str().unwrap().to_lowercase();
        assert_eq!(class, format!("{}forcausallm", model.config.family.name()));
        golden.decoder = Model::from_path(&out, name, &options).unwrap().decoder;
        let mut sequence = golden.sequence();
        golden.check_logits(name, 0, &golden.step(&golden.tokens, &mut sequence));
    }
}
