//! Input that a forward pass or a load refuses: one clear line each, and nothing changed.

use std::collections::HashMap;

use candle_core::{Device, Tensor};
use minicache_core::KvCache;
use minicache_models::{Decoder, LoadOptions, LogitsFor, ModelConfig, Safetensors, Step};

use crate::reference::ReferenceCache;
use crate::{fixture, golden};

/// Breaks a model's tensors.
type Change<'a> = &'a dyn Fn(&mut HashMap<String, Tensor>);

fn line<T>(result: minicache_models::Result<T>) -> String {
    match result {
        Ok(_) => panic!("expected an error"),
        Err(e) => {
            let text = e.to_string();
            assert!(!text.contains('\n'), "one line: {text}");
            text
        }
    }
}

#[test]
fn steps_that_cannot_be_taken() {
    let golden = golden("llama3");
    let mut cache = golden.cache();
    golden.step(&golden.tokens[..10], &mut cache);
    let long = vec![1; 503];
    let mut other =
        ReferenceCache::new(minicache_core::ModelShape { kv_heads: 4, ..*golden.decoder.shape() });
    for (tokens, planned_len, wanted) in [
        (&[][..], 0, "sequence 0: a step needs at least one token"),
        (&[5, 200], 0, "sequence 0: token 200 is outside of the vocabulary of 200"),
        (&long[..], 0, "sequence 0: 513 tokens exceed the model's context of 512"),
        (&[5], 600, "sequence 0: 600 tokens exceed the model's context of 512"),
    ] {
        let step = Step { tokens, cache: &mut cache, planned_len, logits: LogitsFor::Last };
        assert_eq!(line(golden.decoder.forward(&mut [step])), wanted);
        // A good sequence beside a bad one is not touched either.
        let mut good = golden.cache();
        let mut steps = [
            Step { tokens: &[1, 2], cache: &mut good, planned_len: 0, logits: LogitsFor::Last },
            Step { tokens, cache: &mut cache, planned_len, logits: LogitsFor::Last },
        ];
        assert_eq!(line(golden.decoder.forward(&mut steps)), wanted.replace("sequence 0", "sequence 1"));
        assert_eq!((cache.len(), good.len()), (10, 0));
    }
    let step = Step { tokens: &[1], cache: &mut other, planned_len: 0, logits: LogitsFor::Last };
    let got = line(golden.decoder.forward(&mut [step]));
    assert!(got.contains("the cache is for 4 layers, 4 heads, 4 KV heads of 8, no window"), "{got}");
    assert!(golden.decoder.forward(&mut []).unwrap().is_empty());
    // After all that the sequence goes on as if nothing had happened.
    golden.check_logits("after errors", 10, &golden.step(&golden.tokens[10..20], &mut cache));
}

#[test]
fn models_that_cannot_be_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let config =
        ModelConfig::from_json(&std::fs::read_to_string(fixture("qwen2").join("config.json")).unwrap());
    let config = config.unwrap();
    let good =
        candle_core::safetensors::load(fixture("qwen2").join("model.safetensors"), &Device::Cpu).unwrap();
    let load = |change: Change<'_>| {
        let mut tensors = good.clone();
        change(&mut tensors);
        candle_core::safetensors::save(&tensors, &path).unwrap();
        Decoder::load(&config, &Safetensors::open(dir.path())?, &LoadOptions::default())
    };
    let zeros = |shape: &[usize]| Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu).unwrap();
    // Buffers of old tools are let through.
    load(&|t| {
        t.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), zeros(&[4]));
    })
    .unwrap();
    let starts = format!("weights: {} does not hold a qwen2 model of this configuration; ", path.display());
    let cases: [(Change<'_>, &str); 4] = [
        (
            &|t| _ = t.remove("model.layers.2.self_attn.k_proj.bias"),
            "missing: model.layers.2.self_attn.k_proj.bias",
        ),
        (&|t| _ = t.insert("model.extra".into(), zeros(&[1])), "unexpected: model.extra"),
        (
            &|t| _ = t.insert("model.norm.weight".into(), zeros(&[16])),
            "misshaped: model.norm.weight is [16] where the configuration says [32]",
        ),
        (&|t| t.retain(|name, _| !name.contains("layers.3.")), "and 8 more"),
    ];
    for (change, wanted) in cases {
        let got = line(load(change));
        assert!(got.starts_with(&starts) && got.contains(wanted), "{got}");
    }
    let got = line(load(&|t| {
        let broken = (t["model.layers.1.mlp.up_proj.weight"].clone() * f64::NAN).unwrap();
        t.insert("model.layers.1.mlp.up_proj.weight".into(), broken);
    }));
    let wanted =
        "model.layers.1.mlp.up_proj.weight holds NaN or infinity (number 0 of 3072); the file is broken";
    assert_eq!(got, format!("{}: {wanted}", path.display()));
}
