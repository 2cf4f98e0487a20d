//! LongBench (Bai et al. 2023): the 21 tasks with their official prompts and generation lengths
//! (`config/dataset2prompt.json` and `dataset2maxlen.json` of the LongBench repository).
//!
//! Chat models get the prompt inside their template, but for the few-shot and code tasks; prompts that are too long
//! lose their middle.

use super::{
    Chat, Document, Generate, Output, Overflow, Reference, Request, Scale, ScoreError, Scores, Tally, Task,
};
use crate::data::{Dataset, HubFile, Part, Record, Result, as_is};
use crate::metrics;

/// One of the 21 tasks.
pub(super) struct LongBench {
    name: &'static str,
    prompt: &'static str,
    max_new_tokens: usize,
    chat: Chat,
    stop_token: Option<&'static str>,
    metric: Metric,
}

/// Score of one prediction against one answer.
#[derive(Clone, Copy)]
enum Metric {
    F1,
    F1Zh,
    Rouge,
    RougeZh,
    Classes,
    /// With the word before the paragraph's number.
    Retrieval(&'static str),
    Count,
    Code,
}

/// The seven tasks of the MiniCache paper's Table 1, in its order.
pub(super) const PAPER: [&str; 7] =
    ["lcc", "repobench-p", "passage_retrieval_en", "trec", "2wikimqa", "gov_report", "multifieldqa_zh"];

static PARTS: [Part; 1] = [Part {
    name: "samples",
    local: &[
        "longbench/{}.jsonl",
        "LongBench/{}.jsonl",
        "longbench/data/{}.jsonl",
        "{}.jsonl",
        "longbench/data.zip",
        "LongBench/data.zip",
        "data.zip",
        "longbench/{}-*.parquet",
    ],
    hub: &[HubFile::main("THUDM/LongBench", "data.zip")],
    optional: false,
    normalise: as_is,
}];

const PASSAGES: &str = "Answer the question based on the given passages. Only give me the answer and do not output any \
    other words.\n\nThe following are given passages.\n{context}\n\nAnswer the question based on the given passages. \
    Only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:";

const fn task(
    name: &'static str,
    max_new_tokens: usize,
    chat: Chat,
    metric: Metric,
    prompt: &'static str,
) -> LongBench {
    LongBench { name, prompt, max_new_tokens, chat, stop_token: None, metric }
}

pub(super) static TASKS: [LongBench; 21] = [
    task(
        "longbench/narrativeqa",
        128,
        Chat::Wrap,
        Metric::F1,
        // "asconcisely" is the original's, and in every published run.
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question \
         asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\nStory: \
         {context}\n\nNow, answer the question based on the story asconcisely as you can, using a single phrase if \
         possible. Do not provide any explanation.\n\nQuestion: {input}\n\nAnswer:",
    ),
    task(
        "longbench/qasper",
        128,
        Chat::Wrap,
        Metric::F1,
        "You are given a scientific article and a question. Answer the question as concisely as you can, using a \
         single phrase or sentence if possible. If the question cannot be answered based on the information in the \
         article, write \"unanswerable\". If the question is a yes/no question, answer \"yes\", \"no\", or \
         \"unanswerable\". Do not provide any explanation.\n\nArticle: {context}\n\n Answer the question based on the \
         above article as concisely as you can, using a single phrase or sentence if possible. If the question cannot \
         be answered based on the information in the article, write \"unanswerable\". If the question is a yes/no \
         question, answer \"yes\", \"no\", or \"unanswerable\". Do not provide any explanation.\n\nQuestion: \
         {input}\n\nAnswer:",
    ),
    task(
        "longbench/multifieldqa_en",
        64,
        Chat::Wrap,
        Metric::F1,
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the \
         above text, only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
    ),
    task(
        "longbench/multifieldqa_zh",
        64,
        Chat::Wrap,
        Metric::F1Zh,
        "阅读以下文字并用中文简短回答：\n\n{context}\n\n现在请基于上面的文章回答下面的问题，只告诉我答案，不要输出任何\
         其他字词。\n\n问题：{input}\n回答：",
    ),
    task("longbench/hotpotqa", 32, Chat::Wrap, Metric::F1, PASSAGES),
    task("longbench/2wikimqa", 32, Chat::Wrap, Metric::F1, PASSAGES),
    task("longbench/musique", 32, Chat::Wrap, Metric::F1, PASSAGES),
    task(
        "longbench/dureader",
        128,
        Chat::Wrap,
        Metric::RougeZh,
        "请基于给定的文章回答下述问题。\n\n文章：{context}\n\n请基于上述文章回答下面的问题。\n\n问题：{input}\n回答：",
    ),
    task(
        "longbench/gov_report",
        512,
        Chat::Wrap,
        Metric::Rouge,
        "You are given a report by a government agency. Write a one-page summary of the \
         report.\n\nReport:\n{context}\n\nNow, write a one-page summary of the report.\n\nSummary:",
    ),
    task(
        "longbench/qmsum",
        512,
        Chat::Wrap,
        Metric::Rouge,
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one \
         or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting transcript \
         in one or more sentences.\n\nQuery: {input}\nAnswer:",
    ),
    task(
        "longbench/multi_news",
        512,
        Chat::Wrap,
        Metric::Rouge,
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\nNow, \
         write a one-page summary of all the news.\n\nSummary:",
    ),
    task(
        "longbench/vcsum",
        512,
        Chat::Wrap,
        Metric::RougeZh,
        "下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\n{context}\n\n会议总结：",
    ),
    task(
        "longbench/trec",
        64,
        Chat::Never,
        Metric::Classes,
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}",
    ),
    task(
        "longbench/triviaqa",
        32,
        Chat::Never,
        Metric::F1,
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. \
         The following are some examples.\n\n{context}\n\n{input}",
    ),
    LongBench {
        name: "longbench/samsum",
        prompt: "Summarize the dialogue into a few short sentences. The following are some \
                 examples.\n\n{context}\n\n{input}",
        max_new_tokens: 128,
        chat: Chat::Never,
        // Models go on with "\nDialogue" without end.
        stop_token: Some("\n"),
        metric: Metric::Rouge,
    },
    task(
        "longbench/lsht",
        64,
        Chat::Never,
        Metric::Classes,
        "请判断给定新闻的类别，下面是一些例子。\n\n{context}\n{input}",
    ),
    task(
        "longbench/passage_count",
        32,
        Chat::Wrap,
        Metric::Count,
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read \
         these paragraphs and determine how many unique paragraphs there are after removing duplicates. In other \
         words, how many non-repeating paragraphs are there in total?\n\n{context}\n\nPlease enter the final count of \
         unique paragraphs after removing duplicates. The output format should only contain the number, such as 1, 2, \
         3, and so on.\n\nThe final answer is: ",
    ),
    task(
        "longbench/passage_retrieval_en",
        32,
        Chat::Wrap,
        Metric::Retrieval("Paragraph "),
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract \
         is from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number of the paragraph \
         that the abstract is from. The answer format must be like \"Paragraph 1\", \"Paragraph 2\", etc.\n\nThe \
         answer is: ",
    ),
    task(
        "longbench/passage_retrieval_zh",
        32,
        Chat::Wrap,
        Metric::Retrieval("段落"),
        "以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\n{context}\n\n下面是一个摘要\n\n{input}\n\n\
         请输入摘要所属段落的编号。答案格式必须是\"段落1\"，\"段落2\"等格式\n\n答案是：",
    ),
    task(
        "longbench/lcc",
        64,
        Chat::Never,
        Metric::Code,
        "Please complete the code given below. \n{context}Next line of code:\n",
    ),
    task(
        "longbench/repobench-p",
        64,
        Chat::Never,
        Metric::Code,
        "Please complete the code given below. \n{context}{input}Next line of code:\n",
    ),
];

impl Task for LongBench {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> String {
        format!("LongBench, up to {} new tokens", self.max_new_tokens)
    }

    fn dataset(&self) -> Dataset {
        Dataset { name: self.name.trim_start_matches("longbench/"), parts: &PARTS }
    }

    fn document(&self, record: &Record, _: &[Record]) -> Result<Document> {
        let answers = record.strs("answers")?;
        let classes =
            if record.get("all_classes").is_some() { record.strs("all_classes")? } else { Vec::new() };
        let id = record.str("_id").map_or_else(|_| record.index.to_string(), str::to_string);
        Ok(Document {
            id,
            task: self.name,
            request: Request::Generate(Generate {
                prompt: self.fill(record.str("context")?, record.str("input")?),
                until: Vec::new(),
                max_new_tokens: self.max_new_tokens,
                chat: self.chat,
                stop_token: self.stop_token,
                overflow: Overflow::CutMiddle,
            }),
            reference: Reference::Answers { answers, classes },
        })
    }

    fn text(&self, record: &Record) -> Result<String> {
        let (context, input) = (record.str("context")?, record.str("input")?);
        Ok(if input.is_empty() { context.to_string() } else { format!("{context}\n\n{input}") })
    }

    fn metrics(&self) -> &'static [&'static str] {
        &["score"]
    }

    fn scale(&self) -> Scale {
        Scale::Percent
    }

    fn score(&self, reference: &Reference, output: &Output) -> std::result::Result<Scores, ScoreError> {
        let Reference::Answers { answers, classes } = reference else {
            return Err(reference.unlike("a list of answers"));
        };
        let text = output.text()?;
        let text = if self.first_line() {
            text.trim_start_matches('\n').split('\n').next().unwrap_or("")
        } else {
            text
        };
        let mut best: f64 = 0.0;
        for answer in answers {
            best = best.max(self.against(text, answer, classes)?);
        }
        Ok(Scores::from([("score", Tally::one(best))]))
    }

    fn reference(&self, answers: Vec<String>, classes: Vec<String>) -> Option<Reference> {
        Some(Reference::Answers { answers, classes })
    }
}

impl LongBench {
    /// Few-shot tasks, where a model goes on with the next example: only the first line is the answer.
    fn first_line(&self) -> bool {
        ["trec", "triviaqa", "samsum", "lsht"].iter().any(|t| self.name.ends_with(t))
    }

    fn against(&self, text: &str, answer: &str, classes: &[String]) -> std::result::Result<f64, ScoreError> {
        Ok(match self.metric {
            Metric::F1 => metrics::f1(text, answer),
            Metric::F1Zh => metrics::f1_zh(text, answer),
            Metric::Rouge => metrics::rouge_l(text, answer),
            Metric::RougeZh => metrics::rouge_l_zh(text, answer),
            Metric::Classes if classes.is_empty() => {
                let found = "no `all_classes`".to_string();
                return Err(ScoreError { expected: "the labels of all classes".to_string(), found });
            }
            Metric::Classes => metrics::classification(text, answer, classes),
            Metric::Retrieval(label) => {
                metrics::retrieval(text, answer, label).ok_or_else(|| ScoreError {
                    expected: format!("an answer such as \"{label}3\""),
                    found: format!("{answer:?}"),
                })?
            }
            Metric::Count => metrics::count(text, answer),
            Metric::Code => metrics::code_similarity(text, answer),
        })
    }

    /// The prompt, filled in one pass so that braces in a context stay as they are.
    fn fill(&self, context: &str, input: &str) -> String {
        let (head, tail) = self.prompt.split_once("{context}").unwrap_or((self.prompt, ""));
        format!("{head}{context}{}", tail.replacen("{input}", input, 1))
    }
}
