//! NVIDIA's libraries, found at run time: the driver (which comes with the GPU), NVRTC and cuBLAS (of the CUDA toolkit, or
//! of the PyPI wheels `nvidia-cuda-nvrtc` and `nvidia-cublas`).

use std::path::PathBuf;
use std::process::Command;

use libloading::Library;

use crate::{Error, Result};

/// Folders to search first, as `PATH` has them.
const VARIABLE: &str = "MINICACHE_CUDA_LIBS";

/// Major versions of the toolkit that are tried, newest first.
const VERSIONS: [u32; 2] = [13, 12];

/// Loads the driver, NVRTC and cuBLAS for good, so that whoever asks for them by name later gets these.
///
/// # Errors
/// What is missing, and how to get it.
pub(crate) fn load() -> Result<()> {
    // SAFETY: the driver's library has initialisers that are safe to run in any process.
    match unsafe { Library::new("libcuda.so.1") } {
        Ok(library) => std::mem::forget(library),
        Err(_) => {
            return Err(Error::Missing(
                "no NVIDIA driver is installed here (libcuda.so.1); use --device cpu".into(),
            ));
        }
    }
    let mut folders: Option<Vec<PathBuf>> = None;
    for (name, wheel, before) in
        [("nvrtc", "nvidia-cuda-nvrtc", "nvrtc-builtins"), ("cublas", "nvidia-cublas", "cublasLt")]
    {
        if by_name(name) {
            continue;
        }
        let folders = folders.get_or_insert_with(folders_of_this_machine);
        if !folders.iter().any(|folder| in_folder(folder, name, before)) {
            return Err(Error::Missing(format!(
                "lib{name} is not found: install the CUDA toolkit, or `pip install {wheel}`, and name its folder in {VARIABLE} if need be"
            )));
        }
    }
    Ok(())
}

/// Whether the system's loader knows the library.
fn by_name(name: &str) -> bool {
    let mut files: Vec<String> = VERSIONS.iter().map(|v| format!("lib{name}.so.{v}")).collect();
    files.push(format!("lib{name}.so"));
    files.iter().any(keep)
}

fn keep(file: impl AsRef<std::ffi::OsStr>) -> bool {
    // SAFETY: as in `load`.
    match unsafe { Library::new(file) } {
        Ok(library) => {
            std::mem::forget(library);
            true
        }
        Err(_) => false,
    }
}

/// Loads the library of a folder, and before it the one that it asks for by name.
fn in_folder(folder: &std::path::Path, name: &str, before: &str) -> bool {
    VERSIONS.iter().any(|version| {
        let file = folder.join(format!("lib{name}.so.{version}"));
        if !file.is_file() {
            return false;
        }
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(&format!("lib{before}.so.{version}")) {
                keep(entry.path());
            }
        }
        keep(file)
    })
}

/// Where toolkits and wheels are usually installed.
fn folders_of_this_machine() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = std::env::var_os(VARIABLE)
        .iter()
        .flat_map(|v| std::env::split_paths(v).collect::<Vec<_>>())
        .collect();
    for variable in ["CUDA_HOME", "CUDA_PATH"] {
        if let Some(home) = std::env::var_os(variable) {
            folders.push(PathBuf::from(&home).join("lib64"));
        }
    }
    folders.push("/usr/local/cuda/lib64".into());
    // Wheels: where the Python at hand looks for its packages.
    let script = "import sys; print('\\n'.join(sys.path))";
    let python =
        Command::new("python3").args(["-c", script]).output().map(|out| out.stdout).unwrap_or_default();
    for site in String::from_utf8_lossy(&python).lines().filter(|line| line.ends_with("-packages")) {
        for package in ["cu13", "cuda_nvrtc", "cublas"] {
            folders.push(PathBuf::from(site).join("nvidia").join(package).join("lib"));
        }
    }
    folders
}
