//! Tokenizers out of GGUF metadata: byte-level BPE (`gpt2`) and SentencePiece BPE with scores (`llama`).
//!
//! Which pre-tokenizer a name in `tokenizer.ggml.pre` stands for is llama.cpp's (`llama-vocab.cpp`); the pipelines are
//! those of the models' own `tokenizer.json`.

use std::collections::{BTreeSet, HashMap};

use candle_core::quantized::gguf_file::Value;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::byte_level::ByteLevel as ByteLevelDecoder;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::{NormalizerWrapper, Prepend, Replace, Sequence as Normalizers, unicode::NFC};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

use super::{END_TOKENS, Tokenizer};
use crate::Result;
use crate::gguf::Gguf;

/// The space of SentencePiece vocabularies.
const SPACE: &str = "\u{2581}";

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
        let pre = gguf.text("tokenizer.ggml.pre");
        let mut inner = match model {
            "gpt2" => byte_level(gguf, &vocabulary, pre)?,
            "llama" => sentencepiece(gguf, &vocabulary)?,
            other => {
                let message = format!(
                    "tokenizer model {other:?} is not supported; gpt2 (BPE) and llama (SentencePiece) are"
                );
                return Err(gguf.error(message));
            }
        };
        inner
            .add_tokens(vocabulary.added(gguf.architecture() == "phi3" && model == "llama"))
            .map_err(|e| gguf.error(format!("special tokens cannot be added: {e}")))?;

        let id = |key: &str| {
            let id = u32::try_from(gguf.integer(&format!("tokenizer.ggml.{key}_token_id"))?).ok()?;
            ((id as usize) < vocabulary.tokens.len()).then_some(id)
        };
        let (bos, eos) = (id("bos"), id("eos"));
        // Defaults of llama.cpp for files that do not say.
        let adds_bos = model == "llama" || pre.is_some_and(|p| LLAMA3.contains(&p) || p == "tekken");
        let flag = |key: &str, default: bool| gguf.flag(&format!("tokenizer.ggml.{key}")).unwrap_or(default);
        let mut stop: BTreeSet<u32> = ["eos", "eot", "eom"].iter().filter_map(|k| id(k)).collect();
        stop.extend(vocabulary.control(&END_TOKENS));
        Ok(Some(Self {
            size: vocabulary.tokens.len(),
            prefix: bos.filter(|_| flag("add_bos_token", adds_bos)),
            suffix: eos.filter(|_| flag("add_eos_token", false)),
            inner,
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

const GPT2_SPLIT: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN_SPLIT: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const GPT2: [&str; 7] = ["gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais", "trillion"];
const DIGITS: [&str; 6] = ["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"];
const LLAMA3: [&str; 7] = ["llama-bpe", "llama3", "llama-v3", "falcon3", "smaug-bpe", "dbrx", "pixtral"];
const QWEN2: [&str; 3] = ["qwen2", "deepseek-r1-qwen", "megrez"];

/// The expressions that split text into words, each applied to what the one before left.
fn splits(pre: Option<&str>) -> Option<&'static [&'static str]> {
    match pre {
        // llama.cpp's guess for files written before the metadata had a name.
        None | Some("default") => Some(&[r"[\p{P}\$\+<=>\^~\|]+", GPT2_SPLIT, r"\p{N}+", r"[0-9][0-9][0-9]"]),
        Some(p) if GPT2.contains(&p) => Some(&[GPT2_SPLIT]),
        Some(p) if DIGITS.contains(&p) => Some(&[r"\p{N}", GPT2_SPLIT]),
        Some(p) if LLAMA3.contains(&p) => Some(&[LLAMA3_SPLIT]),
        Some(p) if QWEN2.contains(&p) => Some(&[QWEN2_SPLIT]),
        Some("tekken") => Some(&[TEKKEN_SPLIT]),
        Some(_) => None,
    }
}

/// Byte-level BPE, as GPT-2, LLaMA-3, Qwen2 and SmolLM have it.
fn byte_level(gguf: &Gguf, vocabulary: &Vocabulary, pre: Option<&str>) -> Result<tokenizers::Tokenizer> {
    let expressions = splits(pre).ok_or_else(|| {
        let known = [&GPT2[..], &DIGITS, &LLAMA3, &QWEN2, &["tekken"]].concat().join(", ");
        gguf.error(format!("pre-tokenizer {:?} is not known; known are {known}", pre.unwrap_or_default()))
    })?;
    let merges = strings(gguf, "tokenizer.ggml.merges")?
        .into_iter()
        .map(|merge| {
            // A space inside a token is written Ġ, so the only one separates; it never comes first.
            let at = merge.char_indices().skip(1).find(|&(_, c)| c == ' ').map(|(at, _)| at);
            at.map(|at| (merge[..at].to_string(), merge[at + 1..].to_string()))
                .ok_or_else(|| gguf.error(format!("metadata tokenizer.ggml.merges: {merge:?} is not a pair")))
        })
        .collect::<Result<Vec<_>>>()?;
    let whole_words = pre.is_some_and(|p| LLAMA3.contains(&p) || p == "tekken");
    let ids = vocabulary.ids();
    let bpe = BPE::builder()
        .vocab_and_merges(ids.into_iter().map(|(t, id)| (t.to_string(), id)).collect::<Ids>(), merges)
        .ignore_merges(whole_words)
        .build()
        .map_err(|e| gguf.error(format!("its BPE merges cannot be used ({e}); convert the model again")))?;
    let mut tokenizer = tokenizers::Tokenizer::new(bpe);
    if pre.is_some_and(|p| QWEN2.contains(&p)) {
        set_normalizer(gguf, &mut tokenizer, NFC.into())?;
    }
    let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
    for expression in expressions {
        let pattern = SplitPattern::Regex((*expression).to_string());
        let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
        steps.push(split.map_err(|e| gguf.error(format!("pre-tokenizer: {e}")))?.into());
    }
    steps.push(ByteLevel::new(false, true, false).into());
    tokenizer.with_pre_tokenizer(Some(PreTokenizers::new(steps)));
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
    let replace = |from: &str, to: &str| {
        Replace::new(from.to_string(), to.to_string()).map_err(|e| gguf.error(format!("normaliser: {e}")))
    };
    let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
    if space_first {
        normalizers.push(Prepend::new(SPACE.to_string()).into());
    }
    normalizers.push(replace(" ", SPACE)?.into());
    set_normalizer(gguf, &mut tokenizer, Normalizers::new(normalizers).into())?;
    let mut decoders = vec![replace(SPACE, " ")?.into(), ByteFallback::new().into(), Fuse::new().into()];
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
