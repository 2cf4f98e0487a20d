//! Chat templates against Jinja2 as transformers sets it up.

use minicache_models::{ChatTemplate, Message};
use serde_json::Value;

use super::gguf::fixture;

fn table(name: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(fixture("chat").join(name)).unwrap()).unwrap()
}

fn render(source: &str, messages: &[Message]) -> Result<String, String> {
    let template = ChatTemplate::new(source, "<s>", "</s>").map_err(|e| e.to_string())?;
    template.render(messages, true).map_err(|e| e.to_string())
}

/// Beginnings of snippets that are known to come out differently, or are refused: escapes of bytes, Jinja2's filters for
/// web pages, and tests and globals that no chat template uses.
const UNLIKE: [&str; 12] = [
    r"{{ '\d\/\é' }}",
    "{{ 'a' is sequence",
    "{{ f is callable",
    "{{ {} is sequence",
    "{{ 'a b c'|wordcount",
    "{{ 'hello world foo'|truncate",
    "{{ 'a b c d'|wordwrap",
    "{{ '<p>x</p> y'|striptags",
    "{{ 'a b&c'|urlencode",
    "{{ 1234567|filesizeformat",
    "{% set x = 1 %}{% for i in [1] %}{% set x = 2 %}{% endfor %}{{ x }} {% if true %}{% set x = 3 %}{% endif %}{{ x }} {{ range(3)|list }} {{ dict(a=1, b='x') }} {{ cycler",
    "{{ 'a'.upper }}",
];

#[test]
fn snippets_are_rendered_as_jinja2_renders_them() {
    let table = table("jinja.json");
    let messages: Vec<Message> = serde_json::from_value(table["messages"].clone()).unwrap();
    let mut wrong = Vec::new();
    for case in table["cases"].as_array().unwrap() {
        let source = case["source"].as_str().unwrap();
        let ours = render(source, &messages);
        let known = UNLIKE.iter().any(|beginning| source.starts_with(beginning));
        let alike = match (&ours, case["result"].as_str()) {
            (Ok(ours), Some(theirs)) => ours == theirs,
            (ours, theirs) => ours.is_err() && theirs.is_none(),
        };
        match alike {
            true if !known => {}
            false if known => {}
            _ => wrong.push(format!("{source}\n  ours:   {ours:?}\n  theirs: {}", case["result"])),
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}
