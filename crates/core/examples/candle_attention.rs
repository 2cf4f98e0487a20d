//! A compressed KV cache in one's own candle attention layer.
//!
//! cargo run --release -p minicache-core --features candle --example candle_attention

use candle_core::{Device, Result as CandleResult, Tensor};
use minicache_core::{CacheSpec, KvCache, ModelShape, Resources, Result, build};

const HIDDEN: usize = 512;

/// Attention of one decoder layer; weights `(in, out)`.
struct Attention {
    layer: usize,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    w_o: Tensor,
}

impl Attention {
    fn random(layer: usize, shape: &ModelShape) -> CandleResult<Self> {
        let (q_dim, kv_dim) = (shape.heads * shape.head_dim, shape.kv_dim());
        let weight = |inputs: usize, outputs: usize| {
            Tensor::randn(0f32, 1.0 / (inputs as f32).sqrt(), (inputs, outputs), &Device::Cpu)
        };
        Ok(Self {
            layer,
            w_q: weight(HIDDEN, q_dim)?,
            w_k: weight(HIDDEN, kv_dim)?,
            w_v: weight(HIDDEN, kv_dim)?,
            w_o: weight(q_dim, HIDDEN)?,
        })
    }

    /// `x` holds the new tokens `(tokens, HIDDEN)`; all earlier ones are in the cache.
    fn forward(&self, x: &Tensor, cache: &mut dyn KvCache) -> Result<Tensor> {
        let shape = *cache.shape();
        let split = |w: &Tensor, heads: usize| {
            x.matmul(w)?.reshape((x.dim(0)?, heads, shape.head_dim))?.transpose(0, 1)
        };
        // Keys are cached as attention sees them: after RoPE.
        let q = rope(&split(&self.w_q, shape.heads)?, cache.len())?;
        let k = rope(&split(&self.w_k, shape.kv_heads)?, cache.len())?;
        let v = split(&self.w_v, shape.kv_heads)?;
        // (heads, tokens, head_dim) and twice (kv_heads, tokens, head_dim) in, (heads, tokens, head_dim) out.
        let out = cache.attend(self.layer, &q, &k, &v)?;
        Ok(out.transpose(0, 1)?.flatten_from(1)?.matmul(&self.w_o)?)
    }
}

/// Rotates `(heads, tokens, head_dim)` to the positions from `first` on; pair j is (j, j + head_dim / 2).
fn rope(x: &Tensor, first: usize) -> CandleResult<Tensor> {
    let (_, tokens, dim) = x.dims3()?;
    let half = dim / 2;
    let angle = |i: usize| (first + i / half) as f32 * 10_000f32.powf(-((i % half) as f32) / half as f32);
    let angles = Tensor::from_vec((0..tokens * half).map(angle).collect(), (tokens, half), x.device())?;
    let (cos, sin) = (angles.cos()?, angles.sin()?);
    let (a, b) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
    let re = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let im = (a.broadcast_mul(&sin)? + b.broadcast_mul(&cos)?)?;
    Tensor::cat(&[re, im], 2)
}

fn rms_norm(x: &Tensor) -> CandleResult<Tensor> {
    let mean_square = x.sqr()?.mean_keepdim(1)?;
    x.broadcast_div(&(mean_square + 1e-6)?.sqrt()?)
}

/// One forward step: every layer in order, then `finish_step`, which merges and packs what is complete.
fn step(layers: &[Attention], mut x: Tensor, cache: &mut dyn KvCache) -> Result<Tensor> {
    for layer in layers {
        x = (&x + layer.forward(&rms_norm(&x)?, cache)?)?;
    }
    cache.finish_step()?;
    Ok(x)
}

fn main() -> Result<()> {
    let shape = ModelShape {
        layers: 8,
        heads: 8,
        kv_heads: 2,
        head_dim: 64,
        scale: 64f32.powf(-0.5),
        ..ModelShape::PLAIN
    };
    let layers = (0..shape.layers).map(|l| Attention::random(l, &shape)).collect::<CandleResult<Vec<_>>>()?;
    let prompt = Tensor::randn(0f32, 1.0, (512, HIDDEN), &Device::Cpu)?;

    for name in ["full", "minicache", "minicache-4", "kivi-2"] {
        let mut cache = build(&CacheSpec::parse(name)?, &shape, &Resources::default())?;
        // Prefill: all tokens of the prompt at once. Decode: one token at a time, here the last output fed back.
        let out = step(&layers, prompt.clone(), &mut *cache)?;
        let mut x = out.narrow(0, out.dim(0)? - 1, 1)?;
        for _ in 0..16 {
            x = step(&layers, x, &mut *cache)?;
        }
        let (tokens, footprint) = (cache.len(), cache.footprint());
        let ratio = shape.full_bytes(tokens) as f64 / footprint.total() as f64;
        println!("{name}: {tokens} tokens in {} bytes, {ratio:.2}x", footprint.total());
        for (part, bytes) in footprint.parts().into_iter().filter(|(_, bytes)| *bytes > 0) {
            println!("  {part:<10} {bytes:>8}");
        }

        // A fork shares storage until either side writes: several continuations of one prefix.
        let mut other = cache.fork();
        step(&layers, x.neg()?, &mut *other)?;
        println!("  fork: {} tokens; the original still {}", other.len(), cache.len());
    }
    Ok(())
}
