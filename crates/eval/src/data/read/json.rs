//! A JSON list of objects, or an object whose `data` is one (as in CoQA's file).

use std::io::{BufRead, Read as _};
use std::path::PathBuf;

use minicache_config::{python_json, utf8};

use super::{Kept, LARGEST_TEXT, Record};
use crate::data::error::{DataError, Result};

pub(super) fn list(name: &str, reader: Box<dyn BufRead + '_>, kept: &mut Kept<'_>) -> Result<()> {
    let wrong = |message: String| DataError::Format { place: name.to_string(), message };
    let mut bytes = Vec::new();
    reader
        .take(LARGEST_TEXT + 1)
        .read_to_end(&mut bytes)
        .map_err(|source| DataError::Io { path: PathBuf::from(name), source })?;
    if bytes.len() as u64 > LARGEST_TEXT {
        return Err(wrong(format!("larger than {} MiB; give it as JSON lines", LARGEST_TEXT >> 20)));
    }
    let text = utf8(&bytes).map_err(&wrong)?;
    let mut entries = python_json::entries(text, "data").map_err(|e| wrong(e.to_string()))?;
    for index in 0.. {
        if !kept.wants_more()? {
            break;
        }
        let place = format!("{name}, entry {}", index + 1);
        match entries.next() {
            Some(Ok(value)) => kept.add(Record::new(value, place, index)?)?,
            Some(Err(e)) => return Err(DataError::Format { place, message: e.to_string() }),
            None => break,
        }
    }
    Ok(())
}
