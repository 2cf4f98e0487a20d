//! Texts that models write.

use std::cell::Cell;
use std::sync::Arc;

use minicache_core::CacheSpec;
use minicache_models::{LoadOptions, LogitsFor, Model, Step};

use crate::files::gguf::fixture;

fn load(name: &str) -> Model {
    Model::from_path(&fixture(name), name, &LoadOptions::default()).unwrap()
}

fn written(model: &Model, tokens: usize, chunk: usize) -> Arc<[Vec<u32>]> {
    model.own_text(tokens, chunk, &|| true).unwrap().unwrap()
}

#[test]
fn texts_have_the_lengths_asked_for_and_are_the_same_every_time() {
    let (model, again) = (load("llama3"), load("llama3"));
    let asked = Cell::new(0);
    let stop_at = |most: usize| {
        asked.set(0);
        let go_on = || asked.replace(asked.get() + 1) < most;
        again.own_text(530, 25, &go_on).unwrap()
    };
    assert_eq!(stop_at(7), None);
    assert_eq!(asked.get(), 8);
    let texts = written(&model, 530, 25);
    let lengths: Vec<usize> = texts.iter().map(Vec::len).collect();
    assert_eq!(lengths, [vec![25; 21], vec![5]].concat());
    assert_eq!(stop_at(usize::MAX).unwrap(), texts);
    // Once written, nobody is asked again.
    assert_eq!(stop_at(0).unwrap(), texts);
    // No two of them alike, and none longer than the context.
    assert!((1..texts.len()).all(|i| !texts[..i].contains(&texts[i])));
    let long = written(&model, 600, 1 << 20);
    assert_eq!(long.iter().map(Vec::len).collect::<Vec<_>>(), [512, 88]);
}

/// The surprise of a token drawn from a distribution is on average its entropy.
#[test]
fn tokens_are_drawn_from_what_the_model_says() {
    for name in ["llama3", "mixtral", "gguf/llama3.q8_0.gguf"] {
        let model = load(name);
        let (mut off, mut variance) = (0.0, 0.0);
        for text in written(&model, 2000, 100).iter() {
            let mut sequence = model.sequence(&CacheSpec::default(), text.len()).unwrap();
            let step = Step { tokens: text, sequence: &mut sequence, logits: LogitsFor::All };
            let logits = model.decoder.forward(&mut [step]).unwrap();
            for (row, &next) in logits.of(0).chunks_exact(logits.vocab()).zip(&text[1..]) {
                let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let weights: Vec<f64> = row.iter().map(|x| f64::from(x - top).exp()).collect();
                let total: f64 = weights.iter().sum();
                let surprise = |w: &f64| -(w / total).ln();
                let mean = |of: &dyn Fn(&f64) -> f64| weights.iter().map(|w| w / total * of(w)).sum::<f64>();
                let entropy = mean(&surprise);
                off += surprise(&weights[next as usize]) - entropy;
                variance += mean(&|w| (surprise(w) - entropy).powi(2));
            }
        }
        assert!(off.abs() < 4.0 * variance.sqrt(), "{name}: {off} with a deviation of {}", variance.sqrt());
    }
}
