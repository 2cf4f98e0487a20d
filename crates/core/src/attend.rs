//! Causal attention of one layer over stored (past) and exact (this step's) states.
//!
//! Blocked with an online softmax (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022): scores are held for
//! one block at a time, so memory does not grow with the square of the length, and stored states are read in their
//! packed form, once per KV head for all query heads that share it.

use std::cell::Cell;
use std::ops::Range;

use crate::settings::ModelShape;
use rayon::prelude::*;
use smallvec::SmallVec;

use crate::dense::{View, add_product, mul_transposed};
use crate::kernels::loops::{exp_sum, largest};
use crate::received::{Blocks, Received};
use crate::scratch::{Buffer, with_buffer};
use crate::states::States;
use crate::view::{HeadView, LayerView, SideView};

/// Stored positions scored at a time: scores of all rows stay in the first-level cache.
const BLOCK: usize = 512;
/// The same for the many rows of a tile.
const TILE_BLOCK: usize = 256;
/// Query tokens worked on together in a step of many tokens.
const TILE: usize = 32;
/// Tiles that a step of fewer tokens than [`TILES`] whole tiles is cut into.
const TILES: usize = 4;
/// A longer past is cut into parts of about this many positions, which threads share. Sums of a part are rounded for
/// themselves, so where parts end shows in the last digits: it depends on nothing but the length, neither on the
/// number of threads nor on what else they have to do. Joining a part costs about as much as one of its positions.
const SPLIT: usize = 1024;
/// Numbers held, below which splitting over threads costs more than it gains.
const SMALL: usize = 1 << 15;

thread_local! {
    static ALONE: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f` with decode attention on this thread alone: for many sequences, of which each thread has several to do. The
/// results are the same.
pub fn on_one_thread<R>(f: impl FnOnce() -> R) -> R {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            ALONE.set(self.0);
        }
    }
    let _restore = Restore(ALONE.replace(true));
    f()
}

/// The stored states of one layer, or of one KV head of it, of which the indices `start..end` are read.
#[derive(Clone, Copy)]
struct Past<'p, 'a> {
    keys: &'p SideView<'a>,
    values: &'p SideView<'a>,
    start: usize,
    end: usize,
    /// The KV head that is the first one of the views.
    first_head: usize,
    /// Positions of rows that lie in any order; without these, indices are positions.
    scattered: Option<&'p [u32]>,
    /// The position of the step's first token.
    len: usize,
    /// The layer's sliding window.
    window: Option<usize>,
}

impl Past<'_, '_> {
    /// First position that the query at `position` sees.
    fn seen_from(&self, position: usize) -> usize {
        self.window.map_or(0, |w| (position + 1).saturating_sub(w))
    }

    /// The first index to read where nothing before the position `limit` is seen.
    fn from(&self, limit: usize) -> usize {
        if self.scattered.is_some() { self.start } else { self.start.max(limit) }
    }

    /// Hides the scores of the indices `range` that lie before the position `limit`.
    fn hide(&self, range: &Range<usize>, limit: usize, scores: &mut [f32]) {
        match self.scattered {
            None => {
                let hidden = limit.saturating_sub(range.start).min(scores.len());
                scores[..hidden].fill(f32::NEG_INFINITY);
            }
            Some(positions) => hide_scattered(&positions[range.clone()], limit, scores),
        }
    }

    /// The first index that the step's first query sees. Of scattered rows those that it does not see are not held.
    fn first_read(&self) -> usize {
        self.from(self.seen_from(self.len)).min(self.end)
    }

    /// KV heads of the model as heads of the views.
    fn stored(&self, heads: &Range<usize>) -> Range<usize> {
        heads.start - self.first_head..heads.end - self.first_head
    }
}

/// Writes attention of the step's queries over the first `len` tokens, as `view` has them, and the step's own to
/// `out (tokens, heads, head_dim)`.
pub(crate) fn attend(
    shape: &ModelShape,
    layer: usize,
    view: &LayerView<'_>,
    len: usize,
    step: States<'_>,
    out: &mut [f32],
) {
    let (keys, values, window) = (&view.keys, &view.values, shape.window_of(layer));
    let start = view.start().min(len);
    let past = Past { keys, values, start, end: len, first_head: 0, scattered: None, len, window };
    attend_all(shape, &[past], step, out, None);
}

/// [`attend`] over the tokens that each KV head has for itself, after `len` tokens. `received` is told what these and the
/// step's own receive.
pub(crate) fn attend_heads(
    shape: &ModelShape,
    layer: usize,
    heads: &[HeadView<'_>],
    len: usize,
    step: States<'_>,
    out: &mut [f32],
    received: Option<&Received>,
) {
    assert_eq!(heads.len(), shape.kv_heads, "views of heads");
    let window = shape.window_of(layer);
    let mut pasts = SmallVec::<[Past<'_, '_>; 8]>::new();
    for (first_head, HeadView { keys, values, positions }) in heads.iter().enumerate() {
        let (end, scattered) = (positions.len(), Some(*positions));
        pasts.push(Past { keys, values, start: 0, end, first_head, scattered, len, window });
    }
    attend_all(shape, &pasts, step, out, received);
}

/// Over one past for all KV heads, or one for each.
fn attend_all(
    shape: &ModelShape,
    pasts: &[Past<'_, '_>],
    step: States<'_>,
    out: &mut [f32],
    received: Option<&Received>,
) {
    let count = step.tokens(shape);
    if count == 1 {
        return decode(shape, pasts, step, out, received);
    }
    // By the length alone: what a row is computed beside shows in its last digits.
    let tile = count.div_ceil(TILES).min(TILE);
    out.par_chunks_mut(tile * shape.heads * shape.head_dim).enumerate().for_each(|(i, out)| {
        let tokens = i * tile..((i + 1) * tile).min(count);
        for head in 0..shape.kv_heads {
            tile_attention(shape, of_lane(pasts, head), step, head, tokens.clone(), out, received);
        }
    });
}

/// Hides the scores of tokens that lie in any order, of those before the position `limit`.
fn hide_scattered(positions: &[u32], limit: usize, scores: &mut [f32]) {
    if limit > 0 {
        let hidden = scores.iter_mut().zip(positions).filter(|(_, p)| (**p as usize) < limit);
        hidden.for_each(|(s, _)| *s = f32::NEG_INFINITY);
    }
}

/// The past of a lane: the one that all share, or its own.
fn of_lane<'p, 'a>(pasts: &[Past<'p, 'a>], lane: usize) -> Past<'p, 'a> {
    pasts[lane.min(pasts.len() - 1)]
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

    /// Begins with the scores of sinks, which give nothing: row i is of the query head `first + i % heads`.
    fn sink(&mut self, scores: &[f32], first: usize, heads: usize) {
        if !scores.is_empty() {
            for (row, (max, sum)) in self.max.iter_mut().zip(&mut *self.sum).enumerate() {
                (*max, *sum) = (scores[first + row % heads], 1.0);
            }
        }
    }

    /// Turns a block of scores `(rows, width)` into probabilities relative to the new running maximum and rescales
    /// what was accumulated before.
    fn absorb(&mut self, scores: &mut [f32], width: usize) {
        let dim = self.acc.len() / self.max.len();
        for (r, row) in scores.chunks_exact_mut(width).enumerate() {
            let top = largest(row);
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

/// The end of the block of stored positions that `at` is in.
fn block_end(past: &Past<'_, '_>, at: usize, block: usize) -> usize {
    let first = past.keys.aligned_from();
    if at < first { first } else { first + ((at - first) / block + 1) * block }
}

/// Caps scores as the model does, if it does.
fn cap(shape: &ModelShape, scores: &mut [f32]) {
    if let Some(cap) = shape.softcap {
        scores.iter_mut().for_each(|s| *s = cap * (*s / cap).tanh());
    }
}

fn tile_attention(
    shape: &ModelShape,
    past: Past<'_, '_>,
    step: States<'_>,
    head: usize,
    tokens: Range<usize>,
    out: &mut [f32],
    received: Option<&Received>,
) {
    let (dim, group) = (shape.head_dim, shape.group());
    let rows = tokens.len() * group;
    let (query, sum) = (past.keys.query_dim(dim), past.values.sum_dim(dim));
    // What tokens receive is known when every row's sum is: until then probabilities of all blocks stay.
    let mut seen = received.and_then(|received| received.of_queries(head, &tokens, group));
    let width = if seen.is_some() { past.end + tokens.end } else { TILE_BLOCK };
    with_buffer(rows * (dim + query + width + sum + 2), |buffer| {
        let (q, rest) = buffer.split_at_mut(rows * dim);
        let (mapped, rest) = rest.split_at_mut(rows * query);
        let (scores, rest) = rest.split_at_mut(rows * width);
        let mut online = Online::new(rest, rows);
        online.sink(step.sink_scores, head * group, group);
        gather(shape, step.q, head, tokens.clone(), q);
        let heads = past.stored(&(head..head + 1));
        past.keys.map_queries(heads.clone(), dim, q, mapped);
        let limit = |row: usize| past.seen_from(past.len + tokens.start + row / group);

        let mut at = past.from(limit(0));
        while at < past.end {
            let range = at..block_end(&past, at, TILE_BLOCK).min(past.end);
            let width = range.len();
            let block = &mut scores[seen.as_ref().map_or(0, Blocks::numbers)..][..rows * width];
            past.keys.scores(heads.clone(), dim, range.clone(), mapped, rows, block);
            cap(shape, block);
            for (r, row) in block.chunks_exact_mut(width).enumerate() {
                past.hide(&range, limit(r), row);
            }
            online.absorb(block, width);
            past.values.accumulate(heads.clone(), dim, range.clone(), block, rows, online.acc);
            if let Some(seen) = &mut seen {
                seen.push(range, online.max);
            }
            at += width;
        }

        let kv_dim = shape.kv_dim();
        let mut at = limit(0).saturating_sub(past.len);
        while at < tokens.end {
            let range = at..(at + TILE_BLOCK).min(tokens.end);
            let width = range.len();
            let block = &mut scores[seen.as_ref().map_or(0, Blocks::numbers)..][..rows * width];
            let from = range.start * kv_dim + head * dim;
            let [keys, values] = [step.k, step.v].map(|x| View::new(&x[from..], width, dim, kv_dim));
            mul_transposed(View::new(q, rows, dim, dim), keys, block);
            cap(shape, block);
            for (r, row) in block.chunks_exact_mut(width).enumerate() {
                let hidden = limit(r).saturating_sub(past.len + range.start).min(width);
                row[..hidden].fill(f32::NEG_INFINITY);
                let seen = (tokens.start + r / group + 1).saturating_sub(range.start).min(width);
                row[seen..].fill(f32::NEG_INFINITY);
            }
            online.absorb(block, width);
            add_product(block, rows, values, online.acc, sum);
            if let Some(seen) = &mut seen {
                seen.push(past.end + range.start..past.end + range.end, online.max);
            }
            at += width;
        }
        if let Some(seen) = &seen {
            seen.count(scores, online.max, online.sum);
        }

        for (acc, total) in online.acc.chunks_exact_mut(sum).zip(&*online.sum) {
            acc.iter_mut().for_each(|a| *a /= total);
        }
        past.values.map_sums(heads.start, dim, online.acc, rows, q);
        for (token, q) in q.chunks_exact(group * dim).enumerate() {
            out[(token * shape.heads + head * group) * dim..][..group * dim].copy_from_slice(q);
        }
    });
}

/// What of a past is read in the part of this number, of so many.
fn part_of(past: &Past<'_, '_>, part: usize, parts: usize) -> Range<usize> {
    let (start, end) = (past.first_read(), past.end);
    // Parts end on multiples of the block, so that packed pages are not split between tasks.
    let length = (end - start).div_ceil(parts).next_multiple_of(BLOCK);
    let aligned = past.keys.aligned_from();
    let base = aligned + start.saturating_sub(aligned) / BLOCK * BLOCK;
    let from = if part == 0 { start } else { (base + part * length).min(end) };
    let to = (base + (part + 1) * length).clamp(from, end);
    from..if part + 1 == parts { end } else { to }
}

/// One new token: the past is split into parts, over KV heads and, where long, over positions; parts are joined by
/// their maxima and sums.
fn decode(
    shape: &ModelShape,
    pasts: &[Past<'_, '_>],
    step: States<'_>,
    out: &mut [f32],
    received: Option<&Received>,
) {
    let (dim, group) = (shape.head_dim, shape.group());
    // Pasts of single heads are alike but for what they hold.
    let (keys, values) = (pasts[0].keys, pasts[0].values);
    let heads_per_task = keys.together().max(values.together());
    let rows = heads_per_task * group;
    let held = pasts.iter().map(|past| past.end - past.first_read()).max().unwrap_or(0);
    let alone = ALONE.get();
    let parts = held.div_ceil(SPLIT).max(1);
    let (query, sum) = (keys.query_dim(dim), values.sum_dim(dim));
    let record = rows * (sum + 2);
    let work = |queries: &[f32], mapped: &[f32], task: usize, partial: &mut [f32]| {
        let mut seen = received.and_then(|received| received.of_queries(task / parts, &(0..1), group));
        let (lane, part) = (task / parts, task % parts);
        let heads = lane * heads_per_task..(lane + 1) * heads_per_task;
        let past = of_lane(pasts, lane);
        let stored = past.stored(&heads);
        let mapped = &mapped[lane * rows * query..(lane + 1) * rows * query];
        let Range { start: from, end: to } = part_of(&past, part, parts);
        let mut online = Online::new(partial, rows);
        if part == 0 {
            online.sink(step.sink_scores, heads.start * group, rows);
        }
        let mut scores = Buffer::new(rows * if seen.is_some() { to - from + 1 } else { BLOCK });
        let mut at = from;
        while at < to {
            let range = at..block_end(&past, at, BLOCK).min(to);
            let width = range.len();
            let block = &mut scores[seen.as_ref().map_or(0, Blocks::numbers)..][..rows * width];
            past.keys.scores(stored.clone(), dim, range.clone(), mapped, rows, block);
            cap(shape, block);
            online.absorb(block, width);
            past.values.accumulate(stored.clone(), dim, range.clone(), block, rows, online.acc);
            if let Some(seen) = &mut seen {
                seen.push(range, online.max);
            }
            at += width;
        }
        if part + 1 == parts {
            let own = |row: usize| (heads.start + row / group) * dim..(heads.start + row / group + 1) * dim;
            let block = &mut scores[seen.as_ref().map_or(0, Blocks::numbers)..][..rows];
            let queries = queries[lane * rows * dim..].chunks_exact(dim);
            for (row, (s, q)) in block.iter_mut().zip(queries).enumerate() {
                *s = q.iter().zip(&step.k[own(row)]).map(|(a, b)| a * b).sum();
            }
            cap(shape, block);
            online.absorb(block, 1);
            for (row, (p, acc)) in block.iter().zip(online.acc.chunks_exact_mut(sum)).enumerate() {
                acc.iter_mut().zip(&step.v[own(row)]).for_each(|(a, v)| *a += p * v);
            }
            if let Some(seen) = &mut seen {
                seen.push(past.end..past.end + 1, online.max);
            }
        }
        seen.map(|seen| (seen, scores))
    };
    let lanes = shape.kv_heads / heads_per_task;
    let tasks = lanes * parts;
    with_buffer(shape.heads * (dim + query) + tasks * record, |buffer| {
        let (queries, rest) = buffer.split_at_mut(shape.heads * dim);
        let (mapped, partials) = rest.split_at_mut(shape.heads * query);
        for head in 0..shape.kv_heads {
            gather(shape, step.q, head, 0..1, &mut queries[head * group * dim..(head + 1) * group * dim]);
        }
        for lane in 0..lanes {
            let past = of_lane(pasts, lane);
            let heads = lane * heads_per_task..(lane + 1) * heads_per_task;
            let from = &queries[lane * rows * dim..(lane + 1) * rows * dim];
            past.keys.map_queries(
                past.stored(&heads),
                dim,
                from,
                &mut mapped[lane * rows * query..(lane + 1) * rows * query],
            );
        }
        let work = |(task, partial): (usize, &mut [f32])| work(queries, mapped, task, partial);
        // Without anything to tell of tokens nothing is collected, and nothing allocated.
        let serial = alone || held * shape.kv_heads * dim < SMALL;
        let seen: Vec<(Blocks<'_>, Buffer)> = if serial {
            partials.chunks_exact_mut(record).enumerate().filter_map(work).collect()
        } else {
            partials.par_chunks_exact_mut(record).enumerate().filter_map(work).collect()
        };
        for (lane, records) in partials.chunks_exact_mut(record * parts).enumerate() {
            (0..rows).for_each(|row| join(records, rows, row, sum));
            for (seen, scores) in seen.iter().skip(lane * parts).take(parts) {
                seen.count(scores, &records[..rows], &records[rows..2 * rows]);
            }
            let sums = records[2 * rows..record].chunks_exact(group * sum);
            let outs = out[lane * rows * dim..(lane + 1) * rows * dim].chunks_exact_mut(group * dim);
            let past = of_lane(pasts, lane);
            for (i, (sums, out)) in sums.zip(outs).enumerate() {
                let head = lane * heads_per_task + i - past.first_head;
                past.values.map_sums(head, dim, sums, group, out);
            }
        }
    });
}

/// Joins what the parts accumulated for `row` into the first part's record, by their maxima and sums, and those with it.
fn join(records: &mut [f32], rows: usize, row: usize, sum: usize) {
    let record = rows * (sum + 2);
    let acc = 2 * rows + row * sum;
    let top = records.chunks_exact(record).map(|r| r[row]).fold(f32::NEG_INFINITY, f32::max);
    let (first, others) = records.split_at_mut(record);
    let weight = (first[row] - top).exp();
    let mut total = weight * first[rows + row];
    first[acc..acc + sum].iter_mut().for_each(|a| *a *= weight);
    for other in others.chunks_exact(record) {
        let weight = (other[row] - top).exp();
        total += weight * other[rows + row];
        let theirs = &other[acc..acc + sum];
        first[acc..acc + sum].iter_mut().zip(theirs).for_each(|(a, b)| *a += weight * b);
    }
    first[acc..acc + sum].iter_mut().for_each(|a| *a /= total);
    (first[row], first[rows + row]) = (top, total);
}
