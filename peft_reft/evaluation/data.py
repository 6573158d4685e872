"""Reads the rows of a task, from a folder or from the Hub. `Task.read` knows the fields of its rows."""

from __future__ import annotations

import csv
import json
import random
import sys
from pathlib import Path
from typing import Any

from ..tools.formats import read_rows
from .extras import needs_extra
from .tasks import Glue, Row, Task


SUFFIXES = ("json", "jsonl", "tsv")
DEV = ("validation", "dev")


def read_examples(
    task: Task,
    split: str | None = None,
    data_dir: Path | None = None,
    hub: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
) -> list[Row]:
    """The rows of a task.

    In a folder, and in the folder of the task's family in it, the files looked for are `{name}.{split}` and
    `{name}/{split}`, and, for training sets and alpaca_eval, `{name}`. They end in .json (a list, or JSON lines),
    .jsonl or .tsv (CoLA and SST-2). `validation` and `dev` are the same split.

    Args:
        task (`Task`): The task.
        split (`str`, *optional*): The split. None: `"train"` of a training set, else the split that the task is
            evaluated on.
        data_dir (`Path`, *optional*): The folder.
        hub (`str`, *optional*): A dataset's name on the Hub, or a folder that `datasets` reads. Without it and without
            a folder, the official dataset, where there is one.
        limit (`int`, *optional*): How many rows to take at most. None: all.
        seed (`int`, *optional*): Seed of the random sample that `limit` takes, which keeps the order of the file.
            None: the first rows are taken.

    Returns:
        `list[dict]`: The rows, as `task.read` makes them.

    Raises:
        ValueError: when there is no such file, naming the paths looked for, when the Hub's dataset can't be loaded, or
            when a row lacks a field.
    """
    if data_dir is not None and hub is not None:
        raise ValueError("Rows come from a folder or from the Hub. Give one of --data-dir and --hub.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: take at least one row, or leave it out for all of them.")
    split = split or ("train" if task.training_set else task.default_split)
    if data_dir is not None:
        path = _find(task, split, data_dir)
        where, raw = str(path), _read_file(task, path)
    else:
        where, raw = _read_hub(task, split, hub)
    if not raw:
        raise ValueError(f"{where} has no rows.")
    rows = []
    for number, one in enumerate(raw, 1):
        try:
            rows.append(task.read(one))
        except KeyError as error:
            has = ", ".join(one)
            raise ValueError(
                f"{where}, row {number}: {task.name} reads the field {error}, and the row has {has}."
            ) from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}, row {number}: {error}.") from error
    if limit is None or limit >= len(rows):
        return rows
    if seed is None:
        return rows[:limit]
    return [rows[index] for index in sorted(random.Random(seed).sample(range(len(rows)), limit))]


def _find(task: Task, split: str, data_dir: Path) -> Path:
    """The file of a task and split in a folder."""
    if not data_dir.is_dir():
        raise ValueError(f"--data-dir {data_dir} is no folder.")
    stems = [
        stem for name in (DEV if split in DEV else (split,)) for stem in (f"{task.name}.{name}", f"{task.name}/{name}")
    ]
    if task.single_file and split == ("train" if task.training_set else task.default_split):
        stems.append(task.name)
    paths = [
        folder / f"{stem}.{suffix}"
        for folder in (data_dir, data_dir / task.family)
        for stem in stems
        for suffix in SUFFIXES
    ]
    for path in paths:
        if path.is_file():
            return path
    looked = "\n  ".join(
        f"{folder / stem}.{{{','.join(SUFFIXES)}}}" for folder in (data_dir, data_dir / task.family) for stem in stems
    )
    raise ValueError(f"There is no file of {task.name}, split {split!r}. Looked for:\n  {looked}")


def _read_file(task: Task, path: Path) -> list[Row]:
    if path.suffix == ".tsv":
        return _read_tsv(task, path)
    try:
        rows = list(read_rows(path, sys.maxsize))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number} is {row!r:.60}, not an object with fields.")
    return rows


def _read_tsv(task: Task, path: Path) -> list[Row]:
    """A table of CoLA (source, label, the author's mark, sentence), or of SST-2 (sentence, label)."""
    columns = {"cola": (4, 3, 1), "sst2": (2, 0, 1)}.get(task.name)
    if columns is None:
        raise ValueError(
            f"{path}: tables are read for cola and sst2 only. Give {task.name} as JSON, or take it from the Hub."
        )
    count, text, label = columns
    rows = []
    with path.open(encoding="utf-8", newline="") as file:
        for number, cells in enumerate(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE), 1):
            if not cells or (number == 1 and "label" in cells):
                continue
            if len(cells) != count or cells[label] not in ("0", "1"):
                raise ValueError(
                    f"{path}, line {number}: {task.name} has {count} columns, of which column {label + 1} is a label, "
                    f"0 or 1. Given: {cells}"
                )
            rows.append({"sentence": cells[text], "label": int(cells[label])})
    return rows


def _read_hub(task: Task, split: str, hub: str | None) -> tuple[str, list[Row]]:
    """The dataset in words, for messages, and its rows."""
    name = hub or task.hub
    if name is None:
        raise ValueError(
            f"Where are the rows of {task.name}? There is no official dataset of its rows on the Hub. Give "
            "--data-dir, a folder of LLM-Adapters' files for example, or --hub, the name of a dataset."
        )
    with needs_extra("Reading from the Hub"):
        from datasets import load_dataset
    if isinstance(task, Glue) and split in DEV:
        split = "validation_matched" if task.name == "mnli" else "validation"
    where = ", ".join(filter(None, (name, task.configuration, split)))
    try:
        loaded: Any = load_dataset(name, task.configuration, split=split)
    except Exception as error:  # `datasets` raises many kinds: for no network, no such name, no such split
        raise ValueError(f"{task.name} can't be read from the Hub ({where}): {error}") from error
    return where, list(loaded)
