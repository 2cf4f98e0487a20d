//! One member of a ZIP archive. Nothing is unpacked to disk, so that names of other members do not matter.

use std::io::{self, Read};
use std::path::PathBuf;

use ::zip::ZipArchive;
use ::zip::result::ZipError;
use minicache_config::guard;

use super::{Bytes, LARGEST_TEXT, no_pointer};
use crate::data::error::{DataError, Result};

/// Whether the archive in `file`, called `name`, holds `member`.
pub(super) fn has_member(name: &str, file: Box<dyn Bytes>, member: &str) -> Result<bool> {
    Ok(open(name, file)?.index_for_name(member).is_some())
}

/// Calls `f` with the inflated bytes of `member`.
pub(super) fn with_member<T>(
    name: &str,
    file: Box<dyn Bytes>,
    member: &str,
    f: impl FnOnce(&mut dyn Read) -> io::Result<T>,
) -> Result<T> {
    let wrong = |message: String| DataError::Format { place: name.to_string(), message };
    let mut archive = open(name, file)?;
    guarded(name, || match archive.by_name(member) {
        Ok(file) if file.size() > LARGEST_TEXT => Err(wrong(too_large(member))),
        Ok(file) => {
            let mut inflated = Bounded { inner: file, left: LARGEST_TEXT, member };
            f(&mut inflated).map_err(|e| wrong(format!("cannot read {member} in it: {e}")))
        }
        Err(ZipError::FileNotFound) => Err(wrong(format!("holds no file {member}"))),
        Err(e) => Err(bad(name, &e)),
    })
}

fn open(name: &str, mut file: Box<dyn Bytes>) -> Result<ZipArchive<Box<dyn Bytes>>> {
    no_pointer(name, &mut file)?;
    guarded(name, || ZipArchive::new(file).map_err(|e| bad(name, &e)))
}

fn guarded<T>(name: &str, f: impl FnOnce() -> Result<T>) -> Result<T> {
    let wrong = |message: String| DataError::Format { place: name.to_string(), message };
    guard("the ZIP reader", f).map_err(wrong)?
}

fn bad(name: &str, error: &ZipError) -> DataError {
    match error {
        ZipError::Io(e) if e.kind() == io::ErrorKind::PermissionDenied => {
            DataError::Io { path: PathBuf::from(name), source: io::Error::from(e.kind()) }
        }
        e => {
            DataError::Format { place: name.to_string(), message: format!("not a readable ZIP archive: {e}") }
        }
    }
}

fn too_large(member: &str) -> String {
    format!("{member} in it unpacks to more than {} MiB", LARGEST_TEXT >> 20)
}

/// A stream that fails beyond a number of bytes: what an archive says of a member's size need not be so.
struct Bounded<'a, R> {
    inner: R,
    left: u64,
    member: &'a str,
}

impl<R: Read> Read for Bounded<'_, R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(out)?;
        self.left =
            self.left.checked_sub(n as u64).ok_or_else(|| io::Error::other(too_large(self.member)))?;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_unpacks_to_more_than_it_may_is_an_error() {
        let read =
            |left| io::copy(&mut Bounded { inner: &b"0123456789"[..], left, member: "m" }, &mut io::sink());
        assert_eq!(read(10).ok(), Some(10));
        assert!(read(9).is_err_and(|e| e.to_string().starts_with("m in it unpacks to more than")));
    }
}
