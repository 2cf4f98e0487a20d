//! Input that a forward pass or a load refuses: one clear line each, and nothing changed.

use std::collections::HashMap;

use candle_core::{Device, Tensor};
use minicache_core::{Footprint, KvCache, ModelShape, Restored, Sequence, States};
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
    let mut sequence = golden.sequence();
    golden.step(&golden.tokens[..10], &mut sequence);
    let long = vec![1; 503];
    let shape = ModelShape { kv_heads: 4, ..*golden.decoder.shape() };
    let mut other = golden.decoder.sequence(Box::new(ReferenceCache::new(shape)), 0);
    for (tokens, wanted) in [
        (&[][..], "sequence 0: a step needs at least one token"),
        (&[5, 200], "sequence 0: token 200 is outside of the vocabulary of 200"),
        (&long[..], "sequence 0: 513 tokens exceed the model's context of 512"),
    ] {
        let step = Step { tokens, sequence: &mut sequence, logits: LogitsFor::Last };
        assert_eq!(line(golden.decoder.forward(&mut [step])), wanted);
        // A good sequence beside a bad one is not touched either.
        let mut good = golden.sequence();
        let mut steps = [
            Step { tokens: &[1, 2], sequence: &mut good, logits: LogitsFor::Last },
            Step { tokens, sequence: &mut sequence, logits: LogitsFor::Last },
        ];
        assert_eq!(line(golden.decoder.forward(&mut steps)), wanted.replace("sequence 0", "sequence 1"));
        assert_eq!((sequence.len(), good.len()), (10, 0));
    }
    let refused = |sequence: &mut Sequence| {
        let step = Step { tokens: &[1], sequence, logits: LogitsFor::Last };
        line(golden.decoder.forward(&mut [step]))
    };
    let got = refused(&mut other);
    assert!(got.contains("the cache is for 4 layers, 4 heads, 4 KV heads of 8, no window"), "{got}");
    let cache = || Box::new(ReferenceCache::new(*golden.decoder.shape()));
    let got = refused(&mut golden.decoder.sequence(cache(), 600));
    assert_eq!(got, "sequence 0: 600 tokens exceed the model's context of 512");
    assert!(refused(&mut Sequence::new(cache())).contains("no rotary embedding of this model"));
    assert!(golden.decoder.forward(&mut []).unwrap().is_empty());
    // After all that the sequence goes on as if nothing had happened.
    golden.check_logits("after errors", 10, &golden.step(&golden.tokens[10..20], &mut sequence));
}

/// An error in some layer takes every sequence of the step back to where it was.
#[test]
fn a_step_that_fails_leaves_nothing() {
    let golden = golden("llama3");
    let specs =
        ["full", "kivi-2", "{ method = \"minicache\", quant = { bits = 4 } }", "{ method = \"h2o\" }"];
    for spec in specs {
        let spec = minicache_core::CacheSpec::parse(spec).unwrap();
        let cache = || minicache_core::build(&spec, golden.decoder.shape(), &Default::default()).unwrap();
        let sequence = || golden.decoder.sequence(cache(), 48);
        let forward = |steps: &mut [Step<'_>]| golden.decoder.forward(steps).map(|l| l.of(0).to_vec());
        let fresh = |sequences: &mut [Sequence; 2], tokens: [&[u32]; 2]| {
            let mut steps: Vec<Step<'_>> = sequences
                .iter_mut()
                .zip(tokens)
                .map(|(sequence, tokens)| Step { tokens, sequence, logits: LogitsFor::All })
                .collect();
            forward(&mut steps)
        };
        let (prompt, next) = (&golden.tokens[..20], &golden.tokens[20..40]);
        let (mut whole, mut broken) = ([sequence(), sequence()], [sequence(), sequence()]);
        for pair in [&mut whole, &mut broken] {
            fresh(pair, [prompt, prompt]).unwrap();
        }
        for tokens in [&next[..1], next] {
            // A third sequence, whose cache does not take the third layer.
            let failing = Box::new(Failing(ReferenceCache::new(*golden.decoder.shape())));
            let mut third = golden.decoder.sequence(failing, 48);
            let [a, b] = &mut broken;
            let mut steps = [
                Step { tokens, sequence: a, logits: LogitsFor::All },
                Step { tokens: &next[..1], sequence: b, logits: LogitsFor::All },
                Step { tokens, sequence: &mut third, logits: LogitsFor::All },
            ];
            assert!(forward(&mut steps).unwrap_err().to_string().contains("not this one"));
            assert_eq!((broken[0].len(), broken[1].len()), (whole[0].len(), whole[1].len()));
            let (want, got) =
                (fresh(&mut whole, [tokens, &next[..1]]), fresh(&mut broken, [tokens, &next[..1]]));
            assert_eq!(want.unwrap(), got.unwrap(), "{}", spec.label());
        }
        let bytes = [&whole[0], &broken[0]].map(|s| s.footprint().total());
        assert!(bytes[0].abs_diff(bytes[1]) < 4096, "{}: {bytes:?}", spec.label());
    }
}

/// Does not attend in the third layer.
struct Failing(ReferenceCache);

impl KvCache for Failing {
    fn shape(&self) -> &ModelShape {
        self.0.shape()
    }
    fn attend_held(
        &self,
        layer: usize,
        states: States<'_>,
        out: &mut [f32],
        received: &mut Vec<f32>,
    ) -> minicache_core::Result<()> {
        match layer {
            2 => Err(minicache_core::Error::Missing("not this one".into())),
            _ => self.0.attend_held(layer, states, out, received),
        }
    }
    fn store(&mut self, layer: usize, states: States<'_>, received: &[f32]) -> minicache_core::Result<()> {
        self.0.store(layer, states, received)
    }
    fn finish_step(&mut self) -> minicache_core::Result<()> {
        self.0.finish_step()
    }
    fn len(&self) -> usize {
        self.0.len()
    }
    fn footprint(&self) -> Footprint {
        self.0.footprint()
    }
    fn restored(&self, layer: usize) -> minicache_core::Result<Restored> {
        self.0.restored(layer)
    }
    fn fork(&self) -> Box<dyn KvCache> {
        Box::new(Failing(self.0.clone()))
    }
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
