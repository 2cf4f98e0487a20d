//! Quantised weight matrices with integer kernels for the CPU.
//!
//! A [`PackedMatrix`] holds weights of 4 or 8 bits, rearranged once at load time for the vector units; a product
//! quantises its activations to int8 ([`Activations`]) and multiplies integers. Decoding one token then runs at
//! the speed of memory, a prefill at that of the integer multipliers. The instruction set is chosen at run time
//! ([`InstructionSet`]); all give the same sums.
//!
//! ```text
//! y[r, o] = sum over blocks b of  dx[r, b] * d[o, b] * (sum of (q - zero) * xq)  +  m[o, b] * dx[r, b] * sum of xq
//! ```

mod activations;
mod ggml;
mod kernels;
mod layout;
mod matrix;
mod product;
#[cfg(test)]
mod tests;

pub use activations::Activations;
pub use kernels::InstructionSet;
pub use layout::{BLOCK, Format, PANEL};
pub use matrix::PackedMatrix;
