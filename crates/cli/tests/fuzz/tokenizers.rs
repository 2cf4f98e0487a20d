//! Tokenizers and chat templates: those that still load also read and write a text.

use std::fs;
use std::path::Path;

use minicache_models::{ChatTemplate, Message, Tokenizer};

use crate::models::fixture;
use crate::mutate::{Seeds, Shape};
use crate::{Format, Outcome, line};

const TOKENIZER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tokenizer.json");

pub(crate) fn speak(tokenizer: &Tokenizer) -> Outcome {
    let ids = tokenizer.encode("Hello  wörld, it's 1234\n<mark> 中", true).map_err(line)?;
    tokenizer.decode(&ids, false).map_err(line)?;
    tokenizer.decode(&[0, 1, 2, u32::MAX], true).map(drop).map_err(line)
}

pub(crate) fn talk(template: &ChatTemplate) -> Outcome {
    let turns = [("system", " be brief "), ("user", "hi"), ("assistant", "yo\n"), ("user", "中 <b>")];
    let turns = turns.map(|(role, content)| Message::new(role, content));
    template.render(&turns, true).map(drop).map_err(line)
}

pub(crate) fn tokenizer(dir: &Path) -> Format {
    const WORDS: &[&str] = &[
        "\"type\":\"BPE\"",
        "\"type\":\"WordPiece\"",
        "\"type\":\"Unigram\"",
        "\"type\":\"WordLevel\"",
        "\"type\":\"ByteLevel\"",
        "\"type\":\"Sequence\"",
        "\"type\":\"Metaspace\"",
        "\"type\":\"Split\"",
        "\"type\":\"Replace\"",
        "\"type\":\"Prepend\"",
        "\"type\":\"TemplateProcessing\"",
        "\"type\":\"Digits\"",
        "\"type\":\"FixedLength\",\"length\":0",
        "\"type\":\"NFKC\"",
        "\"type\":\"BertNormalizer\"",
        "\"type\":\"Precompiled\",\"precompiled_charsmap\":\"AAAA\"",
        "\"type\":\"Strip\"",
        "\"type\":\"Fuse\"",
        "\"type\":\"ByteFallback\"",
        "\"type\":\"CTC\"",
        "\"byte_fallback\":true",
        "\"unk_id\":",
        "\"unk_token\":\"<unk>\"",
        "\"fuse_unk\":true",
        "\"ignore_merges\":true",
        "\"max_input_chars_per_word\":",
        "\"id\":",
        "\"truncation\":{\"max_length\":0,\"stride\":9,\"strategy\":\"LongestFirst\",\"direction\":\"Right\"}",
        "\"padding\":{\"strategy\":{\"Fixed\":1000000000},\"direction\":\"Left\",\"pad_to_multiple_of\":0,\"pad_id\":0,\"pad_type_id\":0,\"pad_token\":\"\"}",
        "\"Regex\":\"(a*)*b\"",
        "\"Regex\":\"(?<x>\\\\g<x>)\"",
        "\"Regex\":\"\"",
        "\"String\":\"\"",
        "\"dropout\":1.0",
        "\"dropout\":0.5",
        "\"cache_capacity\":",
        "\"merges\":[\"a b\",[\"b\",\"c\"]]",
        "\"added_tokens\":[]",
        "\"continuing_subword_prefix\":\"##\"",
    ];
    let mut files = vec![fs::read(TOKENIZER).unwrap(), fs::read(fixture("gguf/tokenizer.json")).unwrap()];
    files.extend(
        [
            r###"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[{"id":0,"content":"[UNK]","single_word":true,"lstrip":true,"rstrip":true,"normalized":true,"special":true}],"normalizer":{"type":"BertNormalizer","clean_text":true,"handle_chinese_chars":true,"strip_accents":null,"lowercase":true},"pre_tokenizer":{"type":"BertPreTokenizer"},"post_processor":{"type":"BertProcessing","sep":["[SEP]",2],"cls":["[CLS]",1]},"decoder":{"type":"WordPiece","prefix":"##","cleanup":true},"model":{"type":"WordPiece","unk_token":"[UNK]","continuing_subword_prefix":"##","max_input_chars_per_word":100,"vocab":{"[UNK]":0,"[CLS]":1,"[SEP]":2,"h":3,"##e":4,"##l":5,"##o":6}}}"###,
            r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":{"type":"Sequence","normalizers":[{"type":"Prepend","prepend":"▁"},{"type":"Replace","pattern":{"String":" "},"content":"▁"},{"type":"Replace","pattern":{"Regex":" {2,}"},"content":"▁"}]},"pre_tokenizer":null,"post_processor":{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"<s>","type_id":0}},{"Sequence":{"id":"A","type_id":0}}],"pair":[{"Sequence":{"id":"A","type_id":0}},{"Sequence":{"id":"B","type_id":1}}],"special_tokens":{"<s>":{"id":"<s>","ids":[1],"tokens":["<s>"]}}},"decoder":{"type":"Sequence","decoders":[{"type":"Replace","pattern":{"String":"▁"},"content":" "},{"type":"ByteFallback"},{"type":"Fuse"},{"type":"Strip","content":" ","start":1,"stop":0}]},"model":{"type":"Unigram","unk_id":0,"vocab":[["<unk>",0.0],["<s>",-1.0],["▁",-2.0],["h",-2.5],["el",-3.0],["<0x0A>",-9.0]],"byte_fallback":true}}"#,
            r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,"pre_tokenizer":{"type":"Sequence","pretokenizers":[{"type":"Metaspace","replacement":"▁","prepend_scheme":"always","split":true},{"type":"Digits","individual_digits":true},{"type":"Punctuation","behavior":"Isolated"},{"type":"WhitespaceSplit"}]},"post_processor":null,"decoder":{"type":"Metaspace","replacement":"▁","prepend_scheme":"always","split":true},"model":{"type":"WordLevel","vocab":{"▁Hello":0,"<unk>":1,"1":2},"unk_token":"<unk>"}}"#,
        ]
        .map(|text| text.as_bytes().to_vec()),
    );
    let path = dir.join("tokenizer.json");
    let read = move |_, bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        let tokenizer = Tokenizer::from_file(&path, &serde_json::Value::Null).map_err(line)?;
        speak(&tokenizer)
    };
    Format::new(Seeds { shape: Shape::Text, files, words: WORDS }, read)
}

/// Words and signs of Jinja.
const JINJA: &[&str] = &[
    "{% for",
    "{% for m in messages %}",
    "{% endfor %}",
    "{% if",
    "{% endif %}",
    "{% else %}",
    "{% elif",
    "{% set x =",
    "{% set",
    "{%- macro f(x) -%}",
    "{% endmacro %}",
    "{{ f(",
    "{% generation %}",
    "{% raw %}",
    "{% include 'x' %}",
    "{% call",
    "{{",
    "}}",
    "{%",
    "%}",
    "{#",
    "#}",
    "range(10**9)",
    "range(99999999)",
    "*",
    "**",
    "//",
    "%",
    "~",
    "|",
    "| tojson",
    "| join",
    "| length",
    "| sort",
    "| batch(0)",
    "| indent(1000000000)",
    "| tojson(indent=99999999)",
    "| center(10**9)",
    "| slice(0)",
    "| map(attribute='x')",
    ".split('')",
    ".replace('', 'aaaaaaaa')",
    ".format(",
    "'%99999999d' % 1",
    "namespace(a=1)",
    "ns.a = ns",
    "recursive",
    "loop(",
    "loop.cycle()",
    "loop.previtem",
    "messages",
    "message['content']",
    "[::0]",
    "[-1:]",
    "[:-9223372036854775808]",
    "[0]",
    "not",
    "is defined",
    "(",
    ")",
    "[",
    "]",
    "{'a':",
    "'",
    "raise_exception(",
    "strftime_now('%",
    "strftime_now('%Q')",
    "9223372036854775807",
    "-9223372036854775808",
    "{% break %}",
    "{% continue %}",
    "bos_token",
    "lower()",
    ".strip('",
    "self",
    "caller()",
    "{% block x %}",
    "dict(a=1).items()",
];

fn templates() -> Vec<Vec<u8>> {
    let table: serde_json::Value =
        serde_json::from_slice(&fs::read(fixture("chat/jinja.json")).unwrap()).unwrap();
    let mut all: Vec<Vec<u8>> =
        table["cases"].as_array().unwrap().iter().map(|c| c["source"].as_str().unwrap().into()).collect();
    // As often as the snippets together.
    for _ in 0..all.len() / 3 {
        all.extend(
            [
                "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
                "{%- set ns = namespace(n=0) %}{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}{%- else %}{%- set system_message = '' %}{%- endif %}{%- for m in messages %}{%- set ns.n = ns.n + m.content|length %}{{- bos_token if loop.first }}{{- '<|start|>' + m.role + '\\n\\n' + m.content | trim + eos_token }}{%- endfor %}{{ ns.n }}",
                "{%- macro show(x, depth=0) -%}{%- if x is mapping -%}{%- for k, v in x.items() -%}{{ k }}={{ show(v, depth + 1) }};{%- endfor -%}{%- else -%}{{ x | tojson(indent=2) }}{%- endif -%}{%- endmacro -%}{% for m in messages recursive %}{{ show(m) }}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}",
            ]
            .map(|text| text.as_bytes().to_vec()),
        );
    }
    all
}

pub(crate) fn chat(_: &Path) -> Format {
    let read = |_, bytes: &[u8]| {
        let source = String::from_utf8_lossy(bytes);
        talk(&ChatTemplate::new(&source, "<s>", "</s>").map_err(line)?)
    };
    Format::new(Seeds { shape: Shape::Text, files: templates(), words: JINJA }, read)
}

pub(crate) fn tokenizer_config(dir: &Path) -> Format {
    fs::copy(TOKENIZER, dir.join("tokenizer.json")).unwrap();
    let files = vec![
        br#"{"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false}, "chat_template": "{% for m in messages %}{{ m['role'] + bos_token }}{% endfor %}", "model_max_length": 1000000000000000019884624838656}"#.to_vec(),
        br#"{"eos_token": "<|im_end|>", "chat_template": [{"name": "default", "template": "{{ messages[0].content.split('e') }}"}, {"name": "tool_use", "template": "{{ tools | tojson }}"}], "added_tokens_decoder": {"0": {"content": "a", "special": true}}}"#.to_vec(),
    ];
    let dir = dir.to_path_buf();
    let read = move |_, bytes: &[u8]| {
        fs::write(dir.join("tokenizer_config.json"), bytes).unwrap();
        Tokenizer::from_dir(&dir).map_err(line)?.map_or(Ok(()), |tokenizer| speak(&tokenizer))?;
        ChatTemplate::from_dir(&dir).map_err(line)?.as_ref().map_or(Ok(()), talk)
    };
    Format::new(Seeds { shape: Shape::Text, files, words: JINJA }, read)
}
