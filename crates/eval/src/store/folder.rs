//! A results folder and its id.

use std::fs;
use std::path::Path;

use minicache_config::atomic;

use super::{Result, StoreError, writing};

const CLONE: &str = ".clone";

/// Checks that no file is in the place of the results folder or of one above it.
///
/// # Errors
/// [`StoreError::NotAFolder`].
pub fn check_folder(results: &Path) -> Result<()> {
    match results.ancestors().find(|a| a.exists() && !a.is_dir()) {
        Some(file) => Err(StoreError::NotAFolder(file.to_path_buf())),
        None => Ok(()),
    }
}

/// The id of the results folder `results`, which tells rows that were computed for it from rows that came with the
/// checkout; `None` before the first run. It lies in `.clone`, which is no part of what is committed.
pub fn clone_id(results: &Path) -> Option<String> {
    let text = fs::read_to_string(results.join(CLONE)).ok()?;
    let id = text.trim();
    (!id.is_empty() && id.len() <= 64 && id.bytes().all(|b| b.is_ascii_hexdigit())).then(|| id.to_string())
}

/// As [`clone_id`], made where there is none: the same one for all who ask at once.
///
/// # Errors
/// A folder that cannot be written to.
pub fn make_clone_id(results: &Path) -> Result<String> {
    if let Some(id) = clone_id(results) {
        return Ok(id);
    }
    let id = format!("{:016x}", rand::random::<u64>());
    let (path, text) = (results.join(CLONE), format!("{id}\n"));
    fs::create_dir_all(results).map_err(writing(results))?;
    if !atomic::create(&path, text.as_bytes()).map_err(writing(&path))? {
        if let Some(id) = clone_id(results) {
            return Ok(id);
        }
        // Something is there that is no id.
        atomic::replace(&path, text.as_bytes()).map_err(writing(&path))?;
    }
    Ok(id)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_keeps_its_id() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(clone_id(dir.path()), None);
        let id = make_clone_id(dir.path()).unwrap();
        assert_eq!(
            (make_clone_id(dir.path()).unwrap(), clone_id(dir.path())),
            (id.clone(), Some(id.clone()))
        );
        fs::write(dir.path().join(CLONE), "../../x").unwrap();
        assert_ne!(make_clone_id(dir.path()).unwrap(), id);
    }
}
