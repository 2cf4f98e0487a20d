//! JSON lines.

use std::io::{BufRead, Read};
use std::path::PathBuf;

use minicache_config::python_json;

use super::{LONGEST_LINE, Record, text_of};
use crate::data::error::{DataError, Result};

/// The records of a stream of one JSON object per line; empty lines are passed over.
pub(crate) struct Lines<'a> {
    name: String,
    reader: Box<dyn BufRead + 'a>,
    /// The line at hand.
    bytes: Vec<u8>,
    number: usize,
    index: usize,
}

impl<'a> Lines<'a> {
    /// # Errors
    /// A stream that is no text, by its first bytes.
    pub(crate) fn new(name: &str, reader: &'a mut dyn Read) -> Result<Self> {
        let (name, reader) = (name.to_string(), text_of(name, reader)?);
        Ok(Self { name, reader, bytes: Vec::new(), number: 0, index: 0 })
    }

    /// Reads the next line that is not empty; whether there is one.
    fn advance(&mut self) -> Result<bool> {
        loop {
            self.bytes.clear();
            self.number += 1;
            let read = self.reader.by_ref().take(LONGEST_LINE + 1).read_until(b'\n', &mut self.bytes);
            match read {
                Ok(0) => return Ok(false),
                Ok(n) if n as u64 > LONGEST_LINE => {
                    return Err(self.wrong(format!("longer than {} MiB", LONGEST_LINE >> 20)));
                }
                Ok(_) if self.bytes.iter().all(u8::is_ascii_whitespace) => {}
                Ok(_) => return Ok(true),
                Err(source) => return Err(DataError::Io { path: PathBuf::from(&self.name), source }),
            }
        }
    }

    fn place(&self) -> String {
        format!("{}, line {}", self.name, self.number)
    }

    fn wrong(&self, message: String) -> DataError {
        DataError::Format { place: self.place(), message }
    }

    fn record(&mut self) -> Result<Option<Record>> {
        if !self.advance()? {
            return Ok(None);
        }
        let text = std::str::from_utf8(&self.bytes).map_err(|_| self.wrong("not UTF-8 text".to_string()))?;
        let value = python_json::from_str(text).map_err(|e| self.wrong(e.without_line()))?;
        let record = Record::new(value, self.place(), self.index)?;
        self.index += 1;
        Ok(Some(record))
    }
}

impl Iterator for Lines<'_> {
    type Item = Result<Record>;

    fn next(&mut self) -> Option<Self::Item> {
        self.record().transpose()
    }
}
