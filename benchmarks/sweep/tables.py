"""Tables of results: the mean over seeds of each setting, with its interval. This module knows numbers only."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import mean, stdev
from typing import Any

from .grids import Grid
from .records import Records
from .settings import Run


CONFIDENCE = 0.95


def half_width(values: list[float]) -> float | None:
    """Half the width of the mean's 95 % interval by Student's t. None for a single value, which says nothing of it.

    Args:
        values (`list[float]`): One number for each seed.
    """
    if len(values) < 2:
        return None
    from scipy.stats import t

    quantile = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return quantile * stdev(values) / math.sqrt(len(values))


def results(grid: Grid, kept: Records) -> list[tuple[Run, list[dict[str, Any]]]]:
    """Each run of a grid, with the records of all its seeds. Runs without any are left out."""
    seeds = sorted({int(record["settings"]["seed"]) for record in kept if "seed" in record["settings"]})
    found = []
    for run in grid.runs:
        of_seeds = {one.key: one for one in (replace(run, seed=seed) for seed in seeds or [run.seed])}
        records = [record for one in of_seeds.values() if (record := kept.find(one)) is not None]
        if records:
            found.append((run, records))
    return found


def varied(runs: list[Run]) -> list[str]:
    """The settings in which the runs that have them differ, the method and the seed apart."""
    described = [run.described() for run in runs]
    names = list(dict.fromkeys(name for one in described for name in one))
    fixed = ("method", "seed")
    return [
        name for name in names if name not in fixed and len({repr(one[name]) for one in described if name in one}) > 1
    ]


def table(grid: Grid, kept: Records) -> tuple[list[str], list[list[str]]]:
    """Columns and lines: for each run its method and what varies, then mean and interval, each seed, and the cost."""
    rows = results(grid, kept)
    names = varied([run for run, _ in rows])
    lines = []
    for run, records in rows:
        settings = run.described()
        scores = [100 * record["score"] for record in records]
        half = half_width(scores)
        lines.append(
            [run.method]
            + [written(settings.get(name)) for name in names]
            + [
                f"{mean(scores):.1f}" + (f" ± {half:.1f}" if half is not None else ""),
                ", ".join(f"{score:.1f}" for score in scores),
                f"{records[0]['trained']:,}",
                f"{mean(record['cpu_seconds'] for record in records):.0f}",
            ]
        )
    metrics = ", ".join(dict.fromkeys(records[0]["metric"] for _, records in rows))
    return ["method", *names, f"{metrics}, % (mean, 95 %)", "each seed", "trained", "CPU s"], lines


def written(value: Any) -> str:
    """A setting as a table shows it. Empty where the method does not have it."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:g}"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
