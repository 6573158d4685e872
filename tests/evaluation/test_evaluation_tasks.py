"""Tasks of `peft-reft evaluate` without a model: prompts, answers, scoring, reading files, metrics and intervals."""

from __future__ import annotations

import builtins
import json
import math
from pathlib import Path

import pytest

from peft_reft.evaluation import TASKS, find_tasks, read_examples, score
from peft_reft.evaluation.scores import accuracy


ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd 1 and 2.\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n"
)
COMMONSENSE = {"instruction": "Is it so?\n\nAnswer format: true/false", "input": "", "output": "x", "answer": "true"}
PROBLEM = {"instruction": "Add 1 and 2.", "input": "", "output": "\nA: 1 + 2 = 3. The answer is 3.", "answer": "3.0"}
GSM8K = {
    "question": "Add 1 and 2.",
    "answer": "1 + 2 = <<1+2=3>>3, 3 - 0 = <<3-0=3>>3\nTimes 400: <<3*400=1200>>1,200\n#### 1,200",
}


# -- tasks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.family == "commonsense"])
def test_commonsense(name):
    task = TASKS[name]
    row = task.read(COMMONSENSE)
    assert task.prompt(row) == "Is it so?\n\nAnswer format: true/false\n"
    assert task.completion(row) == "the correct answer is true"


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.family in ("arithmetic", "instruct")])
def test_alpaca(name):
    task = TASKS[name]
    row = task.read(PROBLEM)
    assert task.prompt(row) == ALPACA
    assert task.completion(row) == "A: 1 + 2 = 3. The answer is 3."
    assert task.prompt(task.read({**PROBLEM, "instruction": "Add.", "input": "1, 2"})) == ALPACA_WITH_INPUT


def test_gsm8k_as_its_authors_give_it():
    task = TASKS["gsm8k"]
    row = task.read(GSM8K)
    assert task.prompt(row) == ALPACA
    assert task.completion(row) == "1 + 2 = 3, 3 - 0 = 3\nTimes 400: 1,200\nThe answer is 1200."
    assert row["answer"] == "1200"
    with pytest.raises(ValueError, match="#### n"):
        task.read({**GSM8K, "answer": "3"})


@pytest.mark.parametrize(
    "output, extracted, correct",
    [
        ("the correct answer is answer1", "answer1", True),
        ("Well, the correct answer is answer1\n", "answer1", True),
        ("the correct answer is answer1. Or not", "answer1. Or not", False),
        ("the correct answer is answer12", "answer12", False),
        ("the correct answer is Answer1", "Answer1", False),
        ("answer1", None, False),
        ("the correct answer is ", None, False),
        ("", None, False),
    ],
)
def test_commonsense_answers(output, extracted, correct):
    task = TASKS["openbookqa"]
    assert task.extract(output, "answer1") == extracted
    assert task.is_correct(extracted, "answer1") is correct


@pytest.mark.parametrize(
    "output, answer, extracted, correct",
    [
        ("A: 1 + 2 = 3. The answer is 3.", "3.0", "3.", True),
        ("It costs $1,234.50 in all", "1234.5", "1234.50", True),
        ("12,345,678", "12345678", "12345678", True),
        ("minus: -15", "-15.0", "-15", True),
        ("15", "-15.0", "15", False),
        ("3 apples, and then 4", "3", "4", False),
        ("0.3333", "0.33333333", "0.3333", True),
        ("0.332", "0.33333333", "0.332", False),
        ("no number", "3", None, False),
        ("", "0", None, False),
        ("The answer is (C).", "C", "C", True),
        ("Between B and C: C", "C", "B", False),  # the first letter counts, as LLM-Adapters has it
        ("A: it is (C)", "C", "A", False),
        ("It is (E).", "C", "E", False),
        ("none of those", "C", None, False),
    ],
)
def test_arithmetic_answers(output, answer, extracted, correct):
    task = TASKS["AQuA" if answer == "C" else "mawps"]
    assert task.extract(output, answer) == extracted
    assert task.is_correct(extracted, answer) is correct


def test_names():
    assert [task.name for task in find_tasks(["OPENBOOKQA", "aqua", "arc-easy"])] == ["openbookqa", "AQuA", "ARC-Easy"]
    assert len(find_tasks(["commonsense", "boolq"])) == 8
    assert [task.name for task in find_tasks(["instruct"])] == ["alpaca_eval"]
    assert len(find_tasks(["glue"])) == 8 and len(find_tasks(["Arithmetic"])) == 7
    with pytest.raises(ValueError, match="no task 'boolqq'.*commonsense: boolq"):
        find_tasks(["boolqq"])
    with pytest.raises(ValueError, match="math_10k is a set to train on. Evaluate on AQuA, gsm8k"):
        find_tasks(["math_10k"], training_sets=False)


GLUE_FIELDS = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "stsb": ("sentence1", "sentence2"),
}


def test_glue():
    assert {name: task.inputs for name, task in TASKS.items() if task.family == "glue"} == GLUE_FIELDS
    assert [TASKS[name].labels for name in ("mnli", "stsb", "cola")] == [3, 1, 2]
    assert TASKS["stsb"].read({"sentence1": "a", "sentence2": "b", "label": 4})["label"] == 4.0
    for label in (-1, 2, "1", True, 0.0):
        with pytest.raises(ValueError, match="not a class of rte"):
            TASKS["rte"].read({"sentence1": "a", "sentence2": "b", "label": label})


# -- files -----------------------------------------------------------------------------------------------------------


def write(path: Path, text: str | list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")


@pytest.mark.parametrize("folder", ["", "commonsense/"])
@pytest.mark.parametrize("file", ["boolq.test.json", "boolq.test.jsonl", "boolq/test.json"])
def test_layouts(tmp_path, folder, file):
    rows = [COMMONSENSE, {**COMMONSENSE, "answer": "false"}]
    write(tmp_path / folder / file, "\n".join(map(json.dumps, rows)) if file.endswith("jsonl") else rows)
    found = read_examples(TASKS["boolq"], "test", tmp_path)
    assert [row["answer"] for row in found] == ["true", "false"]
    assert found == read_examples(TASKS["boolq"], None, tmp_path)
    with pytest.raises(ValueError, match="no file of boolq, split 'train'") as error:
        read_examples(TASKS["boolq"], "train", tmp_path)
    for place in (tmp_path / "boolq.train", tmp_path / "boolq" / "train", tmp_path / "commonsense" / "boolq.train"):
        assert str(place) in str(error.value)


def test_training_sets_are_one_file(tmp_path):
    write(tmp_path / "math_10k.json", [PROBLEM])
    write(tmp_path / "boolq.json", [COMMONSENSE])
    write(tmp_path / "instruct" / "ultrafeedback_1k.json", json.dumps(PROBLEM) + "\n" + json.dumps(PROBLEM))  # lines
    assert read_examples(TASKS["math_10k"], None, tmp_path)[0]["answer"] == "3.0"
    assert len(read_examples(TASKS["ultrafeedback_1k"], "train", tmp_path)) == 2
    for name, split in (("math_10k", "test"), ("boolq", "train")):
        with pytest.raises(ValueError, match="no file"):
            read_examples(TASKS[name], split, tmp_path)
    write(tmp_path / "alpaca_eval.json", [{"instruction": "Hi", "output": "Hello", "dataset": "koala"}])
    assert read_examples(TASKS["alpaca_eval"], None, tmp_path)[0]["dataset"] == "koala"


def test_tables(tmp_path):
    write(tmp_path / "glue" / "cola.dev.tsv", 'gj04\t1\t\tHe said "no.\ngj04\t0\t*\tHe no said.\n')
    expected = [{"sentence": 'He said "no.', "label": 1}, {"sentence": "He no said.", "label": 0}]
    for split in ("dev", "validation", None):
        assert read_examples(TASKS["cola"], split, tmp_path) == expected
    for header in ("", "sentence\tlabel\n"):
        write(tmp_path / "sst2.validation.tsv", header + "fine\t1\nbad\t0\n")
        rows = read_examples(TASKS["sst2"], "dev", tmp_path)
        assert rows == [{"sentence": "fine", "label": 1}, {"sentence": "bad", "label": 0}]
    write(tmp_path / "sst2.validation.tsv", "fine\t1\nbad\tno\n")
    with pytest.raises(ValueError, match=r"line 2: sst2 has 2 columns.*'bad', 'no'"):
        read_examples(TASKS["sst2"], "dev", tmp_path)
    write(tmp_path / "rte.dev.tsv", "a\tb\t1\n")
    with pytest.raises(ValueError, match="for cola and sst2 only"):
        read_examples(TASKS["rte"], "dev", tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        ([{"instruction": "a"}], "row 1: boolq reads the field 'answer', and the row has instruction"),
        ([COMMONSENSE, 3], "row 2 is 3, not an object"),
        ([], "has no rows"),
        ("{not json", "line 1 is not JSON"),
        ("[{]", "is not JSON"),
    ],
)
def test_damaged_files(tmp_path, text, message):
    write(tmp_path / "boolq.test.json", text)
    with pytest.raises(ValueError, match=message) as error:
        read_examples(TASKS["boolq"], "test", tmp_path)
    assert "boolq.test.json" in str(error.value)


def test_limit(tmp_path):
    write(tmp_path / "boolq.test.json", [{**COMMONSENSE, "instruction": f"{number:03}"} for number in range(100)])

    def read(**options) -> list[str]:
        return [row["instruction"] for row in read_examples(TASKS["boolq"], "test", tmp_path, **options)]

    sample = read(limit=10, seed=1)
    assert len(set(sample)) == 10 and sample == sorted(sample) == read(limit=10, seed=1) != read(limit=10, seed=2)
    assert read(limit=10) == read()[:10] != sample
    assert read(limit=1000, seed=1) == read()
    with pytest.raises(ValueError, match="limit=0"):
        read(limit=0)


def test_hub(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*args, **options):
        asked.append((*args, options["split"]))
        return [{"premise": "a", "hypothesis": "b", "label": 2, "question": "q", "answer": "#### 1"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_examples(TASKS["mnli"]) == [{"premise": "a", "hypothesis": "b", "label": 2}]
    read_examples(TASKS["gsm8k"])
    read_examples(TASKS["gsm8k"], "train", hub="me/mine")
    assert asked == [
        ("nyu-mll/glue", "mnli", "validation_matched"),
        ("openai/gsm8k", "main", "test"),
        ("me/mine", "main", "train"),
    ]
    with pytest.raises(ValueError, match="Where are the rows of boolq"):
        read_examples(TASKS["boolq"])
    with pytest.raises(ValueError, match="Give one of"):
        read_examples(TASKS["boolq"], data_dir=tmp_path, hub="me/mine")
    with pytest.raises(ValueError, match="is no folder"):
        read_examples(TASKS["boolq"], data_dir=tmp_path / "none")


def test_hub_that_fails(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("offline")))
    with pytest.raises(
        ValueError, match=r"cola can't be read from the Hub \(nyu-mll/glue, cola, validation\): offline"
    ):
        read_examples(TASKS["cola"])


# -- scores ----------------------------------------------------------------------------------------------------------


def wilson(right: int, count: int) -> tuple[float, float]:
    """Wilson's formula, with the normal distribution's 97.5 % point."""
    z = 1.959963984540054
    share, spread = right / count, z * z / count
    middle = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return (middle - half) / (1 + spread), (middle + half) / (1 + spread)


@pytest.mark.parametrize("right, count", [(0, 10), (10, 10), (3, 10), (431, 500), (1, 1)])
def test_accuracy(right, count):
    pytest.importorskip("scipy")
    found = accuracy([True] * right + [False] * (count - right))
    assert found.value == right / count
    assert (found.low, found.high) == pytest.approx(wilson(right, count), abs=1e-12)


def test_wilson_against_a_table():
    pytest.importorskip("scipy")
    found = accuracy([True] * 81 + [False] * 182)  # Newcombe 1998, table I: 81 of 263
    assert (found.low, found.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_metrics():
    pytest.importorskip("sklearn")
    # 4 true positives, 1 false positive, 2 false negatives, 3 true negatives
    predicted, labels = [1, 1, 1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 1, 1, 0, 0, 0]
    assert score("matthews", predicted, labels).value == pytest.approx((4 * 3 - 1 * 2) / math.sqrt(5 * 6 * 4 * 5))
    assert score("f1", predicted, labels).value == pytest.approx(8 / 11)
    assert score("accuracy", predicted, labels).value == 0.7
    # sums of products of 1, 2, 3, 4 and 1, 4, 9, 16 around their means, by hand
    assert score("pearson", [1, 2, 3, 4], [1, 4, 9, 16]).value == pytest.approx(25 / math.sqrt(5 * 129))
    assert score("spearman", [1, 2, 3, 4], [1, 9, 4, 16]).value == pytest.approx(1 - 6 * 2 / (4 * 15))
    with pytest.raises(ValueError, match="no metric 'bleu'"):
        score("bleu", [1], [1])
    with pytest.raises(ValueError, match="1 predictions do not fit 2 labels"):
        score("f1", [1], [1, 0])


def test_bootstrap():
    pytest.importorskip("sklearn")
    predicted, labels = [1, 0] * 200, [1, 0, 1, 1, 0, 0, 1, 0] * 50  # three in four are right
    found = score("matthews", predicted, labels, seed=1)
    assert found == score("matthews", predicted, labels, seed=1) != score("matthews", predicted, labels, seed=2)
    # Of n examples with correlation 1/2 it varies by about sqrt(1 - 1/4) / sqrt(n)
    spread = 1.96 * math.sqrt(0.75 / 400)
    assert (found.low, found.high) == pytest.approx((0.5 - spread, 0.5 + spread), abs=0.03)
    constant = score("pearson", [1.0, 1.0, 1.0], [1.0, 2.0, 3.0])
    assert constant.value is constant.low is constant.high is None


def test_missing_libraries(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **options):
        if name.split(".")[0] in ("scipy", "sklearn", "datasets"):
            raise ImportError(f"no {name}")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    for call in (lambda: accuracy([True]), lambda: score("f1", [1], [1]), lambda: read_examples(TASKS["cola"])):
        with pytest.raises(ValueError, match=r"pip install 'peft-reft\[eval\]'"):
            call()
