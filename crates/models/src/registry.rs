//! Models by name: where their weights are and what shape their cache has.
//!
//! The list is data, `registry.toml` beside the manifest of this crate, and a user's file of the same form extends it.

use std::path::{Path, PathBuf};

use minicache_config::ConfigError;
use minicache_core::ModelShape;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

const BUILT_IN: &str = include_str!("../registry.toml");
/// The environment variable that names a user's registry file.
pub const VARIABLE: &str = "MINICACHE_MODELS";
const USER_FILE: &str = "models.toml";

/// One model of the registry.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// The name that `--model` takes.
    pub name: String,
    /// Other names for it.
    #[serde(default)]
    pub aliases: Vec<String>,
    /// The name in reports; empty: `name`.
    #[serde(default)]
    pub title: String,
    /// Hugging Face repository.
    pub hub: Option<String>,
    /// Branch, tag or commit of the repository.
    #[serde(default = "main_branch")]
    pub revision: String,
    /// Local weights: a directory or a `.gguf` file, used before the hub.
    pub file: Option<PathBuf>,
    /// How to get `file`.
    pub mend: Option<String>,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Size of one head.
    pub head_dim: usize,
    /// Size of the residual stream.
    pub hidden: usize,
    /// Longest sequence, in tokens.
    pub context: usize,
    /// Sliding window, in tokens.
    pub window: Option<usize>,
    /// Type of the published weights.
    pub dtype: String,
    /// Whether the hub asks for an agreement first.
    #[serde(default)]
    pub gated: bool,
    /// Where the licence is.
    #[serde(default)]
    pub license: String,
}

fn main_branch() -> String {
    "main".to_string()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    #[serde(default)]
    model: Vec<Entry>,
}

impl Entry {
    /// What a cache has to know, without any weights.
    pub fn shape(&self) -> ModelShape {
        ModelShape {
            layers: self.layers,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            window: self.window,
            scale: (1.0 / (self.head_dim as f64).sqrt()) as f32,
            ..ModelShape::PLAIN
        }
    }

    /// The name for reports.
    pub fn title(&self) -> &str {
        if self.title.is_empty() { &self.name } else { &self.title }
    }

    /// The local weights, if they are there. A relative path is looked for below the working directory and below each
    /// of its parents, then below the parents of the running program.
    pub fn local(&self) -> Option<PathBuf> {
        let file = self.file.as_deref()?;
        if file.is_absolute() {
            return file.exists().then(|| file.to_path_buf());
        }
        let starts = [std::env::current_dir().ok(), std::env::current_exe().ok()];
        let above = starts.iter().flatten().flat_map(|start| start.ancestors());
        above.map(|dir| dir.join(file)).find(|path| path.exists())
    }

    fn answers_to(&self, name: &str) -> bool {
        self.name.eq_ignore_ascii_case(name) || self.aliases.iter().any(|a| a.eq_ignore_ascii_case(name))
    }

    fn check(&self) -> std::result::Result<(), ConfigError> {
        let sizes = [
            ("layers", self.layers),
            ("heads", self.heads),
            ("kv_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("hidden", self.hidden),
            ("context", self.context),
            ("window", self.window.unwrap_or(1)),
        ];
        if let Some((key, _)) = sizes.iter().find(|(_, n)| *n == 0) {
            return Err(ConfigError::new(*key, "must be at least 1"));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let message = format!("{} does not divide heads = {}", self.kv_heads, self.heads);
            return Err(ConfigError::new("kv_heads", message));
        }
        if self.hub.is_none() && self.file.is_none() {
            return Err(ConfigError::new("hub", "either hub or file must say where the weights are"));
        }
        Ok(())
    }
}

/// The models that have a name.
#[derive(Debug, Clone, PartialEq)]
pub struct Registry {
    entries: Vec<Entry>,
}

impl Registry {
    /// The models that ship with this crate.
    ///
    /// # Errors
    /// None, unless the crate's own list is broken.
    pub fn built_in() -> Result<Self> {
        let mut registry = Self { entries: Vec::new() };
        registry.extend(BUILT_IN, Path::new("registry.toml"))?;
        Ok(registry)
    }

    /// The built-in models and those of the user's file: `MINICACHE_MODELS`, or `models.toml` in the working directory.
    ///
    /// # Errors
    /// A file that cannot be read or has a mistake, with its line.
    pub fn load() -> Result<Self> {
        let mut registry = Self::built_in()?;
        let named = std::env::var_os(VARIABLE).filter(|v| !v.is_empty()).map(PathBuf::from);
        let user = named.or_else(|| Some(PathBuf::from(USER_FILE)).filter(|p| p.is_file()));
        if let Some(path) = user {
            registry.extend_from(&path)?;
        }
        Ok(registry)
    }

    /// Adds the models of a file; those that are there already are replaced.
    ///
    /// # Errors
    /// A file that cannot be read or has a mistake, with its line.
    pub fn extend_from(&mut self, path: &Path) -> Result<()> {
        let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
        let known = self.entries.len();
        let changed = self.extend(&text, path)?;
        let dir = path.parent().unwrap_or(Path::new(""));
        for (index, entry) in self.entries.iter_mut().enumerate() {
            if index >= known || changed.contains(&index) {
                entry.file = entry.file.take().map(|f| absolute(&dir.join(f)));
            }
        }
        Ok(())
    }

    /// Gives the indices of entries that were replaced.
    fn extend(&mut self, text: &str, path: &Path) -> Result<Vec<usize>> {
        let document: Document = minicache_config::toml_from_str(text).map_err(|e| {
            let line = e.span().map(|s| text[..s.start.min(text.len())].matches('\n').count() + 1);
            let message = e.message().lines().map(str::trim).collect::<Vec<_>>().join("; ");
            ConfigError { file: Some(path.to_path_buf()), line, key: String::new(), message }
        })?;
        let mut changed = Vec::new();
        for (index, entry) in document.model.into_iter().enumerate() {
            entry.check().map_err(|e| e.under(&format!("model.{index}")).in_file(path, text))?;
            match self.entries.iter().position(|e| e.name == entry.name) {
                Some(at) => {
                    self.entries[at] = entry;
                    changed.push(at);
                }
                None => self.entries.push(entry),
            }
        }
        Ok(changed)
    }

    /// All models, in the order of their files.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// A model by name or alias, whatever its case. What was added later is found first.
    ///
    /// # Errors
    /// An unknown name, with those that are close to it.
    pub fn get(&self, name: &str) -> Result<&Entry> {
        self.find(name).ok_or_else(|| self.unknown(name))
    }

    /// [`Registry::get`], or `None`.
    pub fn find(&self, name: &str) -> Option<&Entry> {
        let by_name = self.entries.iter().find(|e| e.name.eq_ignore_ascii_case(name));
        by_name.or_else(|| self.entries.iter().rev().find(|e| e.answers_to(name)))
    }

    fn unknown(&self, name: &str) -> Error {
        let near = self.near(name);
        let hint = if near.is_empty() {
            "`minicache models` lists the known ones".to_string()
        } else {
            format!("did you mean {}?", near.join(", "))
        };
        Error::Registry(format!(
            "{name:?} is no model's name, directory, .gguf file or hub id (org/name); {hint}"
        ))
    }

    /// Names that look like `name`, at most four, best first.
    fn near(&self, name: &str) -> Vec<&str> {
        let name = name.to_ascii_lowercase();
        let distance = |candidate: &str| {
            let candidate = candidate.to_ascii_lowercase();
            // A part of a name is nearer than any misspelling of it.
            if name.len() >= 3 && candidate.contains(&name) { 0 } else { edits(&name, &candidate) }
        };
        let mut ranked: Vec<(usize, &str)> = self
            .entries
            .iter()
            .map(|e| {
                let names = std::iter::once(&e.name).chain(&e.aliases);
                (names.map(|n| distance(n)).min().unwrap_or(usize::MAX), e.name.as_str())
            })
            .filter(|(d, _)| *d <= name.chars().count() / 3)
            .collect();
        ranked.sort_by_key(|(d, _)| *d);
        ranked.into_iter().take(4).map(|(_, n)| n).collect()
    }
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf())
}

/// Levenshtein distance: insertions, deletions and replacements between two words.
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_papers_models_are_there() {
        let registry = Registry::built_in().unwrap();
        // Layers, KV heads and head size decide what a cache costs: bytes of one FP16 token.
        let per_token = |name: &str| registry.get(name).unwrap().shape().full_bytes(1);
        assert_eq!(per_token("llama-2-7b"), 512 * 1024);
        assert_eq!(per_token("llama-2-13b-chat"), 800 * 1024);
        assert_eq!(per_token("llama-3-8b"), 128 * 1024);
        assert_eq!(per_token("LLaMA-3-70B-Instruct"), 320 * 1024);
        assert_eq!(per_token("phi-3-mini-128k"), 384 * 1024);
        assert_eq!(per_token("mixtral"), 128 * 1024);
        assert_eq!(per_token("smollm2-135m"), 2 * 2 * 30 * 3 * 64);
        assert_eq!(per_token("qwen2.5-coder"), 2 * 2 * 28 * 2 * 128);
        assert_eq!(registry.get("mistral-7b").unwrap().shape().window, Some(4096));
        assert_eq!(registry.get("mistral-7b-instruct").unwrap().shape().window, None);
        assert!(registry.get("llama-2-7b").unwrap().gated);
    }

    #[test]
    fn names_and_aliases_are_unique() {
        let registry = Registry::built_in().unwrap();
        let mut names: Vec<_> =
            registry.entries().iter().flat_map(|e| e.aliases.iter().chain([&e.name])).collect();
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
        for entry in registry.entries() {
            assert!(entry.license.starts_with("https://"), "{}", entry.name);
        }
    }

    #[test]
    fn the_models_that_a_script_fetches_are_those_of_the_script() {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/fetch-model");
        let script = std::fs::read_to_string(script).unwrap();
        let registry = Registry::built_in().unwrap();
        let mut fetched = Vec::new();
        for entry in registry.entries() {
            let Some(name) = entry.mend.as_deref().and_then(|m| m.strip_prefix("run scripts/fetch-model "))
            else {
                continue;
            };
            assert_eq!(name, entry.name);
            let file = entry.file.as_deref().unwrap().strip_prefix("models").unwrap().display();
            let place = script.find(&format!("\"{name}\": Model(\n")).unwrap();
            let lines = format!("        title={:?},\n        file=\"{file}\",\n", entry.title);
            assert!(script[place..].lines().skip(1).take(2).eq(lines.lines()), "{name}: {lines}");
            fetched.push(name);
        }
        assert_eq!(fetched.len(), script.matches(": Model(\n").count(), "{fetched:?}");
        assert!(script.contains(&format!("DEFAULT = {:?}", registry.get("default").unwrap().name)));
    }

    #[test]
    fn near_names_are_offered() {
        let registry = Registry::built_in().unwrap();
        let message = registry.get("lama-2-7b").unwrap_err().to_string();
        assert!(message.contains("did you mean llama-2-7b"), "{message}");
        let message = registry.get("smollm").unwrap_err().to_string();
        assert!(message.contains("smollm2-135m"), "{message}");
        let message = registry.get("zzzzzz").unwrap_err().to_string();
        assert!(message.contains("`minicache models`"), "{message}");
    }

    #[test]
    fn a_user_file_adds_and_replaces() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("models.toml");
        let entry = "[[model]]\nname = \"NAME\"\nfile = \"w/x.gguf\"\nlayers = 2\nheads = 4\nkv_heads = KV\nhead_dim = 8\nhidden = 32\ncontext = 64\ndtype = \"f32\"\n";
        let write = |text: String| std::fs::write(&path, text).unwrap();
        let own = entry.replace("NAME", "mine").replace("KV", "2");
        write(own.clone() + &entry.replace("NAME", "mistral-7b").replace("KV", "4"));
        let mut registry = Registry::built_in().unwrap();
        let before = registry.entries().len();
        registry.extend_from(&path).unwrap();
        assert_eq!(registry.entries().len(), before + 1);
        assert_eq!(
            registry.get("mine").unwrap().file.as_deref(),
            Some(dir.path().join("w/x.gguf").as_path())
        );
        assert_eq!(registry.get("mistral-7b").unwrap().layers, 2);

        write(own.replace("kv_heads = 2", "kv_heads = 3"));
        let message = registry.extend_from(&path).unwrap_err().to_string();
        assert!(
            message.ends_with("models.toml:6: model.0.kv_heads: 3 does not divide heads = 4"),
            "{message}"
        );
        write(own + "head_size = 4\n");
        let message = registry.extend_from(&path).unwrap_err().to_string();
        assert!(message.contains("models.toml:11: ") && message.contains("head_size"), "{message}");
    }

    #[test]
    fn edit_distance() {
        assert_eq!(edits("kitten", "sitting"), 3);
        assert_eq!(edits("", "abc"), 3);
        assert_eq!(edits("same", "same"), 0);
    }
}
