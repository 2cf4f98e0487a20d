//! Chat templates: Jinja as transformers renders it.
//!
//! The environment is that of `transformers.utils.chat_template_utils`: blocks trimmed, loop controls, Python's methods
//! of strings, lists and dicts, `raise_exception`, `strftime_now`, and a `tojson` that escapes no HTML. Templates come
//! with models, from anyone: what one may cost is bounded (`limits`).

mod json;
mod limits;
mod python;
mod source;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind, Output, State, Value, context};
use serde::{Deserialize, Serialize};

use crate::gguf::Gguf;
use crate::tokenizer::read_json;
use crate::{Error, Result, Tokenizer};

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A turn of `role`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// A model's chat template.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    bos: String,
    eos: String,
    /// The file that it came with, to be named where it fails.
    file: Option<PathBuf>,
}

const NAME: &str = "chat_template";

impl ChatTemplate {
    /// Parses `source`; `bos` and `eos` are the texts of those tokens, for templates that write them.
    ///
    /// # Errors
    /// A template that does not parse, with its line.
    pub fn new(source: &str, bos: impl Into<String>, eos: impl Into<String>) -> Result<Self> {
        let source = source::translate(source).map_err(Error::Chat)?;
        let environment = limits::bounded(move || environment(source).map_err(|e| described(&e)));
        let environment = Arc::new(environment.map_err(Error::Chat)?);
        Ok(Self { environment, bos: bos.into(), eos: eos.into(), file: None })
    }

    /// The template of a model directory: `chat_template.jinja`, or `chat_template` in `tokenizer_config.json` (a
    /// string, or a list of which the one named `default` counts). `None` if the directory has none.
    ///
    /// # Errors
    /// Files that cannot be read, a template that does not parse.
    pub fn from_dir(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join("tokenizer_config.json");
        let config = if path.is_file() { read_json(&path)? } else { serde_json::Value::Null };
        let token = |key: &str| {
            let value = &config[key];
            value.as_str().or_else(|| value["content"].as_str()).unwrap_or_default().to_string()
        };
        let file = dir.join("chat_template.jinja");
        let (source, file) = if file.is_file() {
            (Some(minicache_config::read_text(&file)?), file)
        } else {
            (default_template(&config["chat_template"]), path)
        };
        source
            .map(|s| Self::new(&s, token("bos_token"), token("eos_token")).map(|t| t.of(&file)))
            .transpose()
            .map_err(|e| Error::file(&file, e.to_string()))
    }

    /// The template in a GGUF file's metadata. `None` if it has none.
    ///
    /// # Errors
    /// A template that does not parse.
    pub fn from_gguf(gguf: &Gguf, tokenizer: Option<&Tokenizer>) -> Result<Option<Self>> {
        let Some(source) = gguf.text("tokenizer.chat_template") else { return Ok(None) };
        let text =
            |id: Option<u32>| id.zip(tokenizer).and_then(|(id, t)| t.id_to_token(id)).unwrap_or_default();
        let (bos, eos) = (tokenizer.and_then(Tokenizer::bos), tokenizer.and_then(Tokenizer::eos));
        Self::new(source, text(bos), text(eos)).map(|t| Some(t.of(gguf.path())))
    }

    fn of(self, file: &Path) -> Self {
        Self { file: Some(file.to_path_buf()), ..self }
    }

    /// The conversation as the model was trained to read it; with `add_generation_prompt` the opening of an answer
    /// follows. Special tokens are written out: encode the text without adding any.
    ///
    /// # Errors
    /// A conversation that the template refuses (two user turns in a row, a system turn it does not know); a template
    /// that costs more than any honest one does.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        self.render_with(messages, add_generation_prompt, serde_json::Map::new())
    }

    /// [`ChatTemplate::render`] with further variables, such as `tools` or `date_string`: a map.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn render_with(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        variables: impl Serialize,
    ) -> Result<String> {
        let own = context! {
            messages => Value::from(Serde(messages)),
            // transformers passes these, and none where there are none.
            tools => Value::from(()),
            documents => Value::from(()),
            add_generation_prompt => add_generation_prompt,
            bos_token => self.bos.as_str(),
            eos_token => self.eos.as_str(),
        };
        let variables = context! { ..Value::from(Serde(variables)), ..own };
        let environment = Arc::clone(&self.environment);
        let render = move || {
            let template = environment.get_template(NAME).map_err(|e| described(&e))?;
            template.render(variables).map_err(|e| described(&e))
        };
        limits::bounded(render).map_err(Error::Chat).map_err(|error| match &self.file {
            Some(file) => Error::file(file, error.to_string()),
            None => error,
        })
    }
}

/// The environment of transformers' templates with one template in it.
fn environment(source: String) -> std::result::Result<Environment<'static>, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_fuel(Some(limits::FUEL));
    environment.set_unknown_method_callback(python::method);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_formatter(print);
    environment.remove_global("debug");
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_function(source::MODULO, python::modulo_function);
    environment.add_function(source::KEEP, limits::keep);
    environment.add_function(source::KEEP_IN_NAMESPACE, limits::keep_in_namespace);
    environment.add_filter("tojson", json::to_json);
    environment.add_filter("center", python::center);
    environment.add_template_owned(NAME, source)?;
    Ok(environment)
}

/// Writes what `{{ }}` gives, as Python writes it, and no more than the fuel that is left pays for.
fn print(out: &mut Output, state: &mut State, value: &Value) -> std::result::Result<(), minijinja::Error> {
    let left = state.fuel_levels().map_or(u64::MAX, |(_, left)| left.saturating_mul(64));
    let left = usize::try_from(left).unwrap_or(usize::MAX);
    let mut capped = python::Capped { out: |text: &str| out.write_str(text), left, written: 0 };
    python::write_str(&mut capped, value).map_err(|_| minijinja::Error::from(ErrorKind::OutOfFuel))
}

fn default_template(value: &serde_json::Value) -> Option<String> {
    if let Some(text) = value.as_str() {
        return Some(text.to_string());
    }
    let named: Vec<_> = value
        .as_array()?
        .iter()
        .filter_map(|t| Some((t["name"].as_str()?, t["template"].as_str()?)))
        .collect();
    let default = named
        .iter()
        .find(|(name, _)| *name == "default")
        .or_else(|| named.first().filter(|_| named.len() == 1));
    default.map(|(_, template)| (*template).to_string())
}

/// What went wrong, in the words of a message, with the line.
fn described(error: &minijinja::Error) -> String {
    let detail = match (error.kind(), error.detail()) {
        (ErrorKind::OutOfFuel, _) => "takes more steps or makes more text than a chat template needs",
        (_, Some(detail)) => detail,
        (kind, None) => return minicache_config::shown(&format!("{kind}{}", line(error))),
    };
    // The words may be the template's own, as those of `raise_exception` are.
    let detail: Vec<&str> = detail.split_whitespace().collect();
    let mut detail = minicache_config::escaped(&detail.join(" "));
    if let Some((cut, _)) = detail.char_indices().nth(300) {
        detail.truncate(cut);
        detail.push('…');
    }
    format!("{detail}{}", line(error))
}

fn line(error: &minijinja::Error) -> String {
    error.line().map(|l| format!(" (line {l})")).unwrap_or_default()
}

fn raise_exception(message: String) -> std::result::Result<String, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

/// The time now, in UTC, in the form that Python's `strftime` would give it.
fn strftime_now(format: &str) -> std::result::Result<String, minijinja::Error> {
    let mut text = String::new();
    write!(text, "{}", chrono::Utc::now().format(format)).map_err(|_| {
        minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now: bad format {format:?}"))
    })?;
    Ok(text)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn render(source: &str, messages: &[Message]) -> Result<String> {
        ChatTemplate::new(source, "<s>", "</s>")?.render(messages, true)
    }

    fn talk() -> Vec<Message> {
        vec![
            Message::new("system", " be <brief> "),
            Message::new("user", "hi"),
            Message::new("assistant", "yo"),
        ]
    }

    #[test]
    fn llama2_template() {
        let source = "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}";
        let expected = "<s>[INST] <<SYS>>\n be <brief> \n<</SYS>>\n\nhi [/INST] yo </s>";
        assert_eq!(render(source, &talk()).unwrap(), expected);
        let twice = [Message::new("user", "a"), Message::new("user", "b")];
        let message = render(source, &twice).unwrap_err().to_string();
        assert!(message.contains("Conversation roles must alternate"), "{message}");
    }

    #[test]
    fn blocks_are_trimmed_and_loops_controlled() {
        let source = "{%- for m in messages %}\n    {%- if m.role == 'system' %}\n        {%- continue %}\n    {%- endif %}\n  {% if true %}\n{{ m.content | upper }}\n  {% endif %}\n{%- endfor %}";
        assert_eq!(render(source, &talk()).unwrap(), "HI\nYO\n");
    }

    #[test]
    fn python_methods_and_namespaces() {
        let source = "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + m['content'].split('e')|length %}{% endfor %}{{ ns.n }} {{ messages[0].content.strip().startswith('be') }} {{ messages[1].get('x', 'none') }} {{ messages[-1]['role'].title() }} {% if tools is none %}no tools{% else %}tools{% endif %}";
        assert_eq!(render(source, &talk()).unwrap(), "5 True none Assistant no tools");
    }

    #[test]
    fn json_is_pythons() {
        let source =
            "{{ messages[:1] | tojson }}|{{ messages[0] | tojson(indent=2) }}|{{ {} | tojson(indent=2) }}";
        let expected = "[{\"role\": \"system\", \"content\": \" be <brief> \"}]|{\n  \"role\": \"system\",\n  \"content\": \" be <brief> \"\n}|{}";
        assert_eq!(render(source, &talk()).unwrap(), expected);
    }

    #[test]
    fn generation_tags_are_transparent() {
        let source = "a {% generation %}b{% endgeneration %}\n {%- generation -%} c {%- endgeneration %}.";
        assert_eq!(render(source, &[]).unwrap(), "a bc.");
    }

    #[test]
    fn dates_and_variables() {
        let template =
            ChatTemplate::new("{{ date_string }} {{ strftime_now('%Y') | length }}", "", "").unwrap();
        let variables = serde_json::json!({"date_string": "26 Jul 2024"});
        assert_eq!(template.render_with(&[], false, variables).unwrap(), "26 Jul 2024 4");
        assert!(template.render(&[], false).unwrap().starts_with(' '));
    }

    #[test]
    fn a_broken_template_is_one_line() {
        let message = ChatTemplate::new("{% if %}", "", "").unwrap_err().to_string();
        assert!(message.starts_with("chat template: ") && !message.contains('\n'), "{message}");
    }

    #[test]
    fn template_lists() {
        let list =
            serde_json::json!([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]);
        assert_eq!(default_template(&list).as_deref(), Some("d"));
        assert_eq!(default_template(&serde_json::Value::Null), None);
    }
}
