//! Chat templates: Jinja as transformers renders it.
//!
//! The environment is that of `transformers.utils.chat_template_utils`: blocks trimmed, loop controls, Python's string
//! and dict methods, `raise_exception`, `strftime_now`, and a `tojson` that escapes no HTML.

use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Serde};
use minijinja::{Environment, ErrorKind, Value, context};
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
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

const NAME: &str = "chat_template";

impl ChatTemplate {
    /// Parses `source`; `bos` and `eos` are the texts of those tokens, for templates that write them.
    ///
    /// # Errors
    /// A template that does not parse, with its line.
    pub fn new(source: &str, bos: impl Into<String>, eos: impl Into<String>) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax =
            SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(|e| failed(&e))?;
        environment.set_syntax(syntax);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", to_json);
        environment.add_template_owned(NAME, without_generation_tags(source)).map_err(|e| failed(&e))?;
        Ok(Self { environment, bos: bos.into(), eos: eos.into() })
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
        let source = if file.is_file() {
            Some(std::fs::read_to_string(&file).map_err(Error::io(&file))?)
        } else {
            default_template(&config["chat_template"])
        };
        source.map(|s| Self::new(&s, token("bos_token"), token("eos_token"))).transpose()
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
        Self::new(source, text(bos), text(eos)).map(Some)
    }

    /// The conversation as the model was trained to read it; with `add_generation_prompt` the opening of an answer
    /// follows. Special tokens are written out: encode the text without adding any.
    ///
    /// # Errors
    /// A conversation that the template refuses (two user turns in a row, a system turn it does not know).
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
        let template = self.environment.get_template(NAME).map_err(|e| failed(&e))?;
        let own = context! {
            messages => Value::from(Serde(messages)),
            add_generation_prompt => add_generation_prompt,
            bos_token => self.bos.as_str(),
            eos_token => self.eos.as_str(),
        };
        let variables = context! { ..own, ..Value::from(Serde(variables)) };
        template.render(variables).map_err(|e| failed(&e))
    }
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

/// transformers marks what the assistant said with `{% generation %}`; for rendering, a block that always holds.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else { break };
        let (open, close) = (start + 2, start + length);
        out.push_str(&rest[..open]);
        let tag = &rest[open..close];
        match tag.trim_matches(['-', '+']).trim() {
            "generation" => out.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", "endif")),
            _ => out.push_str(tag),
        }
        out.push_str("%}");
        rest = &rest[close + 2..];
    }
    out.push_str(rest);
    out
}

fn failed(error: &minijinja::Error) -> Error {
    let detail = error.detail().map_or_else(|| error.kind().to_string(), str::to_string);
    let line = error.line().map(|l| format!(" (line {l})")).unwrap_or_default();
    Error::Chat(format!("{detail}{line}"))
}

fn raise_exception(message: String) -> std::result::Result<String, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

/// The time now, in UTC, in the form that Python's `strftime` would give it.
fn strftime_now(format: &str) -> std::result::Result<String, minijinja::Error> {
    use std::fmt::Write as _;
    let mut text = String::new();
    write!(text, "{}", chrono::Utc::now().format(format)).map_err(|_| {
        minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now: bad format {format:?}"))
    })?;
    Ok(text)
}

/// `json.dumps(value, ensure_ascii=False, indent=indent, separators=..)`. minijinja's own filter writes `<` as `\u003c`.
fn to_json(
    value: &Value,
    rest: Rest<Value>,
    options: Kwargs,
) -> std::result::Result<Value, minijinja::Error> {
    let indent = match rest.first() {
        Some(given) => Some(given.clone()),
        None => options.get::<Option<Value>>("indent")?,
    };
    let indent = indent.filter(|i| !i.is_none() && !i.is_undefined()).map(usize::try_from).transpose()?;
    let separators = options.get::<Option<Vec<String>>>("separators")?;
    let _ = options.get::<Option<bool>>("ensure_ascii")?;
    let sort_keys = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    options.assert_all_used()?;
    let bad = |e: serde_json::Error| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string());
    let mut json = serde_json::to_value(value).map_err(bad)?;
    if sort_keys {
        json.sort_all_objects();
    }
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        // Python's defaults: no space behind a comma that ends a line.
        _ if indent.is_some() => (",".to_string(), ": ".to_string()),
        _ => (", ".to_string(), ": ".to_string()),
    };
    let mut out = Vec::new();
    let format = PythonJson { item, key, indent, depth: 0, filled: Vec::new() };
    json.serialize(&mut serde_json::Serializer::with_formatter(&mut out, format)).map_err(bad)?;
    Ok(Value::from_safe_string(String::from_utf8_lossy(&out).into_owned()))
}

/// The spacing of Python's `json.dumps`.
struct PythonJson {
    item: String,
    key: String,
    indent: Option<usize>,
    depth: usize,
    /// Whether the containers that are open hold anything yet.
    filled: Vec<bool>,
}

type Written = std::io::Result<()>;

impl PythonJson {
    fn line<W: ?Sized + std::io::Write>(&self, out: &mut W) -> Written {
        match self.indent {
            Some(width) => write!(out, "\n{:1$}", "", width * self.depth),
            None => Ok(()),
        }
    }

    fn open<W: ?Sized + std::io::Write>(&mut self, out: &mut W, bracket: &[u8]) -> Written {
        self.depth += 1;
        self.filled.push(false);
        out.write_all(bracket)
    }

    fn next<W: ?Sized + std::io::Write>(&mut self, out: &mut W, first: bool) -> Written {
        if !first {
            out.write_all(self.item.as_bytes())?;
        }
        if let Some(filled) = self.filled.last_mut() {
            *filled = true;
        }
        self.line(out)
    }

    fn close<W: ?Sized + std::io::Write>(&mut self, out: &mut W, bracket: &[u8]) -> Written {
        self.depth -= 1;
        if self.filled.pop() == Some(true) {
            self.line(out)?;
        }
        out.write_all(bracket)
    }
}

impl serde_json::ser::Formatter for PythonJson {
    fn begin_array<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> Written {
        self.open(out, b"[")
    }
    fn end_array<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> Written {
        self.close(out, b"]")
    }
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W, first: bool) -> Written {
        self.next(out, first)
    }
    fn begin_object<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> Written {
        self.open(out, b"{")
    }
    fn end_object<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> Written {
        self.close(out, b"}")
    }
    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, out: &mut W, first: bool) -> Written {
        self.next(out, first)
    }
    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> Written {
        out.write_all(self.key.as_bytes())
    }
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
        let source = "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + m['content'].split('e')|length %}{% endfor %}{{ ns.n }} {{ messages[0].content.strip().startswith('be') }} {{ messages[1].get('x', 'none') }} {{ messages[-1]['role'].title() }} {% if tools is defined %}tools{% else %}no tools{% endif %}";
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
