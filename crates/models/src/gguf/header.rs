//! The header of a GGUF file: metadata and where tensors lie, read strictly and never beyond the file.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. Every count and length is held against the bytes
//! that are left before anything is allocated, so that memory is bounded by the file's size, whatever it says.

mod reader;
mod start;

use std::collections::{HashMap, HashSet};

use candle_core::quantized::gguf_file::Value;
use minicache_config::shown;

use super::types::WeightType;
use reader::{Info, Reader};
use start::check_start;

/// Where tensors begin, if the file does not say.
const ALIGNMENT: u32 = 32;

/// What a file says about itself.
#[derive(Debug)]
pub(super) struct Header {
    /// By key.
    pub(super) metadata: HashMap<String, Value>,
    pub(super) tensors: Vec<Entry>,
}

/// One tensor, inside of the file.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: String,
    /// Outermost first, as in Hugging Face files; none is 0.
    pub(super) dims: Vec<usize>,
    pub(super) kind: WeightType,
    /// Its first byte in the file, and the one behind its last.
    pub(super) bytes: std::ops::Range<usize>,
}

type Result<T> = std::result::Result<T, String>;

/// Reads the header of `file`, all of its bytes.
///
/// # Errors
/// What is wrong, without the file's name.
pub(super) fn read(file: &[u8]) -> Result<Header> {
    check_start(file)?;
    let mut reader = Reader { file, at: 8 };
    let (tensors, pairs) = (reader.u64()?, reader.u64()?);
    // A key of no letters and a byte; a tensor of no name and one dimension.
    let pairs = reader.count(pairs, 13, "metadata keys")?;
    let mut metadata = HashMap::new();
    for _ in 0..pairs {
        let key = reader.string()?;
        let kind = reader.u32()?;
        let value = reader.value(kind, 0).map_err(|e| format!("metadata {}: {e}", shown(&key)))?;
        if let Some(key) = duplicate(&mut metadata, key, value) {
            return Err(format!("metadata {} comes twice", shown(&key)));
        }
    }
    let alignment = alignment(&metadata)?;
    let tensors = reader.count(tensors, 32, "tensors")?;
    let mut infos = Vec::new();
    for _ in 0..tensors {
        infos.push(reader.tensor()?);
    }
    let data = (reader.at as u64).next_multiple_of(u64::from(alignment));
    let tensors = place(infos, data, alignment, file.len())?;
    Ok(Header { metadata, tensors })
}

/// Adds a pair; gives the key back where it is there already.
fn duplicate(metadata: &mut HashMap<String, Value>, key: String, value: Value) -> Option<String> {
    if metadata.contains_key(&key) {
        return Some(key);
    }
    metadata.insert(key, value);
    None
}

/// `general.alignment`.
fn alignment(metadata: &HashMap<String, Value>) -> Result<u32> {
    match metadata.get("general.alignment") {
        None => Ok(ALIGNMENT),
        Some(Value::U32(n)) if n.is_power_of_two() => Ok(*n),
        Some(Value::U32(n)) => {
            Err(format!("metadata general.alignment is {n}, which is no power of two; the file is damaged"))
        }
        Some(_) => Err("metadata general.alignment is not of type u32; the file is damaged".to_string()),
    }
}

/// Where tensors lie, once it is known where the data begin.
fn place(infos: Vec<Info>, data: u64, alignment: u32, length: usize) -> Result<Vec<Entry>> {
    let mut names = HashSet::new();
    let mut entries: Vec<Entry> = Vec::with_capacity(infos.len());
    for Info { name, dims, kind, offset, size } in infos {
        let shown = shown(&name);
        if !offset.is_multiple_of(u64::from(alignment)) {
            return Err(format!(
                "tensor {shown} begins at {offset}, not at a multiple of {alignment}; the file is damaged"
            ));
        }
        let start = data.checked_add(offset);
        let end = start.and_then(|start| start.checked_add(size));
        let (Some(start), Some(end)) = (start, end.filter(|end| *end <= length as u64)) else {
            let need = end.map_or_else(|| "more".to_string(), |end| end.to_string());
            return Err(format!(
                "truncated: tensor {shown} needs {need} bytes, the file has {length}; {}",
                super::DOWNLOAD_AGAIN
            ));
        };
        if !names.insert(name.clone()) {
            return Err(format!("tensor {shown} comes twice; the file is damaged"));
        }
        // Both fit into the file, whose length is a usize.
        entries.push(Entry { name, dims, kind, bytes: start as usize..end as usize });
    }
    // Tensors that share bytes could name more weights than the file is large.
    let mut order: Vec<&Entry> = entries.iter().collect();
    order.sort_unstable_by_key(|e| e.bytes.start);
    if let Some([a, b]) = order.windows(2).find(|pair| pair[1].bytes.start < pair[0].bytes.end) {
        let (a, b) = (shown(&a.name), shown(&b.name));
        return Err(format!("tensors {a} and {b} overlap; the file is damaged"));
    }
    Ok(entries)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn text(out: &mut Vec<u8>, text: &str) {
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text.as_bytes());
    }

    /// A header of `pairs` (key, type, bytes) and `tensors` (name, dimensions, type, offset), and `data` bytes.
    fn file(pairs: &[(&str, u32, Vec<u8>)], tensors: &[(&str, &[u64], u32, u64)], data: usize) -> Vec<u8> {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend((tensors.len() as u64).to_le_bytes());
        out.extend((pairs.len() as u64).to_le_bytes());
        for (key, kind, value) in pairs {
            text(&mut out, key);
            out.extend(kind.to_le_bytes());
            out.extend(value);
        }
        for (name, dims, kind, offset) in tensors {
            text(&mut out, name);
            out.extend((dims.len() as u32).to_le_bytes());
            dims.iter().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend(offset.to_le_bytes());
        }
        out.resize(out.len().next_multiple_of(32) + data, 0);
        out
    }

    fn array(kind: u32, count: u64, rest: &[u8]) -> Vec<u8> {
        [&kind.to_le_bytes()[..], &count.to_le_bytes(), rest].concat()
    }

    fn message(bytes: &[u8]) -> String {
        read(bytes).unwrap_err()
    }

    #[test]
    fn what_is_written_is_read() {
        let mut words = Vec::new();
        text(&mut words, "a");
        text(&mut words, "");
        let pairs = [
            ("x", 7, vec![1]),
            ("y", 9, array(8, 2, &words)),
            ("z", 9, array(9, 1, &array(0, 2, &[3, 4]))),
            ("general.alignment", 4, 64u32.to_le_bytes().to_vec()),
        ];
        let header = read(&file(&pairs, &[("w", &[4, 2], 0, 64), ("v", &[4], 1, 0)], 128)).unwrap();
        assert!(matches!(header.metadata["x"], Value::Bool(true)));
        assert!(matches!(&header.metadata["y"], Value::Array(v) if v.len() == 2));
        assert!(
            matches!(&header.metadata["z"], Value::Array(v) if matches!(&v[0], Value::Array(v) if v.len() == 2))
        );
        let w = &header.tensors[0];
        assert_eq!(
            (w.name.as_str(), &w.dims[..], w.bytes.len(), w.bytes.start % 64),
            ("w", &[2, 4][..], 32, 0)
        );
    }

    #[test]
    fn alignment_is_the_keys() {
        let align = |kind: u32, value: Vec<u8>| file(&[("general.alignment", kind, value)], &[], 0);
        assert!(message(&align(0, vec![0])).contains("not of type u32"));
        assert!(message(&align(4, vec![0; 4])).contains("is 0, which is no power of two"));
        assert!(message(&align(4, vec![24, 0, 0, 0])).contains("is 24"));
        // The words inside of a value are not the key.
        let mut value = Vec::new();
        text(&mut value, "general.alignment\0\0\0\0\0\0\0\0");
        assert!(read(&file(&[("general.name", 8, value)], &[("w", &[4], 0, 0)], 16)).is_ok());
    }

    #[test]
    fn numbers_beyond_the_file_are_refused() {
        let huge = (u64::MAX / 2).to_le_bytes();
        let mut many = file(&[], &[], 0);
        many[8..16].copy_from_slice(&huge);
        assert!(message(&many).contains("tensors, more than fit"));
        let mut many = file(&[], &[], 0);
        many[16..24].copy_from_slice(&huge);
        assert!(message(&many).contains("metadata keys, more than fit"));
        let long = file(&[("x", 8, huge.to_vec())], &[], 0);
        assert!(message(&long).contains("goes on behind its end"));
        let long = file(&[("x", 9, array(0, u64::MAX, &[]))], &[], 0);
        assert!(message(&long).contains("array elements, more than fit"));
        let mut nested = array(0, 0, &[]);
        for _ in 0..1000 {
            nested = array(9, 1, &nested);
        }
        assert!(message(&file(&[("x", 9, nested)], &[], 0)).contains("nested too deeply"));
        assert!(message(&file(&[("x", 9, array(77, 1, &[0]))], &[], 0)).contains("77 is no type"));
        assert!(message(&file(&[("x", 7, vec![2])], &[], 0)).contains("a truth value is 2"));
        let twice = [("x", 0, vec![2]), ("x", 0, vec![2])];
        assert!(message(&file(&twice, &[], 0)).contains("metadata x comes twice"));
    }

    #[test]
    fn tensors_lie_inside_apart_and_aligned() {
        let tensors = |t: &[(&str, &[u64], u32, u64)]| message(&file(&[], t, 64));
        assert!(tensors(&[("w", &[], 0, 0)]).contains("has 0 dimensions"));
        assert!(tensors(&[("w", &[1, 1, 1, 1, 1], 0, 0)]).contains("has 5 dimensions"));
        assert!(tensors(&[("w", &[4, 0], 0, 0)]).contains("is empty"));
        assert!(tensors(&[("w", &[u64::MAX, u64::MAX], 0, 0)]).contains("is too large"));
        assert!(tensors(&[("w", &[1 << 62], 0, 0)]).contains("is too large"));
        assert!(tensors(&[("w", &[17], 0, 0)]).contains("truncated: tensor w needs"));
        assert!(tensors(&[("w", &[4], 0, u64::MAX - 31)]).contains("needs more bytes"));
        assert!(tensors(&[("w", &[4], 0, 8)]).contains("not at a multiple of 32"));
        assert!(tensors(&[("w", &[31], 8, 0)]).contains("not whole blocks of 32"));
        assert!(tensors(&[("v", &[16], 0, 0), ("w", &[4], 0, 32)]).contains("tensors v and w overlap"));
        assert!(tensors(&[("w", &[4], 0, 0), ("w", &[4], 0, 32)]).contains("w comes twice"));
        assert!(tensors(&[("w\u{1b}[2J", &[256], 16, 0)]).contains("w\\u{1b}[2J: has the type IQ2_XXS"));
    }

    /// Cut anywhere, and with any byte changed, a file is read or refused.
    #[test]
    fn damage_is_no_panic() {
        let mut words = Vec::new();
        text(&mut words, "ab");
        let whole = file(
            &[("general.alignment", 4, 32u32.to_le_bytes().to_vec()), ("y", 9, array(8, 1, &words))],
            &[("w", &[4, 2], 0, 64), ("v", &[32], 8, 0)],
            96,
        );
        read(&whole).unwrap();
        for at in 0..whole.len() {
            let _ = read(&whole[..at]);
            for byte in [0, 1, 0x7f, 0x80, 0xff] {
                let mut changed = whole.clone();
                changed[at] = byte;
                let _ = read(&changed);
            }
        }
    }
}
