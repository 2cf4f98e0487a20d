//! Safetensors files, written tensor by tensor and whole or not at all.
//!
//! The library's own `serialize_to_file` makes temporary files of its own, which stay behind when the process is
//! killed, and puts them beside devices too; its `serialize` holds all tensors in memory a second time.

use std::collections::HashMap;
use std::fmt::Display;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use minicache_config::atomic;
use safetensors::View;
use safetensors::tensor::{Metadata, TensorInfo};

use crate::{Error, Result};

/// Writes `tensors` with the free text `about` to the file `path`, which appears when it is whole.
///
/// # Errors
/// A file that cannot be written.
pub fn save_tensors<S: AsRef<str> + Ord + Display, V: View>(
    path: &Path,
    tensors: impl IntoIterator<Item = (S, V)>,
    about: Option<HashMap<String, String>>,
) -> Result<()> {
    let mut writer = atomic::Writer::new(path).map_err(Error::write(path))?;
    write_tensors(&mut writer, tensors, about).map_err(Error::write(path))?;
    writer.commit().map_err(Error::write(path))
}

/// Writes the bytes of a safetensors file: the length of the header, the header, and the tensors, those of wide types
/// first so that each is aligned.
pub(crate) fn write_tensors<S: AsRef<str> + Ord + Display, V: View>(
    out: &mut impl Write,
    tensors: impl IntoIterator<Item = (S, V)>,
    about: Option<HashMap<String, String>>,
) -> io::Result<()> {
    let mut tensors: Vec<(S, V)> = tensors.into_iter().collect();
    tensors.sort_by(|(a, x), (b, y)| y.dtype().cmp(&x.dtype()).then_with(|| a.cmp(b)));
    let mut end = 0;
    let described = tensors.iter().map(|(name, tensor)| {
        let start = end;
        end += tensor.data_len();
        let (dtype, shape) = (tensor.dtype(), tensor.shape().to_vec());
        (name.to_string(), TensorInfo { dtype, shape, data_offsets: (start, end) })
    });
    let header = Metadata::new(about, described.collect()).map_err(io::Error::other)?;
    let mut header = serde_json::to_value(&header)?;
    // The library keeps it in no order; the same content is to give the same bytes.
    if let Some(about) = header.get_mut("__metadata__").and_then(serde_json::Value::as_object_mut) {
        about.sort_keys();
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut out = BufWriter::with_capacity(1 << 20, out);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    for (_, tensor) in &tensors {
        out.write_all(&tensor.data())?;
    }
    out.flush()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use safetensors::tensor::{Dtype, TensorView};

    #[test]
    fn the_bytes_are_the_library_s() {
        let (wide, narrow) = ([1u8; 24], [2u8; 6]);
        let tensors = || {
            [
                ("b", TensorView::new(Dtype::F16, vec![3], &narrow).unwrap()),
                ("c", TensorView::new(Dtype::F32, vec![2, 3], &wide).unwrap()),
                ("a", TensorView::new(Dtype::F32, vec![6], &wide).unwrap()),
            ]
        };
        let about = || Some(HashMap::from([("format".to_string(), "pt".to_string())]));
        let mut ours = Vec::new();
        write_tensors(&mut ours, tensors(), about()).unwrap();
        assert_eq!(ours, safetensors::serialize(tensors(), about()).unwrap());
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        save_tensors(&path, tensors(), about()).unwrap();
        assert_eq!(std::fs::read(path).unwrap(), ours);
        let e = save_tensors(&dir.path().join("absent/x"), tensors(), None).unwrap_err().to_string();
        assert!(e.starts_with("cannot write ") && e.contains("absent/x"), "{e}");
    }

    #[test]
    fn the_same_content_gives_the_same_bytes() {
        let bytes = || {
            let about = ["d", "a", "c", "b"].map(|key| (key.to_string(), "x".to_string()));
            let mut bytes = Vec::new();
            let tensor = TensorView::new(Dtype::F32, vec![1], &[0; 4]).unwrap();
            write_tensors(&mut bytes, [("t", tensor)], Some(about.into())).unwrap();
            bytes
        };
        assert!((0..20).all(|_| bytes() == bytes()));
        assert!(String::from_utf8_lossy(&bytes()).contains(r#"{"a":"x","b":"x","c":"x","d":"x"}"#));
    }
}
