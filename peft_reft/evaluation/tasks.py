"""The tasks of the ReFT paper: the fields of their rows, their prompts and answers, and how an output is judged.

The same functions make the prompts of training data and of evaluation, so these can't differ. Prompts and scoring are
those of the paper's set-up (pyreft's examples/loreft), which follows LLM-Adapters' data and evaluation. This module
knows rows and text. data.py knows files, generate.py and classify.py know models, scores.py knows statistics.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..tools.formats import alpaca_prompt


Row = dict[str, Any]
TRIGGER = "the correct answer is "


@dataclass(frozen=True)
class Task:
    """A task, or a set of rows to train on.

    Args:
        name (`str`): Its name, as LLM-Adapters or GLUE spells it.
        training_set (`bool`): Whether it is only trained on, and never evaluated.
        hub (`str`, *optional*): The official dataset on the Hub. None: there is none.
        configuration (`str`, *optional*): The configuration of that dataset.
    """

    name: str
    training_set: bool = False
    hub: str | None = None
    configuration: str | None = None

    family: ClassVar[str]
    default_split: ClassVar[str] = "test"

    @property
    def single_file(self) -> bool:
        """Whether the task comes as one file that has no split in its name."""
        return self.training_set

    def read(self, raw: Row) -> Row:
        """A row with the fields that this task's other functions read.

        Raises:
            KeyError: when a field is missing, with its name.
            ValueError: when the value of a field is not one that the task allows.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class GenerationTask(Task):
    """A task that a model answers in text.

    Args:
        max_new_tokens (`int`): How many tokens the paper's set-up allows an answer.
    """

    max_new_tokens: int = 512
    scored: ClassVar[bool] = True

    def read(self, raw: Row) -> Row:
        row = {"instruction": str(raw["instruction"]), "input": str(raw.get("input") or "")}
        return {**row, "output": str(raw.get("output") or ""), "answer": str(raw["answer"]).strip()}

    def prompt(self, row: Row) -> str:
        """The prompt of a row: Alpaca's, with or without an input."""
        return alpaca_prompt(row["instruction"], row["input"])

    def completion(self, row: Row) -> str:
        """The completion that the model is trained on.

        White space at its start is removed: the prompt ends in a line end, and many tokenizers merge two line ends
        into one token, so that the prompt's last token would not be the same in training and in generation.
        """
        return row["output"].lstrip()

    def extract(self, output: str, answer: str) -> str | None:
        """The answer in an output, in the form of the right answer. None: the output has no answer.

        Args:
            output (`str`): The text that the model generated.
            answer (`str`): The right answer.
        """
        raise NotImplementedError

    def is_correct(self, extracted: str | None, answer: str) -> bool:
        """Whether an extracted answer is the right one."""
        return extracted == answer


@dataclass(frozen=True)
class Commonsense(GenerationTask):
    """Prompt `"{instruction}\\n"`, completion `"the correct answer is {answer}"`. The text after those words must
    equal the answer exactly."""

    max_new_tokens: int = 32
    family: ClassVar[str] = "commonsense"

    def prompt(self, row: Row) -> str:
        return f"{row['instruction']}\n"

    def completion(self, row: Row) -> str:
        return TRIGGER + row["answer"]

    def extract(self, output: str, answer: str) -> str | None:
        _, trigger, rest = output.partition(TRIGGER)
        return (rest.strip() or None) if trigger else None


@dataclass(frozen=True)
class Arithmetic(GenerationTask):
    """Word problems with worked solutions. The answer in an output is its last number, or, where the right answer is a
    letter, its first letter from A to E.

    Rows of GSM8K as its authors publish them, with a `question` and an answer that ends in `#### n`, become rows like
    the others: the calculator's marks `<<...>>` are removed, and the last line becomes "The answer is n.", as in the
    outputs of LLM-Adapters' training sets. pyreft's own training on GSM8K differs: it has another prompt, keeps the
    marks and writes "The final answer is: n". For the arithmetic tasks pyreft has LLM-Adapters' rows and Alpaca's
    prompt, as here.
    """

    family: ClassVar[str] = "arithmetic"

    def read(self, raw: Row) -> Row:
        if "question" not in raw or "instruction" in raw:
            return super().read(raw)
        worked, mark, number = str(raw["answer"]).rpartition("####")
        if not mark:
            raise ValueError(f"answer={raw['answer']!r} does not end in '#### n', as GSM8K's answers do")
        number = number.strip().replace(",", "")
        worked = re.sub(r"<<.*?>>", "", worked).strip()
        return {
            "instruction": str(raw["question"]),
            "input": "",
            "output": f"{worked}\nThe answer is {number}.",
            "answer": number,
        }

    def extract(self, output: str, answer: str) -> str | None:
        if _number(answer) is None:
            letter = re.search("[A-E]", output)
            return letter.group() if letter else None
        numbers = re.findall(r"-?\d+\.?\d*", output.replace(",", ""))
        return numbers[-1] if numbers else None

    def is_correct(self, extracted: str | None, answer: str) -> bool:
        number = _number(answer)
        if extracted is None or number is None:
            return extracted == answer
        return abs(float(extracted) - number) <= 1e-3


@dataclass(frozen=True)
class Instruct(GenerationTask):
    """Instructions of all kinds. Outputs are not scored here; `alpaca_eval` can judge them."""

    max_new_tokens: int = 2048
    family: ClassVar[str] = "instruct"
    default_split: ClassVar[str] = "eval"
    scored: ClassVar[bool] = False

    @property
    def single_file(self) -> bool:
        return True

    def read(self, raw: Row) -> Row:
        return {**super().read({"answer": "", **raw}), "dataset": raw.get("dataset", self.name)}

    def extract(self, output: str, answer: str) -> str | None:
        return output or None


@dataclass(frozen=True)
class Glue(Task):
    """A task of GLUE, for a model with a classifier.

    Args:
        inputs (`tuple[str, ...]`): The fields of a row that hold its text, one or two.
        labels (`int`): The number of classes. 1: the label is a number (regression).
        metrics (`tuple[str, ...]`): GLUE's metrics for the task, by their names in scores.py.
    """

    inputs: tuple[str, ...] = ("sentence1", "sentence2")
    labels: int = 2
    metrics: tuple[str, ...] = ("accuracy",)
    family: ClassVar[str] = "glue"
    default_split: ClassVar[str] = "validation"

    def read(self, raw: Row) -> Row:
        texts = {field: str(raw[field]) for field in self.inputs}
        label = raw["label"]
        if self.labels == 1:
            return {**texts, "label": float(label)}
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < self.labels:
            raise ValueError(
                f"label={label!r} is not a class of {self.name}, which are 0 to {self.labels - 1}. GLUE keeps the "
                "labels of its test sets to itself (-1); evaluate on validation"
            )
        return {**texts, "label": label}


def _glue(name: str, **settings: Any) -> Glue:
    return Glue(name, hub="nyu-mll/glue", configuration=name, **settings)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *(
            Commonsense(name)
            for name in (
                "boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa",
            )
        ),
        Commonsense("commonsense_170k", training_set=True),
        Arithmetic("AQuA"),
        Arithmetic("gsm8k", hub="openai/gsm8k", configuration="main"),
        *(Arithmetic(name) for name in ("mawps", "SVAMP", "MultiArith", "AddSub", "SingleEq")),
        *(Arithmetic(name, training_set=True) for name in ("math_10k", "math_7k", "math_data")),
        Instruct("alpaca_eval"),
        *(Instruct(name, training_set=True) for name in ("ultrafeedback", "ultrafeedback_1k")),
        _glue("cola", inputs=("sentence",), metrics=("matthews",)),
        _glue("sst2", inputs=("sentence",)),
        _glue("mnli", inputs=("premise", "hypothesis"), labels=3),
        _glue("mrpc", metrics=("accuracy", "f1")),
        _glue("qnli", inputs=("question", "sentence")),
        _glue("qqp", inputs=("question1", "question2"), metrics=("accuracy", "f1")),
        _glue("rte"),
        _glue("stsb", labels=1, metrics=("pearson", "spearman")),
    )
}  # fmt: skip


def find_tasks(names: Sequence[str], training_sets: bool = True) -> list[Task]:
    """The tasks of these names, in upper or lower case. A family's name stands for its tasks that are evaluated.

    Args:
        names (`Sequence[str]`): Names of tasks and families.
        training_sets (`bool`): Whether the names of sets to train on are allowed.

    Raises:
        ValueError: when there is no task of a name, or when it is a set to train on and these are not allowed.
    """
    found: dict[str, Task] = {}
    by_name = {name.lower(): task for name, task in TASKS.items()}
    for name in names:
        family = [task for task in TASKS.values() if task.family == name.lower() and not task.training_set]
        if not family and name.lower() not in by_name:
            raise ValueError(f"There is no task {name!r}. {describe_tasks()}")
        for task in family or [by_name[name.lower()]]:
            if task.training_set and not training_sets:
                tasks = (
                    other.name for other in TASKS.values() if other.family == task.family and not other.training_set
                )
                raise ValueError(
                    f"{task.name} is a set to train on. Evaluate on {', '.join(tasks)}, or all: {task.family}."
                )
            found[task.name] = task
    return list(found.values())


def describe_tasks() -> str:
    """A sentence with the names of all tasks, by family."""
    families: dict[str, list[str]] = {}
    for task in TASKS.values():
        families.setdefault(task.family, []).append(task.name)
    return "There are " + "; ".join(f"{family}: {', '.join(names)}" for family, names in families.items()) + "."


def _number(text: str) -> float | None:
    """The number that a text is, thousands separators allowed. None: it is none."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None
