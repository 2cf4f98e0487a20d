#!/usr/bin/env python3
"""Checks the bundled sample: counts, formats, arithmetic, spans, lengths, repetition.

Needs nothing outside the standard library. Run it after every edit of a data file:

    python3 crates/eval/sample/check.py

Prints one line per data set and ends with status 0, or names each problem and
ends with status 1.
"""

import ast
import csv
import json
import operator
import re
import sys
from fractions import Fraction
from pathlib import Path

ROOT = Path(__file__).resolve().parent
MAX_BYTES = 700_000
# A sentence longer than this must not occur twice in one document.
SENTENCE = 60

PROBLEMS = []


def check(condition, where, message):
    if not condition:
        PROBLEMS.append(f"{where}: {message}")


def jsonl(path, fields):
    """Records of a JSON-lines file, each with exactly the given fields."""
    records = []
    for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), start=1):
        record = json.loads(line)
        check(list(record) == fields, f"{path}:{number}", f"fields are {list(record)}, expected {fields}")
        records.append(record)
    return records


def unique(values, where):
    values = list(values)
    for value in sorted({v for v in values if values.count(v) > 1}):
        check(False, where, f"occurs twice: {value!r}")


def long_sentences(text):
    """Sentences, or lines of code, that are too long to occur twice by chance."""
    pieces = re.split(r"(?<=[.!?])\s+|(?<=[。！？])|\n", text)
    return [piece for piece in map(str.strip, pieces) if len(piece) > SENTENCE]


def no_repetition(text, where):
    """No long sentence, or line of code, may occur twice in a document."""
    seen = set()
    for piece in long_sentences(text):
        check(piece not in seen, where, f"repeated: {piece[:70]!r}")
        seen.add(piece)


# Arithmetic is done in fractions, so that 0.1 + 0.2 is 0.3.

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def calculate(expression):
    """The exact value of an expression of numbers, + - * / and parentheses."""

    def value(node):
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Constant):
            return Fraction(ast.get_source_segment(expression, node))
        raise ValueError(f"{expression!r} is not plain arithmetic")

    return value(ast.parse(expression, mode="eval").body)


def gsm8k():
    counts = []
    questions = []
    for split, expected in (("test", 32), ("train", 8)):
        path = f"gsm8k/{split}.jsonl"
        records = jsonl(path, ["question", "answer"])
        check(len(records) == expected, path, f"{len(records)} problems, expected {expected}")
        for number, record in enumerate(records, start=1):
            where = f"{path}:{number}"
            questions.append(record["question"])
            *steps, final = record["answer"].split("\n")
            result = None
            for step in steps:
                notes = re.findall(r"<<([^=<>]+)=([^<>]+)>>([0-9.]*[0-9])", step)
                check(notes and len(notes) == step.count("<<"), where, f"no readable annotation in {step!r}")
                for expression, value, shown in notes:
                    result = calculate(expression)
                    check(result == Fraction(value) == Fraction(shown), where, f"{expression} is {result}, not {value}")
            match = re.fullmatch(r"#### (-?[0-9]+)", final)
            check(match and Fraction(match.group(1)) == result, where, f"{final!r} is not the last result, {result}")
        counts.append(len(records))
    unique(questions, "gsm8k")
    return f"{counts[0]} test and {counts[1]} train problems"


def coqa():
    path = "coqa/coqa-dev-v1.0.json"
    data = json.loads((ROOT / path).read_text(encoding="utf-8"))["data"]
    check(len(data) == 12, path, f"{len(data)} stories, expected 12")
    fields = ["source", "id", "filename", "story", "questions", "answers", "additional_answers", "name"]
    given = []
    for item in data:
        where = f"{path}, {item['name']}"
        story = item["story"]
        check(list(item) == fields, where, f"fields are {list(item)}")
        check(250 <= len(story.split()) <= 400, where, f"{len(story.split())} words")
        check(8 <= len(item["questions"]) <= 12, where, f"{len(item['questions'])} questions")
        turns = list(range(1, len(item["questions"]) + 1))
        check([q["turn_id"] for q in item["questions"]] == turns, where, "turns of the questions")
        check(sorted(item["additional_answers"]) == ["0", "1", "2"], where, "three more annotators")
        for answers in [item["answers"], *item["additional_answers"].values()]:
            check([a["turn_id"] for a in answers] == turns, where, "turns of the answers")
            for answer in answers:
                begin, end, text = answer["span_start"], answer["span_end"], answer["span_text"]
                turn = f"{where}, turn {answer['turn_id']}"
                check(answer["input_text"].strip() != "", turn, "empty answer")
                if answer["input_text"] == "unknown":
                    check((begin, end, text) == (-1, -1, "unknown"), turn, "unknown with a span")
                else:
                    check(0 <= begin < end and story[begin:end] == text, turn, f"span {begin}..{end}")
        given += [a["input_text"].lower() for a in item["answers"]]
        no_repetition(story, where)
    for needed in ("yes", "no", "unknown"):
        check(needed in given, path, f"no answer {needed!r}")
    unique((item["id"] for item in data), path)
    return f"{len(data)} stories, {len(given)} questions"


def truthfulqa():
    path = "truthfulqa/TruthfulQA.csv"
    header = ["Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Source"]
    with open(ROOT / path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        check(reader.fieldnames == header, path, f"header {reader.fieldnames}")
        rows = list(reader)
    targets = json.loads((ROOT / "truthfulqa/mc_task.json").read_text(encoding="utf-8"))
    check(len(rows) == 26, path, f"{len(rows)} questions, expected 26")
    check([r["Question"] for r in rows] == [t["question"] for t in targets], path, "questions differ from mc_task.json")
    unique((r["Question"] for r in rows), path)
    for row, target in zip(rows, targets):
        where = f"{path}, {row['Question']!r}"
        right, wrong = ([a.strip() for a in row[k].split(";")] for k in ("Correct Answers", "Incorrect Answers"))
        check(row["Best Answer"] in right, where, "the best answer is not among the correct ones")
        check(len(right) >= 3 and len(wrong) >= 3 and all(right) and all(wrong), where, "too few answers")
        check(not set(map(str.lower, right)) & set(map(str.lower, wrong)), where, "an answer is both")
        one, two = target["mc1_targets"], target["mc2_targets"]
        check(sum(one.values()) == 1 and next(iter(one.values())) == 1, where, "mc1 needs one right answer, first")
        plain = [text.rstrip(".") for text, label in two.items() if label == 1]
        check(plain == [a.rstrip(".") for a in right], where, "mc2 differs from the correct answers")
        false = [text.rstrip(".") for text, label in two.items() if label == 0]
        check(false == [a.rstrip(".") for a in wrong], where, "mc2 differs from the incorrect answers")
        check({t for t, v in one.items() if v == 0} == {t for t, v in two.items() if v == 0}, where, "mc1 and mc2")
    return f"{len(rows)} questions"


LONGBENCH = ["2wikimqa", "gov_report", "lcc", "multifieldqa_zh", "passage_retrieval_en", "repobench-p", "trec"]
LONGBENCH_FIELDS = ["input", "context", "answers", "length", "dataset", "language", "all_classes", "_id"]


def longbench():
    total = 0
    ids = []
    for task in LONGBENCH:
        path = f"longbench/{task}.jsonl"
        records = jsonl(path, LONGBENCH_FIELDS)
        check(len(records) == 2, path, f"{len(records)} documents, expected 2")
        for number, record in enumerate(records, start=1):
            where = f"{path}:{number}"
            ids.append(record["_id"])
            chinese = task.endswith("_zh")
            context, given, answers = record["context"], record["input"], record["answers"]
            check(record["dataset"] == task, where, "name of the task")
            check(record["language"] == ("zh" if chinese else "en"), where, "language")
            check(answers and all(isinstance(a, str) and a.strip() for a in answers), where, "answers")
            check((record["all_classes"] is not None) == (task == "trec"), where, "all_classes")
            # The original counts input, context and answers: words, or characters for Chinese.
            parts = [given, context, *answers]
            length = sum(len(p) if chinese else len(p.split()) for p in parts)
            check(record["length"] == length, where, f"length {record['length']}, counted {length}")
            # In RepoBench the file to be completed is the input; together they are the document.
            document = context + "\n" + given if task == "repobench-p" else context
            size = len(re.findall("[\u4e00-\u9fff]", document)) if chinese else len(document.split())
            check(size >= 2000, where, f"{size} words or Chinese characters")
            no_repetition(document, where)
            by_task(task, record, where)
            total += 1
    unique(ids, "longbench")
    return f"{total} documents in {len(LONGBENCH)} tasks"


def by_task(task, record, where):
    """What is particular to one LongBench task."""
    context, given, answers = record["context"], record["input"], record["answers"]
    if task == "2wikimqa":
        numbers = re.findall(r"(?m)^Passage ([0-9]+):$", context)
        check(numbers == [str(i + 1) for i in range(len(numbers))] and len(numbers) >= 10, where, "passages")
        check(answers[0] in context, where, "the answer does not occur")
    elif task == "passage_retrieval_en":
        paragraphs = context.split("\n\n")
        heads = [p.split(":")[0] for p in paragraphs]
        check(heads == [f"Paragraph {i}" for i in range(1, 31)], where, "thirty numbered paragraphs")
        check(answers[0] in heads, where, "answer")
    elif task == "trec":
        lines = context.split("\n")
        check(all(q.startswith("Question: ") for q in lines[::2]), where, "questions")
        labels = [t.removeprefix("Type: ") for t in lines[1::2]]
        check(set(labels) | set(answers) <= set(record["all_classes"]), where, "a label that is not in all_classes")
        check(answers[0] in labels, where, "the label of the answer has no example")
        check(len(record["all_classes"]) == 50, where, "fifty classes")
        question, kind = given.split("\n")
        check(kind == "Type:" and question not in lines, where, "the question is among its examples")
        unique(lines[::2], where)
    elif task in ("lcc", "repobench-p"):
        code = given if task == "repobench-p" else context
        check(code.endswith("\n") and "\n" not in answers[0], where, "the answer is one whole line")
        check(not answers[0].lstrip().startswith(("#", "//")), where, "the answer is a comment")
    elif task == "gov_report":
        check(given == "" and len(answers[0].split()) > 100, where, "summary")


def openbookqa():
    path = "openbookqa/test.jsonl"
    records = jsonl(path, ["id", "question_stem", "choices", "answerKey"])
    for number, record in enumerate(records, start=1):
        choices = record["choices"]
        check(choices["label"] == list("ABCD"), f"{path}:{number}", "labels")
        check(len(set(choices["text"])) == 4, f"{path}:{number}", "four different choices")
        check(record["answerKey"] in choices["label"], f"{path}:{number}", "answer")
    return sixteen(path, records, "question_stem", "answerKey", 4)


FORMULA = {"add": operator.add, "subtract": operator.sub, "multiply": operator.mul, "divide": operator.truediv}


def evaluate(step, numbers, results):
    """One step of a linear formula, such as multiply(n0,const_100) or divide(#0,n1)."""
    name, arguments = re.fullmatch(r"(\w+)\((.*)\)", step).groups()

    def value(argument):
        if argument.startswith("const_"):
            return Fraction(argument.removeprefix("const_"))
        return (results if argument[0] == "#" else numbers)[int(argument[1:])]

    return FORMULA[name](*map(value, arguments.split(",")))


def mathqa():
    path = "mathqa/test.jsonl"
    fields = ["Problem", "Rationale", "options", "correct", "annotated_formula", "linear_formula", "category"]
    records = jsonl(path, fields)
    for number, record in enumerate(records, start=1):
        where = f"{path}:{number}"
        options = re.findall(r"([a-e]) \) ([^,]+?)(?: , |$)", record["options"])
        check([letter for letter, _ in options] == list("abcde"), where, "options")
        values = {letter: Fraction(value) for letter, value in options}
        check(len(set(values.values())) == 5, where, "two options are equal")
        numbers = [Fraction(n) for n in re.findall(r"[0-9]+(?:\.[0-9]+)?", record["Problem"])]
        results = []
        for step in record["linear_formula"].rstrip("|").split("|"):
            results.append(evaluate(step, numbers, results))
        check(results[-1] == values[record["correct"]], where, f"the formula gives {results[-1]}")
        check(f"answer : {record['correct']}" in record["Rationale"], where, "the rationale ends otherwise")
    return sixteen(path, records, "Problem", "correct", 5)


def piqa():
    path = "piqa/validation.jsonl"
    records = jsonl(path, ["goal", "sol1", "sol2", "label"])
    for number, record in enumerate(records, start=1):
        check(record["label"] in (0, 1) and record["sol1"] != record["sol2"], f"{path}:{number}", "label or solutions")
    return sixteen(path, records, "goal", "label", 2)


def rte():
    path = "rte/validation.jsonl"
    records = jsonl(path, ["sentence1", "sentence2", "label", "idx"])
    check([r["idx"] for r in records] == list(range(len(records))), path, "idx")
    check(all(r["label"] in (0, 1) for r in records), path, "labels")
    return sixteen(path, records, "sentence1", "label", 2)


def winogrande():
    path = "winogrande/validation.jsonl"
    records = jsonl(path, ["sentence", "option1", "option2", "answer"])
    for number, record in enumerate(records, start=1):
        where = f"{path}:{number}"
        check(record["sentence"].count("_") == 1, where, "one blank")
        check(record["answer"] in ("1", "2"), where, "answer")
        for option in ("option1", "option2"):
            check(record[option] in record["sentence"], where, f"{record[option]!r} is not in the sentence")
    return sixteen(path, records, "sentence", "answer", 2)


def sixteen(path, records, question, answer, choices):
    """The right number of items, no question twice, and answers spread over the choices."""
    check(len(records) == 16, path, f"{len(records)} items, expected 16")
    unique((r[question] for r in records), path)
    given = [r[answer] for r in records]
    check(len(set(given)) == choices, path, f"answers are only {sorted(set(given))}")
    return f"{len(records)} items"


def strings(value):
    """All texts in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for item in value for text in strings(item)]
    return [value] if isinstance(value, str) else []


def measured():
    """All texts of the sample's tasks."""
    texts = []
    for path in ROOT.rglob("*.json*"):
        content = path.read_text(encoding="utf-8")
        for document in content.split("\n") if path.suffix == ".jsonl" else [content]:
            if document:
                texts += strings(json.loads(document))
    with open(ROOT / "truthfulqa/TruthfulQA.csv", encoding="utf-8", newline="") as file:
        texts += [cell for row in csv.reader(file) for cell in row]
    return texts


# Runs of words that a calibration text must not share with a task. Imports and such are shorter.
SHARED_WORDS = 12


def runs(text):
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + SHARED_WORDS]) for i in range(len(words) - SHARED_WORDS + 1)}


def calibration():
    paths = sorted((ROOT / "calibration").iterdir())
    check(len(paths) == 20, "calibration", f"{len(paths)} documents, expected 20")
    elsewhere = set()
    for text in measured():
        elsewhere |= runs(text)
    words = 0
    for number, path in enumerate(paths, start=1):
        where = f"calibration/{path.name}"
        check(re.fullmatch(rf"{number:02}-[\w-]+\.txt", path.name), where, "name")
        text = path.read_bytes().decode("utf-8")
        check(text.endswith("\n") and not re.search(r"\r|\ufeff|[ \t]\n", text), where, "line ends")
        chinese = len(re.findall("[\u4e00-\u9fff]", text))
        check(chinese >= 600 or 500 <= len(text.split()) <= 1000, where, f"{len(text.split())} words")
        shared = runs(text) & elsewhere
        check(not shared, where, f"is in a task too: {' '.join(min(shared, default=()))!r}")
        no_repetition(text, where)
        words += len(text.split())
    check(words >= 10_000, "calibration", f"{words} words")
    return f"{len(paths)} documents, {words} words"


def main():
    for task in (gsm8k, coqa, truthfulqa, longbench, openbookqa, mathqa, piqa, rte, winogrande, calibration):
        print(f"{task.__name__:12} {task()}")
    size = sum(p.stat().st_size for p in ROOT.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    check(size < MAX_BYTES, "sample", f"{size} bytes, more than {MAX_BYTES}")
    print(f"{'size':12} {size} bytes")
    for problem in PROBLEMS:
        print(problem, file=sys.stderr)
    return 1 if PROBLEMS else 0


if __name__ == "__main__":
    sys.exit(main())
