//! What a model of the hub is called.

use super::names;

/// A repository with a revision, and a file in it if one was named: `org/name[/file.gguf][@revision]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubId {
    /// `org/name`.
    pub repo: String,
    /// Branch, tag or commit.
    pub revision: String,
    /// A single file in the repository.
    pub file: Option<String>,
}

impl HubId {
    /// Reads `org/name`, `org/name@revision` or `org/name/path/file.gguf[@revision]`; `None` for anything else.
    pub fn parse(text: &str) -> Option<Self> {
        let (path, revision) = text.split_once('@').unwrap_or((text, "main"));
        let parts: Vec<&str> = path.split('/').collect();
        let (repo, file) = parts.split_at_checked(2)?;
        let id = Self {
            repo: repo.join("/"),
            revision: revision.to_string(),
            file: (!file.is_empty()).then(|| file.join("/")),
        };
        id.is_plain().then_some(id)
    }

    /// Whether all of its names are plain.
    pub(super) fn is_plain(&self) -> bool {
        let file = |f: &String| names::is_path(f) && f.ends_with(".gguf");
        names::is_repo(&self.repo) && names::is_path(&self.revision) && self.file.as_ref().is_none_or(file)
    }
}

impl std::fmt::Display for HubId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.repo)?;
        if let Some(file) = &self.file {
            write!(f, "/{file}")?;
        }
        if self.revision == "main" { Ok(()) } else { write!(f, "@{}", self.revision) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids() {
        let id = |repo: &str, revision: &str, file: Option<&str>| {
            Some(HubId { repo: repo.into(), revision: revision.into(), file: file.map(Into::into) })
        };
        assert_eq!(HubId::parse("org/a-b.c"), id("org/a-b.c", "main", None));
        assert_eq!(HubId::parse("org/name@refs/pr/1"), id("org/name", "refs/pr/1", None));
        assert_eq!(HubId::parse("org/name/q/x.gguf@v1"), id("org/name", "v1", Some("q/x.gguf")));
        for bad in [
            "name",
            "org/name/file.bin",
            "org/../x",
            "/org/name",
            "org/name@",
            "org/name@../x",
            "a b/c",
            "./x",
            "org/name/../../x.gguf",
            "org/name//x.gguf",
            "org/name/C:\\x.gguf",
        ] {
            assert_eq!(HubId::parse(bad), None, "{bad}");
        }
        let text = "org/name/x.gguf@v1";
        assert_eq!(HubId::parse(text).map(|id| id.to_string()).as_deref(), Some(text));
    }
}
