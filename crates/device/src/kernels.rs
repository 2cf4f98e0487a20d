//! The kernels' sources, and where they are kept when they are compiled.

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::{Error, Result};

const COMMON: &str = include_str!("../cuda/common.h");
const EMULATED: &str = include_str!("../cuda/emulated.h");
const TABLES: &str = include_str!("../cuda/tables.h");
const SCHEME: &str = include_str!("../cuda/scheme.h");
const WEIGH: &str = include_str!("../cuda/weigh.h");
const LATENT: &str = include_str!("../cuda/latent.h");
const SLOTS: &str = include_str!("../cuda/slots.h");

/// A file of kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum File {
    /// Between linear layers.
    Layers,
    /// Attention over what is held.
    Attention,
    /// Attention of a prefill's tokens to each other.
    Prefill,
    /// Merging, keeping, packing.
    Store,
    /// Attention over latents.
    Latent,
    /// Encoding of latents.
    LatentStore,
    /// Attention over what methods that drop tokens hold.
    Slots,
    /// What these drop.
    Evict,
    /// What queries to come are expected to look at.
    Expect,
}

impl File {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Layers,
        Self::Attention,
        Self::Prefill,
        Self::Store,
        Self::Latent,
        Self::LatentStore,
        Self::Slots,
        Self::Evict,
        Self::Expect,
    ];

    /// Its name, what it includes, its text, and its kernels.
    fn parts(self) -> (&'static str, &'static [&'static str], &'static str, &'static [&'static str]) {
        match self {
            File::Layers => (
                "layers.cu",
                &[],
                include_str!("../cuda/layers.cu"),
                &["embed", "rms_norm", "rotate", "swiglu", "gather", "scatter_add", "noise", "best", "score"],
            ),
            File::Attention => (
                "attention.cu",
                &[TABLES, SCHEME, WEIGH],
                include_str!("../cuda/attention.cu"),
                &["attend_held", "join"],
            ),
            File::Prefill => ("prefill.cu", &[TABLES], include_str!("../cuda/prefill.cu"), &["attend_step"]),
            File::Store => (
                "store.cu",
                &[TABLES, SCHEME],
                include_str!("../cuda/store.cu"),
                &["merge", "retain", "settle", "forget", "keep", "pack", "restore"],
            ),
            File::Latent => (
                "latent.cu",
                &[TABLES, LATENT, WEIGH],
                include_str!("../cuda/latent.cu"),
                &["map_queries", "attend_latents", "join_latents"],
            ),
            File::LatentStore => (
                "latent_store.cu",
                &[TABLES, LATENT],
                include_str!("../cuda/latent_store.cu"),
                &["keep_exact", "encode", "write_latents", "restore_latents"],
            ),
            File::Slots => (
                "slots.cu",
                &[TABLES, SCHEME, SLOTS],
                include_str!("../cuda/slots.cu"),
                &["attend_slots", "weigh", "receive"],
            ),
            File::Evict => (
                "evict.cu",
                &[TABLES, SCHEME, SLOTS],
                include_str!("../cuda/evict.cu"),
                &["keep_slots", "move_slots"],
            ),
            File::Expect => (
                "expect.cu",
                &[TABLES, SCHEME, SLOTS],
                include_str!("../cuda/expect.cu"),
                &["expect_mean", "expect_spread", "expect_logits", "expect"],
            ),
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        self.parts().0
    }

    /// Its kernels, in the order in which [`crate::driver::Driver::compile`] gives them.
    pub fn kernels(self) -> &'static [&'static str] {
        self.parts().3
    }
}

/// A file of kernels with what it is specialised to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Source {
    /// The file.
    pub file: File,
    /// Macros that it reads.
    pub macros: Vec<(&'static str, i64)>,
    /// Threads of a block.
    pub threads: u32,
}

impl Source {
    /// The whole text, for the host's compiler or for NVRTC.
    pub fn text(&self, emulated: bool) -> String {
        let mut text = String::new();
        if emulated {
            text.push_str("#define EMULATED 1\n");
        }
        for (name, value) in &self.macros {
            let _ = writeln!(text, "#define {name} {value}");
        }
        let _ = writeln!(text, "#define THREADS {}", self.threads);
        if emulated {
            text.push_str(EMULATED);
        }
        text.push_str(COMMON);
        let (_, includes, own, _) = self.file.parts();
        includes.iter().for_each(|include| text.push_str(include));
        text.push_str(own);
        text
    }
}

/// The folder of compiled kernels: `MINICACHE_KERNELS`, or the user's cache folder.
fn folder() -> PathBuf {
    let of = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    of("MINICACHE_KERNELS")
        .or_else(|| of("XDG_CACHE_HOME").map(|dir| dir.join("minicache/kernels")))
        .or_else(|| of("HOME").map(|home| home.join(".cache/minicache/kernels")))
        .unwrap_or_else(|| std::env::temp_dir().join("minicache-kernels"))
}

/// The file of what `text` becomes for `target` (architecture, compiler with its version, options), made by `compile` if
/// it is not there. It appears whole or not at all, so that many may compile at once.
pub(crate) fn compiled(
    text: &str,
    target: &str,
    extension: &str,
    compile: impl FnOnce(&Path) -> Result<Vec<u8>>,
) -> Result<PathBuf> {
    let digest = Sha256::new().chain_update(target).chain_update([0]).chain_update(text).finalize();
    let name: String = digest.iter().take(16).map(|b| format!("{b:02x}")).collect();
    let folder = folder();
    let path = folder.join(format!("{name}.{extension}"));
    if path.is_file() {
        return Ok(path);
    }
    let error = |path: &Path| {
        let path = path.to_path_buf();
        move |source| Error::File { path, source }
    };
    fs::create_dir_all(&folder).map_err(error(&folder))?;
    let work = tempfile::tempdir_in(&folder).map_err(error(&folder))?;
    let code = compile(work.path())?;
    let mut file = tempfile::NamedTempFile::new_in(work.path()).map_err(error(&folder))?;
    file.write_all(&code).map_err(error(&path))?;
    file.persist(&path).map_err(|e| Error::File { path: path.clone(), source: e.error })?;
    Ok(path)
}
