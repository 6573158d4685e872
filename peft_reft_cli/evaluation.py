"""`peft-reft prepare` and `peft-reft evaluate`: the paper's tasks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Json, check_model, check_tasks, complete_task, describe_tasks, print_json


if TYPE_CHECKING:
    from peft_reft.evaluation.tasks import Task


Names = Annotated[
    list[str],
    typer.Argument(
        help=f"Tasks or families of tasks. {describe_tasks()}", autocompletion=complete_task, callback=check_tasks
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(help="A folder with the tasks' files, such as LLM-Adapters' dataset/ or ft-training_set/."),
]
Hub = Annotated[str | None, typer.Option(help="A dataset on the Hub. Without it and --data-dir: the official one.")]
Limit = Annotated[int | None, typer.Option(min=1, help="How many examples of each task, drawn by --seed.")]
Seed = Annotated[int, typer.Option(help="Of what is drawn by chance: the examples of --limit, and intervals.")]


class Dtype(str, Enum):
    """The dtype that the base is loaded in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


def prepare(
    tasks: Names,
    out: Annotated[Path, typer.Option(help="The file to write: JSON lines with a prompt and a completion.")],
    data_dir: DataDir = None,
    hub: Hub = None,
    split: Annotated[str, typer.Option(help="Which part of each task.")] = "train",
    limit: Limit = None,
    seed: Seed = 42,
    as_json: Json = False,
) -> None:
    """Write the paper's tasks as data to train on.

    The prompts are those that `evaluate` gives.
    """
    from peft_reft.evaluation import find_tasks
    from peft_reft.evaluation.report import write_lines

    found = find_tasks(tasks)
    # All rows are read before the file is written, so that a row that can't be used leaves no half of it.
    count = write_lines(
        [line for task in found for line in _completions(task, split, data_dir, hub, limit, seed)], out
    )
    names = [task.name for task in found]
    if as_json:
        print_json({"file": out, "examples": count, "tasks": names, "split": split})
    else:
        typer.echo(f"{out}: {count} examples of {', '.join(names)}, split {split!r}")


def _completions(
    task: Task, split: str, data_dir: Path | None, hub: str | None, limit: int | None, seed: int
) -> Iterator[dict[str, str]]:
    """Prompt and completion of each row of a task."""
    from peft_reft.evaluation import read_examples
    from peft_reft.evaluation.tasks import GenerationTask

    if not isinstance(task, GenerationTask):
        raise ValueError(
            f"{task.name} is for a classifier, which is trained on its rows as they are: "
            "peft_reft.evaluation.read_examples."
        )
    for number, row in enumerate(read_examples(task, split, data_dir, hub, limit, seed), 1):
        completion = task.completion(row)
        if not completion:
            raise ValueError(
                f"{task.name}, split {split!r}, row {number} has no output to learn from: {row['instruction']!r:.80}. "
                "Train on a set with worked outputs."
            )
        yield {"prompt": task.prompt(row), "completion": completion}


def evaluate(
    tasks: Names,
    base: Annotated[str, typer.Option(help="The base model's folder or hub name.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="An adapter of any of PEFT's kinds, as PATH or NAME=PATH. May be given several times."),
    ] = None,
    data_dir: DataDir = None,
    hub: Hub = None,
    split: Annotated[
        str | None,
        typer.Option(help="Which part of each task. Left out: test; for GLUE validation, which is also called dev."),
    ] = None,
    limit: Limit = None,
    seed: Seed = 42,
    batch_size: Annotated[int, typer.Option(min=1, help="How many examples at once.")] = 16,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="How many tokens an answer may have. Left out: as the paper's set-up has it."),
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="What the base is loaded in: auto (as its checkpoint says), float32 or bfloat16.")
    ] = Dtype.auto,
    out: Annotated[Path | None, typer.Option(help="A JSON file for the results.")] = None,
    outputs: Annotated[Path | None, typer.Option(help="A folder for every prompt and its answer.")] = None,
    with_base: Annotated[
        bool, typer.Option("--base-too/--no-base", help="Whether to evaluate the base by itself too.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Evaluate a base and its adapters, side by side.

    All answer the same examples. The table has a 95 % interval for each score.
    """
    check_model("--base", base)
    for text in adapter or ():
        check_model(
            "--adapter", text if Path(text).exists() else text.partition("=")[2] or text, "adapter_config.json"
        )
    from peft_reft.evaluation import Settings, find_tasks, read_adapters, read_examples
    from peft_reft.evaluation import evaluate as run
    from peft_reft.evaluation.report import print_table, write_json

    found = find_tasks(tasks, training_sets=False)
    examples = [(task, read_examples(task, split, data_dir, hub, limit, seed)) for task in found]
    adapters = read_adapters(adapter or ())
    settings = Settings(base, with_base, batch_size, max_new_tokens, dtype.value, seed, outputs)
    report = {
        "command": ["peft-reft", *sys.argv[1:]],
        "split": {task.name: split or task.default_split for task in found},
        "limit": limit,
        **run(settings, examples, adapters),
    }
    if out is not None:
        write_json(report, out)
    if as_json:
        print_json(report)
    else:
        print_table(report)
