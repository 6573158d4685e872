"""The grids: which runs answer which question. `python -m benchmarks sweep GRID` makes the runs of one.

Add a grid by adding an entry to `GRIDS`. Runs that several grids have are made once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from .settings import METHODS, Run


# What a run has where its grid does not say otherwise, by task, then by task and method.
TASK_SETTINGS: dict[str, dict[str, Any]] = {
    "sst2": {"examples": 1000, "epochs": 4},
    "cola": {"examples": 2000, "epochs": 4},
    "sst2-token": {"examples": 512, "epochs": 1},
    "style": {"examples": 12, "epochs": 10},
    "mawps": {"examples": 200, "epochs": 1},
}
ENCODER: dict[str, dict[str, Any]] = {
    "loreft": {"rate": 3e-3, "rank": 4, "positions": "all"},
    "lora": {"rate": 3e-3, "rank": 8},
    "head": {"rate": 3e-3},
    "full": {"rate": 1e-4},
}
DECODER: dict[str, dict[str, Any]] = {
    "loreft": {"rate": 1e-3, "rank": 8, "positions": "f7+l7"},
    "lora": {"rate": 1e-3, "rank": 8},
    "full": {"rate": 2e-5},
}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "sst2": ENCODER, "cola": ENCODER, "sst2-token": DECODER, "style": DECODER, "mawps": DECODER,
}  # fmt: skip


def runs(task: str, method: str, **given: Any) -> list[Run]:
    """The runs of a method on a task, seeds apart: every combination of the settings given as lists."""
    usual = SETTINGS[task].get(method, SETTINGS[task]["loreft"] if method in METHODS[4:] else {})
    settings = {**TASK_SETTINGS[task], **usual, **given}
    lists = {name: value if isinstance(value, list) else [value] for name, value in settings.items()}
    return [Run(task, method, **dict(zip(lists, values))) for values in product(*lists.values())]


@dataclass(frozen=True)
class Grid:
    """Runs that answer a question.

    Args:
        question (`str`): The question.
        runs (`list[Run]`): Its runs, the most important first. Each is made with every seed.
        plot (`str`, *optional*): The setting along the plot's axis. None: no plot.
    """

    question: str
    runs: list[Run]
    plot: str | None = None
    seeds: tuple[int, ...] = field(default=(1, 2, 3))


RATES = [2e-4, 1e-3, 4e-3]

GRIDS: dict[str, Grid] = {
    "sink": Grid(
        "What breaks high rates of a decoder: the first token, whose state is a hundred times longer than others?",
        [
            *runs("sst2-token", "loreft", rate=4e-3, positions="f7+l7", first_token=[True, False]),
            *runs("sst2-token", "loreft", rate=4e-3, positions=["l7", "f1"]),
            *runs("sst2-token", "loreft", rate=1e-3, positions="f7+l7"),
            *runs("sst2-token", "lora", rate=1e-3),
            *runs("sst2-token", "loreft", rate=4e-3, positions="f7+l7", rank=1),
            *runs("sst2-token", "loreft", rate=4e-3, positions="f7+l7", layers="every 5th"),
            *runs("sst2-token", "lora", rate=4e-3),
            *runs("sst2-token", "loreft", rate=1e-3, positions="f7+l7", first_token=False),
            *runs("sst2-token", "loreft", rate=1e-3, positions=["l7", "f1"]),
            *runs("sst2-token", "loreft", rate=2e-4, positions=["f7+l7", "l7"]),
            *runs("sst2-token", "lora", rate=2e-4),
        ],
        plot="rate",
    ),
    "methods": Grid(
        "How far are floor, ceiling, LoRA and LoReFT apart?",
        [
            *runs("sst2", "lora"),
            *runs("sst2", "loreft", positions=["all", "f3"]),
            *runs("sst2", "head"),
            *runs("sst2", "full"),
        ],
    ),
    "cola": Grid(
        "The same on a task that is harder to learn",
        [
            *runs("cola", "lora"),
            *runs("cola", "loreft", positions=["all", "f3"]),
            *runs("cola", "head"),
            *runs("cola", "full"),
        ],
    ),
    "positions": Grid(
        "How much comes from the choice of positions alone?",
        runs("sst2", "loreft", positions=["all", "f3", "l1", "f3+l3", "f1", "f7+l7"]),
        plot="positions",
    ),
    "learning_rate": Grid(
        "Which learning rate?",
        [
            *runs("sst2", "loreft", rate=[3e-3, 1e-3, 1e-2, 3e-4], positions="all"),
            *runs("sst2", "loreft", rate=[3e-3, 1e-3, 1e-2, 3e-4], positions="f3"),
            *runs("sst2", "lora", rate=[3e-3, 1e-3, 1e-2, 3e-4]),
        ],
        plot="rate",
    ),
    "layers": Grid(
        "How much comes from the choice of layers alone?",
        runs("sst2", "loreft", layers=["all", "every 2nd", "every 3rd", "last", "middle", "first", "upper half"]),
        plot="layers",
    ),
    "rank": Grid(
        "Which rank?",
        [*runs("sst2", "loreft", rank=[4, 1, 16, 2, 8]), *runs("sst2", "lora", rank=[8, 1, 4, 2, 16])],
        plot="rank",
    ),
    "weight_decay": Grid(
        "What does weight decay do?",
        [
            *runs("sst2", "loreft", weight_decay=[0.0, 0.1, 1.0]),
            *runs("sst2", "lora", weight_decay=[0.0, 0.1, 1.0]),
        ],
        plot="weight_decay",
    ),
    "shared": Grid(
        "One set of weights for first and last tokens, or two?",
        runs("sst2", "loreft", positions="f3+l3", share_weights=[False, True]),
    ),
    "init": Grid("Start at the base, or at random as pyreft does?", runs("sst2", "loreft", init=["base", "pyreft"])),
    "dropout": Grid(
        "Does dropout help?",
        [*runs("sst2", "loreft", dropout=[0.0, 0.05, 0.2]), *runs("sst2", "lora", dropout=[0.0, 0.05, 0.2])],
        plot="dropout",
    ),
    "edits": Grid(
        "Which edit?",
        [
            run
            for edit in ("loreft", "nodireft", "noreft", "direft", "consreft", "lobireft")
            for run in runs("sst2", edit)
        ],
    ),
    "examples": Grid(
        "Who wins with few examples?",
        [
            run
            for examples, epochs in ((1000, 4), (100, 20), (300, 8), (30, 30))
            for method in ("loreft", "lora")
            for run in runs("sst2", method, examples=examples, epochs=epochs)
        ],
        plot="examples",
    ),
    "table": Grid(
        "The starting table of docs/choosing.md, on tasks that it was not made from",
        [
            *runs("style", "loreft", rank=4, layers="every 5th", rate=[1e-3, 4e-3]),
            *runs("cola", "loreft"),
            *runs("cola", "lora"),
            *runs("style", "lora"),
            *runs("style", "base"),
        ],
    ),
    "style": Grid(
        "A new style of answer from a dozen examples: which rate?",
        [*runs("style", "loreft", rate=RATES), *runs("style", "lora", rate=RATES)],
        plot="rate",
    ),
    "arithmetic": Grid(
        "Worked word problems from 200 examples",
        [*runs("mawps", "loreft"), *runs("mawps", "lora"), *runs("mawps", "base")],
    ),
}


def planned(names: list[str], seeds: list[int] | None = None) -> list[Run]:
    """The runs of grids with their seeds, each once: the first seed of all runs of a grid, then the second."""
    found: dict[str, Run] = {}
    for name in names:
        grid = GRIDS[name]
        for seed in seeds or grid.seeds:
            for run in grid.runs:
                one = replace(run, seed=seed)
                found.setdefault(one.key, one)
    return list(found.values())
