//! Files that appear whole or not at all, and keep their date where nothing changed.

use std::io::Write;
use std::path::Path;

use crate::error::{Result, io};

/// Writes `bytes` to `path` by way of a temporary file beside it. A file with these bytes already is left alone.
pub(crate) fn atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    if std::fs::read(path).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut partial =
        tempfile::Builder::new().prefix(".partial-").tempfile_in(folder).map_err(io(path, "write"))?;
    partial.write_all(bytes).map_err(io(path, "write"))?;
    readable(partial.as_file()).map_err(io(path, "write"))?;
    partial.persist(path).map_err(|e| io(path, "write")(e.error))?;
    Ok(())
}

/// Temporary files are for their owner only; reports are for everyone.
#[cfg(unix)]
fn readable(file: &std::fs::File) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.set_permissions(std::fs::Permissions::from_mode(0o644))
}

#[cfg(not(unix))]
fn readable(_: &std::fs::File) -> std::io::Result<()> {
    Ok(())
}
