//! Arguments of methods, by position or name.

use minijinja::Value;
use minijinja::value::Kwargs;

use super::{Result, wrong};

/// Arguments by position or name.
pub(super) struct Args {
    pub(super) given: Vec<Value>,
    pub(super) named: Kwargs,
}

impl Args {
    pub(super) fn new(args: &[Value]) -> Result<Self> {
        Ok(match args {
            [given @ .., last] if last.is_kwargs() => {
                Self { given: given.to_vec(), named: Kwargs::try_from(last.clone())? }
            }
            all => Self { given: all.to_vec(), named: std::iter::empty::<(String, Value)>().collect() },
        })
    }

    /// Checks that there are no more than `most` arguments.
    pub(super) fn at_most(&self, name: &str, most: usize) -> Result<()> {
        self.named.assert_all_used()?;
        if self.given.len() > most {
            return Err(wrong(format!(
                "{name}() takes at most {most} arguments, {} were given",
                self.given.len()
            )));
        }
        Ok(())
    }

    /// The argument at `position` or of that name; `None` where it is left out or none.
    pub(super) fn get(&self, position: usize, name: &str) -> Result<Option<Value>> {
        let value = match self.given.get(position) {
            Some(value) => Some(value.clone()),
            None => self.named.get::<Option<Value>>(name)?,
        };
        Ok(value.filter(|v| !v.is_none() && !v.is_undefined()))
    }

    pub(super) fn text(&self, position: usize, name: &str) -> Result<Option<String>> {
        let text = |v: Value| {
            v.as_str()
                .map(str::to_string)
                .ok_or_else(|| wrong(format!("`{name}` must be a string, not {}", v.kind())))
        };
        self.get(position, name)?.map(text).transpose()
    }

    pub(super) fn need_text(&self, position: usize, name: &str) -> Result<String> {
        self.text(position, name)?.ok_or_else(|| wrong(format!("`{name}` is missing or none")))
    }

    pub(super) fn integer(&self, position: usize, name: &str) -> Result<Option<i64>> {
        self.get(position, name)?
            .map(|v| i64::try_from(v).map_err(|_| wrong(format!("`{name}` must be a whole number"))))
            .transpose()
    }

    pub(super) fn need_integer(&self, position: usize, name: &str) -> Result<i64> {
        self.integer(position, name)?.ok_or_else(|| wrong(format!("`{name}` is missing or none")))
    }
}
