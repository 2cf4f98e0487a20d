//! CSV: rows under a header line, every field a string.

use std::io::{BufRead, Read as _};

use ::csv::{Error, ErrorKind, Position, Reader};
use serde_json::{Map, Value};

use super::{Kept, LARGEST_TEXT, Record};
use crate::data::error::{DataError, Result};

/// Columns, at most.
const MOST_COLUMNS: usize = 4096;

pub(super) fn rows(name: &str, reader: Box<dyn BufRead + '_>, kept: &mut Kept<'_>) -> Result<()> {
    let place = |line: Option<u64>| match line {
        Some(line) => format!("{name}, line {line}"),
        None => name.to_string(),
    };
    let bad = |e: Error| {
        let place = place(e.position().map(Position::line));
        DataError::Format { place, message: format!("not valid CSV: {}", reason(&e)) }
    };
    // Nothing bounds a field that is quoted and never closed but the end of what is read.
    let mut reader = Reader::from_reader(reader.take(LARGEST_TEXT));
    let header = reader.headers().map_err(bad)?.clone();
    if header.len() > MOST_COLUMNS {
        let message = format!("more than {MOST_COLUMNS} columns");
        return Err(DataError::Format { place: place(Some(1)), message });
    }
    let mut rows = reader.records();
    for index in 0.. {
        if !kept.wants_more()? {
            break;
        }
        let Some(row) = rows.next() else { break };
        let row = row.map_err(bad)?;
        let line = row.position().map_or(0, Position::line);
        let fields: Map<String, Value> =
            header.iter().zip(&row).map(|(k, v)| (k.trim().to_string(), Value::from(v))).collect();
        kept.add(Record { fields, place: place(Some(line)), index })?;
    }
    if rows.reader().get_ref().limit() == 0 {
        let message = format!("larger than {} MiB; set a `limit`", LARGEST_TEXT >> 20);
        return Err(DataError::Format { place: place(None), message });
    }
    Ok(())
}

fn reason(error: &Error) -> String {
    match error.kind() {
        ErrorKind::UnequalLengths { expected_len, len, .. } => {
            format!("{len} fields where the header has {expected_len}")
        }
        _ => error.to_string(),
    }
}
