//! Tokenizers out of GGUF metadata: byte-level BPE (`gpt2`) and SentencePiece BPE with scores (`llama`).
//!
//! The pipelines are those of the models' own `tokenizer.json`.

use std::collections::{BTreeSet, HashMap};

use candle_core::quantized::gguf_file::Value;
use minicache_config::shown;
use tokenizers::AddedToken;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::byte_level::ByteLevel as ByteLevelDecoder;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::{NormalizerWrapper, Prepend, Replace, Sequence as Normalizers, unicode::NFC};
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};

use super::pre::PreTokenizer;
use super::{END_TOKENS, Tokenizer};
use crate::Result;
use crate::gguf::Gguf;

/// The space of SentencePiece vocabularies.
const SPACE: char = '\u{2581}';

/// Longer pieces of SentencePiece vocabularies are no results of merges.
const MAX_PIECE: usize = 512;

/// `tokenizer.ggml.token_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

/// The vocabulary as the file lists it.
struct Vocabulary {
    tokens: Vec<String>,
    kinds: Vec<Kind>,
}

impl Tokenizer {
    /// The tokenizer of a GGUF file; `None` if its metadata has no vocabulary.
    ///
    /// # Errors
    /// A vocabulary that is incomplete, or of a kind that is not supported.
    pub fn from_gguf(gguf: &Gguf) -> Result<Option<Self>> {
        let Some(model) = gguf.text("tokenizer.ggml.model") else { return Ok(None) };
        if model == "none" || model == "no_vocab" {
            return Ok(None);
        }
        let vocabulary = Vocabulary::read(gguf)?;
        let (mut inner, adds_bos) = match model {
            "gpt2" => {
                let pre = pre_tokenizer(gguf)?;
                (byte_level(gguf, &vocabulary, pre)?, pre.adds_bos)
            }
            "llama" => (sentencepiece(gguf, &vocabulary)?, true),
            other => {
                let other = shown(other);
                let message = format!(
                    "tokenizer model `{other}` is not supported; gpt2 (BPE) and llama (SentencePiece) are"
                );
                return Err(gguf.error(message));
            }
        };
        inner
            .add_tokens(
                vocabulary.added(model == "llama" && gguf.families().any(|family| family.gguf.tokens_strip)),
            )
            .map_err(|e| gguf.error(format!("special tokens cannot be added: {e}")))?;

        let id = |key: &str| {
            let id = u32::try_from(gguf.integer(&format!("tokenizer.ggml.{key}_token_id"))?).ok()?;
            ((id as usize) < vocabulary.tokens.len()).then_some(id)
        };
        let (bos, eos) = (id("bos"), id("eos"));
        let flag = |key: &str, default: bool| gguf.flag(&format!("tokenizer.ggml.{key}")).unwrap_or(default);
        let mut stop: BTreeSet<u32> = ["eos", "eot", "eom"].iter().filter_map(|k| id(k)).collect();
        stop.extend(vocabulary.control(&END_TOKENS));
        Ok(Some(Self {
            size: vocabulary.tokens.len(),
            prefix: bos.filter(|_| flag("add_bos_token", adds_bos)),
            suffix: eos.filter(|_| flag("add_eos_token", false)),
            inner,
            file: gguf.path().to_path_buf(),
            bos,
            eos,
            stop,
        }))
    }
}

impl Vocabulary {
    fn read(gguf: &Gguf) -> Result<Self> {
        let tokens = strings(gguf, "tokenizer.ggml.tokens")?;
        let kinds = match gguf.array("tokenizer.ggml.token_type") {
            None => vec![Kind::Normal; tokens.len()],
            Some(values) => values.iter().map(kind).collect(),
        };
        if kinds.len() != tokens.len() {
            let message = format!("{} tokens but {} token types in its metadata", tokens.len(), kinds.len());
            return Err(gguf.error(message));
        }
        Ok(Self { tokens, kinds })
    }

    fn ids(&self) -> HashMap<&str, u32> {
        // Of two tokens with one text the first is meant: the later ones are padding.
        self.tokens.iter().enumerate().rev().map(|(id, t)| (t.as_str(), id as u32)).collect()
    }

    fn of_kind(&self, kind: Kind) -> impl Iterator<Item = &String> {
        self.tokens.iter().zip(&self.kinds).filter(move |(_, k)| **k == kind).map(|(t, _)| t)
    }

    /// Whether text behind a control token goes on as it stands. The vocabularies of Mistral from v2 on have a token for
    /// `[INST]`, and only they do; LLaMA-2 and Mistral's first put a space in front of every stretch of text.
    fn instructs_by_tokens(&self) -> bool {
        self.of_kind(Kind::Control).any(|token| token == "[INST]")
    }

    /// Control tokens with one of these names.
    fn control(&self, names: &[&str]) -> impl Iterator<Item = u32> {
        let special = |k: &Kind| matches!(k, Kind::Control | Kind::UserDefined);
        let all = self.tokens.iter().zip(&self.kinds).enumerate();
        all.filter(move |(_, (t, k))| special(k) && names.contains(&t.as_str())).map(|(id, _)| id as u32)
    }

    /// Tokens that are found in text before anything else. Those of Phi-3 take the white space behind them along,
    /// as its `tokenizer.json` has it.
    fn added(&self, strip_right: bool) -> Vec<AddedToken> {
        const KEEP: [&str; 3] = ["<unk>", "<s>", "<|endoftext|>"];
        let all = self.tokens.iter().zip(&self.kinds).filter(|(token, _)| !token.is_empty());
        all.filter_map(|(token, kind)| match kind {
            Kind::Control | Kind::Unknown => {
                let strip = strip_right && !KEEP.contains(&token.as_str());
                Some(AddedToken::from(token.clone(), true).rstrip(strip))
            }
            Kind::UserDefined => Some(AddedToken::from(token.clone(), false).normalized(false)),
            _ => None,
        })
        .collect()
    }
}

fn kind(value: &Value) -> Kind {
    match crate::gguf::as_u64(value) {
        Some(2) => Kind::Unknown,
        Some(3) => Kind::Control,
        Some(4) => Kind::UserDefined,
        Some(5) => Kind::Unused,
        Some(6) => Kind::Byte,
        _ => Kind::Normal,
    }
}

fn strings(gguf: &Gguf, key: &str) -> Result<Vec<String>> {
    let values = gguf
        .array(key)
        .ok_or_else(|| gguf.error(format!("metadata {key} is missing; convert the model again")))?;
    let text = |v: &Value| match v {
        Value::String(s) => Ok(s.clone()),
        _ => Err(gguf.error(format!("metadata {key} is not a list of strings"))),
    };
    values.iter().map(text).collect()
}

/// The pre-tokenizer that the file names; llama.cpp's default, with a warning, where it names none.
fn pre_tokenizer(gguf: &Gguf) -> Result<&'static PreTokenizer> {
    let name = gguf.text("tokenizer.ggml.pre").filter(|name| !name.is_empty()).unwrap_or_else(|| {
        let file = gguf.path().display();
        eprintln!(
            "{file}: warning: no tokenizer.ggml.pre says how text is cut into words; the default may not be the \
             model's, convert it again if answers are poor"
        );
        "default"
    });
    PreTokenizer::named(name).ok_or_else(|| {
        let known = PreTokenizer::names();
        gguf.error(format!("pre-tokenizer \"{}\" is not known; known are {known}", shown(name)))
    })
}

/// Byte-level BPE, as GPT-2, LLaMA-3, Qwen2 and SmolLM have it.
fn byte_level(gguf: &Gguf, vocabulary: &Vocabulary, pre: &PreTokenizer) -> Result<tokenizers::Tokenizer> {
    let merges = strings(gguf, "tokenizer.ggml.merges")?
        .into_iter()
        .map(|merge| {
            // A space inside a token is written Ġ, so the only one separates; it never comes first.
            let at = merge.char_indices().skip(1).find(|&(_, c)| c == ' ').map(|(at, _)| at);
            at.map(|at| (merge[..at].to_string(), merge[at + 1..].to_string())).ok_or_else(|| {
                gguf.error(format!("metadata tokenizer.ggml.merges: `{}` is not a pair", shown(&merge)))
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let ids = vocabulary.ids();
    let bpe = BPE::builder()
        .vocab_and_merges(ids.into_iter().map(|(t, id)| (t.to_string(), id)).collect::<Ids>(), merges)
        .ignore_merges(pre.whole_words)
        .build()
        .map_err(|e| gguf.error(format!("its BPE merges cannot be used ({e}); convert the model again")))?;
    let mut tokenizer = tokenizers::Tokenizer::new(bpe);
    if pre.composes {
        set_normalizer(gguf, &mut tokenizer, NFC.into())?;
    }
    let steps = pre.build().map_err(|e| gguf.error(format!("pre-tokenizer: {e}")))?;
    tokenizer.with_pre_tokenizer(Some(steps));
    tokenizer.with_decoder(Some(ByteLevelDecoder::new(false, true, false)));
    Ok(tokenizer)
}

/// SentencePiece BPE, as LLaMA-2, Mistral and Phi-3 have it, in the form of their `tokenizer.json`: merges are every
/// split of a piece into two others, best score first.
fn sentencepiece(gguf: &Gguf, vocabulary: &Vocabulary) -> Result<tokenizers::Tokenizer> {
    let scores =
        gguf.array("tokenizer.ggml.scores").filter(|s| s.len() == vocabulary.tokens.len()).ok_or_else(
            || gguf.error("metadata tokenizer.ggml.scores is missing or of another length than its tokens"),
        )?;
    let score = |id: usize| match &scores[id] {
        Value::F32(x) => *x,
        _ => f32::NEG_INFINITY,
    };
    let ids = vocabulary.ids();
    let mut merges = Vec::new();
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        if vocabulary.kinds[id] != Kind::Normal || ids.get(token.as_str()) != Some(&(id as u32)) {
            continue;
        }
        // Pieces have 16 characters, seldom 32; every way to cut a very long one would be looked up.
        if token.len() > MAX_PIECE {
            continue;
        }
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            let part =
                |t: &str| ids.get(t).copied().filter(|&i| vocabulary.kinds[i as usize] == Kind::Normal);
            if let (Some(l), Some(r)) = (part(left), part(right)) {
                merges.push((score(id), left.chars().count(), l, r));
            }
        }
    }
    // The order of transformers' converter (`generate_merges`): by score, then the longer left part, then by ids.
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)).then((a.2, a.3).cmp(&(b.2, b.3))));
    let text = |id: u32| vocabulary.tokens[id as usize].clone();
    let merges = merges.into_iter().map(|(_, _, l, r)| (text(l), text(r))).collect();
    let has_bytes = vocabulary.of_kind(Kind::Byte).count() == 256;
    let mut builder = BPE::builder()
        .vocab_and_merges(ids.into_iter().map(|(t, id)| (t.to_string(), id)).collect::<Ids>(), merges)
        .fuse_unk(true)
        .byte_fallback(has_bytes);
    if let Some(unknown) = vocabulary.of_kind(Kind::Unknown).next() {
        builder = builder.unk_token(unknown.clone());
    }
    let bpe = builder
        .build()
        .map_err(|e| gguf.error(format!("its vocabulary cannot be used ({e}); convert the model again")))?;
    let mut tokenizer = tokenizers::Tokenizer::new(bpe);
    let space_first = gguf.flag("tokenizer.ggml.add_space_prefix").unwrap_or(true);
    let replace = |from: char, to: char| {
        Replace::new(from.to_string(), to.to_string()).map_err(|e| gguf.error(format!("normaliser: {e}")))
    };
    if space_first && vocabulary.instructs_by_tokens() {
        tokenizer.with_pre_tokenizer(Some(Metaspace::new(SPACE, PrependScheme::First, false)));
    } else {
        let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
        if space_first {
            normalizers.push(Prepend::new(SPACE.to_string()).into());
        }
        normalizers.push(replace(' ', SPACE)?.into());
        set_normalizer(gguf, &mut tokenizer, Normalizers::new(normalizers).into())?;
    }
    let mut decoders = vec![replace(SPACE, ' ')?.into(), ByteFallback::new().into(), Fuse::new().into()];
    if space_first {
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    tokenizer.with_decoder(Some(Decoders::new(decoders)));
    Ok(tokenizer)
}

/// The map that the BPE builder takes.
type Ids = tokenizers::models::bpe::Vocab;

fn set_normalizer(
    gguf: &Gguf,
    tokenizer: &mut tokenizers::Tokenizer,
    normalizer: NormalizerWrapper,
) -> Result<()> {
    tokenizer.with_normalizer(Some(normalizer)).map_err(|e| gguf.error(format!("normaliser: {e}")))?;
    Ok(())
}
