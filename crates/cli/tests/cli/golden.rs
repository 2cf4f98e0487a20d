//! Tensors in files, and how far they are from golden ones.

use std::fs;
use std::path::Path;

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

pub(crate) type Tensors = Vec<(String, Vec<usize>, Vec<f32>)>;

pub(crate) fn read(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let number = |view: &TensorView<'_>| -> Vec<f32> {
        let four = view.data().chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]]);
        match view.dtype() {
            Dtype::F32 => four.map(f32::from_le_bytes).collect(),
            Dtype::I32 => four.map(|b| i32::from_le_bytes(b) as f32).collect(),
            Dtype::I64 => {
                let eight = view.data().chunks_exact(8);
                eight.map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f32).collect()
            }
            Dtype::U8 => view.data().iter().map(|&b| f32::from(b)).collect(),
            other => panic!("{other}"),
        }
    };
    let mut all: Tensors =
        file.iter().map(|(name, view)| (name.to_string(), view.shape().to_vec(), number(&view))).collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

pub(crate) fn find<'a>(tensors: &'a Tensors, name: &str) -> &'a (String, Vec<usize>, Vec<f32>) {
    tensors.iter().find(|t| t.0 == name).unwrap_or_else(|| panic!("no {name}"))
}

/// Largest difference over the largest number.
pub(crate) fn difference(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let top = want.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    got.iter().zip(want).fold(0.0f32, |m, (g, w)| m.max((g - w).abs())) / top
}

pub(crate) fn ids(golden: &Tensors) -> String {
    find(golden, "tokens").2.iter().map(|t| format!("{t} ")).collect()
}
