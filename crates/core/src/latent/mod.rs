//! Cross-layer latents: the states of a group of consecutive layers are stored as one vector of coefficients in a
//! calibrated basis, and attention works on the coefficients.
//!
//! Neighbouring layers do not point the same way, but their states share a subspace. For a group of G layers:
//!
//! Values: v = mean + B z with z = B^T (v - mean), B orthonormal, from the second moment of the G layers' values side by
//! side. sum_i p_i v_{l,h,i} = (sum_i p_i) mean_{l,h} + B_{l,h} (sum_i p_i z_i): latents are weighed, and B is applied
//! once per step.
//!
//! Keys: RoPE multiplies frequency pair j of every layer and head by the same phase e^{i w_j p}; a unitary map among
//! them *per frequency* therefore commutes with it. With k_j in C^(G kv_heads) the rotated keys of one frequency,
//! k_j = e^{i w_j p} mean_j + U_j z_j, and <q, k_{l,h}> is the sum over j of Re(conj(q_j) e^{i w_j p} mean_{j,(l,h)})
//! and Re(conj(q~_j) . z_j), with q~_j = conj(U_j[(l,h)]) q_j. The mean of the *un-rotated* keys, most of their energy,
//! costs no bytes per token: its scores come from a table of phases that all layers and sequences share.
//!
//! The first tokens (attention sinks) and, by option, the newest stay exact.

pub(crate) mod account;
mod basis;
mod cache;
mod coded;
mod coder;
mod maps;
mod moments;
mod plan;
mod transform;
mod view;

pub use basis::{Basis, Grouping, KeyBasis, Span, ValueBasis};
pub(crate) use cache::LatentCache;
pub use coder::{Allocation, Errors, allocate, trellis_errors, uniform_errors};
pub use maps::{LatentGroup, LatentSet};
pub use moments::{KeyMoments, Moments, ValueMoments};
pub use plan::LatentPlan;
pub(crate) use view::{LatentKeys, LatentValues};
