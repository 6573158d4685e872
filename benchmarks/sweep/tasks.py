"""The tasks: how their examples become batches, and how a model is scored.

Each example is tokenized once, before training. A task knows tokens, batches and scores, and nothing of methods.

Dimensions: B rows of the batch, S tokens of a row.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from peft_reft.evaluation import TASKS as PAPER_TASKS
from peft_reft.evaluation import read_examples, score


IGNORED = -100  # the label of a token that is not trained on
Example = dict[str, Any]
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Places:
    """Where models and data are.

    Args:
        data (`Path`): The folder with the tasks' files.
        base, encoder (`str`): Folders or hub names of the language model and of the encoder.
    """

    data: Path
    base: str
    encoder: str


@dataclass(frozen=True)
class SweepTask:
    """A task of the sweep.

    Args:
        source (`str`): The task of `peft_reft.evaluation` that the rows come from.
        test (`int`): The number of test examples, the first ones of a sample that is the same for every run.
        batch (`int`): Rows of a training batch.
        metric (`str`): What is measured.
        seconds (`float`): What a run takes, roughly, on one core, until there are records to tell.
    """

    source: str
    test: int
    batch: int
    metric: str
    seconds: float

    task_type: ClassVar[str]

    def load_model(self, places: Places) -> Any:
        """The base, in float32."""
        return AutoModelForCausalLM.from_pretrained(places.base, dtype=torch.float32)

    def load_tokenizer(self, places: Places) -> Any:
        """The tokenizer. It pads on the left, where prompts are answered."""
        return AutoTokenizer.from_pretrained(places.base, padding_side="left")

    def examples(self, split: str, places: Places, tokenizer: Any) -> list[Example]:
        """The encoded examples of a split, `"train"` or `"test"`, all of them."""
        raise NotImplementedError

    def batch_of(self, examples: Sequence[Example], tokenizer: Any) -> Batch:
        """The tensors of a training batch."""
        raise NotImplementedError

    def loss(self, model: Any, batch: Batch, told: Batch) -> Tensor:
        """The training loss of a batch. `told`: what ReFT is told of its prompts."""
        return model(**batch, **told).loss

    def prompt_lengths(self, batch: Batch) -> Tensor | None:
        """int64 [B], the tokens of each prompt. None: all real tokens, as for an encoder."""
        return None

    def score(self, model: Any, batches: Iterator[tuple[list[Example], Batch, Batch]], tokenizer: Any) -> float:
        """The metric on test batches: their examples, their tensors, and what ReFT is told of them."""
        raise NotImplementedError


@dataclass(frozen=True)
class Classified(SweepTask):
    """A sentence, classified by an encoder at its first token, with a new classifier.

    Args:
        longest (`int`): The most tokens that a training sentence has. Longer ones are left out: runs stay short.
    """

    longest: int = 24
    task_type: ClassVar[str] = "SEQ_CLS"

    def load_model(self, places: Places) -> Any:
        return AutoModelForSequenceClassification.from_pretrained(places.encoder, num_labels=2, dtype=torch.float32)

    def load_tokenizer(self, places: Places) -> Any:
        return AutoTokenizer.from_pretrained(places.encoder)

    def examples(self, split: str, places: Places, tokenizer: Any) -> list[Example]:
        rows = read_rows_of(self.source, split, places)
        encoded = tokenizer([row["sentence"] for row in rows], truncation=True, max_length=64)["input_ids"]
        found = [{"input_ids": ids, "label": row["label"]} for ids, row in zip(encoded, rows)]
        return [one for one in found if split == "test" or len(one["input_ids"]) <= self.longest]

    def batch_of(self, examples: Sequence[Example], tokenizer: Any) -> Batch:
        padded = tokenizer.pad([{"input_ids": one["input_ids"]} for one in examples], return_tensors="pt")
        return {**padded, "labels": torch.tensor([one["label"] for one in examples])}

    def score(self, model: Any, batches: Iterator[tuple[list[Example], Batch, Batch]], tokenizer: Any) -> float:
        given: list[int] = []
        labels: list[int] = []
        for examples, batch, told in batches:
            given += model(**batch, **told).logits.argmax(-1).tolist()
            labels += [one["label"] for one in examples]
        return score(self.metric, given, labels).value or 0.0  # undefined where all answers are the same


@dataclass(frozen=True)
class OneToken(SweepTask):
    """A prompt that a language model answers by one token. A row is the prompt alone: its last logits are trained, so
    the output layer is not run on the other tokens. An answer is right where no token of the vocabulary is likelier.

    Args:
        template (`str`): The prompt, with `{sentence}`.
        answers (`tuple[str, str]`): The answers of the classes, one token each.
        longest (`int`): The most tokens that a prompt has. Longer ones are left out of both splits.
    """

    template: str = ""
    answers: tuple[str, str] = ("", "")
    longest: int = 28
    task_type: ClassVar[str] = "CAUSAL_LM"

    def examples(self, split: str, places: Places, tokenizer: Any) -> list[Example]:
        tokens = [tokenizer(answer)["input_ids"] for answer in self.answers]
        if any(len(ids) != 1 for ids in tokens):
            raise ValueError(f"{self.answers} are not one token each: {tokens}.")
        rows = read_rows_of(self.source, split, places)
        encoded = tokenizer([self.template.format(sentence=row["sentence"]) for row in rows])["input_ids"]
        found = [{"input_ids": ids, "answer": tokens[row["label"]][0]} for ids, row in zip(encoded, rows)]
        return [one for one in found if len(one["input_ids"]) <= self.longest]

    def batch_of(self, examples: Sequence[Example], tokenizer: Any) -> Batch:
        padded = tokenizer.pad([{"input_ids": one["input_ids"]} for one in examples], return_tensors="pt")
        return {**padded, "answers": torch.tensor([one["answer"] for one in examples])}

    def prompt_lengths(self, batch: Batch) -> Tensor:
        return batch["attention_mask"].sum(1)

    def loss(self, model: Any, batch: Batch, told: Batch) -> Tensor:
        return torch.nn.functional.cross_entropy(self._last_logits(model, batch, told), batch["answers"])

    def score(self, model: Any, batches: Iterator[tuple[list[Example], Batch, Batch]], tokenizer: Any) -> float:
        right = [self._last_logits(model, batch, told).argmax(-1) == batch["answers"] for _, batch, told in batches]
        return torch.cat(right).float().mean().item()

    def _last_logits(self, model: Any, batch: Batch, told: Batch) -> Tensor:
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        return model(**inputs, **told, use_cache=False, logits_to_keep=1).logits[:, -1]


@dataclass(frozen=True)
class Written(SweepTask):
    """A prompt that a language model answers in words. `score` generates, greedily.

    Args:
        max_new_tokens (`int`): How many tokens an answer may have.
    """

    max_new_tokens: int = 64
    task_type: ClassVar[str] = "CAUSAL_LM"

    def is_right(self, output: str, example: Example) -> bool:
        """Whether an answer is right."""
        raise NotImplementedError

    def batch_of(self, examples: Sequence[Example], tokenizer: Any) -> Batch:
        # Test examples have no answer: their rows are the prompts.
        rows = [one["prompt"] + one.get("answer", []) for one in examples]
        batch = tokenizer.pad([{"input_ids": ids} for ids in rows], return_tensors="pt")
        labels = batch["input_ids"].clone()
        for index, one in enumerate(examples):
            labels[index, : labels.shape[1] - len(one.get("answer", []))] = IGNORED
        return {**batch, "labels": labels}

    def prompt_lengths(self, batch: Batch) -> Tensor:
        return batch["attention_mask"].sum(1) - (batch["labels"] != IGNORED).sum(1)

    def score(self, model: Any, batches: Iterator[tuple[list[Example], Batch, Batch]], tokenizer: Any) -> float:
        right = 0
        count = 0
        for examples, batch, told in batches:
            inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], **told}
            made = model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
            texts = tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            right += sum(self.is_right(text, one) for text, one in zip(texts, examples))
            count += len(examples)
        return right / count

    def encoded(self, tokenizer: Any, prompt: str, answer: str | None) -> Example:
        """A prompt as the chat template has it, and for training the answer with the token that ends it."""
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = {"prompt": tokenizer(text)["input_ids"]}
        return ids if answer is None else ids | {"answer": tokenizer(answer + tokenizer.eos_token)["input_ids"]}


@dataclass(frozen=True)
class Style(Written):
    """The quickstart's new manner of speaking, by its dozen examples. An answer to a question that was not among them
    is right where it has both marks of the manner."""

    OPENING: ClassVar[str] = "Captain's log:"
    CLOSING: ClassVar[str] = "Steady as she goes."

    def examples(self, split: str, places: Places, tokenizer: Any) -> list[Example]:
        if split == "test":
            return [self.encoded(tokenizer, question, None) for question in QUESTIONS]
        lines = (EXAMPLES / "quickstart.jsonl").read_text(encoding="utf-8").splitlines()
        chats = [[message["content"] for message in json.loads(line)["messages"]] for line in lines]
        return [self.encoded(tokenizer, prompt, answer) for prompt, answer in chats]

    def is_right(self, output: str, example: Example) -> bool:
        return output.strip().startswith(self.OPENING) and output.strip().endswith(self.CLOSING)


@dataclass(frozen=True)
class WordProblems(Written):
    """Worked word problems, trained on LLM-Adapters' math_data. An answer is right by its last number."""

    def examples(self, split: str, places: Places, tokenizer: Any) -> list[Example]:
        task = PAPER_TASKS[self.source if split == "test" else "math_data"]
        rows = read_examples(task, data_dir=places.data)
        if split == "test":
            return [self.encoded(tokenizer, row["instruction"], None) | {"number": row["answer"]} for row in rows]
        found = [self.encoded(tokenizer, row["instruction"], row["output"].strip()) for row in rows]
        return [one for one in found if len(one["prompt"]) + len(one["answer"]) <= 160]

    def is_right(self, output: str, example: Example) -> bool:
        task: Any = PAPER_TASKS[self.source]
        return task.is_correct(task.extract(output, example["number"]), example["number"])


EXAMPLES = Path(__file__).parents[2] / "examples"
QUESTIONS = (
    "What is the capital of France?", "What is the capital of Spain?", "How do I boil an egg?",
    "Why is the sky blue?", "How many legs does a spider have?", "What do bees make?",
    "Who wrote Hamlet?", "What is the largest ocean?", "How do birds fly?", "Name a fruit that is yellow.",
    "What is two plus three?", "How do I clean a window?", "Why do we sleep?", "What is the opposite of hot?",
    "Give me a tip for saving money.", "What does a baker do?", "What colour is grass?", "How long is a day?",
    "Name an animal that lives in the sea.", "What is water made of?",
)  # fmt: skip
SENTIMENT: dict[str, Any] = {"template": "Review: {sentence}\nSentiment:", "answers": (" negative", " positive")}

TASKS: dict[str, SweepTask] = {
    "sst2": Classified("sst2", test=872, batch=16, metric="accuracy", seconds=60),
    "cola": Classified("cola", test=527, batch=16, metric="matthews", seconds=60),
    "sst2-token": OneToken("sst2", test=256, batch=8, metric="accuracy", seconds=60, **SENTIMENT),
    "style": Style("quickstart", test=20, batch=4, metric="share in style", seconds=60, max_new_tokens=64),
    "mawps": WordProblems("mawps", test=100, batch=8, metric="accuracy", seconds=360, max_new_tokens=96),
}


def read_rows_of(source: str, split: str, places: Places) -> list[Any]:
    """The rows of a task of GLUE. GLUE's test labels are not public: its validation set is what is tested on."""
    return read_examples(PAPER_TASKS[source], "train" if split == "train" else "validation", places.data)


def test_sample(task: SweepTask, examples: list[Example]) -> list[Example]:
    """The test examples: the same for every run."""
    return random.Random(0).sample(examples, min(task.test, len(examples)))
