//! Causal attention of one layer over stored (past) and exact (this step's) states.
//!
//! Blocked with an online softmax (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022): scores are held for
//! one block at a time, so memory does not grow with the square of the length, and stored states are read in their
//! packed form, once per KV head for all query heads that share it.

use std::ops::Range;

use minicache_config::ModelShape;
use rayon::prelude::*;

use crate::dense::{View, add_product, mul_transposed};
use crate::lane::{Keys, Values};
use crate::scratch::with_buffer;
use crate::softmax::exp_sum;

/// Stored positions scored at a time: scores of all rows of a tile stay in the first-level cache.
const BLOCK: usize = 256;
/// Query tokens worked on together in a step of many tokens.
const TILE: usize = 32;
/// A past longer than this is split over threads.
const SPLIT: usize = 1024;
/// Numbers held, below which splitting over threads costs more than it gains.
const SMALL: usize = 1 << 15;

/// The states of one step: `q (tokens, heads, head_dim)`, `k` and `v` `(tokens, kv_heads, head_dim)`.
#[derive(Clone, Copy)]
pub(crate) struct Step<'a> {
    pub(crate) q: &'a [f32],
    pub(crate) k: &'a [f32],
    pub(crate) v: &'a [f32],
    pub(crate) tokens: usize,
}

/// The stored states of one layer: positions `start..end` are held.
#[derive(Clone, Copy)]
pub(crate) struct Past<'a> {
    pub(crate) keys: &'a dyn Keys,
    pub(crate) values: &'a dyn Values,
    pub(crate) start: usize,
    pub(crate) end: usize,
}

/// Writes attention of the step's queries over past and step to `out (tokens, heads, head_dim)`.
pub(crate) fn attend(shape: &ModelShape, past: Past<'_>, step: Step<'_>, out: &mut [f32]) {
    if step.tokens == 1 {
        return decode(shape, past, step, out);
    }
    let tile = step.tokens.div_ceil(2 * rayon::current_num_threads()).min(TILE);
    out.par_chunks_mut(tile * shape.heads * shape.head_dim).enumerate().for_each(|(i, out)| {
        let tokens = i * tile..((i + 1) * tile).min(step.tokens);
        for head in 0..shape.kv_heads {
            let rows = tokens.len() * shape.group();
            with_tile(rows, shape.head_dim, |t| {
                tile_attention(shape, past, step, head, tokens.clone(), t, out)
            });
        }
    });
}

/// Running softmax of one tile: `rows` queries of one KV head.
struct Online<'a> {
    max: &'a mut [f32],
    sum: &'a mut [f32],
    acc: &'a mut [f32],
}

impl<'a> Online<'a> {
    /// Starts with nothing seen; `buffer` holds the maxima, the sums and the accumulated rows.
    fn new(buffer: &'a mut [f32], rows: usize) -> Self {
        let (max, rest) = buffer.split_at_mut(rows);
        let (sum, acc) = rest.split_at_mut(rows);
        max.fill(f32::NEG_INFINITY);
        sum.fill(0.0);
        acc.fill(0.0);
        Self { max, sum, acc }
    }

    /// Turns a block of scores `(rows, width)` into probabilities relative to the new running maximum and rescales
    /// what was accumulated before.
    fn absorb(&mut self, scores: &mut [f32], width: usize) {
        let dim = self.acc.len() / self.max.len();
        for (r, row) in scores.chunks_exact_mut(width).enumerate() {
            let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            if top == f32::NEG_INFINITY {
                row.fill(0.0);
                continue;
            }
            if top > self.max[r] {
                let rescale = (self.max[r] - top).exp();
                self.max[r] = top;
                self.sum[r] *= rescale;
                self.acc[r * dim..(r + 1) * dim].iter_mut().for_each(|x| *x *= rescale);
            }
            self.sum[r] += exp_sum(row, self.max[r]);
        }
    }
}

/// Working memory of one tile, cut from one buffer.
struct Tile<'a> {
    q: &'a mut [f32],
    scores: &'a mut [f32],
    online: Online<'a>,
}

fn with_tile<R>(rows: usize, dim: usize, work: impl FnOnce(Tile<'_>) -> R) -> R {
    with_buffer(rows * (2 * dim + BLOCK + 2), |buffer| {
        let (q, rest) = buffer.split_at_mut(rows * dim);
        let (scores, rest) = rest.split_at_mut(rows * BLOCK);
        let online = Online::new(rest, rows);
        work(Tile { q, scores, online })
    })
}

/// Copies the query heads of KV head `head` for `tokens` as rows (token, head within the group), scaled.
fn gather(shape: &ModelShape, q: &[f32], head: usize, tokens: Range<usize>, rows: &mut [f32]) {
    let width = shape.group() * shape.head_dim;
    for (row, token) in rows.chunks_exact_mut(width).zip(tokens) {
        let from = token * shape.heads * shape.head_dim + head * width;
        for (d, s) in row.iter_mut().zip(&q[from..from + width]) {
            *d = s * shape.scale;
        }
    }
}

/// First position that the query at `position` sees.
fn window_start(shape: &ModelShape, position: usize) -> usize {
    shape.window.map_or(0, |w| (position + 1).saturating_sub(w))
}

fn tile_attention(
    shape: &ModelShape,
    past: Past<'_>,
    step: Step<'_>,
    head: usize,
    tokens: Range<usize>,
    tile: Tile<'_>,
    out: &mut [f32],
) {
    let (dim, group) = (shape.head_dim, shape.group());
    let rows = tokens.len() * group;
    let Tile { q, scores, mut online } = tile;
    gather(shape, step.q, head, tokens.clone(), q);
    let limit = |row: usize| window_start(shape, past.end + tokens.start + row / group);

    let mut at = past.start.max(limit(0));
    while at < past.end {
        let range = at..(at + BLOCK).min(past.end);
        let width = range.len();
        let block = &mut scores[..rows * width];
        past.keys.scores(head, range.clone(), q, rows, block);
        for (r, row) in block.chunks_exact_mut(width).enumerate() {
            let hidden = limit(r).saturating_sub(range.start).min(width);
            row[..hidden].fill(f32::NEG_INFINITY);
        }
        online.absorb(block, width);
        past.values.accumulate(head, range, block, rows, online.acc);
        at += width;
    }

    let kv_dim = shape.kv_dim();
    let mut at = limit(0).saturating_sub(past.end);
    while at < tokens.end {
        let range = at..(at + BLOCK).min(tokens.end);
        let width = range.len();
        let block = &mut scores[..rows * width];
        let from = range.start * kv_dim + head * dim;
        let [keys, values] = [step.k, step.v].map(|x| View::new(&x[from..], width, dim, kv_dim));
        mul_transposed(View::new(q, rows, dim, dim), keys, block);
        for (r, row) in block.chunks_exact_mut(width).enumerate() {
            let hidden = limit(r).saturating_sub(past.end + range.start).min(width);
            row[..hidden].fill(f32::NEG_INFINITY);
            let seen = (tokens.start + r / group + 1).saturating_sub(range.start).min(width);
            row[seen..].fill(f32::NEG_INFINITY);
        }
        online.absorb(block, width);
        add_product(block, rows, values, online.acc);
        at += width;
    }

    for (r, acc) in online.acc.chunks_exact(dim).enumerate() {
        let at = ((r / group) * shape.heads + head * group + r % group) * dim;
        for (o, a) in out[at..at + dim].iter_mut().zip(acc) {
            *o = a / online.sum[r];
        }
    }
}

/// One new token: the past is split into parts, over KV heads and, where long, over positions; parts are joined by
/// their maxima and sums.
fn decode(shape: &ModelShape, past: Past<'_>, step: Step<'_>, out: &mut [f32]) {
    let (dim, group) = (shape.head_dim, shape.group());
    let start = past.start.max(window_start(shape, past.end));
    let held = past.end - start.min(past.end);
    let parts = held.div_ceil(SPLIT).clamp(1, 4 * rayon::current_num_threads());
    // Parts end on multiples of the block, so that packed pages are not split between tasks.
    let length = held.div_ceil(parts).next_multiple_of(BLOCK);
    let record = group * (dim + 2);
    let work = |task: usize, partial: &mut [f32]| {
        let (head, part) = (task / parts, task % parts);
        let from = if part == 0 { start } else { (start / BLOCK * BLOCK + part * length).min(past.end) };
        let to = (start / BLOCK * BLOCK + (part + 1) * length).clamp(from, past.end);
        let to = if part + 1 == parts { past.end } else { to };
        let mut online = Online::new(partial, group);
        with_buffer(group * (dim + BLOCK), |buffer| {
            let (q, scores) = buffer.split_at_mut(group * dim);
            gather(shape, step.q, head, 0..1, q);
            let mut at = from;
            while at < to {
                let range = at..((at / BLOCK + 1) * BLOCK).min(to);
                let width = range.len();
                let block = &mut scores[..group * width];
                past.keys.scores(head, range.clone(), q, group, block);
                online.absorb(block, width);
                past.values.accumulate(head, range, block, group, online.acc);
                at += width;
            }
            if part + 1 == parts {
                let own = head * dim..(head + 1) * dim;
                let block = &mut scores[..group];
                for (s, q) in block.iter_mut().zip(q.chunks_exact(dim)) {
                    *s = q.iter().zip(&step.k[own.clone()]).map(|(a, b)| a * b).sum();
                }
                online.absorb(block, 1);
                for (p, acc) in block.iter().zip(online.acc.chunks_exact_mut(dim)) {
                    acc.iter_mut().zip(&step.v[own.clone()]).for_each(|(a, v)| *a += p * v);
                }
            }
        });
    };
    let tasks = shape.kv_heads * parts;
    with_buffer(tasks * record, |partials| {
        if held * shape.kv_heads * dim < SMALL {
            partials.chunks_exact_mut(record).enumerate().for_each(|(t, p)| work(t, p));
        } else {
            partials.par_chunks_exact_mut(record).enumerate().for_each(|(t, p)| work(t, p));
        }
        for (head, records) in partials.chunks_exact(record * parts).enumerate() {
            join(records, group, dim, &mut out[head * group * dim..(head + 1) * group * dim]);
        }
    });
}

/// Joins the parts' accumulated values by their maxima and sums.
fn join(records: &[f32], group: usize, dim: usize, out: &mut [f32]) {
    let record = group * (dim + 2);
    for (g, row) in out.chunks_exact_mut(dim).enumerate() {
        let top = records.chunks_exact(record).map(|r| r[g]).fold(f32::NEG_INFINITY, f32::max);
        row.fill(0.0);
        let mut total = 0.0;
        for r in records.chunks_exact(record) {
            let weight = (r[g] - top).exp();
            total += weight * r[group + g];
            let acc = &r[2 * group + g * dim..2 * group + (g + 1) * dim];
            row.iter_mut().zip(acc).for_each(|(o, a)| *o += weight * a);
        }
        row.iter_mut().for_each(|o| *o /= total);
    }
}
