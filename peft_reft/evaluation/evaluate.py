"""Runs every task with every model and puts the results into a report. Base and adapters see the same examples."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..tuner.versions import installed
from .classify import classify
from .generate import encode_prompts, generate_answers
from .models import Adapter, Generators, load_classifier, load_tokenizer, with_head
from .report import BASE, means, write_json, write_lines
from .scores import accuracy, score
from .tasks import GenerationTask, Glue, Row, Task


@dataclass(frozen=True)
class Settings:
    """How to evaluate.

    Args:
        base (`str`): The base's folder or hub name.
        with_base (`bool`): Whether the base by itself is evaluated too.
        batch_size (`int`): How many examples at once.
        max_new_tokens (`int`, *optional*): How many tokens an answer may have. None: as many as the task allows.
        dtype (`str`): The dtype that the base is loaded in: `"auto"` for that of its checkpoint, `"float32"`,
            `"bfloat16"`.
        seed (`int`): Seed of the bootstrap samples behind confidence intervals.
        outputs (`Path`, *optional*): A folder for every prompt and its output. None: outputs are not written.
    """

    base: str
    with_base: bool = True
    batch_size: int = 16
    max_new_tokens: int | None = None
    dtype: str = "auto"
    seed: int = 42
    outputs: Path | None = None


def evaluate(
    settings: Settings, examples: Sequence[tuple[Task, list[Row]]], adapters: Sequence[Adapter]
) -> dict[str, Any]:
    """Evaluate a base and adapters on it.

    Args:
        settings (`Settings`): How to evaluate.
        examples (`Sequence[tuple[Task, list[dict]]]`): The tasks, each with its rows.
        adapters (`Sequence[Adapter]`): The adapters, of any PEFT method.

    Returns:
        `dict`: The report, with the fields that docs/evaluation.md lists.

    Raises:
        ValueError: when there is nothing to evaluate, or when an adapter does not fit the base.
    """
    if not adapters and not settings.with_base:
        raise ValueError("There is nothing to evaluate: --no-base, and no --adapter. Give one of them.")
    if settings.batch_size < 1:
        raise ValueError(f"batch_size={settings.batch_size}: take at least one example at once.")
    tokenizer = load_tokenizer(settings.base)
    run = _Run(settings, tokenizer)
    generation = [(task, rows) for task, rows in examples if isinstance(task, GenerationTask)]
    glue = [(task, rows) for task, rows in examples if isinstance(task, Glue)]
    if generation:
        generators = Generators(settings.base, tokenizer, settings.dtype)
        run.note_base(generators.base)
        if settings.with_base:
            for task, rows in generation:
                run.generate(task, rows, generators.base, BASE)
        for adapter in adapters:
            with generators.on_base(adapter) as model:
                for task, rows in generation:
                    run.generate(task, rows, model, adapter.name)
        del generators
    models: list[Adapter | None] = [None, *adapters] if settings.with_base else list(adapters)
    for glue_task, rows in glue:
        for one in models:
            model, missing = load_classifier(settings.base, tokenizer, glue_task, settings.dtype)
            run.note_base(model)
            if one is not None:
                model, missing = with_head(model, missing, one, glue_task)
            run.classify(glue_task, rows, model, BASE if one is None else one.name, missing)
    return run.report(adapters)


class _Run:
    """One evaluation: the results so far, each task with each model."""

    def __init__(self, settings: Settings, tokenizer: Any) -> None:
        self.settings, self.tokenizer = settings, tokenizer
        self.results: list[dict[str, Any]] = []
        self.base: dict[str, Any] = {}

    def note_base(self, model: Any) -> None:
        """Note size, dtype and device of the base. Called before an adapter is put on it."""
        self.base = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
        }

    def generate(self, task: GenerationTask, rows: list[Row], model: Any, name: str) -> None:
        """Have a model answer a task's prompts, and score the answers."""
        started = time.perf_counter()
        config = model.generation_config
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        allowed = self.settings.max_new_tokens or task.max_new_tokens
        prompts = [task.prompt(row) for row in rows]
        encoded = encode_prompts(self.tokenizer, prompts, allowed, context)
        with _progress(f"{task.name}, {name}", len(rows)) as done:
            outputs = generate_answers(model, self.tokenizer, encoded, self.settings.batch_size, done)
        extracted = [task.extract(output, row["answer"]) for output, row in zip(outputs, rows)]
        correct = [task.is_correct(one, row["answer"]) for one, row in zip(extracted, rows)]
        self._add(
            task, name, rows, started,
            scores={"accuracy": accuracy(correct).as_dict()} if task.scored else {},
            unanswered=extracted.count(None),
            generation={
                "do_sample": False, "num_beams": 1, "max_new_tokens": allowed, "eos_token_id": config.eos_token_id,
                "pad_token_id": config.pad_token_id, "padding_side": "left",
            },
            note=None if task.scored else "outputs only",
        )  # fmt: skip
        if not task.scored:
            lists = [
                {"instruction": row["instruction"], "output": output, "generator": name, "dataset": row["dataset"]}
                for row, output in zip(rows, outputs)
            ]
            if self.settings.outputs is not None:
                write_json(lists, self.settings.outputs / f"{task.name}.{name}.json")
            return
        self._write(
            task, name,
            (
                {"prompt": prompt, "output": output, "extracted": one, "answer": row["answer"], "correct": right}
                for prompt, output, one, row, right in zip(prompts, outputs, extracted, rows, correct)
            ),
        )  # fmt: skip

    def classify(self, task: Glue, rows: list[Row], model: Any, name: str, missing: list[str]) -> None:
        """Have a classifier predict the classes of a task's rows, and score them. `missing`: untrained weights."""
        started = time.perf_counter()
        if missing:
            self._add(task, name, rows, started, scores={}, note="untrained head", untrained=missing)
            return
        texts = [tuple(row[field] for field in task.inputs) for row in rows]
        with _progress(f"{task.name}, {name}", len(rows)) as done:
            predicted, cut = classify(model, self.tokenizer, texts, self.settings.batch_size, done)
        labels = [row["label"] for row in rows]
        scores = {metric: score(metric, predicted, labels, self.settings.seed).as_dict() for metric in task.metrics}
        self._add(task, name, rows, started, scores=scores, cut_off=cut, note=None)
        self._write(
            task, name,
            (
                {
                    "prompt": list(text), "output": one, "extracted": one, "answer": label,
                    "correct": one == label if task.labels > 1 else None,
                }
                for text, one, label in zip(texts, predicted, labels)
            ),
        )  # fmt: skip

    def _add(self, task: Task, name: str, rows: list[Row], started: float, **fields: Any) -> None:
        """Add a result. Fields that are None are left out."""
        seconds = round(time.perf_counter() - started, 2)
        entry = {"task": task.name, "model": name, "examples": len(rows), **fields, "seconds": seconds}
        self.results.append({key: value for key, value in entry.items() if value is not None})

    def _write(self, task: Task, name: str, rows: Iterator[dict[str, Any]]) -> None:
        if self.settings.outputs is not None:
            write_lines(rows, self.settings.outputs / f"{task.name}.{name}.jsonl")

    def report(self, adapters: Sequence[Adapter]) -> dict[str, Any]:
        """The report: settings, versions, models and results."""
        settings = self.settings
        size = self.base.get("parameters")
        models: dict[str, Any] = {}
        if settings.with_base:
            models[BASE] = {"parameters": size, "share": None, "bytes": None}
        for adapter in adapters:
            models[adapter.name] = {
                "adapter": adapter.path,
                "method": adapter.method,
                "parameters": adapter.parameters,
                "share": adapter.parameters / size if size else None,
                "bytes": adapter.size,
            }
        return {
            "base": settings.base,
            "dtype": self.base.get("dtype"),
            "device": self.base.get("device"),
            "batch_size": settings.batch_size,
            "seed": settings.seed,
            "versions": {
                "peft_reft": installed("peft-reft"),
                "peft": peft.__version__,
                "transformers": transformers.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "models": models,
            "results": self.results,
            "means": means(self.results),
        }


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, and the function that moves it on."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(title, total=total)
        yield lambda count: progress.advance(bar, count)
